"""Processes: what runs, the one spawner, and signals that cannot hit the wrong process.

psutil's and subprocess' only door. Facts come from /proc (proc(5)); nothing is judged here.
"""

import contextlib
import os
import pwd
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import psutil

from sage_reconcile.core.facts import ExitFact, Gap, ProcessFact
from sage_reconcile.core.identity import EngineId, ProcessIdentity
from sage_reconcile.core.label import GATE, LEADER, leader_text
from sage_reconcile.core.resolved import Placement
from sage_reconcile.world.failpoints import failpoint
from sage_reconcile.world.sockets import held_port

# What an engine inherits from sage's own environment. Everything else comes from its manifest or from sage.
_INHERITED = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "XDG_CACHE_HOME",
)  # fmt: skip
_INHERITED_PREFIXES = ("LC_", "HF_", "SSL_CERT_")

_PF_KTHREAD = 0x00200000  # include/linux/sched.h


def boot_id() -> str:
    """The kernel's name for this boot; another value means that every pid on record is void."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def node_name() -> str:
    return socket.gethostname()


# --- looking ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """The fields of /proc/PID/stat that sage uses."""

    status: str
    parent_pid: int
    session: int
    start_ticks: int
    threads: int
    of_the_kernel: bool

    @property
    def alive(self) -> bool:
        """A process whose first thread has ended shows as a zombie while others of its threads still run."""
        return self.status not in ("Z", "X", "x") or (self.status == "Z" and self.threads > 1)


def stat(pid: int) -> Stat | None:
    """/proc/PID/stat; None when there is no such process, or it is hidden from us (proc(5), hidepid)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The command's name stands in parentheses and may hold any character, so the fields are counted from its end.
    fields = text[text.rindex(")") + 2 :].split()
    return Stat(
        status=fields[0],
        parent_pid=int(fields[1]),
        session=int(fields[3]),
        start_ticks=int(fields[19]),
        threads=int(fields[17]),
        of_the_kernel=int(fields[6]) & _PF_KTHREAD != 0,
    )


def identity(pid: int, *, node: str, boot: str) -> ProcessIdentity | None:
    """The identity of a live process; None when there is none or it is a zombie."""
    found = stat(pid)
    if found is None or not found.alive:
        return None
    return ProcessIdentity(node=node, boot_id=boot, pid=pid, start_ticks=found.start_ticks)


def processes(*, node: str, boot: str, logs: str = "") -> tuple[tuple[ProcessFact, ...], tuple[Gap, ...]]:
    """Every process of the machine, and a gap for each live one of ours whose environment cannot be read.

    `logs` is the directory below which the logs of sage's engines lie.
    """
    facts: list[ProcessFact] = []
    gaps: list[Gap] = []
    ours = own_pids()
    for pid in psutil.pids():
        try:
            fact = _process(pid, node, boot, logs)
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # Gone, or hidden from us (proc(5), hidepid): then it is another user's.
        if fact is None:
            continue
        facts.append(fact)
        if fact.label is None and pid not in ours and not _holds_more_than_we_do(pid):
            why = f"pid {pid} is of our user, and its environment cannot be read"
            gaps.append(Gap(what="processes", why=why, subject=str(pid)))
    return tuple(facts), tuple(gaps)


def without_the_dead(facts: tuple[ProcessFact, ...]) -> tuple[ProcessFact, ...]:
    """The facts, with those of engines that have ended since they were listed as dead.

    Asked after the sockets were read: an engine that died in between would else be alive and no longer listen.
    """
    return tuple(
        replace(fact, status="X") if fact.label and fact.alive and not _still_lives(fact.identity) else fact
        for fact in facts
    )


def _still_lives(target: ProcessIdentity) -> bool:
    found = stat(target.pid)
    return found is not None and found.alive and found.start_ticks == target.start_ticks


def _holds_more_than_we_do(pid: int) -> bool:
    """Whether a process has capabilities that this one lacks.

    The kernel hides such a process's environment from us (ptrace(2), access mode checking), and nothing that sage
    starts can come to have them: it is not one of our engines, so not knowing its environment is no gap.
    """
    theirs, own = _capabilities(pid), _capabilities(os.getpid())
    return theirs & ~own != 0


def _capabilities(pid: int) -> int:
    """The permitted capabilities of a process, as bits; none when it is gone."""
    return int(_status_field(pid, "CapPrm:") or "0", 16)


def _real_uid(pid: int) -> int:
    return int(_status_field(pid, "Uid:") or "-1")


def _status_field(pid: int, name: str) -> str:
    """The first word of a line of /proc/PID/status; empty when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return next((line.split()[1] for line in lines if line.startswith(name)), "")


def pid_namespace() -> int:
    """The inode of this process's pid namespace (pid_namespaces(7))."""
    return os.stat("/proc/self/ns/pid").st_ino


def _process(pid: int, node: str, boot: str, logs: str) -> ProcessFact | None:
    found = stat(pid)
    # On a machine with many cores, the threads of the kernel are most of what there is.
    if found is None or found.of_the_kernel:
        return None
    owner = os.stat(f"/proc/{pid}").st_uid
    # The files of a process that may not be dumped belong to root, whoever's it is (proc(5)).
    uid = owner if owner == os.getuid() else _real_uid(pid)
    alive = found.alive
    process = psutil.Process(pid)
    label = _label(process) if alive and owner == os.getuid() else ()
    return ProcessFact(
        identity=ProcessIdentity(node=node, boot_id=boot, pid=pid, start_ticks=found.start_ticks),
        parent_pid=found.parent_pid,
        session=found.session,
        uid=uid,
        user=_user_name(uid),
        status=found.status,
        threads=found.threads,
        argv=_argv(process) if alive else (),
        label=label,
        output=_output(pid, logs) if logs and alive and owner == os.getuid() and not label else (),
    )


def _output(pid: int, logs: str) -> tuple[str, ...]:
    """The files below a directory that a process's standard output and error go to."""
    found = set()
    for number in (1, 2):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/{pid}/fd/{number}")
            if target.startswith(f"{logs}/"):
                found.add(target)
    return tuple(sorted(found))


def _argv(process: psutil.Process) -> tuple[str, ...]:
    try:
        return tuple(process.cmdline())
    except (psutil.AccessDenied, psutil.ZombieProcess):
        return ()


def _label(process: psutil.Process) -> tuple[tuple[str, str], ...] | None:
    """The SAGE_* variables; None when the environment cannot be read. A process that is ending has none left."""
    try:
        return tuple(sorted((name, value) for name, value in process.environ().items() if name.startswith("SAGE_")))
    except psutil.ZombieProcess:
        return ()
    except psutil.AccessDenied:
        return None


@lru_cache(maxsize=256)
def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def own_pids() -> tuple[int, ...]:
    """sage itself and its ancestors."""
    pids = [os.getpid()]
    while pids[-1] > 1:
        found = stat(pids[-1])
        if found is None:
            break
        pids.append(found.parent_pid)
    return tuple(pids)


# --- starting ---------------------------------------------------------------------------------------------------------


class CannotSpawn(Exception):
    """Nothing was started; the message says why."""


@dataclass(slots=True, kw_only=True)
class Gated:
    """A process that waits at the gate. It is an engine once released, and gone once abandoned."""

    identity: ProcessIdentity
    process: "subprocess.Popen[bytes]"
    hold: socket.socket | None

    def release(self) -> None:
        """Let the process become the engine. Raises CannotSpawn when it is no longer there."""
        assert self.process.stdin is not None
        line = leader_text(self.identity.pid, self.identity.start_ticks, pid_namespace())
        failpoint("gate.checked")
        try:
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.close()
        except BrokenPipeError as error:
            raise CannotSpawn("the process ended before it was released") from error
        failpoint("gate.released")

    def abandon(self) -> None:
        """Close the gate: the process reads end-of-file and exits."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        if self.hold is not None:
            self.hold.close()
        failpoint("gate.abandoned")


def spawn(
    placement: Placement,
    argv: tuple[str, ...],
    variables: Mapping[str, str],
    *,
    directory: str,
    log_fd: int,
    boot: str,
    hold: bool,
) -> Gated:
    """The only function that starts engines. It wants a placement, and leaves the process at the gate.

    `variables` go on top of the inherited allow-list. `hold` keeps the port bound by a socket of ours, so that nobody
    who sets neither SO_REUSEADDR nor SO_REUSEPORT takes it before the engine does. Raises CannotSpawn.
    """
    try:
        held = held_port(placement.host, placement.port, hold=hold)
    except OSError as error:
        raise CannotSpawn(f"port {placement.port} cannot be bound: {error.strerror}") from error
    environment = inherited(os.environ) | dict(variables)
    assert LEADER not in environment
    try:
        failpoint("gate.begin")
        process = subprocess.Popen(
            [*GATE, *argv],
            stdin=subprocess.PIPE,
            stdout=log_fd,
            stderr=log_fd,
            cwd=directory,
            env=environment,
            close_fds=True,
            start_new_session=True,
        )
    except (OSError, MemoryError, ValueError, subprocess.SubprocessError) as error:
        if held is not None:
            held.close()
        raise CannotSpawn(f"cannot start {argv[0]}: {error or 'not enough memory'}") from error
    failpoint("gate.spawned")
    the_identity = identity(process.pid, node=placement.node, boot=boot)
    if the_identity is None:
        process.wait()
        if held is not None:
            held.close()
        raise CannotSpawn("the process ended at the gate")
    failpoint("gate.identified")
    return Gated(identity=the_identity, process=process, hold=held)


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that engines inherit."""
    return {
        name: value for name, value in environment.items() if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    }


# --- ending -----------------------------------------------------------------------------------------------------------


def send_signal(target: ProcessIdentity, number: signal.Signals, *, boot: str) -> bool:
    """Signal exactly this process, through a pidfd; False when it is gone.

    The identity is read again after the pidfd was opened: from then on the kernel keeps the pid's meaning.
    """
    if target.boot_id != boot or target.pid in own_pids():
        return False
    failpoint("signal.begin")
    try:
        pidfd = os.pidfd_open(target.pid)
    except ProcessLookupError:
        return False
    try:
        failpoint("signal.opened")
        found = stat(target.pid)
        if found is None or found.start_ticks != target.start_ticks:
            return False
        signal.pidfd_send_signal(pidfd, number)
        failpoint("signal.sent")
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True


@dataclass(slots=True, kw_only=True)
class Children:
    """The engines that this very sage started: it alone can learn how they end."""

    running: dict[ProcessIdentity, tuple[EngineId, "subprocess.Popen[bytes]"]] = field(default_factory=dict)
    exits: list[ExitFact] = field(default_factory=list)

    def add(self, engine: EngineId, gated: Gated) -> None:
        self.running[gated.identity] = (engine, gated.process)

    def reap(self) -> tuple[ExitFact, ...]:
        """How the ones that ended did end, so far."""
        for leader, (engine, process) in list(self.running.items()):
            code = process.poll()
            if code is not None:
                del self.running[leader]
                self.exits.append(ExitFact(engine=engine, leader=leader, code=code))
        return tuple(self.exits)


def started_at(target: ProcessIdentity) -> float:
    """Epoch seconds of a process's start, for people to read; it moves when the wall clock is set."""
    age_seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - target.start_ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age_seconds
