"""The order of acts: what must come before what, and one order that keeps every prefix sound."""

import heapq
from dataclasses import dataclass, replace

from sage_reconcile.core.plan import Act, RelabelEngine, StartEngine, StopEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """An act that has no place in an order yet, and the engines ("stack/name") that its engine depends on."""

    act: Act
    depends_on: tuple[str, ...] = ()


def ordered_acts(drafts: list[Draft]) -> tuple[Act, ...]:
    """The acts in an order in which they are sound, each with the indexes of those that it must wait for.

    Must: a start waits for the stop of its predecessor, and for the stop of whoever has its port. Should, where no
    circle comes of it: a start waits for the start of what it depends on (manifests have no circles, but a restore
    takes each engine as it once was); replicas are replaced one after the other, an engine is replaced after what it
    depends on is back, and an engine that others depend on is stopped after them.
    """
    count = len(drafts)
    before: list[set[int]] = [set() for _ in range(count)]
    pairs = [(first, second) for first in range(count) for second in range(count) if first != second]
    for first, second in pairs:
        if _must(drafts[first], drafts[second]):
            before[second].add(first)
    for wish in (_starts_after, _should):
        for first, second in pairs:
            if wish(drafts[first], drafts[second]) and not _reaches(before, first, second):
                before[second].add(first)
    order = _topological(drafts, before)
    place = {old: new for new, old in enumerate(order)}
    return tuple(
        replace(drafts[old].act, after=tuple(sorted(place[earlier] for earlier in before[old]))) for old in order
    )


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
    return f"{act.engine.stack}/{act.engine.name}" in dependent.depends_on


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
