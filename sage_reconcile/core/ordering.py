"""The order of acts: what must come before what, and one order that keeps every prefix sound."""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sage_reconcile.core.identity import EngineId, ProcessIdentity
from sage_reconcile.core.observed import ObservedState, free_bytes, held_bytes
from sage_reconcile.core.plan import Act, RelabelEngine, StartEngine, StopEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """An act that has no place in an order yet, and the engines ("stack/name") that its engine depends on."""

    act: Act
    depends_on: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The memory of the devices before anything is done, in bytes by UUID."""

    # Without what is kept free on each.
    free: Mapping[str, int]
    # What each process that may be stopped holds.
    held: Mapping[ProcessIdentity, Mapping[str, int]]
    # What an engine's dead process has not given back yet, and only its own start may count on: by engine.
    lingering: Mapping[EngineId, Mapping[str, int]]


def room_of(observed: ObservedState, *, reserve_bytes: int = 0, restoring: bool = False) -> Room:
    """The room of a world in which so many bytes stay free on each device, whatever else happens.

    `restoring`: every start waits for the memory of all the dead, so that it counts as free.
    """
    lingering: dict[EngineId, dict[str, int]] = {}
    for device in () if restoring else observed.devices:
        for entry in device.lingering:
            own = lingering.setdefault(entry.engine, {})
            own[device.uuid] = own.get(device.uuid, 0) + entry.held_bytes
    dead = {
        device.uuid: sum(entry.held_bytes for entry in device.lingering) if restoring else 0
        for device in observed.devices
    }
    return Room(
        free={
            device.uuid: free_bytes(device, observed.engines) + dead[device.uuid] - reserve_bytes
            for device in observed.devices
        },
        held={
            engine.leader: {device.uuid: held_bytes(engine, device.uuid) for device in observed.devices}
            for engine in observed.engines
        },
        lingering=lingering,
    )


def ordered_acts(drafts: list[Draft], room: Room) -> tuple[Act, ...]:
    """The acts in an order in which they are sound, each with the indexes of those that it must wait for.

    Must: a start waits for the stop of its predecessor, of whoever has its port, and of those whose memory it needs.
    Acts that share a device come one after the other, in this order (`behind`): engines that start side by side measure
    each other, and so does one that starts while another ends. Should, where no
    circle comes of it: a start waits for the start of what it depends on (manifests have no circles, but a restore
    takes each engine as it once was); replicas are replaced one after the other, an engine is replaced after what it
    depends on is back, and an engine that others depend on is stopped after them.
    """
    needed: set[tuple[int, int]] = set()
    while True:
        before = _edges(drafts, needed)
        order = _topological(drafts, before)
        more = _needed_stops([drafts[old].act for old in order], room)
        if not more:
            break
        needed |= {(order[stop], order[start]) for stop, start in more}
    place = {old: new for new, old in enumerate(order)}
    acts = [replace(drafts[old].act, after=tuple(sorted(place[earlier] for earlier in before[old]))) for old in order]
    return _one_after_the_other(acts)


def _edges(drafts: list[Draft], needed: set[tuple[int, int]]) -> list[set[int]]:
    """For each draft those that come before it. `needed` are (stop, start) of engines whose memory others need."""
    count = len(drafts)
    before: list[set[int]] = [set() for _ in range(count)]
    pairs = [(first, second) for first in range(count) for second in range(count) if first != second]
    for first, second in pairs:
        if _must(drafts[first], drafts[second]) or (first, second) in needed:
            before[second].add(first)
    for wish in (_starts_after, _should):
        for first, second in pairs:
            if wish(drafts[first], drafts[second]) and not _reaches(before, first, second):
                before[second].add(first)
    return before


def _needed_stops(acts: list[Act], room: Room) -> set[tuple[int, int]]:
    """(stop, start) by their places in this order, for the first start that finds a device full: all later stops there.

    Nothing where every start finds room. A start that finds none and has no stop to wait for is left to the audit.
    """
    free = dict(room.free)
    for index, act in enumerate(acts):
        match act:
            case StopEngine():
                for uuid, size in room.held.get(act.leader, {}).items():
                    free[uuid] = free.get(uuid, 0) + size
            case StartEngine():
                place, own = act.resolved.placement, room.lingering.get(act.engine, {})
                for uuid in place.devices:
                    free[uuid] = free.get(uuid, 0) + own.get(uuid, 0) - place.counted_bytes_per_device
                full = {uuid for uuid in place.devices if free[uuid] < 0}
                later = {
                    (number, index)
                    for number, other in enumerate(acts)
                    if number > index and isinstance(other, StopEngine) and full & set(other.devices)
                }
                if later:
                    return later
    return set()


def _one_after_the_other(acts: list[Act]) -> tuple[Act, ...]:
    """The acts, each with those on its devices that must have ended before. Stops only free, so they may overlap."""
    ordered: list[Act] = []
    for index, act in enumerate(acts):
        if isinstance(act, RelabelEngine) or not _devices(act):
            ordered.append(act)
            continue
        behind = tuple(
            earlier
            for earlier in range(index)
            if _devices(acts[earlier]) & _devices(act)
            and StartEngine in (type(acts[earlier]), type(act))
            and earlier not in act.after
        )
        ordered.append(replace(act, behind=behind))
    return tuple(_waiting(act, index, ordered) for index, act in enumerate(ordered))


def _waiting(act: Act, index: int, acts: list[Act]) -> Act:
    """A start that others come behind is done only once its engine is ready."""
    if isinstance(act, StartEngine) and any(index in getattr(other, "behind", ()) for other in acts):
        return replace(act, waits=True)
    return act


def _devices(act: Act) -> set[str]:
    match act:
        case StopEngine():
            return set(act.devices)
        case StartEngine():
            return set(act.resolved.placement.devices)
        case RelabelEngine():
            return set()


def _must(first: Draft, second: Draft) -> bool:
    match first.act, second.act:
        case StopEngine() as stop, StartEngine() as start:
            return stop.engine == start.engine or stop.port == start.resolved.placement.port
    return False


def _starts_after(first: Draft, second: Draft) -> bool:
    match first.act, second.act:
        case StartEngine() as earlier, StartEngine():
            return _depends(second, earlier)
    return False


def _should(first: Draft, second: Draft) -> bool:
    match first.act, second.act:
        case StartEngine() as start, StopEngine() as stop:
            siblings = (start.engine.stack, start.engine.name) == (stop.engine.stack, stop.engine.name)
            return (siblings and start.engine < stop.engine) or _depends(second, start)
        case StopEngine(), StopEngine() as stop:
            return _depends(first, stop)
    return False


def _depends(dependent: Draft, act: Act) -> bool:
    return str(act.engine.first) in dependent.depends_on


def _reaches(before: list[set[int]], first: int, second: int) -> bool:
    """Whether `first` must already wait for `second`: then it cannot come before it."""
    seen: set[int] = set()
    todo = [first]
    while todo:
        act = todo.pop()
        if act == second:
            return True
        if act not in seen:
            seen.add(act)
            todo += before[act]
    return False


def _topological(drafts: list[Draft], before: list[set[int]]) -> list[int]:
    """One order, always the same: policy first, then what only frees, then each engine's start as soon as it may be."""
    starts = {draft.act.engine for draft in drafts if isinstance(draft.act, StartEngine)}

    def rank(index: int) -> tuple[int, int]:
        act = drafts[index].act
        match act:
            case RelabelEngine():
                return 0, index
            case StopEngine():
                return (3 if act.engine in starts else 1), index
            case StartEngine():
                return 2, index

    waiting = {index: set(earlier) for index, earlier in enumerate(before)}
    ready = [rank(index) for index, earlier in waiting.items() if not earlier]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        _, index = heapq.heappop(ready)
        order.append(index)
        for later, earlier in waiting.items():
            if index in earlier:
                earlier.discard(index)
                if not earlier:
                    heapq.heappush(ready, rank(later))
    assert len(order) == len(drafts)
    return order
