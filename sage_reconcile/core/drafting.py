"""A step for each change, and its acts: exactly what will be done, and what a reader sees of it. Pure."""

from collections.abc import Mapping

from sage_reconcile.core.compare import Change, written
from sage_reconcile.core.desired import DesiredState, Wanted
from sage_reconcile.core.identity import EngineId, in_stack
from sage_reconcile.core.needs import program_fact, shape_of
from sage_reconcile.core.observed import Engine, ObservedState, model_of, spec_of
from sage_reconcile.core.ordering import Draft
from sage_reconcile.core.plan import PlanOptions, RelabelEngine, StartEngine, Step, StopEngine
from sage_reconcile.core.resolved import Placement, Resolved
from sage_reconcile.core.runtimes import runtime_of
from sage_reconcile.core.runtimes.base import device_env
from sage_reconcile.core.spec import EngineSpec, canonical_json, default_fields, served_model


def drafted(
    changes: list[Change],
    placed: Mapping[EngineId, Placement],
    desired: DesiredState,
    observed: ObservedState,
    options: PlanOptions,
) -> tuple[tuple[Step, ...], list[Draft]]:
    """A step for each change, and its acts, not yet in order."""
    steps: list[Step] = []
    drafts: list[Draft] = []
    for number, change in enumerate(sorted(changes, key=lambda change: (change.id, change.action))):
        if change.action == "update":
            steps.append(_step(change, None, None, observed))
            drafts.append(Draft(act=_relabel(change, number, desired, options)))
            continue
        start = _start(change, number, placed, desired, observed, options)
        steps.append(_step(change, start, placed.get(change.id), observed))
        drafts += [Draft(act=_stop_act(engine, number), depends_on=depends_on(engine)) for engine in change.stops]
        if start is not None:
            assert change.start is not None
            drafts.append(Draft(act=start, depends_on=change.start.depends_on))
    return tuple(steps), drafts


def depends_on(engine: Engine) -> tuple[str, ...]:
    """The engines of its project that a running engine depends on, as "stack/name"."""
    spec = spec_of(engine)
    if spec is None:
        return ()
    return tuple(in_stack(name, engine.id.stack) for name in spec.depends_on)


def _stop_act(engine: Engine, step: int) -> StopEngine:
    spec = spec_of(engine) or EngineSpec(name="unreadable", model="unreadable")
    return StopEngine(
        step=step,
        after=(),
        engine=engine.id,
        leader=engine.leader,
        port=engine.resolved.placement.port,
        drain_seconds=spec.update.drain,
        grace_seconds=spec.update.grace,
        devices=tuple(sorted({*engine.resolved.placement.devices, *(uuid for uuid, _ in engine.measured_bytes)})),
    )


def _relabel(change: Change, step: int, desired: DesiredState, options: PlanOptions) -> RelabelEngine:
    assert change.start is not None
    (engine,) = change.stops
    source = change.start.source or (desired.source if options.take_over else engine.source)
    return RelabelEngine(
        step=step, after=(), engine=change.id, leader=engine.leader, written=written(change.start), source=source
    )


def _start(
    change: Change,
    step: int,
    placed: Mapping[EngineId, Placement],
    desired: DesiredState,
    observed: ObservedState,
    options: PlanOptions,
) -> StartEngine | None:
    wanted = change.start
    if wanted is None:
        return None
    spec, place, runtime = wanted.spec, placed[wanted.id], runtime_of(wanted.spec)
    counted = {device.uuid: device.number for device in observed.devices}
    numbers = tuple(counted[uuid] for uuid in place.devices) if runtime.device_names == "index" else None
    env = {**spec.env, **runtime.env(spec, place), **device_env(spec, place, numbers), "SPT_NOENV": "1"}
    return StartEngine(
        step=step,
        after=(),
        engine=wanted.id,
        source=wanted.source or desired.source,
        written=written(wanted),
        resolved=resolved(wanted, place, observed),
        env=tuple(sorted(env.items())),
        kind=spec.kind,
        model=served_model(spec),
        health_path=spec.ready.path,
        ready_seconds=spec.ready.timeout if options.ready_seconds is None else options.ready_seconds,
        waits=_waits(wanted, desired, options),
        needs=(),
        hold=runtime.hold,
    )


def _waits(wanted: Wanted, desired: DesiredState, options: PlanOptions) -> bool:
    """Whether the start is done only once the engine is ready."""
    if wanted.pin is not None:
        return wanted.pin.ready
    name = str(wanted.id.first)
    return options.waits or any(name in other.depends_on for other in desired.wanted)


def resolved(wanted: Wanted, place: Placement, observed: ObservedState) -> Resolved:
    """What is resolved for an engine in its place; of one that is put back, what was."""
    if wanted.pin is not None:
        return wanted.pin.resolved
    runtime = runtime_of(wanted.spec)
    program = program_fact(wanted.spec, observed)
    assert program is not None
    return Resolved(
        placement=place,
        runtime=runtime.name,
        argv=runtime.argv(wanted.spec, program.argv, place, shape_of(wanted.spec, observed)),
        directory=wanted.directory,
        defaults=canonical_json(default_fields()),
    )


def _step(change: Change, start: StartEngine | None, place: Placement | None, observed: ObservedState) -> Step:
    if start is not None:
        kind, runtime, model = start.kind, start.resolved.runtime, start.model
    else:
        engine = change.stops[-1]
        spec = spec_of(engine)
        kind, runtime, model = spec.kind if spec else "?", engine.resolved.runtime, model_of(engine)
    return Step(
        action=change.action,
        engine=change.id,
        kind=kind,
        runtime=runtime,
        model=model,
        reason=change.reason,
        cause=change.cause,
        placement=place,
        changes=change.changes,
        argv=start.resolved.argv if start else (),
        env=start.env if start else (),
        at=change.start.at if change.start else "",
    )
