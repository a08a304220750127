"""(desired, observed) -> Plan. Pure: the same input gives the same plan, in any order of files and facts.

The planner makes one pass, simulates its end with plan.after, and makes another pass on the result, until a pass finds
nothing to do: planning again after an apply gives no steps, by construction.
"""

from collections.abc import Mapping
from dataclasses import replace

from sage_reconcile.core.compare import (
    Change,
    Comparison,
    compared,
    current_process,
    drift_of,
    in_order,
    listed,
    written,
)
from sage_reconcile.core.desired import DesiredState, Pin, Wanted
from sage_reconcile.core.drafting import depends_on, drafted
from sage_reconcile.core.identity import EngineId, ProcessIdentity
from sage_reconcile.core.observed import Engine, ObservedState, project_engines, spec_of
from sage_reconcile.core.ordering import ordered_acts
from sage_reconcile.core.placement import Refusal, Taken, placement
from sage_reconcile.core.plan import (
    Act,
    Awaited,
    Blocked,
    Plan,
    PlanOptions,
    StartEngine,
    after,
)
from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes import program_of, runtime_of
from sage_reconcile.core.spec import (
    is_path,
    served_model,
)

# A second pass finds what the first made room for; each further one needs yet another such engine.
_MOST_PASSES = 64


def make_plan(desired: DesiredState, observed: ObservedState, options: PlanOptions | None = None) -> Plan:
    """The acts that lead from the observed to the desired, what is blocked, and why."""
    options = options or PlanOptions()
    first = plan = _pass(desired, observed, options)
    world = observed
    for _ in range(_MOST_PASSES):
        if not first.acts:
            break
        for act in first.acts:
            world = after(act, world)
        first = _pass(desired, world, options)
        plan = _joined(plan, first)
    assert not first.acts, "planning does not come to rest"
    return plan


def restore_target(before: ObservedState, failed: Plan, desired: DesiredState) -> DesiredState:
    """What must run so that the world is again as it was `before` a plan for `desired` failed: each engine as it was.

    Only what the plan touched may be stopped for it. Engines whose first process was already gone did not run; engines
    that this version cannot read are never touched, so there is nothing to restore.
    """
    running: dict[EngineId, list[Engine]] = {}
    for engine in project_engines(before, desired.project):
        running.setdefault(engine.id, []).append(engine)
    wanted = []
    for engines in running.values():
        engine, _ = current_process(engines)
        spec = spec_of(engine)
        if engine.leader_alive and spec is not None:
            wanted.append(
                Wanted(
                    id=engine.id,
                    spec=spec,
                    depends_on=depends_on(engine),
                    directory=engine.resolved.directory,
                    source=engine.source,
                    pin=Pin(
                        resolved=engine.resolved,
                        leader=engine.leader,
                        phase=engine.phase,
                        ready=engine.state == "ready",
                    ),
                )
            )
    touched = frozenset(act.engine for act in failed.acts)
    return replace(desired, wanted=tuple(wanted), prune_stacks=None, prune_ids=touched)


# --- one pass ---------------------------------------------------------------------------------------------------------


def _pass(desired: DesiredState, observed: ObservedState, options: PlanOptions) -> Plan:
    """1. Compare. 2. Find a home for what should start, until no more are refused. 3. Order the acts."""
    # (1)
    found = compared(desired, observed, options)
    # (2)
    changes, refused = list(found.changes), list(found.blocked)
    placed: dict[EngineId, Placement] = {}
    while True:
        placed, refusals = _placed(changes, found, desired, observed)
        if not refusals:
            break
        # The predecessor of a refused engine stays, and with it its port: what relied on it must be placed anew.
        refused += refusals
        changes = [change for change in changes if change.id not in {blocked.engine for blocked in refusals}]
    # (3)
    steps, drafts = drafted([*found.updates, *changes], placed, desired, observed, options)
    acts, awaited = _with_needs(ordered_acts(drafts), _all_awaited(found, options), desired, options)
    blocked_ids = {blocked.engine for blocked in refused}
    stays_blocked = {engine.id for engine in project_engines(observed, desired.project) if engine.id in blocked_ids}
    return Plan(
        project=desired.project,
        source=desired.source,
        digest=desired.digest,
        steps=steps,
        acts=acts,
        awaited=awaited,
        blocked=tuple(sorted(refused, key=lambda blocked: blocked.engine)),
        drift=drift_of(observed, desired),
        notes=(*found.notes, *_port_notes(placed, observed)),
        unchanged=tuple(engine.id for engine in found.unchanged),
        kept=tuple(sorted(stays_blocked.union(found.kept))),
        desired=tuple((wanted.id, written(wanted)) for wanted in in_order(desired)),
    )


def _port_notes(placed: Mapping[EngineId, Placement], observed: ObservedState) -> tuple[str, ...]:
    """Ports that the kernel may give to any client while their engine does not listen (ip_local_port_range)."""
    first, last = observed.client_ports
    return tuple(
        f"{engine}: port {place.port} is one of those that the kernel gives to clients ({first}-{last}); sage holds it "
        "while the engine starts, but another program may get it while the engine is down"
        for engine, place in sorted(placed.items())
        if first <= place.port <= last
    )


def _joined(plan: Plan, later: Plan) -> Plan:
    """A plan followed by a later pass: everything of the later one comes after everything of the first."""
    step, index = len(plan.steps), len(plan.acts)
    before = tuple(range(index))
    acts = tuple(
        replace(act, step=act.step + step, after=before + tuple(earlier + index for earlier in act.after))
        for act in later.acts
    )
    touched = {entry.engine for entry in plan.steps} | {entry.engine for entry in later.steps}
    return replace(
        plan,
        steps=plan.steps + later.steps,
        acts=plan.acts + acts,
        blocked=later.blocked,
        kept=later.kept,
        unchanged=tuple(engine for engine in plan.unchanged if engine not in touched),
    )


def _all_awaited(found: Comparison, options: PlanOptions) -> tuple[Awaited, ...]:
    """Engines that keep their process and are not ready yet.

    A restore awaits none: it puts back what was there, and what was not ready then need not be ready now.
    """
    staying = [*found.unchanged, *(engine for update in found.updates for engine in update.stops)]
    return tuple(
        _awaited(engine, options) for engine in staying if engine.state == "starting" and not options.restoring
    )


def _with_needs(
    acts: tuple[Act, ...], awaited: tuple[Awaited, ...], desired: DesiredState, options: PlanOptions
) -> tuple[tuple[Act, ...], tuple[Awaited, ...]]:
    """Each start with the awaited engines that its engine depends on, and the engines that are awaited at all."""
    depends_on = {wanted.id: wanted.depends_on for wanted in desired.wanted}
    needing = tuple(
        replace(
            act,
            needs=tuple(
                task.leader for task in awaited if f"{task.engine.stack}/{task.engine.name}" in depends_on[act.engine]
            ),
        )
        if isinstance(act, StartEngine)
        else act
        for act in acts
    )
    needed = {leader for act in needing if isinstance(act, StartEngine) for leader in act.needs}
    return needing, tuple(task for task in awaited if options.waits or task.leader in needed)


def _awaited(engine: Engine, options: PlanOptions) -> Awaited:
    spec = spec_of(engine)
    assert spec is not None
    place = engine.resolved.placement
    return Awaited(
        engine=engine.id,
        leader=engine.leader,
        kind=spec.kind,
        model=served_model(spec),
        host=place.host,
        port=place.port,
        health_path=spec.ready.path,
        ready_seconds=spec.ready.timeout if options.ready_seconds is None else options.ready_seconds,
    )


# --- placing ----------------------------------------------------------------------------------------------------------


def _placed(
    changes: list[Change], found: Comparison, desired: DesiredState, observed: ObservedState
) -> tuple[dict[EngineId, Placement], list[Blocked]]:
    """A placement for each start, and a refusal for each that has none."""
    stopping = {engine.leader for change in changes for engine in change.stops}
    homeless = {blocked.engine for blocked in found.blocked}
    homeless |= {wanted.id for wanted in desired.wanted} - {change.id for change in changes}
    homeless -= {engine.id for engine in observed.engines if engine.leader_alive and engine.leader not in stopping}
    homeless |= {engine.id for engine in found.unchanged if engine.state not in ("ready", "starting")}
    staying, freed = _ports(observed, stopping, desired)
    asked = {wanted.spec.port: wanted.id for wanted in desired.wanted if isinstance(wanted.spec.port, int)}
    asked |= {w.pin.resolved.placement.port: w.id for w in desired.wanted if w.pin is not None}
    # An engine that comes back after a crash finds its port where it left it, whoever comes with it.
    coming_back = {change.id for change in changes if change.start is not None}
    asked = {record.port: record.engine for record in observed.records if record.engine in coming_back} | asked
    placed: dict[EngineId, Placement] = {}
    refusals: list[Blocked] = []
    for change in _homes_first(changes):
        wanted = change.start
        if wanted is None:
            continue
        taken = Taken(
            ports=staying | {place.port: str(engine) for engine, place in placed.items()},
            freed_ports=freed,
            asked_ports={port for port, engine in asked.items() if engine != wanted.id},
        )
        predecessor = change.stops[-1] if change.stops else None
        place = placement(wanted, desired, observed, predecessor, taken)
        if isinstance(place, Placement):
            place = _missing_part(wanted, observed, homeless) or place
        if isinstance(place, Refusal):
            refusals.append(
                Blocked(engine=wanted.id, reason=place.reason, why=place.why, would_help=place.would_help, at=wanted.at)
            )
        else:
            placed[wanted.id] = place
    return placed, refusals


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
    waits_for = sorted(str(engine) for engine in homeless if f"{engine.stack}/{engine.name}" in wanted.depends_on)
    if waits_for:
        return Refusal(
            reason="dependency", why=f"it depends on {listed(waits_for)}, which is not ready and cannot be made so"
        )
    if wanted.pin is not None:
        return None  # It ran with exactly this command: starting it again is the only question worth asking.
    program = next((fact for fact in observed.programs if fact.name == program_of(spec)), None)
    if program is None:
        return Refusal(reason="not_observed", why=f"nobody looked for the program {program_of(spec)}")
    if not program.argv:
        return Refusal(reason="program_missing", why=program.why, would_help=(runtime_of(spec).install_hint,))
    model = next((fact for fact in observed.models if fact.model == spec.model), None)
    if is_path(spec.model) and model is not None and model.why:
        return Refusal(reason="model_missing", why=model.why)
    return None
