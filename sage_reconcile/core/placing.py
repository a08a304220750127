"""A home for everything that should start: devices and a port for each, or a refusal. Pure.

1. What is cheap to refuse: a missing program or model, a dependency that will not be there, no port. 2. Devices, all at
once, by the exact search of core.housing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from sage_reconcile.core.compare import Change, Comparison, listed
from sage_reconcile.core.desired import DesiredState, Wanted
from sage_reconcile.core.facts import RecordFact
from sage_reconcile.core.housing import out_of_the_question, seated
from sage_reconcile.core.identity import EngineId, ProcessIdentity
from sage_reconcile.core.lookup import why_unasked
from sage_reconcile.core.needs import Claim, Need, model_fact, need_of, program_fact, shape_of
from sage_reconcile.core.observed import Engine, ObservedState, spec_of
from sage_reconcile.core.placement import Taken, placement, port_of
from sage_reconcile.core.plan import Blocked
from sage_reconcile.core.puzzle import Candidate, Follower, Seat
from sage_reconcile.core.refusal import Refusal
from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes import program_of, runtime_of
from sage_reconcile.core.spec import is_path, needs_gpu

# What may depend on an engine in these states: it is ready, or waited for.
_CAN_BE_HAD = ("ready", "starting")

# Whether running engines may make room: allowed; told, where that would help; never.
Moves = Literal["allowed", "told", "never"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """What came of placing once: all of it, or the refusals that come first, after which it is tried again."""

    places: Mapping[EngineId, Placement]
    refusals: tuple[Blocked, ...] = ()
    # Running engines that make room.
    moves: tuple[Change, ...] = ()
    proved: bool = True


def placed(
    changes: list[Change],
    found: Comparison,
    desired: DesiredState,
    observed: ObservedState,
    moves: Moves,
    *,
    only_shown: bool,
) -> Placed:
    """A placement for each start, or a refusal for each that has none. Only shown, it may be on made-up devices."""
    # (1)
    ports, refusals = _ports_for(changes, found, desired, observed, only_shown=only_shown)
    if refusals:
        return Placed(places={}, refusals=tuple(refusals))
    # (2)
    leaving = {engine.leader for change in changes for engine in change.stops}
    wanting = [change for change in changes if change.start is not None and _wants_devices(change.start)]
    requires = _chains(changes)
    candidates = tuple(replace(_candidate(change, observed), requires=requires.pop(change.id)) for change in wanting)
    movable = _movable(found, desired, observed) if moves != "never" and candidates else ()
    settled = {candidate.wanted.id for candidate in candidates}
    movable = tuple(candidate for candidate in movable if candidate.wanted.id not in settled)
    seating = seated(
        candidates,
        desired,
        observed,
        leaving,
        movable=movable,
        may_move=moves == "allowed",
        followers=tuple(Follower(id=engine, requires=others) for engine, others in sorted(requires.items())),
    )
    if seating.refusals:
        at = {change.id: change.start.at for change in wanting if change.start is not None}
        return Placed(
            places={}, refusals=tuple(_blocked(engine, at[engine], why) for engine, why in seating.refusals.items())
        )
    moved = tuple(_move(candidate, seating.seats) for candidate in movable if candidate.wanted.id in seating.seats)
    if moved:
        return Placed(places={}, moves=moved)
    places = {
        change.id: placement(change.start, ports[change.id], observed, seating.seats.get(change.id))
        for change in changes
        if change.start is not None
    }
    return Placed(places=places, proved=seating.proved)


def _blocked(engine: EngineId, at: str, refusal: Refusal) -> Blocked:
    return Blocked(
        engine=engine,
        reason=refusal.reason,
        why=refusal.why,
        would_help=refusal.would_help,
        devices=refusal.devices,
        at=at,
    )


# --- devices ----------------------------------------------------------------------------------------------------------


def _wants_devices(wanted: Wanted) -> bool:
    if wanted.pin is not None:
        return bool(wanted.pin.resolved.placement.devices)
    return needs_gpu(wanted.spec)


def _chains(changes: list[Change]) -> dict[EngineId, tuple[EngineId, ...]]:
    """Which starts require which others: of those that want devices, or wait for one that does.

    Where something runs now and can be had, that goes on if its successor has no place: nothing requires that.
    """
    starting = {change.id: change.start for change in changes if change.start is not None}
    runs = {change.id for change in changes if any(engine.leader_alive for engine in change.stops)}
    can_be_had = {
        change.id
        for change in changes
        if any(engine.leader_alive and engine.state in _CAN_BE_HAD for engine in change.stops)
    }
    requires = {
        engine: {
            other
            for other in starting.keys() - (can_be_had if wanted.pin is None else runs)
            if str(other.first) in wanted.depends_on
        }
        for engine, wanted in starting.items()
    }
    chained = {engine for engine, wanted in starting.items() if _wants_devices(wanted)}
    while more := {engine for engine, others in requires.items() if others & chained} - chained:
        chained |= more
    return {engine: tuple(sorted(requires[engine] & chained)) for engine in chained}


def _candidate(change: Change, observed: ObservedState) -> Candidate:
    assert change.start is not None
    wanted = change.start
    if change.action == "move":
        return _running_candidate(wanted, change.stops[-1], observed)
    return Candidate(
        wanted=wanted,
        need=_need(wanted, observed),
        stops=change.stops,
        takes_slices=wanted.pin is not None or runtime_of(wanted.spec).takes_slices,
    )


def _need(wanted: Wanted, observed: ObservedState) -> Need:
    """What it needs; of an engine that is put back, what it had."""
    if wanted.pin is None:
        return need_of(wanted.spec, observed)
    place = wanted.pin.resolved.placement
    claim = Claim(
        memory_bytes=place.memory_bytes_per_device,
        context_bytes=place.context_bytes_per_device,
        fraction=place.memory_fraction,
        source=place.memory_source,
    )
    return Need(
        count=len(place.devices),
        told=place.memory_told,
        claims=tuple((device.uuid, claim) for device in observed.devices),
    )


def _movable(found: Comparison, desired: DesiredState, observed: ObservedState) -> tuple[Candidate, ...]:
    """Running engines of this project that may be started again elsewhere to make room."""
    wanted = {one.id: one for one in desired.wanted}
    candidates = []
    for engine in found.unchanged:
        one = wanted.get(engine.id)
        home = engine.resolved.placement.devices
        if one is None or one.pin is not None or spec_of(engine) is None or why_unasked(one.spec.model, observed):
            continue
        if not home or not set(home) <= {device.uuid for device in observed.devices}:
            continue
        candidates.append(_running_candidate(one, engine, observed))
    return tuple(candidates)


def _running_candidate(wanted: Wanted, engine: Engine, observed: ObservedState) -> Candidate:
    """Where it is, it counts for what it holds; started anew, for what it would be given."""
    return Candidate(
        wanted=wanted,
        need=need_of(wanted.spec, observed),
        stops=(engine,),
        takes_slices=runtime_of(wanted.spec).takes_slices,
        runs=True,
    )


def _move(candidate: Candidate, seats: Mapping[EngineId, Seat]) -> Change:
    (engine,) = candidate.stops
    names = ", ".join(f"gpu{device.index}" for device in seats[candidate.wanted.id].devices)
    return Change(
        id=engine.id,
        stops=(engine,),
        start=candidate.wanted,
        action="move",
        reason="moved",
        cause=f"makes room for others, to {names}",
    )


# --- ports and parts --------------------------------------------------------------------------------------------------


def _ports_for(
    changes: list[Change], found: Comparison, desired: DesiredState, observed: ObservedState, *, only_shown: bool
) -> tuple[dict[EngineId, int], list[Blocked]]:
    """A port for each start that lacks nothing, and a refusal for each of the others."""
    stopping = {engine.leader for change in changes for engine in change.stops}
    homeless = {blocked.engine for blocked in found.blocked}
    homeless |= {wanted.id for wanted in desired.wanted} - {change.id for change in changes}
    kept = [engine for engine in observed.engines if engine.leader_alive and engine.leader not in stopping]
    homeless -= {engine.id for engine in kept}
    unready = {engine.id for engine in kept} - _to_be_ready(kept, found)
    staying, freed = _ports(observed, stopping, desired)
    asked = {wanted.spec.port: wanted.id for wanted in desired.wanted if isinstance(wanted.spec.port, int)}
    asked |= {w.pin.resolved.placement.port: w.id for w in desired.wanted if w.pin is not None}
    # An engine that comes back after a crash finds its port where it left it, whoever comes with it.
    coming_back = {change.id for change in changes if change.start is not None}
    asked = {record.port: record.engine for record in _latest_last(observed) if record.engine in coming_back} | asked
    ports: dict[EngineId, int] = {}
    refusals: list[Blocked] = []
    for change in _homes_first(changes):
        wanted = change.start
        if wanted is None:
            continue
        taken = Taken(
            ports=staying | {port: str(engine) for engine, port in ports.items()},
            freed_ports=freed,
            asked_ports={port for port, engine in asked.items() if engine != wanted.id},
        )
        predecessor = change.stops[-1] if change.stops else None
        port = port_of(wanted, desired, observed, predecessor, taken)
        if isinstance(port, int) and _wants_devices(wanted):
            port = out_of_the_question(wanted, observed, made_up_will_do=only_shown) or port
        if isinstance(port, int):
            # What is put back was there beside it, ready or not.
            port = _missing_part(wanted, observed, homeless if wanted.pin is not None else homeless | unready) or port
        if isinstance(port, Refusal):
            refusals.append(_blocked(wanted.id, wanted.at, port))
        else:
            ports[wanted.id] = port
    return ports, refusals


def _to_be_ready(kept: list[Engine], found: Comparison) -> set[EngineId]:
    """Those of the engines that go on as they are which are ready, become it by themselves, or by their new label."""
    relabelled = {engine.leader for update in found.updates for engine in update.stops}
    return {
        engine.id
        for engine in kept
        if engine.state in _CAN_BE_HAD or (engine.phase == "draining" and engine.leader in relabelled)
    }


def _latest_last(observed: ObservedState) -> list[RecordFact]:
    """Of several that had a port it is the last one's."""
    return sorted(observed.records, key=lambda record: (record.started_at, record.engine, record.leader))


def _homes_first(changes: list[Change]) -> list[Change]:
    """Engines that have a port before those that need one, so that a newcomer never takes a neighbour's."""
    return sorted(changes, key=lambda change: (not change.stops, change.id))


def _ports(
    observed: ObservedState, stopping: set[ProcessIdentity], desired: DesiredState
) -> tuple[dict[int, str], set[int]]:
    """Ports that stay in use, with who holds them, and ports that the stops set free."""
    staying = {desired.router.port: "the router"}
    freed: set[int] = set()
    members = {process.pid: engine for engine in observed.engines for process in engine.members}
    for listener in observed.listeners:
        holders = [members[pid] for pid in listener.pids if pid in members]
        if holders and len(holders) == len(listener.pids) and all(engine.leader in stopping for engine in holders):
            freed.add(listener.port)
        elif len(holders) < len(listener.pids) or not holders:
            staying[listener.port] = listener.owner
        else:
            staying[listener.port] = holders[0].id.full
    for engine in observed.engines:
        port = engine.resolved.placement.port
        if engine.leader in stopping:
            freed.add(port)
        else:
            staying[port] = engine.id.full
    staying = dict.fromkeys(observed.busy_ports, "a connection of another program") | staying
    return staying, freed - set(staying)


def _missing_part(wanted: Wanted, observed: ObservedState, homeless: set[EngineId]) -> Refusal | None:
    """What the engine lacks besides a place."""
    spec = wanted.spec
    waits_for = sorted(str(engine) for engine in homeless if str(engine.first) in wanted.depends_on)
    if waits_for:
        return Refusal(
            reason="dependency", why=f"it depends on {listed(waits_for)}, which is not ready and cannot be made so"
        )
    if wanted.pin is not None:
        return None  # It ran with exactly this command: starting it again is the only question worth asking.
    program = program_fact(spec, observed)
    unasked = f"nobody looked for the program {program_of(spec)}" if program is None else ""
    unasked = unasked or why_unasked(spec.model, observed)
    if unasked:
        return Refusal(reason="not_observed", why=unasked, would_help=("a new snapshot, taken with these manifests",))
    assert program is not None
    if not program.argv:
        return Refusal(reason="program_missing", why=program.why, would_help=(runtime_of(spec).install_hint,))
    model = model_fact(spec, observed)
    if is_path(spec.model) and model is not None and model.why:
        return Refusal(reason="model_missing", why=model.why)
    return _uneven_heads(wanted, observed) or _too_many_stages(wanted, observed) if needs_gpu(spec) else None


def _uneven_heads(wanted: Wanted, observed: ObservedState) -> Refusal | None:
    """Attention heads go to devices whole, so their number decides over how many a layer may be split."""
    spec, shape = wanted.spec, shape_of(wanted.spec, observed)
    if shape is None or not shape.attention_heads or not runtime_of(spec).splits_heads:
        return None
    if shape.attention_heads % spec.tensor_parallel == 0:
        return None
    possible = [str(count) for count in range(1, 65) if shape.attention_heads % count == 0]
    return Refusal(
        reason="parallelism",
        why=f"tensor_parallel: {spec.tensor_parallel} does not divide its {shape.attention_heads} attention heads",
        would_help=(f"tensor_parallel: {', '.join(possible[:-1])} or {possible[-1]}",) if len(possible) > 1 else (),
    )


def _too_many_stages(wanted: Wanted, observed: ObservedState) -> Refusal | None:
    """Each stage of a pipeline has a layer at least."""
    spec, shape = wanted.spec, shape_of(wanted.spec, observed)
    if shape is None or not shape.layers or not runtime_of(spec).splits_heads:
        return None
    if spec.pipeline_parallel <= shape.layers:
        return None
    return Refusal(
        reason="parallelism",
        why=f"pipeline_parallel: {spec.pipeline_parallel} is more than its {shape.layers} layers",
        would_help=(f"pipeline_parallel <= {shape.layers}",),
    )
