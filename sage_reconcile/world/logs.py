"""The log files of engines: `<state>/<project>/logs/STACK/NAME.log`, and the one before it as `NAME.log.previous`."""

import os
from pathlib import Path

from sage_reconcile.core.identity import EngineId, engine_id
from sage_reconcile.errors import Environment
from sage_reconcile.world.state import matches, private_directory

# Enough for the last lines of a traceback, and never more than a terminal wants.
_TAIL_BYTES = 64 * 1024


def log_path(root: Path, engine: EngineId) -> Path:
    replica = f"#{engine.replica}" if engine.replica else ""
    return root / engine.project / "logs" / engine.stack / f"{engine.name}{replica}.log"


def previous_log(path: Path) -> Path:
    """Where the log of the process before is kept. No engine's own log ends so, whatever its name."""
    return path.with_name(path.name + ".previous")


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
    """A descriptor of a fresh log; the earlier one is kept as `.log.previous`. Raises Environment."""
    private_directory(path.parent)
    try:
        if path.exists():
            path.replace(previous_log(path))
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Environment(f"cannot open the log {path}: {error.strerror}") from error


def tail(path: str, lines: int) -> tuple[str, ...]:
    """The last lines of a log; none when there is no such file."""
    return tail_of(path, None, lines)


def tail_of(path: str, end: int | None, lines: int) -> tuple[str, ...]:
    """The last lines of the first `end` bytes of a log; None means all of it."""
    if lines == 0:
        return ()
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END) if end is None else end
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read(min(size, _TAIL_BYTES)).decode("utf-8", errors="replace")
    except OSError:
        return ()
    found = [line.rstrip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    return tuple("".join(letter if letter.isprintable() else "?" for letter in line) for line in found[-lines:])
