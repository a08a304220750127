"""status, logs, wait and gpu: what runs, what should and does not, and what it says. Reads no manifest."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from sage_reconcile.app.project import local_host
from sage_reconcile.app.verbs import matching
from sage_reconcile.core.facts import AppliedFact, RecordFact
from sage_reconcile.core.label import parse_label
from sage_reconcile.core.observed import Engine, ObservedState
from sage_reconcile.errors import Usage
from sage_reconcile.world import processes
from sage_reconcile.world.logs import log_path, logged_engines, previous_log
from sage_reconcile.world.state import state_root


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """An engine that does not run: one of the last applied revision, or one that ended and is stuck."""

    # Of one that nothing asks for any more: what it was.
    applied: AppliedFact
    # The record of its last process; None when there is none.
    record: RecordFact | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Everything that `sage status` shows."""

    observed: ObservedState
    engines: tuple[Engine, ...]
    missing: tuple[Missing, ...]
    # Seconds since each engine's first process started, by the engine's leader.
    uptimes: tuple[tuple[int, float], ...]

    @property
    def healthy(self) -> bool:
        return not self.missing and all(engine.state == "ready" for engine in self.engines)


def status(engine: str | None, project: str | None) -> Status:
    """All engines of this user, or the ones that an id names. Raises Usage."""
    observed = local_host().look()
    running = {found.id for found in observed.engines}
    not_running = (*observed.applied, *_stuck(observed))
    shown = running | {fact.engine for fact in not_running}
    if engine is not None:
        shown = matching(engine, shown, project)
    elif project is not None:
        shown = {found for found in shown if found.project == project}
    engines = tuple(found for found in observed.engines if found.id in shown)
    return Status(
        observed=observed,
        engines=engines,
        missing=tuple(
            Missing(applied=fact, record=_last_record(observed, fact))
            for fact in not_running
            if fact.engine in shown - running
        ),
        uptimes=tuple((found.leader.pid, time.time() - processes.started_at(found.leader)) for found in engines),
    )


def _stuck(observed: ObservedState) -> tuple[AppliedFact, ...]:
    """The engines that nothing asks for any more, and whose last process has not given its memory back."""
    pids = {entry.pid for device in observed.devices if device.closed for entry in device.lingering}
    applied = {fact.engine for fact in observed.applied}
    labels = {
        record.engine: label
        for record in observed.records
        if record.leader.pid in pids and (label := parse_label(dict(record.label))) is not None
    }
    return tuple(
        AppliedFact(engine=engine, written=label.written, at=0.0)
        for engine, label in sorted(labels.items())
        if engine not in applied
    )


def _last_record(observed: ObservedState, applied: AppliedFact) -> RecordFact | None:
    mine = [record for record in observed.records if record.engine == applied.engine]
    return max(mine, key=lambda record: record.started_at, default=None)


def log_file(engine: str, project: str | None, *, previous: bool) -> Path:
    """Where the log of an engine is, running or not; it may be gone while its engine runs. Raises Usage."""
    known = set(logged_engines(state_root(os.environ)))
    try:
        named = matching(engine, known, project)
    except Usage:
        observed = local_host().look()
        runs = {found.id for found in observed.engines} | {fact.engine for fact in observed.applied}
        named = matching(engine, known | runs, project)
    path = log_path(state_root(os.environ), min(named))
    return previous_log(path) if previous else path
