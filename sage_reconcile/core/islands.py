"""Which devices reach each other fast: NVLink, else PCIe switches alone, else one NUMA node. Pure.

One level for a whole machine, since a packing knows of one: where there are PCIe switches, two of their islands on one
socket are as far from each other as two on different sockets. It is the border that matters most: beyond it NCCL sends
everything through the host's memory, unless told otherwise (src/graph/paths.cc, ncclTopoCheckP2p).
"""

from collections.abc import Callable, Iterable

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
