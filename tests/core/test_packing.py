"""The packing is the best there is: against every packing of small instances, and within a bound on large ones."""

import os
import random
from itertools import combinations, product

import pytest

from sage_reconcile.core.packing import Cost, Item, Packing, Slot, pack

INSTANCES = int(os.environ.get("INSTANCES", "20000"))

GIB = 1024**3


def everything(slots: tuple[Slot, ...], items: tuple[Item, ...], present: tuple[tuple[str, int], ...]) -> Cost | None:
    """The least cost over all packings, counted in the plainest way; None when there is none."""
    best = None
    choices = [
        [*combinations(item.allowed, item.count), *([] if item.runs else [None])]  # type: ignore[list-item]
        for item in items
    ]
    for places in product(*choices):
        cost = cost_of(slots, items, places, present)
        if cost is not None and (best is None or cost < best):
            best = cost
    return best


def cost_of(
    slots: tuple[Slot, ...],
    items: tuple[Item, ...],
    places: tuple[tuple[int, ...] | None, ...],
    present: tuple[tuple[str, int], ...],
) -> Cost | None:
    """What a packing costs; None when it puts more on a device than is free."""
    free = [slot.free_bytes for slot in slots]
    on: list[list[str]] = [[group for group, device in present if device == number] for number in range(len(slots))]
    left_out = moves = strays = crossings = 0
    for item, place in zip(items, places, strict=True):
        for device in item.home if place is None else place:
            free[device] -= item.stays_bytes if place is None else item.need_bytes
            on[device] += [item.group] if item.group else []
        left_out += place is None
        away = place is not None and item.home != () and set(place) != set(item.home)
        moves += away and item.runs
        strays += away and not item.runs
        crossings += max(len({slots[device].island for device in place or ()}) - 1, 0)
    used = {
        device for item, place in zip(items, places, strict=True) for device in (item.home if place is None else place)
    }
    if any(free[device] < 0 for device in used):
        return None
    crowding = 0
    for number, names in enumerate(on):
        before = [group for group, device in present if device == number]
        for group in {item.group for item in items if item.group}:
            crowding += pairs(names.count(group)) - pairs(before.count(group))
    scatter = -sum(size * size for size in free)
    return Cost(left_out=left_out, moves=moves, strays=strays, crossings=crossings, crowding=crowding, scatter=scatter)


def pairs(count: int) -> int:
    return count * (count - 1) // 2


def instance(rng: random.Random, most_slots: int, most_items: int) -> tuple[tuple[Slot, ...], tuple[Item, ...]]:
    slots = tuple(
        Slot(free_bytes=rng.choice((0, 10, 24, 24, 40, 80)), island=rng.choice((0, 0, 1)))
        for _ in range(rng.randrange(1, most_slots + 1))
    )
    items = []
    free = [slot.free_bytes for slot in slots]
    for number in range(rng.randrange(1, most_items + 1)):
        count = rng.choice((1, 1, 1, 2)) if len(slots) > 1 else 1
        need = rng.choice((5, 10, 12, 20, 24, 40))
        allowed = tuple(sorted(rng.sample(range(len(slots)), rng.randrange(count, len(slots) + 1))))
        home: tuple[int, ...] = ()
        stays = 0
        could = [device for device in allowed if free[device] >= need]
        runs = False
        if rng.random() < 0.5 and len(could) >= count:
            # It runs there now: what runs fits as it is.
            home, runs = tuple(sorted(rng.sample(could, count))), rng.random() < 0.5
            stays = need if runs else rng.choice((0, need))
            for device in home:
                free[device] -= stays
        items.append(
            Item(
                key=f"item{number}",
                need_bytes=need,
                count=count,
                allowed=allowed,
                home=home,
                stays_bytes=stays,
                runs=runs,
                group=rng.choice(("", "a", "b")),
            )
        )
    return slots, tuple(items)


def test_no_packing_of_a_small_instance_is_better() -> None:
    for seed in range(INSTANCES):
        rng = random.Random(seed)
        slots, items = instance(rng, 3, 4)
        present = tuple((rng.choice("ab"), rng.randrange(len(slots))) for _ in range(rng.randrange(3)))

        found = pack(slots, items, present=present)

        best = everything(slots, items, present)
        assert (found.cost if found else None) == best, f"seed {seed}"
        assert found is None or found.proved, f"seed {seed}"
        if found is not None:
            places = tuple(found.places[item.key] for item in items)
            assert cost_of(slots, items, places, present) == found.cost, f"seed {seed}"


def test_the_order_of_items_changes_nothing() -> None:
    for seed in range(INSTANCES // 10):
        rng = random.Random(seed)
        slots, items = instance(rng, 4, 6)
        assert pack(slots, tuple(rng.sample(items, len(items)))) == pack(slots, items), f"seed {seed}"


def test_a_complete_packing_is_found_where_there_is_one() -> None:
    """First fit leaves the largest out here, whichever it takes first of the others."""
    slots = (Slot(free_bytes=40), Slot(free_bytes=24))
    items = tuple(
        Item(key=name, need_bytes=need, count=1, allowed=(0, 1))
        for name, need in (("a", 12), ("b", 12), ("c", 20), ("d", 20))
    )
    found = pack(slots, items)
    assert found is not None and None not in found.places.values()


def large(seed: int) -> tuple[tuple[Slot, ...], tuple[Item, ...]]:
    """8 devices of 80 GiB in two islands, 16 engines of which about 80% run; some of those are being replaced."""
    rng = random.Random(seed)
    now, without_items = [80 * GIB] * 8, [80 * GIB] * 8
    items = []
    for number in range(16):
        need = rng.choice((6, 14, 20, 30, 38, 55)) * GIB
        count = rng.choice((1, 1, 1, 1, 2, 4))
        room = [device for device in range(8) if now[device] >= need]
        runs = rng.random() < 0.8 and len(room) >= count
        home = tuple(sorted(rng.sample(room, count))) if runs else ()
        is_item = not runs or rng.random() < 0.2
        for device in home:
            now[device] -= need
            # What stays is no item: its memory is simply not free.
            without_items[device] -= 0 if is_item else need
        if is_item:
            items.append(
                Item(
                    key=f"engine{number:02}",
                    need_bytes=need,
                    count=count,
                    allowed=tuple(range(8)),
                    home=home,
                    stays_bytes=need if home else 0,
                    group=f"engine{number // 2}",
                )
            )
    slots = tuple(Slot(free_bytes=size, island=device // 4) for device, size in enumerate(without_items))
    return slots, tuple(items)


def test_eight_devices_with_sixteen_engines_are_packed_within_a_bound() -> None:
    found = [pack(*large(seed)) for seed in range(200)]
    packings = [packing for packing in found if packing is not None]
    assert len(packings) == len(found)
    nodes = sorted(packing.nodes for packing in packings)
    assert nodes[len(nodes) // 2] <= 300
    assert sum(packing.proved for packing in packings) >= 190


def test_a_search_that_ends_with_its_budget_says_so_and_has_an_answer() -> None:
    slots = tuple(Slot(free_bytes=80 * GIB + number) for number in range(8))
    items = tuple(
        Item(key=f"{number:02}", need_bytes=(9 + number) * GIB, count=1, allowed=tuple(range(8)))
        for number in range(20)
    )
    found = pack(slots, items, budget_nodes=500)
    assert found is not None and not found.proved and found.nodes == 500
    assert sum(place is None for place in found.places.values()) == found.cost.left_out == 0


def placed(*items: Item, slots: int = 4, free: int = 80, islands: tuple[int, ...] = (0, 0, 1, 1)) -> Packing:
    found = pack(tuple(Slot(free_bytes=free, island=islands[number]) for number in range(slots)), items)
    assert found is not None
    return found


def item(key: str, need: int, count: int = 1, **fields: object) -> Item:
    return Item(**{"key": key, "need_bytes": need, "count": count, "allowed": (0, 1, 2, 3), **fields})  # type: ignore[arg-type]


def test_a_tensor_parallel_group_stays_on_one_island() -> None:
    found = placed(item("small", 50, allowed=(1,)), item("pair", 40, 2))
    assert found.places["pair"] == (2, 3)


def test_replicas_have_devices_of_their_own() -> None:
    found = placed(item("a", 10, group="x"), item("a#1", 10, group="x"))
    assert found.places["a"] != found.places["a#1"]


def test_what_comes_back_comes_home_though_it_would_fit_better_elsewhere() -> None:
    assert placed(item("back", 10, home=(3,))).places == {"back": (3,)}


def test_what_runs_is_moved_only_to_place_one_more_and_as_few_as_can_be() -> None:
    running = [item(f"r{number}", 40, home=(number,), runs=True, allowed=(0, 1)) for number in (0, 1)]
    found = placed(*running, item("new", 60, allowed=(0, 1)), slots=2)
    assert (found.cost.left_out, found.cost.moves) == (0, 1)
    assert placed(*running, item("new", 90, allowed=(0, 1)), slots=2).cost.moves == 0


def test_what_is_left_out_keeps_what_it_has() -> None:
    """The successor needs more than there is: its predecessor stays, and its memory is not given away."""
    old = item("old", 90, home=(0,), stays_bytes=70, allowed=(0,))
    found = pack((Slot(free_bytes=80),), (old, item("new", 20, allowed=(0,))))
    assert found is not None
    assert found.places == {"new": None, "old": None}


@pytest.mark.parametrize("need", [0, 1])
def test_nothing_to_place_is_a_packing(need: int) -> None:
    found = pack((), ())
    assert found is not None and found.places == {} and found.proved
    lonely = pack((), (item("x", need, allowed=()),))
    assert lonely is not None and lonely.places == {"x": None}
