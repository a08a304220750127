"""What a packing is of, and what it costs: slots, items, and places for them. Pure, and blind to what engines are."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One device. `free_bytes` counts every item as gone from where it is now; below 0 where others hold too much."""

    free_bytes: int
    # Devices of one island reach each other fast (NVLink, PCIe switches, or one NUMA node).
    island: int = 0
    # Islands of one region are nearer each other than others (one NUMA node).
    region: int = 0
    # The same for devices of one type and size.
    kind: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Something that wants memory on `count` different devices. Devices are indexes of the slots.

    Several devices are of one kind: the ranks of an engine are all told the same fraction of their device.
    """

    key: str
    # What it needs on each slot, since a fraction of a device is more on a larger one. Only `allowed` is looked at.
    need_bytes: tuple[int, ...]
    count: int
    # The devices that it may have.
    allowed: tuple[int, ...]
    # The devices that it has now, or had; empty for something new.
    home: tuple[int, ...] = ()
    # What it holds on each slot, at home or not, if it gets no new place: what runs now is kept then. Empty if none
    # runs; of what runs as it should, that stands for its needs at home.
    stays_bytes: tuple[int, ...] = ()
    # Whether it runs as it should, so that another place than its home means to move it. It is never left out.
    runs: bool = False
    # Items of one group (the replicas of an engine) rather have different devices.
    group: str = ""
    # Keys of items without which it is worth nothing: it has a place only if they all have one. What runs has none.
    requires: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Cost:
    """What a packing costs; the first difference decides.

    1. `left_out`: items without a place. 2. `moves`: running items that leave their home. 3. `strays`: others that
    come back elsewhere than at their home. 4. `crossings`: islands and regions beyond the first, over all items.
    5. `crowding`: pairs of one group on one device. 6. `scatter`: minus the sum of squares of what stays free, so that
    what is free stays in large pieces; on an over-full device nothing is free.
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
