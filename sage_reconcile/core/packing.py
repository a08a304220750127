"""Which engine goes on which devices: an exact, anytime branch and bound. Pure, and blind to what engines are.

Goes in: devices with the memory that is free for placing, and what wants a place. Comes out: the best packing, and
whether it is proved to be the best or the budget ended the search. The budget counts nodes of the search, never
seconds, so that the same input gives the same packing on every machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations

from sage_reconcile.core.slots import Cost, Item, Packing, Slot
from sage_reconcile.core.wishes import Place, Used, Wish, is_away, lived_on, stays_put, taken, wishes_of

# Where the search gives up and keeps the best that it has. benchmarks/packing.py tells what it costs.
BUDGET_NODES = 20_000


def pack(
    slots: tuple[Slot, ...],
    items: tuple[Item, ...],
    *,
    present: tuple[tuple[str, int], ...] = (),
    budget_nodes: int = BUDGET_NODES,
) -> Packing | None:
    """The best packing of the items; None when something that runs may not stay at its home and gets no other place.

    What is kept where it is needs no room: the memory is its already. But a device that gets something new holds all
    that is on it. So what runs on an over-full device goes on, and nothing new comes there.
    `present` are (group, device) of engines that stay and are no items.
    """
    search = _Search(slots=slots, wishes=wishes_of(slots, items), budget_nodes=budget_nodes, present=present)
    search.run()
    if search.best_cost is None:
        return None
    places = {wish.item.key: place for wish, place in zip(search.wishes, search.best_places, strict=True)}
    return Packing(
        places=dict(sorted(places.items())),
        cost=search.best_cost,
        proved=search.nodes <= budget_nodes,
        nodes=min(search.nodes, budget_nodes),
    )


@dataclass(slots=True, kw_only=True)
class _Search:
    """Depth first over the items. What is tried first for each is what is most likely the best."""

    slots: tuple[Slot, ...]
    wishes: tuple[Wish, ...]
    budget_nodes: int
    present: tuple[tuple[str, int], ...]
    nodes: int = 0
    best_cost: Cost | None = None
    best_places: tuple[Place, ...] = ()
    _free: list[int] = field(default_factory=list)
    # How many each device has that are new there.
    _fresh: list[int] = field(default_factory=list)
    # How many of each group each device has.
    _groups: list[dict[str, int]] = field(default_factory=list)
    _places: list[Place] = field(default_factory=list)
    # The same number for devices that no item tells apart.
    _alike: tuple[int, ...] = ()

    def run(self) -> None:
        looks = [self._look(number) for number in range(len(self.slots))]
        self._alike = tuple(looks.index(look) for look in looks)
        self._keep()
        self._descend(0, self._begin())

    def _look(self, device: int) -> tuple[object, ...]:
        """All by which items tell the device from another that has as much free."""
        slot, looks = self.slots[device], []
        for wish in self.wishes:
            need = wish.item.need_bytes[device] if device in wish.item.allowed else None
            looks.append((need, device in wish.home, dict(wish.kept).get(device)))
        return slot.island, slot.region, slot.kind, *looks

    def _begin(self) -> Cost:
        self._free = [slot.free_bytes for slot in self.slots]
        self._fresh = [0 for _ in self.slots]
        self._groups = [{} for _ in self.slots]
        for group, device in self.present:
            self._groups[device][group] = self._groups[device].get(group, 0) + 1
        squares = sum(_square(free) for free in self._free)
        return Cost(left_out=0, moves=0, strays=0, crossings=0, crowding=0, scatter=-squares)

    def _keep(self) -> None:
        """The answer to begin with, so that there is one whatever the budget: what runs stays, all else is left out."""
        cost = self._begin()
        places = tuple(wish.home if wish.item.runs else None for wish in self.wishes)
        for wish, place in zip(self.wishes, places, strict=True):
            if place is not None and not wish.has_home:
                return
            cost = self._with(wish, place, wish.kept, cost)
            self._occupy(wish, place, wish.kept, 1)
        self.best_cost, self.best_places = cost, places

    def _descend(self, depth: int, cost: Cost) -> None:
        self.nodes += 1
        if self.nodes > self.budget_nodes:
            return
        bound = self._bound(depth, cost)
        if bound is None or (self.best_cost is not None and bound >= self.best_cost):
            return
        if depth == len(self.wishes):
            self.best_cost, self.best_places = cost, tuple(self._places)
            return
        wish = self.wishes[depth]
        for place in self._choices(wish):
            used = taken(wish, place)
            after = self._with(wish, place, used, cost)
            self._occupy(wish, place, used, 1)
            self._places.append(place)
            self._descend(depth + 1, after)
            self._places.pop()
            self._occupy(wish, place, used, -1)
            if self.nodes > self.budget_nodes:
                return

    def _occupy(self, wish: Wish, place: Place, used: Used, sign: int) -> None:
        group, fresh = wish.item.group, sign * (not stays_put(wish, place))
        for device, size in used:
            self._free[device] -= sign * size
            self._fresh[device] += fresh
        for device in lived_on(wish, place, used) if group else ():
            self._groups[device][group] = self._groups[device].get(group, 0) + sign

    def _with(self, wish: Wish, place: Place, used: Used, cost: Cost) -> Cost:
        """The cost once the item has this place."""
        away = is_away(wish, place)
        return Cost(
            left_out=cost.left_out + (place is None),
            moves=cost.moves + (away and wish.item.runs),
            strays=cost.strays + (away and not wish.item.runs),
            crossings=cost.crossings + self._crossings(place or ()),
            crowding=cost.crowding + self._crowding(wish, place, used),
            scatter=cost.scatter + self._scatter(used),
        )

    def _crossings(self, place: tuple[int, ...]) -> int:
        if len(place) < 2:
            return 0
        slots = [self.slots[device] for device in place]
        return len({slot.island for slot in slots}) + len({slot.region for slot in slots}) - 2

    def _crowding(self, wish: Wish, place: Place, used: Used) -> int:
        return sum(self._groups[device].get(wish.item.group, 0) for device in lived_on(wish, place, used))

    def _scatter(self, used: Used) -> int:
        return sum(_square(self._free[device]) - _square(self._free[device] - size) for device, size in used)

    def _choices(self, wish: Wish) -> Iterator[Place]:
        """The places that the item can have now, those that look best first; to be left out is the last resort."""
        item = wish.item
        places = () if self._is_barred(wish) else self._new_places(wish)
        choices = [place for place in places if not stays_put(wish, place)]
        if item.runs and self._may_stay(wish):
            choices.append(wish.home)
        yield from sorted(choices, key=lambda place: self._rank(wish, place))
        if self._may_be_left_out(wish):
            yield None

    def _is_barred(self, wish: Wish) -> bool:
        """Whether something that it requires is left out."""
        return any(number < len(self._places) and self._places[number] is None for number in wish.requires)

    def _may_be_left_out(self, wish: Wish) -> bool:
        """Whether nothing that has a place requires it, and what it holds can stay."""
        required = any(number < len(self._places) and self._places[number] is not None for number in wish.required_by)
        return not wish.item.runs and not required and self._may_keep(wish)

    def _new_places(self, wish: Wish) -> Iterator[tuple[int, ...]]:
        """Where it fits. Of places that differ only by devices that nothing tells apart, one is enough."""
        need, free = wish.item.need_bytes, self._free
        seen: set[tuple[object, ...]] = set()
        for row in wish.rows:
            fitting = sorted(device for device in row if free[device] >= need[device])
            looks = {
                device: (self._alike[device], free[device], self._fresh[device] > 0, *self._neighbours(device))
                for device in fitting
            }
            for place in combinations(fitting, wish.item.count):
                look = tuple(sorted(looks[device] for device in place))
                if look not in seen:
                    seen.add(look)
                    yield place

    def _neighbours(self, device: int) -> list[tuple[str, int]]:
        return sorted(entry for entry in self._groups[device].items() if entry[1])

    def _rank(self, wish: Wish, place: tuple[int, ...]) -> tuple[object, ...]:
        used = taken(wish, place)
        return (
            is_away(wish, place),
            self._crossings(place),
            self._crowding(wish, place, used),
            self._scatter(used),
            place,
        )

    def _may_stay(self, wish: Wish) -> bool:
        """Whether what runs can stay at its home."""
        return wish.has_home and self._may_keep(wish)

    def _may_keep(self, wish: Wish) -> bool:
        """Whether what the item holds can stay: nothing new is on its devices, or there is room for both."""
        return all(not self._fresh[device] or self._free[device] >= size for device, size in wish.kept)

    def _bound(self, depth: int, cost: Cost) -> Cost | None:
        """No packing below this node costs less; None if there is none below.

        Memory only ever gets less. 1. An item that fits nowhere now is left out, and so is one that requires something
        that is. 2. Of the others no more are placed
        than all free memory together holds, the smallest first; but what runs is placed. 3. What runs and cannot stay
        is moved. 4. If only those of 1. are left out, others that cannot come home stray. 5. Then also, an item that
        is placed where f is free takes 2fx - x*x from the sum of squares, at least x*x, since x <= f.
        """
        room = sum(free for free in self._free if free > 0)
        sizes, squares, left_out, moves, strays = [], 0, 0, 0, 0
        for wish in self.wishes[depth:]:
            stays = wish.item.runs and self._may_stay(wish)
            least = None if self._is_barred(wish) else self._least(wish, stays)
            if least is None:
                if not self._may_be_left_out(wish):
                    return None
                left_out += 1
                continue
            size, square = least
            squares += square
            if wish.item.runs:
                room -= size
                moves += not stays
            else:
                sizes.append(size)
                strays += bool(wish.home) and not self._comes_home(wish)
        if room < 0:
            return None
        more = 0
        for size in sorted(sizes):
            room -= size
            more += room < 0
        # With more left out the packing is worse by its first figure already, and which are placed is not known.
        return Cost(
            left_out=cost.left_out + left_out + more,
            moves=cost.moves + moves,
            strays=cost.strays + (0 if more else strays),
            crossings=cost.crossings,
            crowding=cost.crowding,
            scatter=cost.scatter + (0 if more else squares),
        )

    def _least(self, wish: Wish, stays: bool) -> tuple[int, int] | None:
        """The least memory that the item takes, and the least sum of squares; None if it fits nowhere.

        What stays takes nothing for sure from a device that can become over-full.
        """
        need, free = wish.item.need_bytes, self._free
        options = [wish.stays_least] if stays else []
        for row in wish.rows:
            missing, total, squares = wish.item.count, 0, 0
            for device in row:
                if not missing:
                    break
                size = need[device]
                if size <= free[device]:
                    missing, total, squares = missing - 1, total + size, squares + size * size
            if not missing:
                options.append((total, squares))
        return (min(total for total, _ in options), min(squares for _, squares in options)) if options else None

    def _comes_home(self, wish: Wish) -> bool:
        return wish.has_home and all(self._free[device] >= wish.item.need_bytes[device] for device in wish.home)


def _square(free: int) -> int:
    return free * free if free > 0 else 0
