"""One problem for the search: which devices there are, who wants some, and what may be relaxed. Pure."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from sage_reconcile.core.desired import DesiredState, Wanted
from sage_reconcile.core.identity import EngineId, ProcessIdentity
from sage_reconcile.core.islands import regions
from sage_reconcile.core.label import parse_label
from sage_reconcile.core.needs import Claim, Need
from sage_reconcile.core.observed import Device, Engine, ObservedState, free_bytes, held_bytes
from sage_reconcile.core.packing import pack
from sage_reconcile.core.slots import Item, Packing, Slot


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An engine that wants devices."""

    wanted: Wanted
    need: Need
    # What it replaces, and what goes on if it finds no place.
    stops: tuple[Engine, ...] = ()
    # Whether a slice of a GPU will do.
    takes_slices: bool = True
    # Whether it runs as it should, and wants another place only to make room: it is never left without one.
    runs: bool = False
    # What must have a place, too: engines that it depends on, and that do not run.
    requires: tuple[EngineId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Follower:
    """An engine that wants no devices, and starts only if others do: it counts among those that have a place."""

    id: EngineId
    requires: tuple[EngineId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """The devices of one engine, and what it needs on each of them."""

    devices: tuple[Device, ...]
    claim: Claim
    told: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Puzzle:
    """One problem for the search. Relaxed, it is another one."""

    candidates: tuple[Candidate, ...]
    desired: DesiredState
    observed: ObservedState
    leaving: set[ProcessIdentity]
    # What is relaxed: engines that are no longer there, foreign pids that are no longer there, pins that do not count.
    without_engines: frozenset[ProcessIdentity] = frozenset()
    without_pids: frozenset[int] = frozenset()
    unpinned: frozenset[EngineId] = frozenset()
    budget_nodes: int | None = None
    # Engines that run as they should, and would be candidates too if they might be moved.
    movable: tuple[Candidate, ...] = ()
    followers: tuple[Follower, ...] = ()

    def moving(self) -> "Puzzle":
        """The same problem where what may be moved is."""
        movers = {engine.leader for candidate in self.movable for engine in candidate.stops}
        return replace(self, candidates=(*self.candidates, *self.movable), leaving=self.leaving | movers, movable=())

    @property
    def devices(self) -> tuple[Device, ...]:
        return self.observed.devices

    @property
    def restoring(self) -> bool:
        """Whether what ran is put back: what has just ended there gives its memory back, and every start waits for it.

        Else what failed a moment ago would keep out what it had replaced.
        """
        return any(candidate.wanted.pin is not None for candidate in self.candidates)

    @property
    def staying(self) -> tuple[Engine, ...]:
        gone = self.leaving | self.without_engines
        return tuple(engine for engine in self.observed.engines if engine.leader not in gone)

    def free(self, device: Device) -> int:
        """What is free once everything that leaves is gone, before anybody is placed."""
        spared = sum(holder.used_bytes for holder in device.holders if holder.pid in self.without_pids)
        spared += sum(entry.held_bytes for entry in device.lingering) if self.restoring else 0
        return free_bytes(device, self.staying) - self.desired.reserve_bytes + min(spared, device.foreign_bytes)

    def need(self, candidate: Candidate, device: Device) -> int:
        """What a candidate adds to a device. What its own last process has not given back yet, its start waits for."""
        needed = candidate.need.on(device.uuid).counted_bytes
        if self.restoring or (candidate.runs and device.uuid in self._home(candidate)):
            return needed  # It counts as free already, or is not started there.
        own = sum(entry.held_bytes for entry in device.lingering if entry.engine == candidate.wanted.id)
        return max(needed - own, 0)

    def allowed(self, candidate: Candidate) -> tuple[int, ...]:
        pins = self.pinned(candidate)
        own = self.home_of(candidate) if candidate.runs else ()
        return tuple(
            number
            for number, device in enumerate(self.devices)
            if number in own or ((pins is None or number in pins) and not self.why_not(candidate, device))
        )

    def why_not(self, candidate: Candidate, device: Device) -> str:
        return why_not(device, count=candidate.need.count, takes_slices=candidate.takes_slices)

    def pinned(self, candidate: Candidate) -> set[int] | None:
        """The devices that it must have, or choose among; None when all will do."""
        wanted = candidate.wanted
        if wanted.pin is not None:
            return numbers_of(self.devices, wanted.pin.resolved.placement.devices)
        if wanted.spec.devices is None or wanted.id in self.unpinned:
            return None
        return numbers_of(self.devices, wanted.spec.devices)

    @property
    def most_alike(self) -> int:
        """How many devices of one kind there are, whatever is on them: no engine can have more. Slices count as one."""
        return max(Counter(kind_of(device) for device in self.devices if not device.parent).values(), default=1)

    def home_of(self, candidate: Candidate) -> tuple[int, ...]:
        """Where it runs, or ran last, as far as those devices are there."""
        uuids = self._home(candidate)
        numbers = {device.uuid: number for number, device in enumerate(self.devices)}
        found = tuple(numbers[uuid] for uuid in uuids if uuid in numbers)
        return found if len(found) == len(uuids) else ()

    def stays(self, candidate: Candidate, place: tuple[int, ...] | None) -> bool:
        """Whether what runs of a candidate goes on where it is, if it gets this place."""
        return place is None or (candidate.runs and set(place) == set(self.home_of(candidate)))

    def _home(self, candidate: Candidate) -> tuple[str, ...]:
        return last_devices(candidate.wanted.id, candidate.stops, self.observed)

    def solved(self) -> Packing:
        kinds = sorted({kind_of(device) for device in self.devices})
        near = regions([(device.island, device.numa_node) for device in self.devices])
        slots = tuple(
            Slot(free_bytes=self.free(device), island=device.island, region=region, kind=kinds.index(kind_of(device)))
            for device, region in zip(self.devices, near, strict=True)
        )
        items = tuple(self._item(candidate) for candidate in self.candidates)
        nothing = tuple(0 for _ in slots)
        items += tuple(
            Item(key=str(one.id), need_bytes=nothing, count=0, allowed=(), requires=tuple(map(str, one.requires)))
            for one in self.followers
        )
        numbers = {device.uuid: number for number, device in enumerate(self.devices)}
        present = tuple(
            (engine.id.first.full, numbers[uuid])
            for engine in self.staying
            for uuid in engine.resolved.placement.devices
            if uuid in numbers
        )
        budget = {} if self.budget_nodes is None else {"budget_nodes": self.budget_nodes}
        packing = pack(slots, items, present=present, **budget)
        assert packing is not None, "what runs may always stay where it is"
        return packing

    def _item(self, candidate: Candidate) -> Item:
        return Item(
            key=str(candidate.wanted.id),
            need_bytes=tuple(self._asked(candidate, device) for device in self.devices),
            count=candidate.need.count,
            allowed=self.allowed(candidate),
            home=self.home_of(candidate),
            stays_bytes=tuple(
                sum(held_bytes(engine, device.uuid) for engine in candidate.stops) for device in self.devices
            )
            if candidate.stops
            else (),
            runs=candidate.runs,
            group=candidate.wanted.id.first.full,
            requires=tuple(map(str, candidate.requires)),
        )

    def _asked(self, candidate: Candidate, device: Device) -> int:
        """What it needs for a start. What runs on a closed device may stay there, and is not started there anew."""
        closed = candidate.runs and self.why_not(candidate, device)
        return device.total_bytes + 1 if closed else self.need(candidate, device)

    def seat(self, candidate: Candidate, place: tuple[int, ...]) -> Seat:
        pin = candidate.wanted.pin
        devices = tuple(self.devices[number] for number in sorted(place))
        if pin is not None:  # In the order in which it counted them.
            order = pin.resolved.placement.devices
            devices = tuple(sorted(devices, key=lambda device: order.index(device.uuid)))
        return Seat(devices=devices, claim=candidate.need.on(devices[0].uuid), told=candidate.need.told)


# What is said of a device that the manifest's `devices` do not name.
NOT_PINNED = "not among its devices"


def kind_of(device: Device) -> tuple[str, int]:
    """One fraction is told for all devices of an engine, so they must be alike."""
    return device.name, device.total_bytes


def numbers_of(devices: tuple[Device, ...], names: Iterable[int | str]) -> set[int]:
    wanted = set(names)
    return {number for number, device in enumerate(devices) if device.uuid in wanted or device.index in wanted}


def last_devices(the_id: EngineId, runs: tuple[Engine, ...], observed: ObservedState) -> tuple[str, ...]:
    """The devices where an engine runs, or ran when it last had any; empty when that is not known."""
    if runs:
        return runs[-1].resolved.placement.devices
    records = [record for record in observed.records if record.engine == the_id]
    for record in sorted(records, key=lambda record: (-record.started_at, record.leader)):
        label = parse_label(dict(record.label))
        if label is not None and label.resolved.placement.devices:
            return label.resolved.placement.devices
    return ()


def why_not(device: Device, *, count: int, takes_slices: bool) -> str:
    """Why a device is out of the question for one that needs so many, whatever is free on it; empty when it is not."""
    if device.closed:
        return f"closed: {device.closed}"
    if device.parent and not takes_slices:
        return "a MIG slice, which its runtime cannot be given"
    if device.parent and count > 1:
        return "a MIG slice, which cannot be one of several"
    return ""
