"""Whose the memory of each device is: facts of the driver joined with engines, records and processes. Pure.

There is no ledger on disk: it is derived anew at every look, so nothing in it can leak.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from sage_reconcile.core.facts import DeviceFact, Facts, Gap, ProcessFact, RecordFact
from sage_reconcile.core.foreign import program_name
from sage_reconcile.core.identity import ProcessIdentity
from sage_reconcile.core.islands import islands
from sage_reconcile.core.label import parse_label
from sage_reconcile.core.observed import Device, Engine, Holder, Lingering
from sage_reconcile.core.quantities import gib
from sage_reconcile.core.recovery import asked_for, why_closed
from sage_reconcile.core.resolved import Placement

# A device whose memory is used by a process that this machine does not show: it is in another pid namespace, or gone.
_UNKNOWN = "?"

# What nobody holds and is less than this is the driver's own: it comes and goes as processes do.
DRIVER_SLACK_BYTES = 64 * 1024 * 1024

# The states of an engine that is alive and may not have taken its memory yet.
_MAY_LACK_MEMORY = ("starting", "unready", "draining")


def measured(engine_pids: Iterable[int], devices: Iterable[DeviceFact]) -> tuple[tuple[str, int], ...]:
    """What the processes of an engine use of each device, by UUID; devices that they do not use are left out."""
    pids = set(engine_pids)
    sums = {
        device.uuid: sum(process.used_bytes for process in device.processes if process.pid in pids)
        for device in devices
        if any(process.pid in pids for process in device.processes)
    }
    return tuple(sorted(sums.items()))


def misplaced(placement: Placement, used: Iterable[tuple[str, int]], devices: Iterable[DeviceFact]) -> str:
    """A sentence about devices that an engine uses and was not placed on; empty when there are none."""
    names = {device.uuid: f"gpu{device.index}" for device in devices}
    elsewhere = [(names[uuid], size) for uuid, size in used if uuid not in placement.devices and size > 0]
    if not elsewhere:
        return ""
    uses = ", ".join(f"{gib(size)} GiB of {name}" for name, size in elsewhere)
    planned = ", ".join(f"gpu{index}" for index in placement.device_indexes) or "no GPU"
    return f"uses {uses}, and was placed on {planned}"


def lost(placement: Placement, gaps: Iterable[Gap]) -> tuple[str, ...]:
    """The UUIDs of a placement's devices that the driver has lost, which is more than not to see them."""
    subjects = {gap.subject for gap in gaps if gap.what == "lost device"}
    return tuple(
        uuid
        for uuid, index in zip(placement.devices, placement.device_indexes, strict=False)
        if uuid in subjects or str(index) in subjects
    )


def ledger(facts: Facts, engines: Iterable[Engine], processes: Mapping[int, ProcessFact]) -> tuple[Device, ...]:
    """The devices, in the order of their indexes. `processes` are the live ones, by pid."""
    engines = tuple(engines)
    facts = judged(facts, engines, processes)
    near, numbers = islands(facts.devices), _numbers(facts.devices)
    view = _View(
        facts=facts,
        engines=engines,
        processes=processes,
        dead=_dead(facts, engines, processes),
    )
    return tuple(
        _device(fact, view, near[fact.uuid], numbers.get(fact.index))
        for fact in sorted(facts.devices, key=lambda fact: (fact.index, fact.uuid))
    )


def judged(facts: Facts, engines: Iterable[Engine], processes: Mapping[int, ProcessFact]) -> Facts:
    """The facts, with the driver's lists of processes disbelieved where an engine of ours is missing from them.

    In a container's pid namespace a driver lists no process, or the pids of another namespace, and says that this is
    all: then an engine that works seems to use nothing, and memory is used by nobody that is seen here, nor by the
    dead. To take all of that for foreign would count our engines twice.
    """
    engines = tuple(engines)
    dead = _dead(facts, engines, processes)
    return replace(facts, devices=tuple(_judged(fact, facts, engines, processes, dead) for fact in facts.devices))


def _judged(
    fact: DeviceFact,
    facts: Facts,
    engines: tuple[Engine, ...],
    processes: Mapping[int, ProcessFact],
    dead: tuple["_Dead", ...],
) -> DeviceFact:
    """1. An engine that is ready uses its devices. 2. One that loads may not have begun to.

    So for the sake of one that loads, the list is disbelieved only where it names no process of this machine, and only
    once more is used than before its start.
    """
    unlisted = [engine for engine in _placed(fact, engines) if not dict(engine.measured_bytes).get(fact.uuid)]
    seen = [process.used_bytes for process in fact.processes if process.pid in processes]
    of_the_dead = sum(one.placement.counted_bytes_per_device for one in dead if fact.uuid in one.placement.devices)
    of_nobody = fact.used_bytes - sum(seen) - of_the_dead
    # (1)
    hidden = any(engine.state == "ready" for engine in unlisted) and of_nobody > DRIVER_SLACK_BYTES
    # (2)
    loading = [engine for engine in unlisted if engine.state in _MAY_LACK_MEMORY]
    more = of_nobody - _before(fact, loading, facts)
    hidden |= bool(loading) and not seen and more > DRIVER_SLACK_BYTES
    return replace(fact, processes_known=False) if hidden else fact


def _placed(fact: DeviceFact, engines: Iterable[Engine]) -> list[Engine]:
    return [engine for engine in engines if fact.uuid in engine.resolved.placement.devices]


def _before(fact: DeviceFact, loading: Iterable[Engine], facts: Facts) -> int:
    """What nobody held of a device when these engines were started: that is not theirs."""
    leaders = {engine.leader for engine in loading}
    return max(
        (dict(record.orphaned).get(fact.uuid, 0) for record in facts.records if record.leader in leaders), default=0
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dead:
    """An engine of this boot that has no process any more, as its record has it."""

    record: RecordFact
    placement: Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """What a device is looked at with."""

    facts: Facts
    engines: tuple[Engine, ...]
    processes: Mapping[int, ProcessFact]
    dead: tuple[_Dead, ...]

    def held_by_live(self, fact: DeviceFact) -> int:
        """What live processes hold. A pid of another namespace is alive; one that was ours and is gone is not."""
        gone = {member.pid for known in self.facts.known for member in known.members}
        gone |= {dead.record.leader.pid for dead in self.dead}
        gone -= set(self.processes)
        return sum(process.used_bytes for process in fact.processes if process.pid not in gone)


def _dead(facts: Facts, engines: Iterable[Engine], processes: Mapping[int, ProcessFact]) -> tuple[_Dead, ...]:
    """The latest first, so that it is the latest that memory is taken to be of."""
    live = {engine.leader for engine in engines}
    found = []
    for record in sorted(facts.records, key=lambda record: (-record.started_at, record.engine, record.leader)):
        label = parse_label(dict(record.label))
        if label is None or record.leader in live or _runs_still(record.leader, facts, processes):
            continue
        if label.resolved.placement.devices:
            found.append(_Dead(record=record, placement=label.resolved.placement))
    return tuple(found)


def _runs_still(leader: ProcessIdentity, facts: Facts, processes: Mapping[int, ProcessFact]) -> bool:
    if leader.boot_id != facts.boot_id:
        return True  # Of another boot: nothing of this one can be its own.
    process = processes.get(leader.pid)
    return process is not None and process.identity == leader


def _device(fact: DeviceFact, view: _View, island: int, cuda_number: int | None) -> Device:
    ours = {process.pid for engine in view.engines for process in engine.members}
    holders = tuple(
        _holder(process.pid, process.used_bytes, view.processes)
        for process in sorted(fact.processes, key=lambda process: (-process.used_bytes, process.pid))
        if process.pid not in ours
    )
    foreign = max(fact.used_bytes - _ours(fact, view, ours), 0)
    orphaned = max(fact.used_bytes - view.held_by_live(fact), 0) if fact.processes_known else foreign
    lingering = _lingering(fact, view, min(orphaned, foreign))
    return Device(
        node=view.facts.node,
        index=fact.index,
        uuid=fact.uuid,
        name=fact.name,
        total_bytes=fact.total_bytes,
        reserved_bytes=fact.reserved_bytes,
        used_bytes=fact.used_bytes,
        foreign_bytes=foreign,
        holders=holders,
        orphaned_bytes=orphaned,
        lingering=lingering,
        closed=why_closed(fact) or _closed(lingering, view),
        island=island,
        numa_node=fact.numa_node,
        utilization_percent=fact.utilization_percent,
        temperature_celsius=fact.temperature_celsius,
        power_watts=fact.power_watts,
        troubles=(*asked_for(fact), *fact.troubles),
        parent=fact.parent,
        cuda_number=cuda_number,
    )


def _ours(fact: DeviceFact, view: _View, pids: set[int]) -> int:
    """The part of what is used that is our engines'.

    Where the driver does not tell it by process, it is taken for granted that they use what they were given, and no
    more: unknown memory is not free memory. One that loads has only what has come since its start, up to that.
    """
    if fact.processes_known:
        return sum(process.used_bytes for process in fact.processes if process.pid in pids)
    placed = _placed(fact, view.engines)
    loading = [engine for engine in placed if engine.state in _MAY_LACK_MEMORY]
    settled = sum(_given(engine) for engine in placed if engine not in loading)
    strangers = sum(
        process.used_bytes for process in fact.processes if process.pid in view.processes and process.pid not in pids
    )
    came_since = fact.used_bytes - settled - strangers - _before(fact, loading, view.facts)
    return settled + min(max(came_since, 0), sum(map(_given, loading)))


def _given(engine: Engine) -> int:
    return engine.resolved.placement.counted_bytes_per_device


def _lingering(fact: DeviceFact, view: _View, orphaned: int) -> tuple[Lingering, ...]:
    """Orphaned memory, given out to the dead that had a place here, the latest first, each no more than it could have.

    An engine that used more than it was given leaves the rest to nobody: that stays foreign. So does what nobody held
    before it started: an older driver counts its own memory as used, and other containers are not seen.
    """
    found = []
    for dead in view.dead:
        mine = orphaned - dict(dead.record.orphaned).get(fact.uuid, 0)
        if fact.uuid not in dead.placement.devices or mine <= DRIVER_SLACK_BYTES:
            continue
        held = min(mine, dead.placement.counted_bytes_per_device)
        orphaned -= held
        found.append(Lingering(engine=dead.record.engine, pid=dead.record.leader.pid, held_bytes=held))
    return tuple(found)


def _closed(lingering: tuple[Lingering, ...], view: _View) -> str:
    """Why nothing may be placed on a device: its memory did not come back after a stop."""
    stuck = {dead.record.leader.pid for dead in view.dead if dead.record.phase == "stuck"}
    found = next((entry for entry in lingering if entry.pid in stuck), None)
    if found is None:
        return ""
    return f"{found.engine} (pid {found.pid}) ended, and {gib(found.held_bytes)} GiB did not come back"


def _holder(pid: int, used_bytes: int, processes: Mapping[int, ProcessFact]) -> Holder:
    process = processes.get(pid)
    if process is None:
        return Holder(pid=pid, name=_UNKNOWN, user=_UNKNOWN, used_bytes=used_bytes)
    return Holder(pid=pid, name=program_name(process.argv)[:60], user=process.user, used_bytes=used_bytes)


def _numbers(facts: tuple[DeviceFact, ...]) -> dict[int, int]:
    """How CUDA counts GPUs that it is told to count in PCI order, by their index; empty where a bus is not known.

    The numbers of GPUs that are not seen stay theirs.
    """
    buses = {fact.index: fact.bus_id.lower() for fact in facts}
    if not all(buses.values()):
        return {}
    return dict(zip(sorted(buses, key=lambda index: buses[index]), sorted(buses), strict=True))
