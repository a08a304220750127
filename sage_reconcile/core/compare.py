"""What must happen to each engine, before anyone asks whether there is room: wanted against observed. Pure."""

from dataclasses import dataclass, replace

from sage_reconcile.core.desired import DesiredState, Wanted
from sage_reconcile.core.diff import FieldChange, field_changes
from sage_reconcile.core.facts import RecordFact
from sage_reconcile.core.identity import EngineId
from sage_reconcile.core.observed import Engine, ObservedState, project_engines, spec_of
from sage_reconcile.core.plan import Blocked, Drift, PlanOptions
from sage_reconcile.core.spec import canonical_json, written_fields

_RAN_BEFORE = "it ran before the apply that failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One engine that should change."""

    id: EngineId
    # What runs now and must go: usually one, more when there are leftovers.
    stops: tuple[Engine, ...] = ()
    # What should start; None for a stop.
    start: Wanted | None = None
    action: str
    reason: str
    cause: str
    changes: tuple[FieldChange, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What one pass found before anything was placed."""

    changes: tuple[Change, ...]
    updates: tuple[Change, ...]
    unchanged: tuple[Engine, ...]
    kept: tuple[EngineId, ...]
    blocked: tuple[Blocked, ...]
    notes: tuple[str, ...]


def compared(desired: DesiredState, observed: ObservedState, options: PlanOptions) -> Comparison:
    running: dict[EngineId, list[Engine]] = {}
    for engine in project_engines(observed, desired.project):
        running.setdefault(engine.id, []).append(engine)
    changes: list[Change] = []
    updates: list[Change] = []
    unchanged: list[Engine] = []
    blocked: list[Blocked] = []
    notes: list[str] = []
    wanted_ids = {wanted.id for wanted in desired.wanted}
    for wanted in in_order(desired):
        engines = running.get(wanted.id, [])
        current, leftovers = current_process(engines) if engines else (None, ())
        refusal = _unseen(wanted, current, observed)
        if refusal is not None:
            blocked.append(refusal)
            continue
        change = _change(wanted, current, desired, observed, options)
        if change is None:
            assert current is not None
            unchanged.append(current)
            if current.state not in ("ready", "starting"):
                notes.append(f"{current.id} is {current.state}: {current.reason}")
        elif change.action == "update":
            updates.append(change)
        else:
            changes.append(replace(change, stops=(*leftovers, *change.stops)))
            continue
        changes += [_stop(engine, "duplicate", "a second process of the same engine") for engine in leftovers]
    notes += [f"{engine.id} {engine.exposed}" for engine in unchanged if engine.exposed]
    unwanted = [engine for the_id, engines in running.items() if the_id not in wanted_ids for engine in engines]
    in_scope = [engine for engine in unwanted if _pruned(engine.id, desired, options)]
    if gap := _gap(observed):
        blocked += [Blocked(engine=engine.id, reason="not_observed", why=gap) for engine in in_scope]
        in_scope = []
    changes += [_stop(engine, options.stop_reason, _stop_cause(options)) for engine in in_scope]
    return Comparison(
        changes=tuple(changes),
        updates=tuple(updates),
        unchanged=tuple(unchanged),
        kept=tuple(engine.id for engine in unwanted if engine not in in_scope),
        blocked=tuple(blocked),
        notes=tuple(notes),
    )


def current_process(engines: list[Engine]) -> tuple[Engine, tuple[Engine, ...]]:
    """The process that counts as the engine, and the leftovers: live before dead, ready first, then the oldest."""
    ranked = sorted(engines, key=lambda engine: (not engine.leader_alive, engine.state != "ready", engine.leader))
    return ranked[0], tuple(ranked[1:])


def processes_of(the_id: EngineId, observed: ObservedState) -> tuple[Engine, ...]:
    """The processes of an engine, the one that counts as it last."""
    engines = [engine for engine in observed.engines if engine.id == the_id]
    if not engines:
        return ()
    current, leftovers = current_process(engines)
    return (*leftovers, current)


def _unseen(wanted: Wanted, current: Engine | None, observed: ObservedState) -> Blocked | None:
    """A refusal where not enough was seen to act: unknown is not gone."""
    gap = _gap(observed)
    if gap:
        why = gap
    elif current is not None and spec_of(current) is None:
        why = f"pid {current.leader.pid} was started by another version of sage, and this one cannot read its label"
    else:
        return None
    return Blocked(engine=wanted.id, reason="not_observed", why=why, at=wanted.at)


def _gap(observed: ObservedState) -> str:
    """What could not be seen and could be any engine; empty when there is nothing of the kind."""
    gap = next((gap for gap in observed.gaps if gap.what in ("processes", "listeners")), None)
    return f"cannot see all {gap.what}: {gap.why}" if gap is not None else ""


def _change(
    wanted: Wanted, current: Engine | None, desired: DesiredState, observed: ObservedState, options: PlanOptions
) -> Change | None:
    """What must happen to one engine; None when it is as it should be."""
    if current is None:
        reason, cause = ("restored", _RAN_BEFORE) if options.restoring else _missing(wanted.id, observed)
        return Change(id=wanted.id, start=wanted, action="start", reason=reason, cause=cause)
    if not current.leader_alive:
        return Change(
            id=wanted.id, stops=(current,), start=wanted, action="start", reason="crashed", cause=current.reason
        )
    recreate = Change(id=wanted.id, stops=(current,), start=wanted, action="recreate", reason="spec_changed", cause="")
    as_before = wanted.pin is not None and (wanted.pin.leader, wanted.pin.phase) == (current.leader, current.phase)
    if current.phase in ("stopping", "stuck") and not as_before:
        return replace(recreate, reason="replaced", cause="an interrupted stop had already signalled it")
    changes = field_changes(
        current.written,
        written(wanted),
        old_defaults=current.resolved.defaults,
        fields_at=dict(wanted.fields_at),
    )
    identity = [change.path for change in changes if change.is_identity]
    if identity:
        return replace(recreate, cause=f"{listed(identity)} changed", changes=changes)
    if wanted.pin is not None and wanted.pin.resolved != current.resolved:
        return replace(recreate, reason="restored", cause="it ran with another command or in another place before")
    # What is put back is put back as it was: it ran there before, too.
    if current.lost_devices and wanted.pin is None:
        return replace(recreate, reason="device_lost", cause=current.reason, changes=changes)
    why = _update_cause(wanted, current, desired, changes, options)
    if why is None:
        return None
    return Change(
        id=wanted.id,
        stops=(current,),
        start=wanted,
        action="update",
        reason="policy_changed",
        cause=why,
        changes=changes,
    )


def _update_cause(
    wanted: Wanted, current: Engine, desired: DesiredState, changes: tuple[FieldChange, ...], options: PlanOptions
) -> str | None:
    """Why the engine's policy must be written anew; None when it need not."""
    if changes:
        return f"{listed([change.path for change in changes])} changed, without a restart"
    if current.phase == "draining" and not (wanted.pin is not None and wanted.pin.phase == "draining"):
        return "an interrupted stop left it draining"
    if (options.take_over or wanted.pin is not None) and current.source != (wanted.source or desired.source):
        return f"taken over from {current.source}"
    return None


def was_stopped(record: RecordFact) -> bool:
    """Whether a process that is gone was stopped by sage, and did not end by itself: its apply or down did not end."""
    return record.phase in ("stopping", "stuck")


def how_it_ended(record: RecordFact) -> str:
    """What became of a process that is gone, in a sentence."""
    return f"pid {record.leader.pid} " + ("was stopped, and not started again" if was_stopped(record) else "is gone")


def why_missing(engine: EngineId, observed: ObservedState) -> str:
    """Why an engine that does not run does not."""
    return _missing(engine, observed)[1]


def _missing(engine: EngineId, observed: ObservedState) -> tuple[str, str]:
    """The reason of a start, and its cause."""
    records = [record for record in observed.records if record.engine == engine]
    if any(record.leader.boot_id == observed.boot_id for record in records):
        latest = max(records, key=lambda record: record.started_at)
        return ("restored" if was_stopped(latest) else "crashed"), how_it_ended(latest)
    if records:
        return "after_reboot", "the machine was restarted"
    if any(applied.engine == engine for applied in observed.applied):
        return "crashed", "it was applied and does not run"
    return "new", "it does not run"


def _pruned(engine: EngineId, desired: DesiredState, options: PlanOptions) -> bool:
    if desired.prune_ids is not None:
        return engine in desired.prune_ids
    return options.prune and (desired.prune_stacks is None or engine.stack in desired.prune_stacks)


def _stop(engine: Engine, reason: str, cause: str) -> Change:
    return Change(id=engine.id, stops=(engine,), action="stop", reason=reason, cause=cause)


def _stop_cause(options: PlanOptions) -> str:
    return "asked for" if options.stop_reason == "destroyed" else "no manifest asks for it"


def listed(names: list[str]) -> str:
    """Names in a sentence: "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def drift_of(observed: ObservedState, desired: DesiredState) -> tuple[Drift, ...]:
    """What was applied and does not run as applied, whatever is wanted now."""
    alive = {engine.id: engine for engine in observed.engines if engine.leader_alive}
    wanted = {wanted.id for wanted in desired.wanted}
    drift = []
    for applied in observed.applied:
        if applied.engine.project != desired.project or applied.engine not in wanted:
            continue
        engine = alive.get(applied.engine)
        if engine is None:
            drift.append(Drift(engine=applied.engine, what=why_missing(applied.engine, observed)))
        elif engine.state in ("unready", "stuck", "failed"):
            drift.append(Drift(engine=applied.engine, what=f"{engine.state}: {engine.reason}"))
    return tuple(drift)


def in_order(desired: DesiredState) -> list[Wanted]:
    return sorted(desired.wanted, key=lambda wanted: wanted.id)


def written(wanted: Wanted) -> str:
    return canonical_json(written_fields(wanted.spec))
