"""What a packing works with: items in the order of the search, and what a place means for one of them. Pure."""

from dataclasses import dataclass, replace

from sage_reconcile.core.slots import Item, Slot

Place = tuple[int, ...] | None
# What is taken of which device.
Used = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """An item, and what of it stays the same during the search."""

    item: Item
    # The devices that may be combined, those where it needs the least first: all, or for several a row for each kind.
    rows: tuple[tuple[int, ...], ...]
    # In ascending order, as every place.
    home: tuple[int, ...]
    # Whether its home is one of its places. What runs may stay at a home of several kinds.
    has_home: bool
    # What it holds if nothing of it changes.
    kept: Used
    # What that takes at least, and its sum of squares: only from devices that cannot become over-full.
    stays_least: tuple[int, int]
    # What it requires, and what requires it, of those that come before it in the search.
    requires: tuple[int, ...] = ()
    required_by: tuple[int, ...] = ()


def wishes_of(slots: tuple[Slot, ...], items: tuple[Item, ...]) -> tuple[Wish, ...]:
    """The items in the order of the search: what runs before all else, what others require, the largest first."""
    held = [0] * len(slots)
    for item in items:
        assert len(item.need_bytes) == len(slots), item.key
        assert len(item.stays_bytes) in (0, len(slots)), item.key
        for device, size in _kept(item):
            held[device] += size
    wishes = []
    for item in items:
        rows, kept = _rows(slots, item), _kept(item)
        sure = [size for device, size in kept if held[device] <= slots[device].free_bytes]
        allowed = item.runs or any(len(item.home) == item.count and set(item.home) <= set(row) for row in rows)
        wishes.append(
            Wish(
                item=item,
                rows=rows,
                home=tuple(sorted(item.home)),
                has_home=bool(item.home) and allowed and set(item.home) <= set(item.allowed),
                kept=kept,
                stays_least=(sum(sure), sum(size * size for size in sure)),
            )
        )
    depths = _depths(items)
    return _joined(sorted(wishes, key=lambda wish: _order(wish, depths[wish.item.key])))


def _depths(items: tuple[Item, ...]) -> dict[str, int]:
    """How long the longest chain of what an item requires is; in a circle, something."""
    depths = {item.key: 0 for item in items}
    for _ in items:
        depths = {
            item.key: max((depths[key] + 1 for key in item.requires if key in depths), default=0) for item in items
        }
    return depths


def _joined(wishes: list[Wish]) -> tuple[Wish, ...]:
    """The wishes, each with what it requires and what requires it, as far as that comes before it."""
    numbers = {wish.item.key: number for number, wish in enumerate(wishes)}
    pairs = [
        (number, numbers[key]) for number, wish in enumerate(wishes) for key in wish.item.requires if key in numbers
    ]
    return tuple(
        replace(
            wish,
            requires=tuple(other for mine, other in pairs if mine == number > other),
            required_by=tuple(other for other, mine in pairs if mine == number > other),
        )
        for number, wish in enumerate(wishes)
    )


def _kept(item: Item) -> Used:
    """What the item holds, by device, if nothing of it changes: not only at its home, of which a part may be lost."""
    if item.stays_bytes:
        return tuple((device, size) for device, size in enumerate(item.stays_bytes) if size or device in item.home)
    return tuple((device, item.need_bytes[device]) for device in item.home if item.runs)


def _rows(slots: tuple[Slot, ...], item: Item) -> tuple[tuple[int, ...], ...]:
    devices = sorted(item.allowed, key=lambda device: (item.need_bytes[device], device))
    if item.count <= 1:
        return (tuple(devices),)
    kinds = sorted({slots[device].kind for device in devices})
    rows = (tuple(device for device in devices if slots[device].kind == kind) for kind in kinds)
    return tuple(row for row in rows if len(row) >= item.count)


def _order(wish: Wish, depth: int) -> tuple[bool, int, int, int, str]:
    """What runs comes first, so that the first answers move nothing, and to move is tried where something is left out.

    Behind what is new it would give way to that: of 100 instances where all may move 14 ended with more left out, 4
    with less.
    """
    item = wish.item
    least = min((sum(item.need_bytes[device] for device in row[: item.count]) for row in wish.rows), default=0)
    return not item.runs, depth, -least, -item.count, item.key


def taken(wish: Wish, place: Place) -> Used:
    """What the item takes with this place. Where it stays, or is left out, what runs of it goes on as it is."""
    if stays_put(wish, place):
        return wish.kept
    return tuple((device, wish.item.need_bytes[device]) for device in place or ())


def stays_put(wish: Wish, place: Place) -> bool:
    """Whether all that it holds with this place is its already."""
    return place is None or (wish.item.runs and place == wish.home)


def lived_on(wish: Wish, place: Place, used: Used) -> list[int]:
    """Its own devices of those that it uses: what it takes beside them crowds nobody of its group."""
    return [device for device, _ in used if device in (wish.home if place is None else place)]


def is_away(wish: Wish, place: Place) -> bool:
    """Whether the item has a place, and it is not the home that it has."""
    return place is not None and bool(wish.home) and place != wish.home
