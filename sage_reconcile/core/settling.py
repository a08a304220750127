"""Whether a device is ready for the next act: its memory at rest, room enough, and given back after a stop. Pure.

An engine that starts measures what is free, so nothing else may move on its devices meanwhile; and between a plan and
its acts others may have taken what was free.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sage_reconcile.core.device_shares import foreign_holders, holders_text
from sage_reconcile.core.identity import ProcessIdentity
from sage_reconcile.core.ledger import DRIVER_SLACK_BYTES
from sage_reconcile.core.observed import Device, Engine, ObservedState, free_bytes, held_bytes, spec_of
from sage_reconcile.core.plan import StartEngine, StopEngine
from sage_reconcile.core.quantities import gib

# A device is at rest when readings this far apart are equal.
SETTLED_SECONDS = 0.25
# How long a start waits for rest, and for memory of the dead to come back.
LONGEST_WAIT_SECONDS = 30.0
# How long devices may be out of sight before a start is given up.
_UNSEEN_SECONDS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a device used when it was last read, and since when that has been so (the host's monotonic clock)."""

    uuid: str
    used_bytes: int
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a start may go on."""

    # go | wait | fail
    answer: str
    why: str = ""
    # Whether it failed because the devices are out of sight.
    unseen: bool = False
    # Dead processes of the engine whose memory was waited for and did not come back.
    stuck: tuple[ProcessIdentity, ...] = ()


def readings(before: Iterable[Reading], observed: ObservedState, now: float) -> tuple[Reading, ...]:
    """The readings of this look. A device that is out of sight has none."""
    earlier = {reading.uuid: reading for reading in before}
    return tuple(
        found
        if (found := earlier.get(device.uuid)) is not None and found.used_bytes == device.used_bytes
        else Reading(uuid=device.uuid, used_bytes=device.used_bytes, since=now)
        for device in observed.devices
    )


def may_start(
    act: StartEngine,
    read: Iterable[Reading],
    observed: ObservedState,
    *,
    now: float,
    waited_seconds: float,
    leaving: Collection[ProcessIdentity] = (),
) -> Verdict:
    """Whether the devices of a start are in sight, at rest, and have room. `leaving` are the engines to be stopped.

    Memory of dead engines is waited for, also where there is room without it: what comes back while an engine starts
    spoils what it measures. Where the engine's own last process does not give it back, there is no start.
    """
    place = act.resolved.placement
    devices = [device for device in observed.devices if device.uuid in place.devices]
    if len(devices) < len(place.devices):
        return _out_of_sight(act, devices, observed, waited_seconds)
    loading = [
        engine
        for engine in observed.engines
        if engine.leader not in leaving and _loads_on(engine, place.devices, act, observed.taken_at)
    ]
    if loading and waited_seconds < act.ready_seconds:
        return Verdict(answer="wait", why=f"{loading[0].id} still loads on its devices")
    rest = {reading.uuid: now - reading.since for reading in read}
    if waited_seconds < LONGEST_WAIT_SECONDS and any(rest.get(uuid, 0.0) < SETTLED_SECONDS for uuid in place.devices):
        return Verdict(answer="wait", why="the memory of its devices still moves")
    lingering = _lingering(devices)
    if lingering and waited_seconds < LONGEST_WAIT_SECONDS:
        return Verdict(answer="wait", why=lingering)
    stuck = _own_dead(act, devices, observed)
    if stuck:
        return Verdict(answer="fail", why=f"{lingering}: it did not come back", stuck=stuck)
    trouble = trouble_on(act, observed.devices, observed.engines)
    if not trouble:
        return Verdict(answer="go")
    short = [device for device in devices if free_bytes(device, observed.engines) < place.counted_bytes_per_device]
    comes_back = short and all(device.orphaned_bytes > DRIVER_SLACK_BYTES for device in short)
    if comes_back and waited_seconds < LONGEST_WAIT_SECONDS:
        return Verdict(answer="wait", why=trouble)
    return Verdict(answer="fail", why=trouble)


def _loads_on(engine: Engine, devices: Collection[str], act: StartEngine, now: float) -> bool:
    """Whether an engine still takes memory there: until it is healthy, or its own time to become so is over.

    Whether it was asked a request of its kind is its project's affair, and no news of its memory.
    """
    if engine.state != "starting" or engine.health == "ok" or not set(engine.resolved.placement.devices) & set(devices):
        return False
    spec = spec_of(engine)
    limit_seconds = spec.ready.timeout if spec is not None else act.ready_seconds
    return not engine.started_at or now - engine.started_at < limit_seconds


def _lingering(devices: Iterable[Device]) -> str:
    """What dead engines have not given back of these devices, in a sentence; empty when there is nothing."""
    parts = [
        f"{gib(entry.held_bytes)} GiB of gpu{device.index} are still held by {entry.engine}, which ended as pid "
        f"{entry.pid}"
        for device in devices
        for entry in device.lingering
    ]
    return ", ".join(parts)


def _own_dead(act: StartEngine, devices: Iterable[Device], observed: ObservedState) -> tuple[ProcessIdentity, ...]:
    """The dead processes of this very engine that hold memory of these devices."""
    pids = {entry.pid for device in devices for entry in device.lingering if entry.engine == act.engine}
    return tuple(
        record.leader for record in observed.records if record.engine == act.engine and record.leader.pid in pids
    )


def _out_of_sight(act: StartEngine, seen: Iterable[Device], observed: ObservedState, waited_seconds: float) -> Verdict:
    place = act.resolved.placement
    uuids = {device.uuid for device in seen}
    missing = ", ".join(
        f"gpu{index}" for uuid, index in zip(place.devices, place.device_indexes, strict=True) if uuid not in uuids
    )
    reasons = [gap.why for gap in observed.gaps if gap.what in ("devices", "device", "lost device")]
    why = f"{missing} is out of sight" + (f": {reasons[0]}" if reasons else "")
    if waited_seconds < _UNSEEN_SECONDS:
        return Verdict(answer="wait", why=why)
    return Verdict(answer="fail", why=why, unseen=True)


def trouble_on(act: StartEngine, devices: Iterable[Device], engines: Iterable[Engine]) -> str:
    """Why the engine cannot start on its devices as they are now, in a sentence; empty when it can."""
    place, engines = act.resolved.placement, tuple(engines)
    by_uuid = {device.uuid: device for device in devices}
    told = dict(act.env).get("CUDA_VISIBLE_DEVICES", "")
    names = place.devices if told == ",".join(place.devices) else tuple(told.split(","))
    for uuid, planned, name in zip(place.devices, place.device_indexes, names, strict=True):
        device = by_uuid.get(uuid)
        if device is None:
            return f"gpu{planned} is out of sight"
        index = device.index
        if device.closed:
            return f"gpu{index} is closed: {device.closed}"
        if name not in (uuid, str(device.number)):
            return (
                f"what was number {name} is number {device.number} now, and its runtime knows devices by their numbers"
            )
        share = place.memory_fraction * device.total_bytes
        if place.memory_told and share > place.memory_bytes_per_device + DRIVER_SLACK_BYTES:
            return (
                f"gpu{index} has {gib(device.total_bytes)} GiB in all now, of which it would be told to use "
                f"{gib(share)}, and {gib(place.memory_bytes_per_device)} were planned"
            )
        free = free_bytes(device, engines)
        if free < place.counted_bytes_per_device:
            return (
                f"gpu{index} has {gib(max(free, 0))} GiB free, and it needs "
                f"{gib(place.counted_bytes_per_device)}: {_holders(device, engines)}"
            )
    return ""


def _holders(device: Device, engines: Iterable[Engine]) -> str:
    held = [(size, str(engine.id)) for engine in engines if (size := held_bytes(engine, device.uuid))]
    held += foreign_holders(device)
    held += [(device.orphaned_bytes, "no live process")] if device.orphaned_bytes > DRIVER_SLACK_BYTES else []
    names = holders_text(held)
    return f"held by {', '.join(names)}" if names else "nobody is known to hold it"


# --- stops ------------------------------------------------------------------------------------------------------------


def orphaned(act: StopEngine, observed: ObservedState) -> tuple[tuple[str, int], ...]:
    """What no live process holds of each device of a stop, before it begins."""
    return tuple((device.uuid, device.orphaned_bytes) for device in observed.devices if device.uuid in act.devices)


def not_back(act: StopEngine, before: Iterable[tuple[str, int]], observed: ObservedState) -> str:
    """What the ended engine has not given back, in a sentence; empty when all of it is back.

    A device that was in sight when the stop began and is not any more has given nothing back: unknown is not free.
    """
    by_uuid = {device.uuid: device for device in observed.devices}
    for uuid, size in before:
        device = by_uuid.get(uuid)
        if device is None:
            return f"the memory of {uuid} cannot be seen"
        more = device.orphaned_bytes - size
        if more > DRIVER_SLACK_BYTES:
            return f"{gib(more)} GiB of gpu{device.index} did not come back"
    return ""
