"""One sage at a time for each user and host: a flock, which the kernel drops when its holder dies, however it dies."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from sage_reconcile.errors import Environment, Locked
from sage_reconcile.world.failpoints import failpoint
from sage_reconcile.world.state import private_directory

_POLL_SECONDS = 0.1

# How often, and with what pause, the name of a holder is looked for.
_NAME_LOOKS = 10
_NAME_SECONDS = 0.01


def lock_paths(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """The locks to hold, in this order: `$SAGE_LOCK_FILE` alone, else `$XDG_RUNTIME_DIR/sage/lock` and one in /tmp.

    Both, because a login has XDG_RUNTIME_DIR and cron has not, and the two must exclude each other.
    """
    if environment.get("SAGE_LOCK_FILE"):
        return (Path(environment["SAGE_LOCK_FILE"]).absolute(),)
    own = f"sage-{os.getuid()}"
    if not environment.get("XDG_RUNTIME_DIR"):
        return (private_directory(Path("/tmp") / own) / "lock",)
    first = private_directory(Path(environment["XDG_RUNTIME_DIR"]) / "sage") / "lock"
    try:
        return first, private_directory(Path("/tmp") / own) / "lock"
    except Environment:
        return (first,)  # Somebody else took the name in /tmp: what is ours alone must do.


@contextlib.contextmanager
def locked(paths: tuple[Path, ...], *, purpose: str, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold all the locks. Raises Locked, which names the holder, when they are not free in time; Environment."""
    with contextlib.ExitStack() as held:
        for path in paths:
            held.enter_context(_locked(path, purpose=purpose, wait_seconds=wait_seconds))
        yield


@contextlib.contextmanager
def _locked(path: Path, *, purpose: str, wait_seconds: float) -> Iterator[None]:
    deadline = time.monotonic() + wait_seconds
    while True:
        descriptor = _opened(path)
        failpoint("lock.opened")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            if time.monotonic() >= deadline:
                raise Locked(
                    f"another sage is at work on this host: {holder}",
                    hint="wait for it, or give --lock-timeout",
                ) from error
            time.sleep(_POLL_SECONDS)
            continue
        # The file may have been removed and made anew between the open and the lock: then this lock is nobody's.
        if _is_at(path, descriptor):
            break
        os.close(descriptor)
    try:
        failpoint("lock.taken")
        # The name is for people. A full disk takes it from them, and the lock from nobody.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"pid {os.getpid()} ({purpose})\n".encode())
        failpoint("lock.named")
        yield
    finally:
        os.close(descriptor)


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise Environment(f"cannot open the lock {path}: {error.strerror}", hint="set SAGE_LOCK_FILE") from error


def _holder(descriptor: int) -> str:
    """Who holds the lock, as it says itself. A holder that has just come may not have put its name there yet."""
    for _ in range(_NAME_LOOKS):
        name = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        pid = name.removeprefix("pid ").partition(" ")[0]
        if pid.isascii() and pid.isdigit() and Path(f"/proc/{pid}").exists():
            return name
        time.sleep(_NAME_SECONDS)
    return "a process that has not said who it is"


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)
