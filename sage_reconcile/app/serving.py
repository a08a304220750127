"""serve: a thread that looks, and a router that is handed what it saw."""

import os
import sys
import threading
from collections.abc import Callable

from sage_reconcile.app.host import LocalHost
from sage_reconcile.app.project import local_host
from sage_reconcile.core.facts import RouterFact
from sage_reconcile.core.observed import ObservedState, model_of, spec_of
from sage_reconcile.core.progress import proof_order
from sage_reconcile.core.routes import routes
from sage_reconcile.router.server import Traffic
from sage_reconcile.router.server import serve as serve_traffic
from sage_reconcile.world.router_files import RouterFile

# How often the router's thread looks at the world: engines come and go within a second.
_LOOK_SECONDS = 0.4


def serve(host: str, port: int, on_ready: Callable[[str], None]) -> None:
    """One OpenAI-compatible address in front of what runs, until a signal. Raises Environment, Refused."""
    machine = local_host()
    machine.answer_seconds = 0.3
    traffic = Traffic()
    traffic.use(routes(machine.look()))
    stopping = threading.Event()
    looking = threading.Thread(target=_look_on, args=(machine, traffic, stopping), daemon=True)
    looking.start()
    try:
        serve_traffic(traffic, host=host, port=port, ready=on_ready, stopping=stopping)
    finally:
        stopping.set()
        looking.join(timeout=5)


def _look_on(machine: LocalHost, traffic: Traffic, stopping: threading.Event) -> None:
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
                traffic.use(routes(observed))
                mine.write(_said(observed, traffic))
                _prove(machine, observed)
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


def _prove(machine: LocalHost, observed: ObservedState) -> None:
    """Engines that were started without anybody waiting for their first answer are asked here."""
    for engine in observed.engines:
        spec = spec_of(engine)
        order = proof_order(engine, spec.kind, model_of(engine)) if spec is not None else None
        if order is not None:
            machine.do(order)


def _complain(text: str, last: str) -> str:
    """Say it once, not at every look."""
    if text != last:
        print(f"sage serve: cannot look at the engines: {text}", file=sys.stderr, flush=True)
    return text
