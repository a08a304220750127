"""What could be written otherwise of a refused engine, so that it finds a place: its memory, its split, its length.

Goes in: the engine and the problem in which it was refused. Comes out: cures, each one found by a search in which all
replicas of the engine are as they would then be. Must not know: ports, acts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sage_reconcile.core.identity import EngineId
from sage_reconcile.core.needs import need_of, shape_of
from sage_reconcile.core.puzzle import Candidate, Puzzle
from sage_reconcile.core.quantities import bytes_of
from sage_reconcile.core.runtimes import runtime_of
from sage_reconcile.core.slots import Packing

_GIB = 1024**3
# Lengths of a context that people write: powers of two, and those half-way between.
_LENGTHS = tuple(sorted(1024 * half * 2**power // 2 for half in (2, 3) for power in range(17)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A refused engine, the problem in which it was refused, and what came of that."""

    candidate: Candidate
    puzzle: Puzzle
    packing: Packing
    # What came of problems in which another field was written: the same for all replicas that are refused.
    tried: dict[tuple[object, ...], Packing]

    def helps(self, **fields: Any) -> bool:
        """Whether it has a place once these fields are written, and no more of the others are left out."""
        the_id = self.candidate.wanted.id
        again = self._solved(fields, lambda: _with_fields(self.candidate, self.puzzle, **fields))
        return again.places[str(the_id)] is not None and again.cost.left_out < self.packing.cost.left_out

    def with_replicas(self, count: int, puzzle: Puzzle) -> Packing:
        """What comes of the problem with so many replicas."""
        return self._solved({"replicas": count}, lambda: puzzle)

    def _solved(self, fields: dict[str, Any], puzzle: Callable[[], Puzzle]) -> Packing:
        key = (self.candidate.wanted.id.first, *fields.items())
        if key not in self.tried:
            self.tried[key] = puzzle().solved()
        return self.tried[key]


def cures_in_its_manifest(trial: Trial, most_bytes: int) -> Iterator[str]:
    """Cures, one field each. `most_bytes` is the memory with which it would fit."""
    candidate = trial.candidate
    if candidate.wanted.pin is not None:
        return
    size = f"{most_bytes // (_GIB // 10) / 10:.1f}GiB"
    if most_bytes >= _GIB and _can_do_with(candidate, trial.puzzle, bytes_of(size)) and trial.helps(gpu_memory=size):
        yield f"gpu_memory <= {size}"
    if candidate.need.count > trial.puzzle.most_alike:
        yield from _narrower(trial)
    elif all(claim.source in ("computed", "measured") for _, claim in candidate.need.claims):
        yield from (f"tensor_parallel: {count}" for count in _wider(trial))
        yield from (f"max_model_len <= {length}" for length in _shorter(trial))
        yield from (f"max_concurrent_requests <= {count}" for count in _at_once(trial))
    yield from (f"replicas: {count}" for count in _fewer(trial))


def of_one_engine(first: EngineId, second: EngineId) -> bool:
    """Whether two ids are replicas of the same."""
    return first.first == second.first


def _can_do_with(candidate: Candidate, puzzle: Puzzle, memory_bytes: int) -> bool:
    """Whether nothing speaks against an engine that is given so much.

    What was measured of an engine that cannot be told is what it takes, whatever is written. What is computed is what
    it needs to start; but llama.cpp puts as many layers on the GPU as fit. A guess by a name speaks against nothing.
    """
    spec, observed = candidate.wanted.spec, puzzle.observed
    if not candidate.need.told and any(claim.source == "measured" for _, claim in candidate.need.claims):
        return False
    if shape_of(spec, observed) is None or (candidate.need.told and not runtime_of(spec).fills):
        return True
    needed = need_of(spec.model_copy(update={"gpu_memory": "auto"}), observed)
    return all(claim.memory_bytes <= memory_bytes for _, claim in needed.claims)


def _wider(trial: Trial) -> Iterator[int]:
    """The fewest devices that each layer may be split over."""
    spec, devices = trial.candidate.wanted.spec, len(trial.puzzle.devices)
    shape = shape_of(spec, trial.puzzle.observed)
    if shape is None or not shape.attention_heads or not runtime_of(spec).splits_heads:
        return
    for count in range(spec.tensor_parallel + 1, devices // spec.pipeline_parallel + 1):
        if shape.attention_heads % count == 0 and trial.helps(tensor_parallel=count):
            yield count
            return


def _narrower(trial: Trial) -> Iterator[str]:
    """The largest group, of those that are smaller in one direction, where there are not as many devices."""
    spec, shape = trial.candidate.wanted.spec, shape_of(trial.candidate.wanted.spec, trial.puzzle.observed)
    heads = shape.attention_heads if shape is not None and runtime_of(spec).splits_heads else 0
    for field, now in (("tensor_parallel", spec.tensor_parallel), ("pipeline_parallel", spec.pipeline_parallel)):
        for count in range(now - 1, 0, -1):
            if (field != "tensor_parallel" or heads % count == 0) and trial.helps(**{field: count}):
                yield f"{field}: {count}"
                break


def _shorter(trial: Trial) -> Iterator[int]:
    """The longest context, of those that people write: where one fits, a shorter one does."""
    spec, shape = trial.candidate.wanted.spec, shape_of(trial.candidate.wanted.spec, trial.puzzle.observed)
    now = spec.max_model_len or (shape.max_positions if shape is not None else 0)
    yield from _most(trial, "max_model_len", [length for length in _LENGTHS if length < now])


def _at_once(trial: Trial) -> Iterator[int]:
    """The most sequences of full length, where a cache for more than one was asked for."""
    spec = trial.candidate.wanted.spec
    yield from _most(trial, "max_concurrent_requests", range(1, runtime_of(spec).serving(spec).full_sequences))


def _most(trial: Trial, field: str, values: Sequence[int]) -> Iterator[int]:
    """The largest value that helps, of those that grow: where one fits, a smaller one does. Nothing when none does."""
    first, last = 0, len(values)
    while first < last:
        middle = (first + last) // 2
        if trial.helps(**{field: values[middle]}):
            first = middle + 1
        else:
            last = middle
    yield from values[first - 1 : first] if first else ()


def _fewer(trial: Trial) -> Iterator[int]:
    """As many replicas as have a place, if those of the lowest numbers have one and nobody loses its own for that."""
    puzzle, packing, the_id = trial.puzzle, trial.packing, trial.candidate.wanted.id
    wanted = {one.id for one in puzzle.desired.wanted if of_one_engine(one.id, the_id)}
    alike = [one for one in puzzle.candidates if one.wanted.id in wanted]
    refused = [one for one in alike if packing.places[str(one.wanted.id)] is None]
    running = [engine for engine in puzzle.staying if engine.id in wanted]
    count = len(alike) - len(refused) + len(running)
    if not 0 < count < len(wanted):
        return
    surplus = {one for one in wanted if one.replica >= count}
    fewer = replace(
        puzzle,
        candidates=tuple(one for one in puzzle.candidates if one.wanted.id not in surplus),
        leaving=puzzle.leaving | {engine.leader for engine in running if engine.id in surplus},
    )
    again = trial.with_replicas(count, fewer)
    kept = [str(one.wanted.id) for one in alike if one.wanted.id not in surplus]
    nobody_loses = again.cost.left_out <= packing.cost.left_out - len(refused)
    if nobody_loses and all(again.places[one] is not None for one in kept):
        yield count


def _with_fields(candidate: Candidate, puzzle: Puzzle, **fields: Any) -> Puzzle:
    """The same problem once these fields are written: all replicas have them, and those that run are started anew."""
    the_id = candidate.wanted.id
    wanted = {one.id: one for one in puzzle.desired.wanted if of_one_engine(one.id, the_id)}
    running = [engine for engine in puzzle.staying if engine.id in wanted]
    known = {one.wanted.id for one in puzzle.candidates}
    started_anew = tuple(
        replace(candidate, wanted=wanted[engine.id], stops=(engine,)) for engine in running if engine.id not in known
    )

    def changed(one: Candidate) -> Candidate:
        if not of_one_engine(one.wanted.id, the_id):
            return one
        spec = one.wanted.spec.model_copy(update=fields)
        wish = replace(one.wanted, spec=spec)
        return replace(one, wanted=wish, need=need_of(spec, puzzle.observed), runs=False)

    return replace(
        puzzle,
        candidates=tuple(map(changed, (*puzzle.candidates, *started_anew))),
        leaving=puzzle.leaving | {engine.leader for engine in running},
        movable=tuple(one for one in puzzle.movable if not of_one_engine(one.wanted.id, the_id)),
    )
