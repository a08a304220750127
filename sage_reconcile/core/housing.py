"""Which devices each engine gets: the exact search of core.packing over what is observed, and refusals with numbers.

Goes in: engines that should start, and what runs. Comes out: devices for each, or why it has none and what would help,
found by searching again with one thing relaxed. Must not know: runtimes, ports, acts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from sage_reconcile.core.compare import listed
from sage_reconcile.core.cures import Trial, cures_in_its_manifest, of_one_engine
from sage_reconcile.core.desired import DesiredState, Wanted
from sage_reconcile.core.device_shares import called, engine_holders, foreign_holders, holders_text
from sage_reconcile.core.facts import Gap
from sage_reconcile.core.identity import EngineId, ProcessIdentity
from sage_reconcile.core.needs import device_count
from sage_reconcile.core.observed import Engine, ObservedState, held_bytes, is_about
from sage_reconcile.core.puzzle import NOT_PINNED, Candidate, Follower, Puzzle, Seat, kind_of, numbers_of
from sage_reconcile.core.quantities import gib
from sage_reconcile.core.refusal import Refusal, Shortfall
from sage_reconcile.core.slots import Packing

# A search that only asks whether a relaxed problem has an answer gets less to try.
_HELP_BUDGET_NODES = 2_000
# Foreign processes and engines that a refusal tries without, those that hold most first.
_MOST_HOLDERS_TRIED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Seating:
    """Where everybody goes."""

    seats: Mapping[EngineId, Seat]
    refusals: Mapping[EngineId, Refusal]
    # Whether no better one exists.
    proved: bool = True


def seated(
    candidates: tuple[Candidate, ...],
    desired: DesiredState,
    observed: ObservedState,
    leaving: set[ProcessIdentity],
    *,
    movable: tuple[Candidate, ...] = (),
    may_move: bool = True,
    followers: tuple[Follower, ...] = (),
) -> Seating:
    """The best devices for the candidates. `leaving` are the processes that will be stopped, those of candidates too.

    `movable` run as they should, and may be moved where that finds room for more; or else a refusal says where that
    would help.
    """
    if not candidates:
        return Seating(seats={}, refusals={})
    puzzle = Puzzle(
        candidates=candidates,
        desired=desired,
        observed=observed,
        leaving=leaving,
        movable=movable,
        followers=followers,
    )
    puzzle = puzzle.moving() if may_move else puzzle
    packing = puzzle.solved()
    seats: dict[EngineId, Seat] = {}
    tried: dict[tuple[object, ...], Packing] = {}
    refused = {
        candidate.wanted.id: _refusal(candidate, puzzle, packing, tried)
        for candidate in _to_refuse(puzzle.candidates, packing)
    }
    for candidate in puzzle.candidates:
        place = packing.places[str(candidate.wanted.id)]
        if place is not None and not puzzle.stays(candidate, place):
            seats[candidate.wanted.id] = puzzle.seat(candidate, place)
    return Seating(seats=seats, refusals=refused, proved=packing.proved)


def _to_refuse(candidates: tuple[Candidate, ...], packing: Packing) -> list[Candidate]:
    """Those without a place, but for those that wait for one of them: that one's refusal is the reason of theirs.

    What waits for each other in a circle, as a restore may have it, is refused together.
    """
    left_out = [candidate for candidate in candidates if packing.places[str(candidate.wanted.id)] is None]
    first = [
        candidate
        for candidate in left_out
        if all(packing.places[str(other)] is not None for other in candidate.requires)
    ]
    return first or left_out


# --- refusals ---------------------------------------------------------------------------------------------------------


def out_of_the_question(wanted: Wanted, observed: ObservedState, *, made_up_will_do: bool) -> Refusal | None:
    """Why no search could find devices for it; None when one might."""
    unseen = ("devices",) if observed.devices else ("devices", "device", "lost device")
    gap = next((gap for gap in observed.gaps if gap.what in unseen), None)
    if gap is not None:
        return Refusal(reason="not_observed", why=f"it needs a GPU, and {gap.why}")
    if not observed.devices:
        return Refusal(
            reason="no_device",
            why=f"it needs a GPU, and none is observed on {observed.node}",
            would_help=("use_gpu: false",),
        )
    if not made_up_will_do and any(device.made_up for device in observed.devices):
        return Refusal(
            reason="no_device",
            why="it needs a GPU, and SAGE_GPU_MOCK_COUNT makes up those of this machine: nothing can run on them",
            would_help=("no SAGE_GPU_MOCK_COUNT", "use_gpu: false"),
        )
    names = wanted.pin.resolved.placement.devices if wanted.pin is not None else wanted.spec.devices
    missing = [name for name in names or () if not numbers_of(observed.devices, (name,))]
    reason = "not_observed" if _hidden(observed, missing) else "device_pin"
    which = listed([f"{_device_name(name)}, {_why_missing(name, observed)}" for name in missing]) if missing else ""
    if missing and wanted.pin is not None:
        return Refusal(reason=reason, why=f"it ran on {which}")
    if missing and len(names or ()) - len(missing) < device_count(wanted.spec):
        there = ", ".join(f"{device.index} ({device.uuid})" for device in observed.devices)
        begins = any(device.uuid.startswith(name) for device in observed.devices for name in map(str, missing))
        in_full = ": a UUID is written in full" if begins else ""
        return Refusal(
            reason=reason,
            why=f"it is pinned to {which}{in_full}",
            would_help=(f"devices: from {there}", "no devices: any will do"),
        )
    return None


def _hidden(observed: ObservedState, names: Iterable[int | str] | None) -> tuple[Gap, ...]:
    """Devices that are there and cannot be seen, of those with these names, or of all: one might have room."""
    unseen = [gap for gap in observed.gaps if gap.what == "device"]
    return tuple(gap for gap in unseen if names is None or any(is_about(gap, name) for name in names))


def _why_missing(name: int | str, observed: ObservedState) -> str:
    gaps = [gap for gap in observed.gaps if gap.what in ("device", "lost device") and is_about(gap, name)]
    if not gaps:
        return "which is not there"
    return "which the driver has lost" if gaps[0].what == "lost device" else f"and {gaps[0].why}"


def _device_name(name: int | str) -> str:
    return f"gpu{name}" if isinstance(name, int) else name


def _refusal(
    candidate: Candidate, puzzle: Puzzle, packing: Packing, tried: dict[tuple[object, ...], Packing]
) -> Refusal:
    """What is missing on each device, who has it, and what would help."""
    shortfalls = tuple(_shortfall(candidate, number, puzzle, packing) for number in range(len(puzzle.devices)))
    fitting = sum(not entry.short_bytes and not entry.why_not for entry in shortfalls)
    sizes = {candidate.need.on(device.uuid).counted_bytes for device in puzzle.devices}
    size = " to ".join(gib(size) for size in sorted({min(sizes), max(sizes)}))
    count, known_from = candidate.need.count, candidate.need.known_from
    wants = f"needs {count} GPUs x {size} GiB" if count > 1 else f"needs a GPU with {size} GiB"
    wants += f" ({known_from})" if known_from else ""
    found = {0: "none fits"}.get(fitting, f"{fitting} fit{'s' if fitting == 1 else ''}")
    pinned = puzzle.pinned(candidate)
    # Slices have the index of their GPU.
    names = list(dict.fromkeys(f"gpu{puzzle.devices[number].index}" for number in sorted(pinned or ())))
    among = f" of {', '.join(names)}" if names else ""
    alike = ", and not as many of one kind" if fitting >= count else ""
    hidden = _hidden(puzzle.observed, None if pinned is None else candidate.wanted.spec.devices)
    unseen = f", and {listed([gap.why for gap in hidden])}" if hidden else ""
    reason = "memory" if pinned is None or len(pinned) >= count else "device_pin"
    reason = "no_device" if count > puzzle.most_alike else reason
    return Refusal(
        reason="not_observed" if hidden else reason,
        why=f"{wants}{among}, {found}{alike}{unseen}",
        devices=shortfalls,
        would_help=_would_help(candidate, puzzle, packing, shortfalls, tried),
    )


def _shortfall(candidate: Candidate, number: int, puzzle: Puzzle, packing: Packing) -> Shortfall:
    device = puzzle.devices[number]
    places = [(other, packing.places[str(other.wanted.id)]) for other in puzzle.candidates if other is not candidate]
    kept = [engine for other, place in places if puzzle.stays(other, place) for engine in other.stops]
    others = [
        (other, puzzle.need(other, device))
        for other, place in places
        if not puzzle.stays(other, place) and number in (place or ())
    ]
    needed = candidate.need.on(device.uuid).counted_bytes
    awaited = needed - puzzle.need(candidate, device)
    free = puzzle.free(device) - sum(size for _, size in others) + awaited
    free -= sum(held_bytes(engine, device.uuid) for engine in kept)
    held = [(size, f"{other.wanted.id}") for other, size in others]
    held += engine_holders(device, (*puzzle.staying, *kept), puzzle.desired.project)
    held += foreign_holders(device)
    for entry in () if puzzle.restoring else device.lingering:
        back = min(awaited, entry.held_bytes) if entry.engine == candidate.wanted.id else 0
        awaited -= back
        held += [(entry.held_bytes - back, f"{entry.engine}, which ended as pid {entry.pid}")]
    unnamed = device.foreign_bytes - sum(holder.used_bytes for holder in device.holders)
    unnamed -= sum(entry.held_bytes for entry in device.lingering)
    held += [(unnamed, "memory that no process holds")] if unnamed > 0 else []
    held += [(puzzle.desired.reserve_bytes, "device_reserve")] if puzzle.desired.reserve_bytes else []
    pinned = puzzle.pinned(candidate)
    elsewhere = NOT_PINNED if pinned is not None and number not in pinned else ""
    return Shortfall(
        index=device.index,
        uuid=device.uuid,
        total_bytes=device.total_bytes,
        free_bytes=free,
        short_bytes=max(needed - free, 0),
        held_by=holders_text(entry for entry in held if entry[0]),
        why_not=puzzle.why_not(candidate, device) or elsewhere,
    )


def _would_help(
    candidate: Candidate,
    puzzle: Puzzle,
    packing: Packing,
    shortfalls: tuple[Shortfall, ...],
    tried: dict[tuple[object, ...], Packing],
) -> tuple[str, ...]:
    """One thing relaxed at a time: what a search then finds a place for, and for the others too."""
    wanted, quick = candidate.wanted, replace(puzzle, budget_nodes=_HELP_BUDGET_NODES)
    most = _largest_that_fits(candidate, puzzle, shortfalls)
    trial = Trial(candidate=candidate, puzzle=quick, packing=packing, tried=tried)
    found = list(cures_in_its_manifest(trial, most))
    if wanted.spec.devices is not None and _helps(replace(quick, unpinned=frozenset({wanted.id})), candidate, packing):
        found.append("other devices than those it is pinned to")
    if puzzle.movable and _helps(quick.moving(), candidate, packing):
        found.append("--allow-moves")
    for pid, name in _foreign_holders(puzzle):
        if _helps(replace(quick, without_pids=frozenset({pid})), candidate, packing):
            found.append(f"without foreign pid {pid} ({name})")
    for engine in _engines_that_hold(puzzle, _waited_for(wanted, puzzle.desired)):
        if of_one_engine(engine.id, wanted.id):
            continue  # No manifest asks for one replica without another.
        if _helps(replace(quick, without_engines=frozenset({engine.leader})), candidate, packing):
            found.append(f"without {called(engine.id, puzzle.desired.project)}")
    if puzzle.desired.reserve_bytes:
        relaxed = replace(quick, desired=replace(puzzle.desired, reserve_bytes=0))
        found += ["no device_reserve"] if _helps(relaxed, candidate, packing) else []
    return tuple(found)


def _largest_that_fits(candidate: Candidate, puzzle: Puzzle, shortfalls: tuple[Shortfall, ...]) -> int:
    """The memory with which it would fit as many alike devices as it needs, besides everything else of the plan."""
    count, context = candidate.need.count, max(claim.context_bytes for _, claim in candidate.need.claims)
    usable: dict[tuple[str, int], list[int]] = {}
    for device, entry in zip(puzzle.devices, shortfalls, strict=True):
        if not entry.why_not:
            usable.setdefault(kind_of(device), []).append(entry.free_bytes)
    fitting = [sorted(sizes, reverse=True)[count - 1] for sizes in usable.values() if len(sizes) >= count]
    return max(max(fitting, default=0) - context, 0)


def _foreign_holders(puzzle: Puzzle) -> list[tuple[int, str]]:
    """(pid, name) of foreign processes, those that hold most first."""
    sizes: dict[tuple[int, str], int] = {}
    for device in puzzle.devices:
        for holder in device.holders:
            key = (holder.pid, holder.name)
            sizes[key] = sizes.get(key, 0) + holder.used_bytes
    return sorted(sizes, key=lambda key: (-sizes[key], key))[:_MOST_HOLDERS_TRIED]


def _waited_for(wanted: Wanted, desired: DesiredState) -> set[str]:
    """All that it depends on, as "stack/name": without these it does not start."""
    names = {str(one.id.first): one.depends_on for one in desired.wanted}
    found: set[str] = set()
    todo = list(wanted.depends_on)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += names.get(name, ())
    return found


def _engines_that_hold(puzzle: Puzzle, spared: set[str]) -> list[Engine]:
    """Those that hold most first, but for the spared."""
    sizes = {
        engine.leader: (sum(held_bytes(engine, device.uuid) for device in puzzle.devices), engine)
        for engine in puzzle.staying
        if str(engine.id.first) not in spared
    }
    holding = [(size, engine) for size, engine in sizes.values() if size]
    return [engine for _, engine in sorted(holding, key=lambda entry: (-entry[0], entry[1].id, entry[1].leader))][
        :_MOST_HOLDERS_TRIED
    ]


def _helps(relaxed: Puzzle, candidate: Candidate, packing: Packing) -> bool:
    """Whether the relaxed problem has a place for it, and leaves out no more of the others."""
    again = relaxed.solved()
    return again.places[str(candidate.wanted.id)] is not None and again.cost.left_out < packing.cost.left_out
