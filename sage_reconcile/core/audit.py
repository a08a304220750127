"""A second opinion on a plan, by other code than the planner's: every prefix of the acts is sound, the end is right.

It knows what a plan says and nothing of how it was made. An empty answer lets the plan through; anything else is a
mistake of ours, and nothing is done.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from sage_reconcile.core.desired import DesiredState
from sage_reconcile.core.identity import EngineId, ProcessIdentity
from sage_reconcile.core.observed import Engine, ObservedState
from sage_reconcile.core.plan import Act, Plan, RelabelEngine, StartEngine, StopEngine
from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.spec import IDENTITY_FIELDS, written_fields

# A fraction is told with four digits.
_ROUNDING = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One law that a plan would break."""

    law: str
    what: str


@dataclass(slots=True, kw_only=True)
class _Seat:
    """An engine of the simulated world: just what the laws are about."""

    engine: EngineId
    leader: ProcessIdentity | None
    port: int
    devices: dict[str, int]
    written: str


def audit(plan: Plan, desired: DesiredState, observed: ObservedState) -> tuple[Violation, ...]:
    """Every way in which carrying out the plan on the observed world would break a law."""
    seats = [
        _Seat(
            engine=engine.id,
            leader=engine.leader,
            port=engine.resolved.placement.port,
            devices=_held(engine),
            written=engine.written,
        )
        for engine in observed.engines
    ]
    ours_pids = {process.pid for engine in observed.engines for process in engine.members}
    foreign_ports = {
        listener.port: listener.owner for listener in observed.listeners if not set(listener.pids) & ours_pids
    }
    foreign_ports[desired.router.port] = "the router"
    found: list[Violation] = []
    for index, act in enumerate(plan.acts):
        found += _order_violations(index, act)
        found += _ownership_violations(act, plan, seats)
        _carry_out(act, seats)
        if isinstance(act, StartEngine):
            found += _start_violations(act, desired, observed, seats, foreign_ports)
    found += _unordered_violations(plan)
    found += _end_violations(plan, desired, seats)
    return tuple(found)


def _order_violations(index: int, act: Act) -> Iterable[Violation]:
    if any(earlier >= index for earlier in act.after):
        yield Violation(law="order", what=f"act {index} on {act.engine} waits for a later act")


def _ownership_violations(act: Act, plan: Plan, seats: list[_Seat]) -> Iterable[Violation]:
    """Only engines of this project, seen running, are stopped or relabelled, and nothing that is blocked is touched."""
    if act.engine.project != plan.project:
        yield Violation(law="not ours, not touched", what=f"{act.engine.full} is of another project")
    if isinstance(act, StartEngine):
        return
    seat = next((seat for seat in seats if seat.leader == act.leader), None)
    if seat is None or seat.engine != act.engine:
        yield Violation(law="not ours, not touched", what=f"pid {act.leader.pid} was not seen as {act.engine}")
    if any(blocked.engine == act.engine for blocked in plan.blocked):
        yield Violation(law="a blocked engine is kept", what=f"{act.engine} is blocked and would be touched")


def _carry_out(act: Act, seats: list[_Seat]) -> None:
    match act:
        case StopEngine():
            seats[:] = [seat for seat in seats if seat.leader != act.leader]
        case RelabelEngine():
            for seat in seats:
                if seat.leader == act.leader:
                    seat.written = act.written
        case StartEngine():
            place = act.resolved.placement
            seats.append(
                _Seat(
                    engine=act.engine,
                    leader=None,
                    port=place.port,
                    devices=_given(place),
                    written=act.written,
                )
            )


def _start_violations(
    act: StartEngine,
    desired: DesiredState,
    observed: ObservedState,
    seats: list[_Seat],
    foreign_ports: dict[int, str],
) -> Iterable[Violation]:
    """Right after a start: its port is its own, it is the only one of its id, its devices hold what is on them."""
    place = act.resolved.placement
    if sum(seat.port == place.port for seat in seats) > 1 or place.port in foreign_ports:
        holder = foreign_ports.get(place.port, "another engine")
        yield Violation(law="no port is shared", what=f"{act.engine} on port {place.port}, which {holder} has")
    if str(place.port) not in " ".join(act.resolved.argv) and act.resolved.runtime != "command":
        yield Violation(law="the port planned is the port told", what=f"{act.engine} is not told port {place.port}")
    if sum(seat.engine == act.engine for seat in seats) > 1:
        yield Violation(law="no engine twice", what=f"{act.engine} would run twice")
    yield from _device_violations(act, desired, observed, seats)
    if not any(wanted.id == act.engine for wanted in desired.wanted):
        yield Violation(law="only what is wanted starts", what=f"nobody wants {act.engine}")


def _given(place: Placement) -> dict[str, int]:
    return dict.fromkeys(place.devices, place.memory_bytes_per_device + place.context_bytes_per_device)


def _held(engine: Engine) -> dict[str, int]:
    """What an engine that runs counts for: what it was given, or what it uses where that is more."""
    held = _given(engine.resolved.placement)
    for uuid, used in engine.measured_bytes:
        held[uuid] = max(held.get(uuid, 0), used)
    return held


def _device_violations(
    act: StartEngine, desired: DesiredState, observed: ObservedState, seats: list[_Seat]
) -> Iterable[Violation]:
    """Its devices are there, hold all that is on them, and are what it is shown: by UUID, or by number."""
    place = act.resolved.placement
    devices = {device.uuid: device for device in observed.devices}
    started = {(seat.engine, uuid) for seat in seats if seat.leader is None for uuid in seat.devices}
    put_back = any(wanted.id == act.engine and wanted.pin is not None for wanted in desired.wanted)
    left = []
    for uuid in place.devices:
        device = devices.get(uuid)
        if device is None or device.closed:
            yield Violation(law="only devices that are there", what=f"{act.engine} on {uuid}, which is not to be had")
            continue
        # What a dead process has not given back is waited for by a start of the same engine there, and by nobody else
        # but an engine that is put back.
        awaited = sum(entry.held_bytes for entry in device.lingering if put_back or (entry.engine, uuid) in started)
        capacity = device.total_bytes - device.reserved_bytes - device.foreign_bytes + awaited - desired.reserve_bytes
        used = sum(seat.devices.get(uuid, 0) for seat in seats)
        left.append(capacity + desired.reserve_bytes - used + place.memory_bytes_per_device)
        if used > capacity:
            yield Violation(law="no device is over-full", what=f"{uuid} would hold {used} bytes with {act.engine}")
    # The number of a slice is that of its whole GPU.
    numbers = [str(devices[uuid].number) for uuid in place.devices if uuid in devices and not devices[uuid].parent]
    shown = {",".join(place.devices)} | ({",".join(numbers)} if len(numbers) == len(place.devices) else set())
    visible = dict(act.env).get("CUDA_VISIBLE_DEVICES")
    if visible not in shown:
        yield Violation(law="an engine sees its planned devices", what=f"{act.engine} would see {visible!r}")
    if len(set(place.devices)) != len(place.devices):
        yield Violation(law="an engine sees its planned devices", what=f"{act.engine} has one device twice")
    if dict(act.env).get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        yield Violation(law="an engine sees its planned devices", what=f"{act.engine} may count devices otherwise")
    if not put_back:
        yield from _telling_violations(
            act, [devices[uuid].total_bytes for uuid in place.devices if uuid in devices], left
        )


def _telling_violations(act: StartEngine, totals: list[int], left: list[int]) -> Iterable[Violation]:
    """The share that it is told is what was planned: of each device, or of the least that is `left` when it starts."""
    planned = act.resolved.placement.memory_bytes_per_device
    share = _told(act.resolved.argv, "--gpu-memory-utilization")
    if share is not None and not all(int(share * total) <= planned <= (share + _ROUNDING) * total for total in totals):
        yield Violation(
            law="the memory planned is the memory told", what=f"{act.engine} is told {share} of its devices"
        )
    share = _told(act.resolved.argv, "--mem-fraction-static")
    if share is not None and left and not 0 < int(share * min(left)) <= planned:
        yield Violation(
            law="the memory planned is the memory told", what=f"{act.engine} is told {share} of {min(left)}"
        )


def _told(argv: tuple[str, ...], name: str) -> float | None:
    """The number that a command line has for an option; None where it has none."""
    values = [value for word, value in zip(argv, argv[1:], strict=False) if word == name]
    return float(values[-1]) if values else None


def _unordered_violations(plan: Plan) -> Iterable[Violation]:
    """Acts that are not ordered by `after` may overlap in time, so they must not want the same thing."""
    reach: list[set[int]] = []
    for act in plan.acts:
        reach.append(set(act.after).union(*(reach[earlier] for earlier in act.after if earlier < len(reach))))
    for later, act in enumerate(plan.acts):
        for earlier in range(later):
            if earlier in reach[later]:
                continue
            first = plan.acts[earlier]
            if StartEngine not in (type(first), type(act)):
                continue  # Stops only free what they have, whoever else stops.
            same_port = _port(act) is not None and _port(first) == _port(act)
            if same_port or first.engine == act.engine:
                yield Violation(law="order", what=f"acts {earlier} and {later} on {act.engine} could overlap")
            elif _devices(first) & _devices(act) and earlier not in getattr(act, "behind", ()):
                yield Violation(law="order", what=f"acts {earlier} and {later} could overlap on a device")


def _devices(act: Act) -> set[str]:
    match act:
        case StopEngine():
            return set(act.devices)
        case StartEngine():
            return set(act.resolved.placement.devices)
        case RelabelEngine():
            return set()


def _port(act: Act) -> int | None:
    match act:
        case StopEngine():
            return act.port
        case StartEngine():
            return act.resolved.placement.port
        case RelabelEngine():
            return None


def _end_violations(plan: Plan, desired: DesiredState, seats: list[_Seat]) -> Iterable[Violation]:
    """At the end all that is wanted and not blocked runs as wanted, once."""
    blocked = {blocked.engine for blocked in plan.blocked}
    for wanted in desired.wanted:
        if wanted.id in blocked:
            continue
        mine = [seat for seat in seats if seat.engine == wanted.id]
        if len(mine) != 1:
            yield Violation(law="all that is wanted runs once", what=f"{wanted.id} would run {len(mine)} times")
            continue
        runs, wants = json.loads(mine[0].written), written_fields(wanted.spec)
        touched = any(act.engine == wanted.id for act in plan.acts)
        same = all(runs.get(name) == wants.get(name) for name in IDENTITY_FIELDS)
        # A default that was written out, or left out, is the same wish: only what this plan started must match whole.
        if touched and any(isinstance(act, StartEngine) and act.engine == wanted.id for act in plan.acts) and not same:
            yield Violation(law="all that is wanted runs once", what=f"{wanted.id} would not run as wanted")
