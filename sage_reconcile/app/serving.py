"""serve and up: a thread that looks, and a router that is handed what it saw."""

import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace

from sage_reconcile.app.host import LocalHost
from sage_reconcile.app.planned import Planned, Watcher
from sage_reconcile.app.project import load, local_host
from sage_reconcile.app.verbs import ApplyOptions, apply, down
from sage_reconcile.app.waiting import prove
from sage_reconcile.core.facts import RouterFact
from sage_reconcile.core.observed import ObservedState, project_engines
from sage_reconcile.core.progress import ended_how
from sage_reconcile.core.routes import routes
from sage_reconcile.drive.reconciler import Outcome
from sage_reconcile.router.server import Traffic, bound_socket
from sage_reconcile.router.server import serve as serve_traffic
from sage_reconcile.world.router_files import RouterFile

# How often the router's thread looks at the world: engines come and go within a second.
_LOOK_SECONDS = 0.4


def serve(host: str, port: int, on_ready: Callable[[str], None], *, project: str | None = None) -> None:
    """One OpenAI-compatible address in front of what runs, until a signal: of one project, or of all for None.

    Raises Environment, Refused.
    """
    _serve_from(local_host(), bound_socket(host, port), on_ready, lambda before, now: None, project=project)


def up(
    paths: tuple[str, ...],
    watcher: Watcher,
    options: ApplyOptions,
    *,
    project: str | None,
    port: int | None,
    on_ready: Callable[[str], None],
    tell: Callable[[str], None],
    applied: Callable[[Outcome | Planned], None],
    stopped: Callable[[Outcome], None],
) -> None:
    """Apply, serve until a signal comes, then stop what was applied.

    `applied` is told what came of the apply, and raises when that is no reason to serve; `tell` is told when an engine
    becomes ready or is lost meanwhile. Raises what apply, serve and down raise.
    """
    settings = load(paths, project).router
    port = settings.port if port is None else port
    # Taken before anything is started: a port that somebody else has is found out at once.
    with bound_socket(settings.host, port) as listening:
        machine = local_host()
        outcome = apply(paths, watcher, replace(options, router_port=port), project=project, host=machine)
        applied(outcome)

        def tell_news(before: ObservedState, now: ObservedState) -> None:
            for sentence in _news(before, now, outcome.plan.project):
                tell(sentence)

        _serve_from(machine, listening, on_ready, tell_news)
    for ended in down(
        paths, (), watcher, project=project, everything=False, lock_seconds=options.lock_seconds, host=machine
    ):
        stopped(ended)


# Told of two looks, one after the other.
_Watching = Callable[[ObservedState, ObservedState], None]


def _serve_from(
    machine: LocalHost,
    listening: socket.socket,
    on_ready: Callable[[str], None],
    watching: _Watching,
    *,
    project: str | None = None,
) -> None:
    machine.answer_seconds, machine.cuts_logs = 0.3, True
    traffic = Traffic()
    first = machine.look()
    traffic.use(routes(first, project))
    stopping = threading.Event()
    told = (machine, traffic, stopping, first, watching, project)
    looking = threading.Thread(target=_look_on, args=told, daemon=True)
    looking.start()
    try:
        serve_traffic(traffic, listening, ready=on_ready, stopping=stopping)
    finally:
        stopping.set()
        looking.join(timeout=5)


def _look_on(
    machine: LocalHost,
    traffic: Traffic,
    stopping: threading.Event,
    before: ObservedState,
    watching: _Watching,
    project: str | None,
) -> None:
    """Look, hand over, and say what is in flight, again and again.

    A look that fails, in whatever way, leaves the last table in use: the router goes on with what was proved, and drops
    by itself what does not answer.
    """
    mine = RouterFile(machine.root)
    complaint = ""
    try:
        while not stopping.is_set():
            try:
                observed = machine.look()
                traffic.use(routes(observed, project))
                mine.write(_said(observed, traffic))
                prove(machine, observed)
                watching(before, observed)
                before = observed
                complaint = ""
            except Exception as error:  # noqa: BLE001 - the edge of a look: whatever it was, the next one must come
                complaint = _complain(str(error), complaint)
            stopping.wait(_LOOK_SECONDS)
    finally:
        mine.close()


def _said(observed: ObservedState, traffic: Traffic) -> RouterFact:
    """What a stop needs to know: engines that get no new requests from here on, and requests that still run."""
    return RouterFact(
        pid=os.getpid(),
        drained_from=tuple(engine.leader for engine in observed.engines if engine.phase),
        in_flight=tuple(sorted((leader, count) for leader, count in traffic.in_flight() if count)),
    )


def _news(before: ObservedState, now: ObservedState, project: str) -> tuple[str, ...]:
    """A sentence for each engine of the project that is in another state than at the look before."""
    was = {engine.leader: engine.state for engine in before.engines}
    still = {engine.leader for engine in now.engines}
    codes = {fact.leader: fact.code for fact in now.exits}
    changed = [
        f"{engine.id} is {engine.state}" + (f": {engine.reason}" if engine.reason else "")
        for engine in project_engines(now, project)
        if was.get(engine.leader, engine.state) != engine.state
    ]
    gone = [
        f"{engine.id} is gone" + (f": {ended_how(codes[engine.leader])}" if engine.leader in codes else "")
        for engine in project_engines(before, project)
        if engine.leader not in still
    ]
    return tuple(changed + gone)


def _complain(text: str, last: str) -> str:
    """Say it once, not at every look."""
    if text != last:
        print(f"sage serve: cannot look at the engines: {text}", file=sys.stderr, flush=True)
    return text
