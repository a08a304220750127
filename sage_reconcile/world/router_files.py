"""What live routers say of themselves, so that a stop can wait for the requests that they carry.

`<state>/routers/PID.json`, and `PID.lock` beside it: held by the router as long as it lives, whatever ends it.
"""

import contextlib
import fcntl
import os
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sage_reconcile.core.facts import RouterFact
from sage_reconcile.errors import Environment
from sage_reconcile.world.state import matches, private_directory, sweep, trusted_matches, write_whole

_FACT = TypeAdapter(RouterFact)

# Ten thousand engines fit.
_LONGEST_BYTES = 4 * 1024 * 1024


def read_routers(root: Path) -> tuple[RouterFact, ...]:
    """The live routers. One that holds its lock and cannot be read is there all the same, and has drained nothing."""
    return tuple(
        _read(path.with_suffix(".json")) or RouterFact(pid=int(path.stem))
        for path in trusted_matches(root, "routers/*.lock")
        if path.stem.isascii() and path.stem.isdigit() and _is_held(path)
    )


def _read(path: Path) -> RouterFact | None:
    try:
        with path.open("rb") as file:
            return _FACT.validate_json(file.read(_LONGEST_BYTES))
    except (OSError, ValidationError):
        return None


def _is_held(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # Who cannot be asked may be there.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


class RouterFile:
    """This router's own file. A state directory that is deleted under it is made again."""

    def __init__(self, root: Path) -> None:
        self._json = root / "routers" / f"{os.getpid()}.json"
        self._lock = self._json.with_suffix(".lock")
        self._descriptor: int | None = None
        self._written = ""
        self._sweep()

    def _sweep(self) -> None:
        """Remove what routers left behind that are no more."""
        sweep(self._lock.parent)
        for lock in matches(self._lock.parent, "*.lock"):
            if not _is_held(lock):
                with contextlib.suppress(OSError):
                    lock.with_suffix(".json").unlink(missing_ok=True)
                    lock.unlink(missing_ok=True)

    def write(self, fact: RouterFact) -> None:
        """Say what this router does now. Nothing is written when nothing has changed. Raises Environment."""
        text = _FACT.dump_json(fact).decode()
        if self._is_locked() and text == self._written and self._json.exists():
            return
        if not self._is_locked():
            self._take_lock()
        write_whole(self._json, text, what="router")
        self._written = text

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        with contextlib.suppress(OSError):
            self._json.unlink(missing_ok=True)
            self._lock.unlink(missing_ok=True)

    def _is_locked(self) -> bool:
        if self._descriptor is None:
            return False
        try:
            return self._lock.stat().st_ino == os.fstat(self._descriptor).st_ino
        except FileNotFoundError:
            return False

    def _take_lock(self) -> None:
        private_directory(self._lock.parent)
        if self._descriptor is not None:
            os.close(self._descriptor)
        try:
            self._descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Environment(f"cannot hold {self._lock}: {error.strerror}") from error
