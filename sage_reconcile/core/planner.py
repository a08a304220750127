"""(desired, observed) -> Plan. Pure: the same input gives the same plan, in any order of files and facts.

The planner makes one pass, simulates its end with plan.after, and makes another pass on the result, until a pass finds
nothing to do: planning again after an apply gives no steps, by construction.
"""

from collections.abc import Mapping
from dataclasses import replace

from sage_reconcile.core.compare import (
    Comparison,
    compared,
    current_process,
    drift_of,
    in_order,
    written,
)
from sage_reconcile.core.desired import DesiredState, Pin, Wanted
from sage_reconcile.core.device_notes import device_notes
from sage_reconcile.core.drafting import depends_on, drafted
from sage_reconcile.core.identity import EngineId
from sage_reconcile.core.observed import Engine, ObservedState, arranged, project_engines, spec_of
from sage_reconcile.core.ordering import ordered_acts, room_of
from sage_reconcile.core.placing import Moves, placed
from sage_reconcile.core.plan import Act, Awaited, Plan, PlanOptions, RelabelEngine, StartEngine, after
from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.shares import told_shares
from sage_reconcile.core.spec import served_model

# A second pass finds what the first made room for; each further one needs yet another such engine.
_MOST_PASSES = 64


def make_plan(desired: DesiredState, observed: ObservedState, options: PlanOptions | None = None) -> Plan:
    """The acts that lead from the observed to the desired, what is blocked, and why."""
    options = options or PlanOptions()
    observed = arranged(observed)
    first = plan = _pass(desired, observed, options, "allowed" if options.allow_moves else "told")
    world = observed
    for _ in range(_MOST_PASSES):
        if not first.acts:
            break
        for act in first.acts:
            world = after(act, world)
        # What a pass started is not moved by the next one: that would be a stop of a process that does not exist yet.
        first = _pass(desired, world, options, "never" if options.allow_moves else "told")
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
    # A reserve that is new must not keep out what ran without it.
    return replace(desired, wanted=tuple(wanted), prune_stacks=None, prune_ids=touched, reserve_bytes=0)


# --- one pass ---------------------------------------------------------------------------------------------------------


def with_places_to_be_had(target: DesiredState, now: ObservedState) -> DesiredState:
    """A restore's target that asks for no device which has since been closed or lost: what ran there goes elsewhere."""
    to_be_had = {device.uuid for device in now.devices if not device.closed}
    if not to_be_had:
        return target
    runs = {engine.id for engine in project_engines(now, target.project) if engine.leader_alive}
    wanted = tuple(
        one
        if one.pin is None or one.id in runs or to_be_had.issuperset(one.pin.resolved.placement.devices)
        else replace(one, pin=None)
        for one in target.wanted
    )
    return replace(target, wanted=wanted)


def _pass(desired: DesiredState, observed: ObservedState, options: PlanOptions, moves: Moves) -> Plan:
    """1. Compare. 2. Find a home for what should start, until no more are refused. 3. Order the acts."""
    # (1)
    found = compared(desired, observed, options)
    # (2)
    changes, refused = list(found.changes), list(found.blocked)
    while True:
        homes = placed(changes, found, desired, observed, moves, only_shown=options.only_shown)
        if not homes.refusals and not homes.moves:
            break
        # The predecessor of a refused engine stays, and with it its port and its memory: what relied on them must be
        # placed anew.
        refused += homes.refusals
        changes = [change for change in changes if change.id not in {blocked.engine for blocked in homes.refusals}]
        changes += homes.moves
        moved = {change.id for change in homes.moves}
        found = replace(found, unchanged=tuple(engine for engine in found.unchanged if engine.id not in moved))
    # (3)
    steps, drafts = drafted([*found.updates, *changes], homes.places, desired, observed, options)
    restoring = any(wanted.pin is not None for wanted in desired.wanted)
    ordered = ordered_acts(drafts, room_of(observed, reserve_bytes=desired.reserve_bytes, restoring=restoring))
    ordered, steps = told_shares(ordered, steps, desired, observed)
    blocked_ids = {blocked.engine for blocked in refused}
    stays_blocked = [engine for engine in project_engines(observed, desired.project) if engine.id in blocked_ids]
    acts, awaited = _with_needs(ordered, _all_awaited(found, stays_blocked, options), desired, options)
    return Plan(
        project=desired.project,
        source=desired.source,
        digest=desired.digest,
        steps=steps,
        acts=acts,
        awaited=awaited,
        blocked=tuple(sorted(refused, key=lambda blocked: blocked.engine)),
        drift=drift_of(observed, desired),
        notes=(
            *found.notes,
            *_port_notes(homes.places, observed),
            *device_notes(homes.places, found, refused, desired, observed),
        ),
        unchanged=tuple(engine.id for engine in found.unchanged),
        kept=tuple(sorted({engine.id for engine in stays_blocked}.union(found.kept))),
        desired=tuple((wanted.id, written(wanted)) for wanted in in_order(desired)),
        optimality="proved" if homes.proved else "budget",
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
        replace(
            _behind_later(act, index),
            step=act.step + step,
            after=before + tuple(earlier + index for earlier in act.after),
        )
        for act in later.acts
    )
    touched = {entry.engine for entry in plan.steps} | {entry.engine for entry in later.steps}
    # Its other notes are on a world that only the plan brings about.
    on_its_own = tuple(
        note
        for note in later.notes
        if any(note.startswith((f"{one.engine}:", f"{one.engine} ")) for one in later.steps)
    )
    return replace(
        plan,
        steps=plan.steps + later.steps,
        acts=plan.acts + acts,
        # An act that needs one that is not awaited would wait for good.
        awaited=plan.awaited + tuple(task for task in later.awaited if task not in plan.awaited),
        blocked=later.blocked,
        optimality=plan.optimality if later.optimality == "proved" else "budget",
        kept=later.kept,
        notes=plan.notes + tuple(note for note in on_its_own if note not in plan.notes),
        unchanged=tuple(engine for engine in plan.unchanged if engine not in touched),
    )


def _behind_later(act: Act, index: int) -> Act:
    """The act with what it is behind, counted on from `index`."""
    if isinstance(act, RelabelEngine):
        return act
    return replace(act, behind=tuple(earlier + index for earlier in act.behind))


def _all_awaited(found: Comparison, stays_blocked: list[Engine], options: PlanOptions) -> tuple[Awaited, ...]:
    """Engines that keep their process and are not ready yet, those whose successors have no place too.

    A restore awaits none: it puts back what was there, and what was not ready then need not be ready now.
    """
    staying = [*found.unchanged, *(engine for update in found.updates for engine in update.stops)]
    staying += [engine for engine in stays_blocked if engine.leader_alive and spec_of(engine) is not None]
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
            needs=tuple(task.leader for task in awaited if str(task.engine.first) in depends_on[act.engine]),
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
