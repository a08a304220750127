"""wait: until engines are ready, or stopped, or the time is up."""

import contextlib
import os
import time

from sage_reconcile.app.host import LocalHost
from sage_reconcile.app.project import local_host
from sage_reconcile.app.verbs import matching
from sage_reconcile.core.identity import EngineId
from sage_reconcile.core.observed import Engine, ObservedState, model_of, spec_of
from sage_reconcile.core.progress import proof_order
from sage_reconcile.errors import Environment, Locked, TimedOut
from sage_reconcile.world.lock import lock_paths, locked
from sage_reconcile.world.logs import logged_engines
from sage_reconcile.world.state import state_root

_PAUSE_SECONDS = 0.2


def wait(ids: tuple[str, ...], *, project: str | None, goal: str, limit_seconds: float) -> None:
    """Until all engines that the ids mean are "ready" or "stopped". Raises TimedOut, and Usage for an unknown id."""
    host = local_host()
    host.answer_seconds, host.measured.keeps = _PAUSE_SECONDS, goal == "ready"
    observed = host.look()
    named = _named(ids, observed, project)
    deadline = time.monotonic() + limit_seconds
    while left := _not_yet(named, observed, goal):
        if time.monotonic() >= deadline:
            raise TimedOut(f"not {goal} after {limit_seconds:g} s: {'; '.join(left)}")
        prove(host, observed)
        host.wait(_PAUSE_SECONDS)
        observed = host.look()
    _keep_measured(host, {engine.project for engine in named})


def _keep_measured(host: LocalHost, projects: set[str]) -> None:
    """What they were seen to take, as an apply that waits would keep it. Whoever has the lock keeps what it sees."""
    with contextlib.suppress(Locked, Environment), locked(lock_paths(os.environ), purpose="wait", wait_seconds=0):
        for project in projects:
            host.measured.keep(project)


def _named(ids: tuple[str, ...], observed: ObservedState, project: str | None) -> set[EngineId]:
    """The engines that ids mean, among those that run, that should run, and that once ran and have a log."""
    current = {engine.id for engine in observed.engines} | {applied.engine for applied in observed.applied}
    known = current | set(logged_engines(state_root(os.environ)))
    named = set()
    for text in ids:
        found = matching(text, known, project)
        # A replica that nobody asks for any more has a log too, and is not waited for beside those that are there.
        named |= found & current or found
    return named


def _not_yet(named: set[EngineId], observed: ObservedState, goal: str) -> list[str]:
    """A sentence for each engine that has not come so far."""
    running: dict[EngineId, list[Engine]] = {}
    for engine in observed.engines:
        running.setdefault(engine.id, []).append(engine)
    left = []
    for the_id in sorted(named):
        engines = running.get(the_id, [])
        if goal == "stopped" and engines:
            left.append(f"{the_id} is {engines[0].state}")
        elif goal == "ready" and not any(engine.state == "ready" for engine in engines):
            left.append(f"{the_id} is {engines[0].state}: {engines[0].reason}" if engines else f"{the_id} does not run")
    return left


def prove(host: LocalHost, observed: ObservedState) -> None:
    """Engines that were started without anybody waiting for their first answer are asked here."""
    for engine in observed.engines:
        spec = spec_of(engine)
        order = proof_order(engine, spec.kind, model_of(engine)) if spec is not None else None
        if order is not None:
            host.do(order)
