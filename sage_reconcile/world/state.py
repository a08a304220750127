"""The state directory: where it is, that it is ours alone, and files that are whole or not there at all."""

import json
import os
import pwd
import stat as file_stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sage_reconcile.errors import Environment


def state_root(environment: Mapping[str, str]) -> Path:
    """`$SAGE_STATE_DIR`, else `$XDG_STATE_HOME/sage`, else `~/.local/state/sage`."""
    if environment.get("SAGE_STATE_DIR"):
        return Path(environment["SAGE_STATE_DIR"]).absolute()
    if environment.get("XDG_STATE_HOME"):
        return Path(environment["XDG_STATE_HOME"]).absolute() / "sage"
    return home(environment) / ".local" / "state" / "sage"


def home(environment: Mapping[str, str]) -> Path:
    """HOME, or what the passwd entry says when it is not set; the root when there is neither."""
    try:
        return Path(environment.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return Path("/")


def private_directory(path: Path) -> Path:
    """The directory, made if need be; ours, and closed to others.

    Raises Environment when it cannot be made, or belongs to somebody else.
    """
    try:
        for directory in reversed([path, *path.parents]):
            if not directory.exists():
                # One by one: a parent that `mkdir(parents=True)` makes is as open as the umask leaves it.
                directory.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise Environment(
            f"cannot make the directory {path}: {error.strerror}",
            hint="set SAGE_STATE_DIR to a directory that you can write",
        ) from error
    if not file_stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise Environment(f"cannot use {path}: it is not a directory of yours")
    if found.st_mode & 0o022:
        raise Environment(f"cannot use {path}: others may write to it", hint=f"chmod go-w {path}")
    return path


def check_writable(root: Path, project: str) -> None:
    """Raises Environment when the state root or the project's part of it cannot be written, or is not ours alone."""
    private_directory(root)
    for name in ("engines", "logs"):
        write_whole(private_directory(root / project) / name / ".writable", "")
    for directory in matches(root, f"{project}/logs/*"):
        if directory.is_dir():
            private_directory(directory)


def matches(root: Path, pattern: str) -> list[Path]:
    """The paths below a directory that match, sorted; what vanishes during the look is not there."""
    try:
        return sorted(root.glob(pattern))
    except OSError:
        return []


def write_whole(path: Path, text: str) -> None:
    """Put the file in place at once: after a crash it has the old content or the new, never a part.

    Raises Environment when the disk does not let it.
    """
    private_directory(path.parent)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)
    except OSError as error:
        raise Environment(f"cannot write {path}: {error.strerror}", hint="is the disk full or read-only?") from error


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None when there is none to be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
