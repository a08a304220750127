"""Which engine goes on which devices: an exact, anytime branch and bound. Pure, and blind to what engines are.

Goes in: devices with the memory that is free for placing, and what wants a place. Comes out: the best packing, and
whether it is proved to be the best or the budget ended the search. The budget counts nodes of the search, never
seconds, so that the same input gives the same packing on every machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations

# Where the search gives up and keeps the best that it has. benchmarks/packing.py tells what it costs.
BUDGET_NODES = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One device. `free_bytes` counts every item as gone from where it is now."""

    free_bytes: int
    # Devices of one island reach each other fast (NVLink, or one NUMA node).
    island: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Something that wants the same memory on `count` different devices. Devices are indexes of the slots."""

    key: str
    need_bytes: int
    count: int
    # The devices that it may have.
    allowed: tuple[int, ...]
    # The devices that it has now, or had; empty for something new.
    home: tuple[int, ...] = ()
    # What it holds on each device of its home if it gets no new place: what runs now is kept then.
    stays_bytes: int = 0
    # Whether it runs as it should, so that another place than its home means to move it. It is never left out.
    runs: bool = False
    # Items of one group (the replicas of an engine) rather have different devices.
    group: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Cost:
    """What a packing costs; the first difference decides.

    1. `left_out`: items without a place. 2. `moves`: running items that leave their home. 3. `strays`: others that
    come back elsewhere than at their home. 4. `crossings`: islands beyond the first, over all items.
    5. `crowding`: pairs of one group on one device. 6. `scatter`: minus the sum of squares of what stays free, so that
    what is free stays in large pieces.
    """

    left_out: int
    moves: int
    strays: int
    crossings: int
    crowding: int
    scatter: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """`places` has the devices of each item, by its key; None for one that is left out."""

    places: dict[str, tuple[int, ...] | None]
    cost: Cost
    # Whether no better packing exists; else the budget ended the search.
    proved: bool
    nodes: int


def pack(
    slots: tuple[Slot, ...],
    items: tuple[Item, ...],
    *,
    present: tuple[tuple[str, int], ...] = (),
    budget_nodes: int = BUDGET_NODES,
) -> Packing | None:
    """The best packing of the items; None when what runs does not fit even as it is.

    `present` are (group, device) of engines that stay and are no items.
    """
    ordered = sorted(items, key=lambda item: (-item.need_bytes * item.count, -item.count, item.key))
    search = _Search(slots=slots, items=tuple(ordered), budget_nodes=budget_nodes, present=present)
    search.run()
    if search.best_cost is None:
        return None
    places = {item.key: place for item, place in zip(search.items, search.best_places, strict=True)}
    return Packing(
        places=dict(sorted(places.items())),
        cost=search.best_cost,
        proved=search.nodes <= budget_nodes,
        nodes=min(search.nodes, budget_nodes),
    )


_Place = tuple[int, ...] | None


@dataclass(slots=True, kw_only=True)
class _Search:
    """Depth first over the items, the largest first. What is tried first for each is what is most likely the best."""

    slots: tuple[Slot, ...]
    items: tuple[Item, ...]
    budget_nodes: int
    present: tuple[tuple[str, int], ...]
    nodes: int = 0
    best_cost: Cost | None = None
    best_places: tuple[_Place, ...] = ()
    _free: list[int] = field(default_factory=list)
    # How many of each group each device has.
    _groups: list[dict[str, int]] = field(default_factory=list)
    _places: list[_Place] = field(default_factory=list)
    # The same number for devices that no item tells apart.
    _alike: tuple[int, ...] = ()

    def run(self) -> None:
        self._free = [slot.free_bytes for slot in self.slots]
        self._groups = [{} for _ in self.slots]
        for group, device in self.present:
            self._groups[device][group] = self._groups[device].get(group, 0) + 1
        looks = [
            (slot.island, *((number in item.allowed, number in item.home) for item in self.items))
            for number, slot in enumerate(self.slots)
        ]
        self._alike = tuple(looks.index(look) for look in looks)
        squares = sum(free * free for free in self._free)
        self._descend(0, Cost(left_out=0, moves=0, strays=0, crossings=0, crowding=0, scatter=-squares))

    def _descend(self, depth: int, cost: Cost) -> None:
        self.nodes += 1
        if self.nodes > self.budget_nodes:
            return
        if self.best_cost is not None and self._bound(depth, cost) >= self.best_cost:
            return
        if depth == len(self.items):
            self.best_cost, self.best_places = cost, tuple(self._places)
            return
        item = self.items[depth]
        for place in self._choices(item):
            # Left out, what runs of it now goes on where it is.
            devices, used = (item.home, item.stays_bytes) if place is None else (place, item.need_bytes)
            after = self._with(item, place, devices, used, cost)
            self._occupy(item, devices, used, 1)
            self._places.append(place)
            self._descend(depth + 1, after)
            self._places.pop()
            self._occupy(item, devices, used, -1)
            if self.nodes > self.budget_nodes:
                return

    def _occupy(self, item: Item, devices: tuple[int, ...], used: int, sign: int) -> None:
        for device in devices:
            self._free[device] -= sign * used
            if item.group:
                self._groups[device][item.group] = self._groups[device].get(item.group, 0) + sign

    def _with(self, item: Item, place: _Place, devices: tuple[int, ...], used: int, cost: Cost) -> Cost:
        """The cost once the item has this place."""
        away = _is_away(item, place)
        free = self._free
        return Cost(
            left_out=cost.left_out + (place is None),
            moves=cost.moves + (away and item.runs),
            strays=cost.strays + (away and not item.runs),
            crossings=cost.crossings + self._crossings(place or ()),
            crowding=cost.crowding + self._crowding(item, devices),
            scatter=cost.scatter + sum(free[device] ** 2 - (free[device] - used) ** 2 for device in devices),
        )

    def _crowding(self, item: Item, devices: tuple[int, ...]) -> int:
        return sum(self._groups[device].get(item.group, 0) for device in devices) if item.group else 0

    def _crossings(self, place: tuple[int, ...]) -> int:
        return max(len({self.slots[device].island for device in place}) - 1, 0)

    def _choices(self, item: Item) -> Iterator[_Place]:
        """The places that the item can have now, those that look best first; to be left out is the last resort."""
        fitting = [device for device in item.allowed if self._free[device] >= item.need_bytes]
        looks = {device: (self._alike[device], self._free[device], *self._neighbours(device)) for device in fitting}
        seen: set[tuple[object, ...]] = set()
        choices = []
        for place in combinations(fitting, item.count):
            # Of places that differ only by devices that nothing tells apart, one is enough.
            look = tuple(sorted(looks[device] for device in place))
            if look not in seen:
                seen.add(look)
                choices.append(place)
        yield from sorted(choices, key=lambda place: self._rank(item, place))
        if not item.runs and all(self._free[device] >= item.stays_bytes for device in item.home):
            yield None

    def _neighbours(self, device: int) -> list[tuple[str, int]]:
        return sorted(entry for entry in self._groups[device].items() if entry[1])

    def _rank(self, item: Item, place: tuple[int, ...]) -> tuple[object, ...]:
        left = sum(self._free[device] - item.need_bytes for device in place)
        return _is_away(item, place), self._crossings(place), self._crowding(item, place), left, place

    def _bound(self, depth: int, cost: Cost) -> Cost:
        """No packing below this node costs less.

        Memory only ever gets less: an item that fits nowhere now is left out, and of the others no more are placed than
        all free memory together holds, the smallest first. An item that is placed where f is free takes 2fx - x*x from
        the sum of squares, at least x*x, since x <= f.
        """
        sizes, squares, left_out = [], 0, cost.left_out
        for item in self.items[depth:]:
            if sum(self._free[device] >= item.need_bytes for device in item.allowed) < item.count:
                left_out += 1
            else:
                sizes.append(item.need_bytes * item.count)
                squares += item.count * item.need_bytes**2
        room = sum(free for free in self._free if free > 0)
        for size in sorted(sizes):
            room -= size
            left_out += room < 0
        return Cost(
            left_out=left_out,
            moves=cost.moves,
            strays=cost.strays,
            crossings=cost.crossings,
            crowding=cost.crowding,
            # With more left out than that the packing is worse by its first figure already.
            scatter=cost.scatter + (squares if left_out == cost.left_out else 0),
        )


def _is_away(item: Item, place: _Place) -> bool:
    """Whether the item has a place, and it is not the home that it has."""
    return place is not None and bool(item.home) and set(place) != set(item.home)
