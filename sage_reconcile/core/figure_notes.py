"""What a reader of a plan should know of the figures that it goes by: guesses, margins, words without one. Pure."""

from collections.abc import Iterator
from dataclasses import replace

from sage_reconcile.core.footprint import footprint
from sage_reconcile.core.identity import EngineId
from sage_reconcile.core.needs import measured, need_of, shape_of, why_no_shape
from sage_reconcile.core.observed import ObservedState
from sage_reconcile.core.quantities import gib
from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes import runtime_of
from sage_reconcile.core.spec import EngineSpec


def notes_of_a_figure(engine: EngineId, spec: EngineSpec, place: Placement, observed: ObservedState) -> Iterator[str]:
    """Of the memory that an engine is given there."""
    yield from _of_a_figure(engine, spec, place.memory_source, place.memory_bytes_per_device, observed)
    yield from _of_too_little(engine, place, spec, observed)


def notes_of_a_need(engine: EngineId, spec: EngineSpec, observed: ObservedState) -> Iterator[str]:
    """Of the memory for which an engine is refused."""
    claim = need_of(spec, observed).on(observed.devices[0].uuid)
    yield from _of_a_figure(engine, spec, claim.source, claim.counted_bytes, observed)


def _of_a_figure(
    engine: EngineId, spec: EngineSpec, source: str, memory_bytes: int, observed: ObservedState
) -> Iterator[str]:
    """From what its memory is known, where that is not all that one could wish."""
    if source == "name":
        yield f"{engine}: {gib(memory_bytes)} GiB is a guess by its model's name: {why_no_shape(spec, observed)}"
    shape = shape_of(spec, observed)
    if source == "computed" and shape is not None:
        known = footprint(shape, runtime_of(spec).serving(spec))
        yield from (
            f"{engine}: with a margin of {gib(term.memory_bytes)} GiB: {term.why}"
            for term in known.terms
            if term.name == "margin"
        )
        yield from (f"{engine}: {sentence}" for sentence in known.not_counted)


def _of_too_little(engine: EngineId, place: Placement, spec: EngineSpec, observed: ObservedState) -> Iterator[str]:
    """A budget that is written and does not hold what the engine needs to start, as far as that can be computed.

    It is no refusal: formulas err, and `args` may know more, as --cpu-offload-gb. One that was ready with it has proved
    that it is enough.
    """
    shape = shape_of(spec, observed)
    names = {device.name for device in observed.devices if device.uuid in place.devices}
    if shape is None or spec.gpu_memory == "auto" or not runtime_of(spec).budgeted:
        return
    if any(measured(spec, name, observed) is not None for name in names):
        return
    known = footprint(shape, replace(runtime_of(spec).serving(spec), full_sequences=1))
    weights, cache = known.bytes_of("weights"), known.bytes_of("kv_cache")
    needed = weights + cache + known.bytes_of("activations", "non_torch")
    if place.memory_bytes_per_device < needed:
        tokens = spec.max_model_len or shape.max_positions
        yield (
            f"{engine}: gpu_memory gives it {gib(place.memory_bytes_per_device)} GiB, and to start it needs about "
            f"{gib(needed)}: {gib(weights)} for its weights, {gib(cache)} for one sequence of {tokens:,} tokens"
        )
