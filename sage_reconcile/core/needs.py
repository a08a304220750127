"""What memory an engine needs on each device, and from what that is known. Blind to what is free.

In this order: what was measured when it last ran on such a device, what its manifest declares, what is computed from
the model's own files, and at last what its name suggests.
"""

import hashlib
from dataclasses import dataclass

from sage_reconcile.core.facts import FootprintFact, ModelFact, ProgramFact
from sage_reconcile.core.footprint import Footprint, by_name, context_bytes, footprint
from sage_reconcile.core.observed import Device, ObservedState
from sage_reconcile.core.quantities import bytes_of
from sage_reconcile.core.runtimes import program_of, runtime_of
from sage_reconcile.core.shape import ModelShape
from sage_reconcile.core.spec import IDENTITY_FIELDS, EngineSpec, canonical_json, written_fields

# What a reader is told of a source whose name does not say it.
SOURCE_WORDS = {"name": "guessed by its name"}

# A fraction is told with so many digits: 0.01% of 80 GiB is 8 MiB.
_FRACTION_DIGITS = 4

# What an engine takes without its cache differs a little from start to start, and one that lacks a block of its cache
# for the longest text does not start (vLLM). What was told too much goes into the cache, so it does not add up.
_LOGGED_SLACK_BYTES = 128 * 1024**2

# Where it runs says nothing about how much it needs.
_NOT_OF_THE_NEED = frozenset({"port", "devices"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What an engine needs of one device."""

    # What it is told to use, where it can be told; else what it is expected to use.
    memory_bytes: int
    # What it takes beyond that.
    context_bytes: int
    # The share of the device that `memory_bytes` is.
    fraction: float
    # measured | declared | computed | name
    source: str

    @property
    def counted_bytes(self) -> int:
        return self.memory_bytes + self.context_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one replica needs: so many devices, and on each what `on` says."""

    count: int
    # Whether the engine is told to keep to it.
    told: bool
    # By UUID.
    claims: tuple[tuple[str, Claim], ...]

    def on(self, uuid: str) -> Claim:
        return dict(self.claims)[uuid]

    @property
    def known_from(self) -> str:
        """From what that is known, in words; it may be measured on one sort of device alone. Empty: not told."""
        sources = sorted({claim.source for _, claim in self.claims} - {"none"})
        return " or ".join(SOURCE_WORDS.get(source, source) for source in sources)


def need_of(spec: EngineSpec, observed: ObservedState) -> Need:
    """What a replica of this engine needs on each of the observed devices."""
    shape = shape_of(spec, observed)
    known = None if shape is None else footprint(shape, runtime_of(spec).serving(spec))
    told = runtime_of(spec).tells(spec, shape)
    return Need(
        count=device_count(spec),
        told=told,
        claims=tuple((device.uuid, _claim(spec, device, observed, known, told)) for device in observed.devices),
    )


def device_count(spec: EngineSpec) -> int:
    """The devices that one replica takes."""
    return spec.tensor_parallel * spec.pipeline_parallel


def program_fact(spec: EngineSpec, observed: ObservedState) -> ProgramFact | None:
    """What was found of its program; None where nobody looked."""
    name = program_of(spec)
    return next((fact for fact in observed.programs if fact.name == name), None)


def model_fact(spec: EngineSpec, observed: ObservedState) -> ModelFact | None:
    """What was found of its model; None where nobody looked."""
    return next((fact for fact in observed.models if fact.model == spec.model), None)


def shape_of(spec: EngineSpec, observed: ObservedState) -> ModelShape | None:
    """The shape of its model; None where that is not known."""
    fact = model_fact(spec, observed)
    return None if fact is None else fact.shape


def why_no_shape(spec: EngineSpec, observed: ObservedState) -> str:
    """Why the shape of its model is not known; empty when it is."""
    fact = model_fact(spec, observed)
    return "nobody looked at the model" if fact is None else fact.shape_why


def footprint_key(spec: EngineSpec, *, told: bool) -> str:
    """A digest of all in a spec that its memory depends on: of one that is not told, not on what is written of it."""
    left_out = _NOT_OF_THE_NEED if told else _NOT_OF_THE_NEED | {"gpu_memory"}
    fields = {
        name: value for name, value in written_fields(spec).items() if name in IDENTITY_FIELDS and name not in left_out
    }
    return hashlib.sha256(canonical_json(fields).encode()).hexdigest()[:16]


def measured(spec: EngineSpec, device_name: str, observed: ObservedState) -> FootprintFact | None:
    """What such an engine was seen to take of a device of that name with today's program; None: it never was seen."""
    program = program_fact(spec, observed)
    version = "" if program is None else program.version
    key = footprint_key(spec, told=runtime_of(spec).tells(spec, shape_of(spec, observed)))
    # Projects keep their measurements apart, so there may be several.
    facts = [
        fact
        for fact in observed.footprints
        if (fact.key, fact.device_name, fact.version) == (key, device_name, version)
    ]
    return max(facts, key=lambda fact: fact.size, default=None)


def _claim(spec: EngineSpec, device: Device, observed: ObservedState, known: Footprint | None, told: bool) -> Claim:
    """1. What it was measured to take. 2. What it should be told, or expected to use. 3. What it takes beyond.

    An engine that fills what it is told is measured by what it needs without its cache, and by what it takes beyond:
    were the whole taken for its need, it would be told more each time.
    """
    runtime = runtime_of(spec)
    seen = measured(spec, device.name, observed)
    context = context_bytes(device_count(spec)) if runtime.budgeted else 0
    # (1)
    needs_what_it_takes = not told or (spec.gpu_memory == "auto" and not runtime.fills)
    if seen is not None and needs_what_it_takes:
        return _share(seen.peak_bytes, 0, device, "measured")
    # (2)
    memory, source = _asked_for(spec, device, known, seen)
    # (3)
    if seen is not None:
        context = max(seen.peak_bytes - memory, 0) if seen.beyond_bytes is None else seen.beyond_bytes
    return _share(memory, context, device, source, spec.gpu_memory if isinstance(spec.gpu_memory, float) else None)


def _asked_for(
    spec: EngineSpec, device: Device, known: Footprint | None, seen: FootprintFact | None
) -> tuple[int, str]:
    """The memory that an engine should be told, or is expected to use, and from what that is known."""
    if isinstance(spec.gpu_memory, float):
        return int(spec.gpu_memory * device.total_bytes), "declared"
    if spec.gpu_memory != "auto":
        return bytes_of(spec.gpu_memory), "declared"
    if known is None:
        return by_name(spec.model, spec.tensor_parallel, spec.pipeline_parallel), "name"
    if seen is not None and seen.non_kv_bytes:
        return seen.non_kv_bytes + known.bytes_of("kv_cache") + _LOGGED_SLACK_BYTES, "measured"
    return known.budget_bytes if runtime_of(spec).budgeted else known.total_bytes, "computed"


def _share(memory: int, context: int, device: Device, source: str, fraction: float | None = None) -> Claim:
    """A claim; without a fraction, the one that the memory is.

    What is computed is told in full, and counted as it is told: a vLLM whose cache is a few tokens short of one whole
    sequence does not start. Of all else, told is no more than that, but for what is less than can be told at all.
    """
    scale: int = 10**_FRACTION_DIGITS
    if (memory / device.total_bytes if fraction is None else fraction) < 1 / scale:
        memory, fraction = -(-device.total_bytes // scale), 1 / scale
    if fraction is None and source != "computed":
        fraction = rounded_down(memory / device.total_bytes)
    elif fraction is None:
        steps = -(-memory * scale // device.total_bytes)
        memory, fraction = -(-steps * device.total_bytes // scale), steps / scale
    return Claim(memory_bytes=memory, context_bytes=context, fraction=fraction, source=source)


def rounded_down(share: float) -> float:
    """A share with the digits with which it is told, never more of it."""
    scale: int = 10**_FRACTION_DIGITS
    return max(int(share * scale), 1) / scale
