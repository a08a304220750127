"""Raw facts in; engines, foreign processes and gaps out.

An engine is the processes that carry one leader in their label, of our uid, and those in its session. Everything else
that runs is foreign: it counts, and it is never touched.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace

from sage_reconcile.core import health
from sage_reconcile.core.facts import Facts, ListenerFact, ProcessFact, RecordFact
from sage_reconcile.core.foreign import foreign, program_name
from sage_reconcile.core.identity import EngineId, ProcessIdentity
from sage_reconcile.core.label import GATE, Label, parse_label
from sage_reconcile.core.ledger import gaps as device_gaps
from sage_reconcile.core.ledger import judged, ledger, lost, measured, misplaced
from sage_reconcile.core.observed import Engine, Listener, ObservedState, model_of
from sage_reconcile.core.spec import IDENTITY_FIELDS, canonical_json


def assemble(facts: Facts) -> ObservedState:
    """What the facts mean. Pure, and blind to the order in which the facts came."""
    processes = tuple(sorted((fact for fact in facts.processes if fact.alive), key=lambda fact: fact.identity.pid))
    labels = _labels(processes, facts)
    known = _known(processes, facts)
    members = _members(processes, labels, known, facts)
    engines = tuple(
        _engine(
            leader,
            [fact for fact in processes if fact.identity.pid in pids],
            next((labels[pid] for pid in sorted(pids) if pid in labels), None) or known[leader][0],
            facts,
        )
        for leader, pids in sorted(members.items())
    )
    engine_of = {process.pid: engine.id for engine in engines for process in engine.members}
    by_pid = {fact.identity.pid: fact for fact in processes}
    return ObservedState(
        taken_at=facts.taken_at,
        node=facts.node,
        boot_id=facts.boot_id,
        devices=ledger(facts, engines, by_pid),
        engines=tuple(sorted(engines, key=lambda engine: (engine.id, engine.leader))),
        foreign=foreign(processes, set(engine_of) | set(facts.own_pids), facts.listeners, engines),
        listeners=_listeners(facts, processes, engine_of),
        lowest_port=facts.lowest_port,
        client_ports=facts.client_ports,
        busy_ports=tuple(sorted(facts.busy_ports)),
        programs=tuple(sorted(facts.programs, key=lambda program: program.name)),
        models=tuple(sorted(facts.models, key=lambda model: model.model)),
        records=tuple(sorted(facts.records, key=lambda record: (record.engine, record.leader))),
        routers=tuple(sorted(facts.routers, key=lambda router: router.pid)),
        exits=tuple(sorted(facts.exits, key=lambda exit_fact: exit_fact.leader)),
        applied=tuple(sorted(facts.applied, key=lambda applied: applied.engine)),
        footprints=tuple(sorted(facts.footprints, key=lambda fact: fact.order)),
        gaps=tuple(
            sorted(
                facts.gaps + device_gaps(judged(facts, engines, by_pid).devices),
                key=lambda gap: (gap.what, gap.subject, gap.why),
            )
        ),
    )


def _labels(processes: Iterable[ProcessFact], facts: Facts) -> dict[int, Label]:
    """The whole labels of live processes of our uid and pid namespace, by pid."""
    found = {}
    for fact in processes:
        if fact.uid != facts.uid or not fact.label or fact.identity.pid in facts.own_pids:
            continue
        waits = fact.session == fact.identity.pid and fact.argv[: len(GATE)] == GATE
        gate = (fact.identity.pid, fact.identity.start_ticks, facts.namespace) if waits else None
        label = parse_label(dict(fact.label), gate=gate)
        if label is not None and label.leader[2] == facts.namespace:
            found[fact.identity.pid] = label
    return found


def _known(processes: Iterable[ProcessFact], facts: Facts) -> dict[ProcessIdentity, tuple[Label, set[int]]]:
    """Engines whose processes are known without their environment, with their label and live pids.

    Known are the processes that this sage saw as members before. On record are the leader, and what runs in its
    session: as long as no other process has the leader's pid, the session of that number is the one that it made.
    """
    alive = {fact.identity: fact for fact in processes if fact.uid == facts.uid}
    pids = {fact.identity.pid for fact in processes}
    found: dict[ProcessIdentity, tuple[Label, set[int]]] = {}
    for engine in facts.known:
        label = parse_label(dict(engine.label))
        if label is not None and alive.keys() & set(engine.members):
            found[engine.leader] = (label, {member.pid for member in engine.members if member in alive})
    for record in facts.records:
        label = parse_label(dict(record.label))
        if label is None or record.leader.boot_id != facts.boot_id or label.leader[2] != facts.namespace:
            continue
        mine = {record.leader.pid} if record.leader in alive else set()
        if mine or record.leader.pid not in pids:
            mine |= {fact.identity.pid for fact in alive.values() if fact.session == record.leader.pid}
        if mine:
            found[record.leader] = (label, found.get(record.leader, (label, set()))[1] | mine)
    return found


def _members(
    processes: Iterable[ProcessFact],
    labels: Mapping[int, Label],
    known: Mapping[ProcessIdentity, tuple[Label, set[int]]],
    facts: Facts,
) -> dict[ProcessIdentity, set[int]]:
    """Pids of each engine, by its leader: those that name the leader, those in its session, and those known before."""
    members: dict[ProcessIdentity, set[int]] = {}
    for pid, label in labels.items():
        leader = ProcessIdentity(
            node=facts.node, boot_id=facts.boot_id, pid=label.leader[0], start_ticks=label.leader[1]
        )
        members.setdefault(leader, set()).add(pid)
    sessions = {leader.pid: leader for leader, pids in members.items() if _holds_session(leader, pids, processes)}
    unlabelled = [fact for fact in processes if fact.identity.pid not in labels and fact.uid == facts.uid]
    for fact in unlabelled:
        if fact.session in sessions and fact.identity.pid not in facts.own_pids:
            members[sessions[fact.session]].add(fact.identity.pid)
    for leader, (_, pids) in known.items():
        strays = pids - set(labels) - set(facts.own_pids)
        if strays or leader in members:
            members.setdefault(leader, set()).update(strays)
    return members


def _holds_session(leader: ProcessIdentity, pids: set[int], processes: Iterable[ProcessFact]) -> bool:
    """Whether the session with the leader's number is still the leader's.

    The kernel does not give a pid away while a session has its number, so one labelled member in it is proof.
    """
    return any(fact.session == leader.pid for fact in processes if fact.identity.pid in pids)


def _engine(leader: ProcessIdentity, processes: list[ProcessFact], label: Label, facts: Facts) -> Engine:
    record = next((record for record in facts.records if record.leader == leader), None)
    resolved = label.resolved
    alive = any(fact.identity == leader for fact in processes)
    pids = {fact.identity.pid for fact in processes}
    health_fact = next((fact for fact in facts.healths if fact.leader == leader), None)
    first = sorted(processes, key=lambda fact: (fact.identity != leader, fact.identity))
    sockets = [fact for fact in facts.listeners if pids & set(fact.pids)]
    used = measured(pids, facts.devices)
    host = resolved.placement.host
    engine = Engine(
        id=label.engine,
        source=record.source if record and record.source else label.source,
        written=_overlaid(label.written, record),
        resolved=resolved,
        leader=leader,
        leader_alive=alive,
        members=tuple(fact.identity for fact in first),
        state="starting",
        phase=record.phase if record else "",
        proved=(record is not None and record.proved)
        or any(known.proved for known in facts.known if known.leader == leader),
        has_record=record is not None and record.from_start,
        health=health_fact.health if health_fact else "unasked",
        listens_on=tuple(sorted({fact.port for fact in sockets if _answers_at(fact.address, host)})),
        exposed=_exposed(sockets),
        intruder=_intruder(resolved.placement.port, pids, facts),
        measured_bytes=used,
        misplaced=misplaced(resolved.placement, used, facts.devices),
        lost_devices=lost(resolved.placement, facts.gaps),
        in_flight=sum(count for router in facts.routers for key, count in router.in_flight if key == leader),
        started_at=record.started_at if record else 0.0,
        restarts=record.restarts if record else 0,
        log=record.log if record else "",
    )
    signs = health.Signs(
        leader_alive=alive,
        member_count=len(pids),
        host=resolved.placement.host,
        port=resolved.placement.port,
        model=model_of(engine),
        listens_on=engine.listens_on,
        listens_at=tuple(sorted({_socket_name(fact) for fact in sockets})),
        intruder=engine.intruder,
        health=engine.health,
        health_detail=health_fact.detail if health_fact else "",
        models=health_fact.models if health_fact else None,
        has_record=engine.has_record,
        phase=engine.phase,
        device_trouble=_device_trouble(engine),
        proved=engine.proved,
        proof_failure=record.proof_failure if record else "",
        in_flight=engine.in_flight,
    )
    state, reason = health.state(signs)
    return replace(engine, state=state, reason=reason)


def _device_trouble(engine: Engine) -> str:
    """A sentence about devices that are lost, or that it must not use; empty when all is well."""
    place = engine.resolved.placement
    if engine.lost_devices:
        indexes = dict(zip(place.devices, place.device_indexes, strict=False))
        names = ", ".join(f"gpu{indexes[uuid]}" for uuid in engine.lost_devices)
        return f"the driver has lost {names}, where it runs"
    return engine.misplaced


# Every address of the machine, in either family.
_EVERYWHERE = ("0.0.0.0", "::")


def _answers_at(address: str, host: str) -> bool:
    """Whether a socket that is bound to an address answers at the host's."""
    return address.removeprefix("::ffff:") == host or address in _EVERYWHERE


def _exposed(sockets: Iterable[ListenerFact]) -> str:
    open_to_all = sorted({_socket_name(fact) for fact in sockets if fact.address in _EVERYWHERE})
    if not open_to_all:
        return ""
    return f"listens on {', '.join(open_to_all)}: other machines may reach it, past the router and without a key"


def _socket_name(fact: ListenerFact) -> str:
    return f"[{fact.address}]:{fact.port}" if ":" in fact.address else f"{fact.address}:{fact.port}"


def _overlaid(written: str, record: RecordFact | None) -> str:
    """The label's spec with the policy fields of the record in place of its own."""
    if record is None or record.policy is None:
        return written
    identity = {name: value for name, value in json.loads(written).items() if name in IDENTITY_FIELDS | {"name"}}
    policy = {name: value for name, value in json.loads(record.policy).items() if name not in IDENTITY_FIELDS}
    return canonical_json(policy | identity)


def _intruder(port: int, pids: set[int], facts: Facts) -> str:
    """Who else listens on the port. Every socket on it must be a member's, or none is trusted."""
    by_pid = {fact.identity.pid: fact for fact in facts.processes}
    for fact in sorted(facts.listeners, key=lambda fact: (fact.address, fact.pids)):
        if fact.port == port and not set(fact.pids) & pids:
            return f"port {port} is answered by {_owner(fact, by_pid)}, not by this engine"
    return ""


def _owner(fact: ListenerFact, by_pid: Mapping[int, ProcessFact]) -> str:
    if not fact.pids:
        return f"a process of uid {fact.uid}"
    pid = min(fact.pids)
    return f"pid {pid} ({program_name(by_pid[pid].argv) if pid in by_pid else 'gone'})"


def _listeners(
    facts: Facts, processes: Iterable[ProcessFact], engine_of: Mapping[int, EngineId]
) -> tuple[Listener, ...]:
    by_pid = {fact.identity.pid: fact for fact in processes}
    listeners = [
        Listener(
            address=fact.address,
            port=fact.port,
            pids=tuple(sorted(fact.pids)),
            owner=_owner(_without_members(fact, engine_of), by_pid),
            engine=next((engine_of[pid] for pid in sorted(fact.pids) if pid in engine_of), None),
        )
        for fact in facts.listeners
    ]
    return tuple(sorted(listeners, key=lambda listener: (listener.port, listener.address, listener.pids)))


def _without_members(fact: ListenerFact, engine_of: Mapping[int, EngineId]) -> ListenerFact:
    """The socket as held by those that are no engine's, where there are any: they keep it when the engine is gone."""
    others = tuple(pid for pid in fact.pids if pid not in engine_of)
    return replace(fact, pids=others or fact.pids)
