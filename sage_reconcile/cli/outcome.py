"""Talking about a plan: showing it, asking for approval, telling how it goes, and what came of it."""

import contextlib
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from sage_reconcile.app.planned import Planned, Watcher
from sage_reconcile.core.plan import Plan
from sage_reconcile.drive.executor import Beat
from sage_reconcile.drive.reconciler import Failure, Outcome
from sage_reconcile.errors import (
    ApplyRestored,
    ApplyStuck,
    Environment,
    Infeasible,
    Interrupted,
    ObservationIncomplete,
    Refused,
    SageError,
)
from sage_reconcile.render.apply_text import (
    converged_line,
    down_text,
    ended_lines,
    restoring_line,
    result_text,
    running_line,
    tasks_of,
    unended,
    unwritten_result,
)
from sage_reconcile.render.paint import Paint
from sage_reconcile.render.plan_text import plan_text
from sage_reconcile.world.logs import tail

# As many last lines of a log as tell why a program gave up.
_LAST_LINES = 12

# With "error: cannot place ..., see above" around them, they fit a terminal of 80 columns.
_NAMES_WIDTH = 50

# Where there is no terminal to redraw, a line this often says that it still goes on.
_LINE_EVERY_SECONDS = 10.0

_CLEAR_LINE_ABOVE = "\x1b[1A\x1b[2K"


def show(planned: Planned, paint: Paint) -> None:
    """Print the plan on stdout. Raises Environment when it cannot be written: then nothing is done either."""
    try:
        print(plan_text(planned.plan, planned.observed, paint), flush=True)
    except OSError as error:
        raise Environment(f"cannot write the plan: {error.strerror}") from error


def blocked_error(plan: Plan) -> SageError:
    """The error for a plan that has something blocked: the names that were told, or how many where they are many."""
    names = ", ".join(str(blocked.engine) for blocked in plan.blocked)
    if len(names) > _NAMES_WIDTH:
        names = f"{len(plan.blocked)} engine{'s' if len(plan.blocked) > 1 else ''}"
    if any(blocked.reason == "not_observed" for blocked in plan.blocked):
        return ObservationIncomplete(f"cannot plan {names}: not enough could be seen, see above")
    return Infeasible(f"cannot place {names}, see above")


def finish(outcome: Outcome, paint: Paint, *, verb: str = "apply") -> None:
    """Say what came of an apply, or of the down that `verb` names.

    Raises ApplyRestored or ApplyStuck when an act failed, Environment for the machine, Interrupted.
    """
    if outcome.result == "converged" and outcome.plan.changes:
        print(converged_line(outcome.plan, paint))
    if outcome.unwritten:
        raise _environment_error(outcome, verb)
    if outcome.result == "converged":
        return
    if outcome.result == "interrupted":
        acts = f"{outcome.done} of {len(outcome.plan.acts)} acts were done"
        hint = f"sage status says what runs; sage {verb} goes on from there"
        raise Interrupted(f"interrupted: {acts}", signal_number=outcome.stop_signal, hint=hint)
    failures = outcome.failures + outcome.restore_failures
    if any(failure.environment for failure in failures):
        raise _environment_error(outcome, verb)
    result = result_text(outcome.result, ran_before=outcome.ran_before, verb=verb)
    message = "; ".join(filter(None, (f"{result}: {_because(failures)}", _down(outcome))))
    if any(failure.unseen for failure in failures):
        raise ObservationIncomplete(message, hint="sage gpu shows what the driver tells; sage status what runs")
    if outcome.result == "restored":
        raise ApplyRestored(message)
    raise ApplyStuck(message, hint=f"sage status shows what runs now; sage {verb} tries again")


def _environment_error(outcome: Outcome, verb: str) -> Environment:
    """The error for an apply or a down that the machine did not let sage do, or not write down."""
    failures = outcome.failures + outcome.restore_failures
    why = "; ".join(filter(None, (_because(failures) if failures else "", outcome.unwritten, _down(outcome))))
    hint = "is the disk full or read-only?"
    if outcome.down:
        hint += " Once it can be written again, the next sage apply starts what is down"
    result = unwritten_result(outcome.result, ran_before=outcome.ran_before, verb=verb)
    return Environment(f"{result}: {why}", hint=hint)


def _down(outcome: Outcome) -> str:
    return down_text(outcome.down, outcome.stopped)


def finish_apply(came_of_it: Outcome | Planned, paint: Paint) -> None:
    """Say what came of an apply; a Planned was not carried out. Raises as `finish`, and for what is blocked."""
    if isinstance(came_of_it, Planned):
        show(came_of_it, paint)
    else:
        finish(came_of_it, paint)
    if came_of_it.plan.blocked:
        raise blocked_error(came_of_it.plan)


def _because(failures: tuple[Failure, ...]) -> str:
    return "; ".join(f"{failure.engine} {failure.why}" for failure in failures) or "see above"


@dataclass(slots=True, kw_only=True)
class Conversation:
    """Asks on stderr, and tells there how it goes: a live line for each engine on a terminal, else one now and then."""

    paint: Paint
    live_paint: Paint
    yes: bool
    _drawn: int = 0
    _told: set[int] = field(default_factory=set)
    _plan: Plan | None = None
    _last_line_at: float = 0.0

    def watcher(self, question: str) -> Watcher:
        return Watcher(
            show=lambda planned: show(planned, self.paint),
            approve=lambda: self._approve(question),
            on_beat=self._tell,
            on_restore=self._restore,
            note=self.note,
        )

    def note(self, sentence: str) -> None:
        """Something to know, which stops nothing."""
        with contextlib.suppress(OSError):
            print(f"note: {sentence}", file=sys.stderr, flush=True)

    def _approve(self, question: str) -> bool:
        if self.yes:
            return True
        if not sys.stdin.isatty():
            raise Refused("cannot ask for approval: stdin is not a terminal", hint="add -y")
        print(f"\n{question} Only 'yes' will do: ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip() == "yes"

    def _restore(self, plan: Plan) -> None:
        with contextlib.suppress(OSError):
            self._erase()
            print(self.live_paint("yellow", restoring_line(plan)), file=sys.stderr)
            sys.stderr.flush()
        known = self._plan.notes if self._plan is not None else ()
        for sentence in plan.notes:
            if sentence not in known:
                self.note(sentence)

    def _tell(self, beat: Beat) -> None:
        """Talk never stops an act: where nobody listens any more, it goes on in silence."""
        with contextlib.suppress(OSError):
            self._beat(beat)

    def _beat(self, beat: Beat) -> None:
        if beat.plan is not self._plan:
            self._plan, self._told, self._last_line_at = beat.plan, set(), 0.0
        self._erase()
        tasks = tasks_of(beat.plan)
        for index, task in enumerate(tasks):
            entry = beat.progress.entries[index]
            if entry.ended and index not in self._told:
                self._told.add(index)
                took_seconds = beat.now - entry.begun_at
                # The log is read now: putting things back begins a new one.
                lines = self._log_tail(beat, index, _LAST_LINES) if entry.phase == "failed" else ()
                print("\n".join(ended_lines(task, entry, took_seconds, lines, self.live_paint)), file=sys.stderr)
        if sys.stderr.isatty():
            self._draw(beat)
        elif beat.elapsed_seconds - self._last_line_at >= _LINE_EVERY_SECONDS:
            self._last_line_at = beat.elapsed_seconds
            print("\n".join(self._running(beat, width=200)), file=sys.stderr)
        sys.stderr.flush()

    def _running(self, beat: Beat, width: int) -> list[str]:
        lines = []
        for index in unended(beat.plan, beat.progress):
            entry = beat.progress.entries[index]
            last = "".join(self._log_tail(beat, index, 1))
            task, took_seconds = tasks_of(beat.plan)[index], beat.now - entry.begun_at
            lines.append(running_line(task, entry, beat.observed, took_seconds, last, width))
        return lines

    def _log_tail(self, beat: Beat, index: int, lines: int) -> tuple[str, ...]:
        leader = beat.progress.entries[index].leader
        log = next((record.log for record in beat.observed.records if record.leader == leader), "")
        return tail(Path(log), lines) if log else ()

    def _draw(self, beat: Beat) -> None:
        lines = self._running(beat, shutil.get_terminal_size().columns - 1)
        if lines:
            print("\n".join(lines), file=sys.stderr)
        self._drawn = len(lines)

    def _erase(self) -> None:
        print(_CLEAR_LINE_ABOVE * self._drawn, end="", file=sys.stderr)
        self._drawn = 0
