"""The log files of engines: `<state>/<project>/logs/STACK/NAME.log`, `NAME.log.older` with what was cut from it, and
`NAME.log.previous` of the process before."""

import codecs
import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sage_reconcile.core.identity import EngineId, engine_id
from sage_reconcile.core.words import shown
from sage_reconcile.errors import Environment
from sage_reconcile.world.failpoints import failpoint
from sage_reconcile.world.state import matches, private_directory

# A log that has grown beyond this at a look is cut, and its last part kept as `.older`: with what is written between
# two looks, an engine's logs take no more than about three times as much.
LONGEST_LOG_BYTES = 32 * 1024 * 1024
_OLDER_BYTES = 16 * 1024 * 1024
_COPY_BYTES = 1024 * 1024

# What an engine says while it starts.
_HEAD_BYTES = 1024 * 1024

# Enough for the last lines of a traceback, and never more than a terminal wants.
_TAIL_BYTES = 64 * 1024


def log_path(root: Path, engine: EngineId) -> Path:
    replica = f"#{engine.replica}" if engine.replica else ""
    return root / engine.project / "logs" / engine.stack / f"{engine.name}{replica}.log"


def previous_log(path: Path) -> Path:
    """Where the log of the process before is kept. No engine's own log ends so, whatever its name."""
    return path.with_name(path.name + ".previous")


def older_log(path: Path) -> Path:
    """Where the part of the log is that was cut from it."""
    return path.with_name(path.name + ".older")


def logged_engines(root: Path) -> tuple[EngineId, ...]:
    """The engines that have a log."""
    found = []
    for path in matches(root, "*/logs/*/*.log"):
        project, _, stack, name = path.relative_to(root).parts
        engine = engine_id(project, f"{stack}/{name.removesuffix('.log')}")
        if engine is not None:
            found.append(engine)
    return tuple(dict.fromkeys(found))


def new_log(path: Path) -> int:
    """A descriptor of a fresh log; the earlier one is kept as `.log.previous`. Raises Environment.

    O_APPEND: what the engine writes after its log was cut goes to the new end, not to where it was.
    """
    private_directory(path.parent)
    try:
        failpoint("log.begin")
        if path.exists():
            path.replace(previous_log(path))
        # What was cut from a log belongs to its process: it goes with it.
        older_log(previous_log(path)).unlink(missing_ok=True)
        if older_log(path).exists():
            older_log(path).replace(older_log(previous_log(path)))
        failpoint("log.kept")
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        failpoint("log.opened")
    except OSError as error:
        raise Environment(f"cannot open the log {path}: {error.strerror}") from error
    return descriptor


def cut_long_log(path: Path, longest_bytes: int = LONGEST_LOG_BYTES) -> bool:
    """Cut a log that is too long, keeping its last part as `.older`; whether it was cut.

    Copied and truncated, because the engine has the file open and goes on writing into it. What it writes between the
    end of the copy and the cut is lost. A full disk loses the older part, and never stops anybody.
    """
    try:
        size = path.stat().st_size
        if size <= longest_bytes:
            return False
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    with os.fdopen(descriptor, "r+b") as log:
        log.seek(size - min(size, _OLDER_BYTES, longest_bytes))
        with contextlib.suppress(OSError):
            _keep_rest(log, older_log(path))
            failpoint("log.copied")
        log.truncate(0)
    failpoint("log.cut")
    return True


def _keep_rest(log: BinaryIO, older: Path) -> None:
    """Copy what is left of the log, and once more what came meanwhile; a fast writer could keep a copy going for ever.

    Raises OSError; then there is no older part.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(older, flags, 0o600), "wb") as file:
        try:
            for _ in range(2):
                left = os.fstat(log.fileno()).st_size - log.tell()
                while left > 0 and (part := log.read(min(left, _COPY_BYTES))):
                    file.write(part)
                    left -= len(part)
        except OSError:
            older.unlink(missing_ok=True)
            raise


def first_lines(path: Path) -> tuple[str, ...]:
    """The first lines of a log, as they were written; none without a file."""
    try:
        with path.open("rb") as file:
            text = file.read(_HEAD_BYTES)
    except OSError:
        return ()
    return tuple(text.decode("utf-8", errors="replace").replace("\r", "\n").split("\n"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A place in a log, after a whole line."""

    position: int
    inode: int


def end_of(path: Path) -> Place:
    """The end of the last whole line that a log has now: its tail can be shown up to there, and followed from there."""
    size, inode = _size_and_inode(path)
    begin = max(0, size - _TAIL_BYTES)
    try:
        with path.open("rb") as file:
            file.seek(begin)
            whole = file.read(size - begin).rfind(b"\n") + 1
    except OSError:
        whole = 0
    return Place(position=begin + whole if whole else size, inode=inode)


def tail(path: Path, lines: int, *, end: Place | None = None) -> tuple[str, ...]:
    """The last lines of a log, fit to be shown, and of its older part where it has been cut; none without a file.

    Those before `end`, if it is given.
    """
    found = _last_lines(path, lines, end)
    if len(found) < lines:
        found = (*_last_lines(older_log(path), lines - len(found)), *found)
    return found


def _last_lines(path: Path, lines: int, end: Place | None = None) -> tuple[str, ...]:
    if lines == 0:
        return ()
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            last = size if end is None else min(size, end.position)
            begin = file.seek(max(0, last - _TAIL_BYTES))
            text = file.read(last - begin).decode("utf-8", errors="replace")
    except OSError:
        return ()
    found = [line.rstrip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    return tuple(shown(line, _TAIL_BYTES) for line in found[-lines:])


def followed(path: Path, start: Place, pause: Callable[[], None]) -> Iterator[str]:
    """What is written to a log after a place in it, for ever, with a pause between two looks.

    A log that was cut is followed from its new start, and so is that of another process in its place.
    """
    position, inode = start.position, start.inode
    # A letter of several bytes may be read in two parts.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while True:
        size, now = _size_and_inode(path)
        if now != inode or size < position:
            position, inode = 0, now
        if size > position:
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(position)
                text = file.read(min(size - position, _COPY_BYTES))
                position += len(text)
                yield decoder.decode(text)
        else:
            pause()


def _size_and_inode(path: Path) -> tuple[int, int]:
    """(0, 0) for a log that is not there."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_ino
