"""Failpoints: named places at every effect, where a test makes this process die, stop, or be refused by the kernel.

Goes in: `SAGE_FAILPOINTS` and `SAGE_FAILPOINT_TRACE`, only together with `SAGE_TEST=1`; every command refuses them
without it. Nothing is kept in memory: how often a place was reached is counted in the trace file.
"""

import errno
import os
import signal
from collections.abc import Mapping
from pathlib import Path

from sage_reconcile.errors import Refused

WISHES, TRACE, SWITCH = "SAGE_FAILPOINTS", "SAGE_FAILPOINT_TRACE", "SAGE_TEST"

# The moments of a file that is put in place whole, and the files that are.
_MOMENTS = ("begin", "written", "synced", "renamed", "done")
_WHOLE_FILES = ("record", "proof", "router", "mended", "footprints")

NAMES = (
    "lock.opened", "lock.taken", "lock.named",
    "state.probed",
    "journal.opened", "journal.written", "journal.synced",
    "damaged.begin", "damaged.done",
    "log.begin", "log.kept", "log.opened", "log.copied", "log.cut",
    "port.begin", "port.proved", "port.held",
    "gate.begin", "gate.spawned", "gate.identified", "gate.recorded", "gate.checked", "gate.released", "gate.abandoned",
    "signal.begin", "signal.opened", "signal.sent",
    "forget.begin", "forget.half", "forget.done",
    *(f"{file}.{moment}" for file in _WHOLE_FILES for moment in _MOMENTS),
)  # fmt: skip

_SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "interrupt": signal.SIGINT,
    "terminate": signal.SIGTERM,
}


def refuse_outside_tests(environment: Mapping[str, str]) -> None:
    """Raises Refused when a failpoint is asked for and this is no test."""
    asked = [name for name in (WISHES, TRACE) if environment.get(name)]
    if asked and environment.get(SWITCH) != "1":
        raise Refused(f"{asked[0]} is set: failpoints break sage on purpose, for its tests", hint=f"unset {asked[0]}")


def failpoint(name: str) -> None:
    """A place that a test may wish something for; in a normal run nothing happens.

    A wish is `NAME@N=ACTION`, several are separated by commas: at the Nth time (1 when left out) that NAME is reached,
    or any place for the name `*`. ACTION is kill, stop, interrupt or terminate, which signal this process; MemoryError;
    or the name of an errno, which raises that OSError.
    """
    trace = os.environ.get(TRACE)
    if trace is None or os.environ.get(SWITCH) != "1":
        return
    assert name in NAMES, f"{name} is not on the list of failpoints"
    with open(trace, "a+", encoding="ascii") as file:
        file.write(f"{name}\n")
        file.flush()
        file.seek(0)
        reached = file.read().split()
    for wish in os.environ.get(WISHES, "").split(","):
        place, _, action = wish.partition("=")
        wanted, _, number = place.partition("@")
        count = len(reached) if wanted == "*" else reached.count(wanted)
        if wanted in (name, "*") and count == int(number or "1"):
            _act(action)


def _act(action: str) -> None:
    if action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[action])
    elif action == "MemoryError":
        raise MemoryError
    else:
        number = getattr(errno, action)
        raise OSError(number, os.strerror(number))


def traced(path: Path) -> tuple[str, ...]:
    """The places that a process reached, in order, as its trace file tells."""
    return tuple(path.read_text(encoding="ascii").split()) if path.exists() else ()
