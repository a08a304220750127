"""Look, plan, apply; when the apply fails, put back what was there: another plan, through the same executor, once.

An apply fails too when something cannot be written down. Putting back is written down like everything else, so it ends
where that cannot be: then the outcome names what is down.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from sage_reconcile.core.audit import Violation, audit
from sage_reconcile.core.desired import DesiredState
from sage_reconcile.core.identity import EngineId
from sage_reconcile.core.journal import PlanBegun, PlanEnded, RestoreBegun
from sage_reconcile.core.observed import ObservedState, project_engines
from sage_reconcile.core.plan import Plan, PlanOptions
from sage_reconcile.core.planner import make_plan, restore_target, with_places_to_be_had
from sage_reconcile.drive.executor import Beat, Executed, Host, Journal, act_sentence, execute, seen, write_down


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One act that failed, and the engine that it was about."""

    engine: EngineId
    why: str
    # Whether the machine did not let sage work, as with a full disk.
    environment: bool = False
    # Whether what it needs could not be seen.
    unseen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of an apply.

    converged: all acts done. restored: it failed, and what ran before runs again. stuck: it failed, and not everything
    could be put back. halted: it failed, and was left as it is, as asked for. interrupted: a signal ended it between
    two acts, and nothing was put back. It fails with an act, or with what cannot be written down.
    """

    result: str
    plan: Plan
    failures: tuple[Failure, ...] = ()
    # The plan that put things back; None when none was made.
    restore: Plan | None = None
    restore_failures: tuple[Failure, ...] = ()
    observed: ObservedState
    # How many acts of the last plan were done.
    done: int = 0
    # The signal that interrupted it; 0 when none did.
    stop_signal: int = 0
    # Why something could not be written down, be it the end of what converged; empty when all could.
    unwritten: str = ""
    # Whether anything of the project ran before.
    ran_before: bool = True
    # Of what ran before and runs no more, unless it converged: what is still wanted, and what the plan was to stop.
    down: tuple[EngineId, ...] = ()
    stopped: tuple[EngineId, ...] = ()


class UnsoundPlan(AssertionError):
    """The audit found that a plan of ours would break a law: our own mistake, and nothing was done."""

    def __init__(self, violations: tuple[Violation, ...]) -> None:
        super().__init__("; ".join(f"{violation.law}: {violation.what}" for violation in violations))


def sound_plan(desired: DesiredState, observed: ObservedState, options: PlanOptions) -> Plan:
    """A plan that the audit lets through. Raises UnsoundPlan."""
    plan = make_plan(desired, observed, options)
    violations = audit(plan, desired, observed)
    if violations:
        raise UnsoundPlan(violations)
    return plan


def apply_plan(
    plan: Plan,
    desired: DesiredState,
    before: ObservedState,
    host: Host,
    journal: Journal,
    *,
    revision: tuple[tuple[EngineId, str], ...],
    pid: int,
    on_failure: str = "rollback",
    ready_seconds: float | None = None,
    on_beat: Callable[[Beat], None] = lambda beat: None,
    on_restore: Callable[[Plan], None] = lambda plan: None,
) -> Outcome:
    """Carry out a plan; when it fails, do what `on_failure` says: rollback, halt or continue.

    `ready_seconds` replaces every engine's own limit, also while putting things back; None keeps them. `revision` is
    all that the project runs once the plan is done, and is remembered when it is. Raises Environment, and does nothing,
    when the plan itself cannot be written down.
    """
    journal.append(
        PlanBegun(
            at=host.wall_clock(),
            pid=pid,
            source=plan.source,
            digest=plan.digest,
            acts=tuple(act_sentence(act) for act in plan.acts),
            revision=revision,
        )
    )
    result = "interrupted"
    try:
        outcome = _outcome(plan, desired, before, host, journal, on_failure, ready_seconds, on_beat, on_restore)
        result = outcome.result
    finally:
        unwritten = write_down(journal, [PlanEnded(at=host.wall_clock(), outcome=result)])
    return replace(outcome, unwritten=outcome.unwritten or unwritten)


def _outcome(
    plan: Plan,
    desired: DesiredState,
    before: ObservedState,
    host: Host,
    journal: Journal,
    on_failure: str,
    ready_seconds: float | None,
    on_beat: Callable[[Beat], None],
    on_restore: Callable[[Plan], None],
) -> Outcome:
    """1. Carry the plan out. 2. When it fails, put back what ran before. 3. Say what is down all the same."""
    # (1)
    done = execute(plan, host, journal, keep_going=on_failure == "continue", on_beat=on_beat)
    unwritten = done.progress.unwritten
    failures = _failures(plan, done)
    if done.stop_signal:
        outcome = _interrupted(plan, done, failures)
    elif done.progress.all_done:
        return Outcome(result="converged", plan=plan, observed=done.observed, unwritten=unwritten)
    elif on_failure != "rollback":
        outcome = Outcome(result="halted", plan=plan, failures=failures, observed=done.observed, unwritten=unwritten)
    else:
        # (2)
        failed = Outcome(result="stuck", plan=plan, failures=failures, observed=done.observed, unwritten=unwritten)
        outcome = _put_back(failed, desired, before, host, journal, ready_seconds, on_beat, on_restore)
    # (3)
    return _with_what_is_down(outcome, plan, desired, before, seen(host)[0])


def _put_back(
    failed: Outcome,
    desired: DesiredState,
    before: ObservedState,
    host: Host,
    journal: Journal,
    ready_seconds: float | None,
    on_beat: Callable[[Beat], None],
    on_restore: Callable[[Plan], None],
) -> Outcome:
    """1. Plan back to what ran before. 2. Carry that out, if it can be written down. 3. Look again."""
    # (1)
    options = PlanOptions(restoring=True, ready_seconds=ready_seconds)
    observed, unseen = seen(host)
    target = with_places_to_be_had(restore_target(before, failed.plan, desired), observed)
    restore = sound_plan(target, observed, options)
    on_restore(restore)
    # (2)
    restore_begun = RestoreBegun(at=host.wall_clock(), acts=tuple(act_sentence(act) for act in restore.acts))
    unwritten = write_down(journal, [restore_begun])
    restore_failures: tuple[Failure, ...] = ()
    if not unwritten:
        restored = execute(restore, host, journal, on_beat=on_beat)
        if restored.stop_signal:
            return _interrupted(restore, restored, failed.failures)
        observed, unwritten = restored.observed, restored.progress.unwritten
        restore_failures = _failures(restore, restored)
    # (3)
    left = sound_plan(target, seen(host)[0], options)
    return replace(
        failed,
        result="stuck" if restore_failures or restore.blocked or left.changes else "restored",
        restore=restore,
        restore_failures=restore_failures,
        observed=observed,
        unwritten=failed.unwritten or unseen or unwritten,
    )


def _with_what_is_down(
    outcome: Outcome, plan: Plan, desired: DesiredState, before: ObservedState, now: ObservedState
) -> Outcome:
    ran, runs = _running(before, desired.project), _running(now, desired.project)
    wanted = {wish.id for wish in desired.wanted}
    down = sorted(ran - runs)
    touched = {act.engine for act in plan.acts}
    return replace(
        outcome,
        ran_before=bool(ran),
        down=tuple(engine for engine in down if engine in wanted),
        stopped=tuple(engine for engine in down if engine in touched - wanted),
    )


def _running(observed: ObservedState, project: str) -> set[EngineId]:
    return {engine.id for engine in project_engines(observed, project) if engine.leader_alive}


def _interrupted(plan: Plan, done: Executed, failures: tuple[Failure, ...]) -> Outcome:
    ended = sum(entry.phase == "done" for entry in done.progress.entries[: len(plan.acts)])
    return Outcome(
        result="interrupted",
        plan=plan,
        failures=failures,
        observed=done.observed,
        done=ended,
        stop_signal=done.stop_signal,
        unwritten=done.progress.unwritten,
    )


def _failures(plan: Plan, done: Executed) -> tuple[Failure, ...]:
    tasks = (*plan.acts, *plan.awaited)
    return tuple(
        Failure(
            engine=tasks[index].engine,
            why=why,
            environment=done.progress.entries[index].environment,
            unseen=done.progress.entries[index].unseen,
        )
        for index, why in done.failures
    )
