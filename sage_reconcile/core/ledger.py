"""Whose the memory of each device is: facts of the driver joined with engines and processes. Pure.

There is no ledger on disk: it is derived anew at every look, so nothing in it can leak.
"""

from collections.abc import Iterable, Mapping

from sage_reconcile.core.facts import DeviceFact, Gap, ProcessFact
from sage_reconcile.core.foreign import program_name
from sage_reconcile.core.observed import Device, Engine, Holder

# A device whose memory is used by a process that this machine does not show: it is in another pid namespace, or gone.
_UNKNOWN = "?"


def measured(engine_pids: Iterable[int], devices: Iterable[DeviceFact]) -> tuple[tuple[str, int], ...]:
    """What the processes of an engine use of each device, by UUID; devices that they do not use are left out."""
    pids = set(engine_pids)
    sums = {
        device.uuid: sum(process.used_bytes for process in device.processes if process.pid in pids)
        for device in devices
        if any(process.pid in pids for process in device.processes)
    }
    return tuple(sorted(sums.items()))


def ledger(
    facts: Iterable[DeviceFact], engines: Iterable[Engine], processes: Mapping[int, ProcessFact], node: str
) -> tuple[Device, ...]:
    """The devices, in the order of their indexes. `processes` are the live ones, by pid."""
    facts, engines = tuple(facts), tuple(engines)
    islands = _islands(facts)
    return tuple(
        _device(fact, engines, processes, node, islands[fact.uuid])
        for fact in sorted(facts, key=lambda fact: (fact.index, fact.uuid))
    )


def gaps(facts: Iterable[DeviceFact]) -> tuple[Gap, ...]:
    """Devices of which only totals are known."""
    return tuple(
        Gap(
            what="device memory",
            why=f"the driver does not tell which process uses what of gpu{fact.index}: what our engines were not given "
            "counts as foreign",
            subject=fact.uuid,
        )
        for fact in facts
        if not fact.processes_known
    )


def _device(
    fact: DeviceFact, engines: tuple[Engine, ...], processes: Mapping[int, ProcessFact], node: str, island: int
) -> Device:
    ours = {process.pid for engine in engines for process in engine.members}
    holders = tuple(
        _holder(process.pid, process.used_bytes, processes)
        for process in sorted(fact.processes, key=lambda process: (-process.used_bytes, process.pid))
        if process.pid not in ours
    )
    return Device(
        node=node,
        index=fact.index,
        uuid=fact.uuid,
        name=fact.name,
        total_bytes=fact.total_bytes,
        reserved_bytes=fact.reserved_bytes,
        used_bytes=fact.used_bytes,
        foreign_bytes=max(fact.used_bytes - _ours(fact, engines, ours), 0),
        holders=holders,
        island=island,
        utilization_percent=fact.utilization_percent,
        temperature_celsius=fact.temperature_celsius,
        power_watts=fact.power_watts,
        troubles=fact.troubles,
        parent=fact.parent,
    )


def _ours(fact: DeviceFact, engines: tuple[Engine, ...], pids: set[int]) -> int:
    """The part of what is used that is our engines'.

    Where the driver does not tell it by process, it is taken for granted that they use what they were given, and no
    more: unknown memory is not free memory.
    """
    if fact.processes_known:
        return sum(process.used_bytes for process in fact.processes if process.pid in pids)
    places = [engine.resolved.placement for engine in engines]
    return sum(place.memory_bytes_per_device for place in places if fact.uuid in place.devices)


def _holder(pid: int, used_bytes: int, processes: Mapping[int, ProcessFact]) -> Holder:
    process = processes.get(pid)
    if process is None:
        return Holder(pid=pid, name=_UNKNOWN, user=_UNKNOWN, used_bytes=used_bytes)
    return Holder(pid=pid, name=program_name(process.argv)[:60], user=process.user, used_bytes=used_bytes)


def _islands(facts: tuple[DeviceFact, ...]) -> dict[str, int]:
    """A number for each device, the same for those that reach each other fast.

    GPUs that NVLink connects, directly or through others; without any link, those of one NUMA node. Slices are where
    their GPU is.
    """
    linked = any(fact.links for fact in facts)
    islands: dict[str, int] = {}
    for number, fact in enumerate(sorted(facts, key=lambda fact: (fact.index, fact.uuid))):
        if fact.uuid in islands:
            continue
        island = _reached(fact, facts) if linked else _on_one_node(fact, facts)
        islands |= dict.fromkeys(island, number)
    return islands


def _reached(first: DeviceFact, facts: tuple[DeviceFact, ...]) -> set[str]:
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
                todo += [*fact.links, gpu]
    return found


def _on_one_node(first: DeviceFact, facts: tuple[DeviceFact, ...]) -> set[str]:
    return {fact.uuid for fact in facts if fact.numa_node == first.numa_node}
