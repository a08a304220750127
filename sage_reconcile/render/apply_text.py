"""How an apply goes and what came of it, in lines for a reader."""

from collections.abc import Mapping

from sage_reconcile.core.identity import EngineId
from sage_reconcile.core.observed import ObservedState
from sage_reconcile.core.plan import Act, Awaited, Plan, RelabelEngine, StartEngine, StopEngine
from sage_reconcile.core.progress import ActProgress, Progress
from sage_reconcile.core.quantities import duration_text
from sage_reconcile.render.paint import PLAIN, Paint, one_line

_PHASES = {
    "draining": "draining",
    "terminating": "stopping",
    "killing": "killing",
    "freeing": "giving memory back",
    "settling": "waiting",
    "starting": "starting",
}


def tasks_of(plan: Plan) -> tuple[Act | Awaited, ...]:
    """What a progress has entries for, in their order."""
    return (*plan.acts, *plan.awaited)


def running_line(
    task: Act | Awaited,
    entry: ActProgress,
    observed: ObservedState,
    elapsed_seconds: float,
    last_log_line: str,
    width: int,
) -> str:
    """The live line of one engine: what is being done to it, for how long, what it lacks, and the last that it said."""
    what = f"  {task.engine}  {_PHASES[entry.phase]}  {duration_text(elapsed_seconds)}"
    lacks = entry.waits_for or _not_ready_because(entry, observed)
    return one_line("  ".join(filter(None, (what, lacks, last_log_line))), width)


def _not_ready_because(entry: ActProgress, observed: ObservedState) -> str:
    """What `sage status` says of an engine that starts; empty while it loads and does not listen: its log says more."""
    engine = next((one for one in observed.engines if one.leader == entry.leader), None)
    if engine is None or entry.phase != "starting":
        return ""
    hindered = engine.intruder or engine.lost_devices or any(one.engine == engine.id for one in observed.listeners)
    return engine.reason if hindered else ""


def ended_lines(
    task: Act | Awaited, entry: ActProgress, took_seconds: float, log_tail: tuple[str, ...], paint: Paint = PLAIN
) -> list[str]:
    """What stays on the screen once an act has ended: a line, and for a failure the last that the engine said."""
    took = f"{took_seconds:.1f}s"
    if entry.phase == "failed":
        lines = [f"  {paint('red', 'failed')}   {task.engine}  {entry.why}"]
        return lines + [f"    | {line}" for line in log_tail]
    match task:
        case StopEngine():
            return [f"  {paint('dim', 'stopped')}  {task.engine}  pid {task.leader.pid}  {took}"]
        case RelabelEngine():
            return [f"  {paint('cyan', 'updated')}  {task.engine}"]
        case StartEngine():
            pid = entry.leader.pid if entry.leader else "?"
            port = task.resolved.placement.port
            word = "ready" if task.waits else "started"
            return [f"  {paint('green', word)}{' ' * (9 - len(word))}{task.engine}  pid {pid}  port {port}  {took}"]
        case Awaited():
            return [f"  {paint('green', 'ready')}    {task.engine}  pid {task.leader.pid}  {took}"]


_RESULTS: Mapping[str, str] = {
    "converged": "applied",
    "restored": "the {verb} failed, and what ran before runs again",
    "stuck": "the {verb} failed, and not everything could be put back",
    "halted": "the {verb} failed, and was left as it is",
    "interrupted": "the {verb} was interrupted",
}


def result_text(result: str, *, ran_before: bool, verb: str = "apply") -> str:
    """What came of an apply, or of a down; `ran_before` is whether there was anything to put back."""
    if result == "restored" and not ran_before:
        return "the apply failed, and nothing runs, as before"
    return _RESULTS[result].format(verb=verb)


def restoring_line(restore: Plan) -> str:
    """What is done now that an apply has failed."""
    if any(isinstance(act, StartEngine | RelabelEngine) for act in restore.acts):
        return "  the apply failed: putting back what ran before"
    return "  the apply failed: stopping what it started" if restore.acts else "  the apply failed"


def converged_line(plan: Plan, paint: Paint = PLAIN) -> str:
    """One line for the good end of an apply."""
    done = ", ".join(f"{count} {word}" for word, count in counts_of(plan).items() if count)
    return f"{paint('green', 'Applied')}: {done}."


def unwritten_result(result: str, *, ran_before: bool, verb: str = "apply") -> str:
    """What came of an apply or a down of which something could not be written down."""
    if result == "converged":
        done = "stopped" if verb == "down" else "applied"
        return f"{done}, but not all of it could be written down"
    return result_text(result, ran_before=ran_before, verb=verb)


def down_text(down: tuple[EngineId, ...], stopped: tuple[EngineId, ...]) -> str:
    """Which engines an apply that failed left down: those that are still wanted, and those that were to be stopped."""
    told = (("down now", down), ("stopped, as asked for", stopped))
    return "; ".join(f"{what}: {', '.join(map(str, engines))}" for what, engines in told if engines)


def counts_of(plan: Plan) -> dict[str, int]:
    """How many steps of each sort a plan has, in the past tense."""
    words = {"start": "started", "recreate": "recreated", "move": "moved", "update": "updated", "stop": "stopped"}
    return {word: sum(step.action == action for step in plan.steps) for action, word in words.items()}


def unended(plan: Plan, progress: Progress) -> list[int]:
    """The indexes of what is under way."""
    return [
        index
        for index in range(len(tasks_of(plan)))
        if not progress.entries[index].ended and progress.entries[index].phase != "waiting"
    ]
