"""Look, plan, apply; when the apply fails, put back what was there: another plan, through the same executor, once."""

from collections.abc import Callable
from dataclasses import dataclass

from sage_reconcile.core.audit import Violation, audit
from sage_reconcile.core.desired import DesiredState
from sage_reconcile.core.identity import EngineId
from sage_reconcile.core.journal import PlanBegun, PlanEnded, RestoreBegun
from sage_reconcile.core.observed import ObservedState
from sage_reconcile.core.plan import Plan, PlanOptions
from sage_reconcile.core.planner import make_plan, restore_target
from sage_reconcile.drive.executor import Beat, Executed, Host, Journal, act_sentence, execute


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

    converged: all acts done. restored: an act failed, and what ran before runs again. stuck: it failed, and not
    everything could be put back. halted: it failed, and was left as it is, as asked for. interrupted: a signal ended it
    between two acts, and nothing was put back.
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
    """Carry out a plan; when an act fails, do what `on_failure` says: rollback, halt or continue.

    `ready_seconds` replaces every engine's own limit, also while putting things back; None keeps them. `revision` is
    all that the project runs once the plan is done, and is remembered when it is.
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
        journal.append(PlanEnded(at=host.wall_clock(), outcome=result))
    return outcome


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
    """1. Carry the plan out. 2. When an act fails, plan back to what ran before, and carry that out. 3. Look again."""
    # (1)
    done = execute(plan, host, journal, keep_going=on_failure == "continue", on_beat=on_beat)
    failures = _failures(plan, done)
    if done.stop_signal:
        return _interrupted(plan, done, failures)
    if not failures or on_failure != "rollback":
        return Outcome(
            result="halted" if failures else "converged", plan=plan, failures=failures, observed=done.observed
        )
    # (2)
    target = restore_target(before, plan, desired)
    options = PlanOptions(restoring=True, ready_seconds=ready_seconds)
    restore = sound_plan(target, host.look(), options)
    on_restore(restore)
    journal.append(RestoreBegun(at=host.wall_clock(), acts=tuple(act_sentence(act) for act in restore.acts)))
    restored = execute(restore, host, journal, on_beat=on_beat)
    if restored.stop_signal:
        return _interrupted(restore, restored, failures)
    # (3)
    restore_failures = _failures(restore, restored)
    left = sound_plan(target, host.look(), options)
    return Outcome(
        result="stuck" if restore_failures or restore.blocked or left.changes else "restored",
        plan=plan,
        failures=failures,
        restore=restore,
        restore_failures=restore_failures,
        observed=restored.observed,
    )


def _interrupted(plan: Plan, done: Executed, failures: tuple[Failure, ...]) -> Outcome:
    ended = sum(entry.phase == "done" for entry in done.progress.entries[: len(plan.acts)])
    return Outcome(
        result="interrupted",
        plan=plan,
        failures=failures,
        observed=done.observed,
        done=ended,
        stop_signal=done.stop_signal,
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
