"""Which devices reach each other fast: NVLink, else PCIe switches alone, else one NUMA node. Pure.

The border of an island is the one that matters most: beyond it NCCL sends everything through the host's memory, unless
told otherwise (src/graph/paths.cc, ncclTopoCheckP2p). Beyond the border of a NUMA node, from one CPU to the other, too.
"""

from collections.abc import Callable, Iterable, Sequence

from sage_reconcile.core.facts import DeviceFact


def islands(devices: Iterable[DeviceFact]) -> dict[str, int]:
    """A number for each device, by UUID, the same for those that reach each other fast, directly or through others.

    Slices are where their GPU is.
    """
    facts = tuple(sorted(devices, key=lambda fact: (fact.index, fact.uuid)))
    linked = any(fact.links for fact in facts)
    found: dict[str, int] = {}
    for number, fact in enumerate(facts):
        if fact.uuid in found:
            continue
        if linked:
            island = _reached(fact, facts, lambda one: one.links)
        elif fact.switched:
            island = _reached(fact, facts, lambda one: one.switched)
        else:
            island = {one.uuid for one in facts if not one.switched and one.numa_node == fact.numa_node}
        found |= dict.fromkeys(island, number)
    return found


def regions(devices: Sequence[tuple[int, int | None]]) -> tuple[int, ...]:
    """The same number for devices whose islands are near each other, for devices given as (island, NUMA node).

    That is their NUMA node. Where an island spans several, or some node is not known, all are as near: 0.
    """
    if any(numa is None for _, numa in devices) or len(set(devices)) != len({island for island, _ in devices}):
        return (0,) * len(devices)
    return tuple(numa or 0 for _, numa in devices)


def _reached(
    first: DeviceFact, facts: Iterable[DeviceFact], neighbours: Callable[[DeviceFact], tuple[str, ...]]
) -> set[str]:
    by_gpu: dict[str, list[DeviceFact]] = {}
    for fact in facts:
        by_gpu.setdefault(fact.parent or fact.uuid, []).append(fact)
    found: set[str] = set()
    todo = [first.parent or first.uuid]
    while todo:
        gpu = todo.pop()
        for fact in by_gpu.get(gpu, []):
            if fact.uuid not in found:
                found.add(fact.uuid)
                todo += [*neighbours(fact), gpu]
    return found
