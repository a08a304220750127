"""What a reader of a plan should know of the figures that it goes by: guesses, margins, words without one. Pure."""

from collections.abc import Iterator

from sage_reconcile.core.footprint import footprint
from sage_reconcile.core.identity import EngineId
from sage_reconcile.core.needs import need_of, shape_of, why_no_shape
from sage_reconcile.core.observed import ObservedState
from sage_reconcile.core.quantities import gib
from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes import runtime_of
from sage_reconcile.core.spec import EngineSpec


def notes_of_a_figure(engine: EngineId, spec: EngineSpec, place: Placement, observed: ObservedState) -> Iterator[str]:
    """Of the memory that an engine is given there."""
    yield from _of_a_figure(engine, spec, place.memory_source, place.memory_bytes_per_device, observed)


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
