"""What memory an engine needs on each device, and from what that is known. Blind to what is free.

In this order: what was measured when it last ran on such a device, what its manifest declares, what is computed from
the model's own files, and at last what its name suggests.
"""

import hashlib
from dataclasses import dataclass

from sage_reconcile.core.footprint import Footprint, by_name, context_bytes, footprint
from sage_reconcile.core.observed import Device, ObservedState
from sage_reconcile.core.quantities import bytes_of
from sage_reconcile.core.runtimes import program_of, runtime_of
from sage_reconcile.core.shape import ModelShape
from sage_reconcile.core.spec import IDENTITY_FIELDS, EngineSpec, canonical_json, written_fields

# A fraction is told with so many digits: 0.01% of 80 GiB is 8 MiB.
_FRACTION_DIGITS = 4

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


def shape_of(spec: EngineSpec, observed: ObservedState) -> ModelShape | None:
    """The shape of its model; None where that is not known."""
    return next((fact.shape for fact in observed.models if fact.model == spec.model), None)


def why_no_shape(spec: EngineSpec, observed: ObservedState) -> str:
    """Why the shape of its model is not known; empty when it is."""
    fact = next((fact for fact in observed.models if fact.model == spec.model), None)
    return "nobody looked at the model" if fact is None else fact.shape_why


def footprint_key(spec: EngineSpec) -> str:
    """A digest of all in a spec that its memory depends on."""
    fields = {
        name: value
        for name, value in written_fields(spec).items()
        if name in IDENTITY_FIELDS and name not in _NOT_OF_THE_NEED
    }
    return hashlib.sha256(canonical_json(fields).encode()).hexdigest()[:16]


def measured_bytes(spec: EngineSpec, device_name: str, observed: ObservedState) -> int | None:
    """The most that the engine was seen to use on a device of that name with today's program; None: it never was."""
    program = program_of(spec)
    version = next((fact.version for fact in observed.programs if fact.name == program), "")
    key = footprint_key(spec)
    peaks = [
        fact.peak_bytes
        for fact in observed.footprints
        if (fact.key, fact.device_name, fact.version) == (key, device_name, version)
    ]
    return max(peaks, default=None)


def _claim(spec: EngineSpec, device: Device, observed: ObservedState, known: Footprint | None, told: bool) -> Claim:
    """1. What it should be told, or expected to use. 2. What it was measured to use, where that says more.

    An engine that fills what it is told is measured by what it takes beyond: were the whole taken for its need, it
    would be told more each time.
    """
    # (1)
    runtime = runtime_of(spec)
    fraction: float | None = None
    if isinstance(spec.gpu_memory, float):
        fraction, memory, source = spec.gpu_memory, int(spec.gpu_memory * device.total_bytes), "declared"
    elif spec.gpu_memory != "auto":
        memory, source = bytes_of(spec.gpu_memory), "declared"
    elif known is not None:
        memory, source = known.budget_bytes if runtime.budgeted else known.total_bytes, "computed"
    else:
        memory, source = by_name(spec.model, spec.tensor_parallel, spec.pipeline_parallel), "name"
    context = context_bytes(device_count(spec)) if runtime.budgeted else 0
    # (2)
    peak = measured_bytes(spec, device.name, observed)
    if peak is not None and told:
        context = max(peak - memory, 0)
    elif peak is not None:
        memory, fraction, source = peak, None, "measured"
    if fraction is None:
        fraction = _rounded_down(memory / device.total_bytes)
    return Claim(memory_bytes=memory, context_bytes=context, fraction=fraction, source=source)


def _rounded_down(share: float) -> float:
    scale: int = 10**_FRACTION_DIGITS
    return max(int(share * scale), 1) / scale
