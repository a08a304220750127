"""Carries out a plan: journal, then act, then journal. It never chooses; what is next comes from core.progress.

What cannot be written down is not begun, and nothing after it.

A synchronous, single-threaded loop. Every order returns at once, so engines load side by side.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from sage_reconcile.core.journal import ActBegun, ActDone, ActFailed, Entry
from sage_reconcile.core.observed import ObservedState
from sage_reconcile.core.orders import Order, Spawned
from sage_reconcile.core.plan import Act, Plan
from sage_reconcile.core.progress import Progress, advance, begin, failed, finished, spawned, unwritable
from sage_reconcile.errors import Environment, SageError

# How long the loop waits between two looks, in seconds. Signals and exits end the wait sooner.
PAUSE_SECONDS = 0.1


class Host(Protocol):
    """One machine, as the loop needs it: plain values in and out. A fake one keeps its world in memory."""

    def look(self) -> ObservedState:
        """The world as it is now.

        Raises Environment when something that it shows should be written down and could not be; it is not shown again.
        """

    def do(self, order: Order) -> Spawned | None:
        """Carry out an order and return at once; only a Spawn has a result."""

    def now(self) -> float:
        """Seconds of a clock that never goes back, and stands still while this sage is stopped."""

    def wall_clock(self) -> float:
        """Epoch seconds, for people to read."""

    def wait(self, seconds: float) -> None:
        """Let that much time pass, or less when something happened."""

    def stop_signal(self) -> int:
        """The number of the signal that asks for an end between two acts; 0 as long as none came."""


class Journal(Protocol):
    """Where each entry is safe before the call returns. It raises Environment when it cannot be."""

    def append(self, entry: Entry) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a watcher is told after each look."""

    plan: Plan
    progress: Progress
    observed: ObservedState
    # Seconds of the host's clock: now, and since the plan began.
    now: float
    elapsed_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """What came of a plan.

    `observed` is what the last orders were given on, so it may be older than they are. `failures` are (act index, why);
    an index past the acts is an awaited engine's.
    """

    progress: Progress
    observed: ObservedState
    failures: tuple[tuple[int, str], ...]
    # The signal that ended it before its end; 0 when none did.
    stop_signal: int = 0


def execute(
    plan: Plan,
    host: Host,
    journal: Journal,
    *,
    keep_going: bool = False,
    on_beat: Callable[[Beat], None] = lambda beat: None,
) -> Executed:
    """Carry out a plan to its end, or until asked to stop.

    When an act fails, or something cannot be written down, it ends once what was begun is settled. Asked to stop, it
    gives no further order: what was begun is left as it is, and the next plan goes on from there.
    """
    progress = begin(plan, keep_going=keep_going)
    started_at = host.now()
    observed, why = seen(host)
    while not (stop_signal := host.stop_signal()):
        progress = _step(plan, unwritable(progress, why), observed, host, journal)
        now = host.now()
        on_beat(Beat(plan=plan, progress=progress, observed=observed, now=now, elapsed_seconds=now - started_at))
        if finished(plan, progress):
            break
        host.wait(PAUSE_SECONDS)
        observed, why = seen(host)
    failures = tuple((index, progress.entries[index].why) for index in progress.failures)
    return Executed(progress=progress, observed=observed, failures=failures, stop_signal=stop_signal)


def _step(plan: Plan, progress: Progress, observed: ObservedState, host: Host, journal: Journal) -> Progress:
    """One look: journal what it showed to have ended, then what begins; give the orders; journal what they ended."""
    before = progress
    progress, orders = advance(plan, progress, observed, host.now())
    acts = range(len(plan.acts))
    begun = [index for index in acts if _begins(before, progress, index)]
    ended = [_end_of(progress, index, host) for index in acts if index not in begun and _ends(before, progress, index)]
    why = write_down(journal, [*ended, *(ActBegun(at=host.wall_clock(), act=index) for index in begun)])
    # What could not be written down is not done: no order follows a line that is not there, no signal a mark.
    refused = set(begun) if why else set()
    progress = unwritable(progress, why, refused)
    told = progress
    for index, order in orders:
        if index in refused:
            continue
        try:
            result = host.do(order)
        except SageError as error:
            # The machine did not let it: the act has failed, and what to do about that is decided as ever.
            refused.add(index)
            progress = failed(progress, index, error.message, environment=isinstance(error, Environment))
            continue
        if isinstance(result, Spawned):
            progress = spawned(progress, index, result)
    ended = [
        _end_of(progress, index, host) for index in acts if _ends(before if index in begun else told, progress, index)
    ]
    return unwritable(progress, write_down(journal, ended))


def seen(host: Host) -> tuple[ObservedState, str]:
    """The world as it is now, and why something that it shows could not be written down; empty when all could."""
    try:
        return host.look(), ""
    except Environment as error:
        return host.look(), error.message


def write_down(journal: Journal, entries: Iterable[Entry]) -> str:
    """Append each of the entries; why the first that could not be could not, empty when all could."""
    why = ""
    for entry in entries:
        try:
            journal.append(entry)
        except Environment as error:
            why = why or error.message
    return why


def _begins(before: Progress, after: Progress, index: int) -> bool:
    return before.entries[index].phase == "waiting" and after.entries[index].phase != "waiting"


def _ends(before: Progress, after: Progress, index: int) -> bool:
    return after.entries[index].ended and not before.entries[index].ended


def _end_of(progress: Progress, index: int, host: Host) -> Entry:
    entry = progress.entries[index]
    if entry.phase == "done":
        return ActDone(at=host.wall_clock(), act=index)
    return ActFailed(at=host.wall_clock(), act=index, why=entry.why)


def act_sentence(act: Act) -> str:
    """An act in the journal's words: "stop lab/chat pid 12", "start lab/chat port 8001"."""
    kind = type(act).__name__.removesuffix("Engine").lower()
    leader = getattr(act, "leader", None)
    resolved = getattr(act, "resolved", None)
    where = f" pid {leader.pid}" if leader else f" port {resolved.placement.port}" if resolved else ""
    return f"{kind} {act.engine}{where}"
