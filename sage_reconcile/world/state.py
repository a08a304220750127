"""The state directory: where it is, that it is ours alone, and files that are whole or not there at all."""

import contextlib
import errno
import os
import pwd
import shutil
import stat as file_stat
from collections.abc import Mapping
from pathlib import Path

from sage_reconcile.errors import Environment
from sage_reconcile.world.failpoints import failpoint

# A plan writes a few KiB for each of its acts; a disk that has not this much left is full.
_ROOM_BYTES = 1024 * 1024

# What a file system answers that has no room, or takes nothing. Others answer that they cannot say beforehand.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


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
    return _checked(path, found)


def trusted_root(root: Path) -> Path:
    """The state root, if it may be believed: what others could have written there is no hint. Nothing is made.

    Raises Environment when it belongs to somebody else, or others may write to it.
    """
    try:
        found = root.lstat()
    except OSError:
        return root  # Not there, or not to be read: then nothing in it is believed.
    return _checked(root, found)


def _checked(path: Path, found: os.stat_result) -> Path:
    if not _is_ours(found):
        raise Environment(f"cannot use {path}: it is not a directory of yours")
    if not _is_closed(found):
        raise Environment(f"cannot use {path}: others may write to it", hint=f"chmod go-w {path}")
    return path


def _is_ours(found: os.stat_result) -> bool:
    return file_stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _is_closed(found: os.stat_result) -> bool:
    return not found.st_mode & 0o022


def check_writable(root: Path, project: str) -> None:
    """Raises Environment when the state root or the project's part of it cannot be written, or is not ours alone.

    Also sweeps up what a sage that died while it wrote has left.
    """
    private_directory(root)
    sweep(root / project)
    for name in ("engines", "logs"):
        directory = private_directory(root / project / name)
        sweep(directory)
        _probe(directory / ".writable")
    for directory in matches(root, f"{project}/logs/*"):
        if directory.is_dir():
            private_directory(directory)


def _probe(path: Path) -> None:
    """Whether the disk takes what a plan will write, found out before anything is stopped."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            failpoint("state.probed")
            os.posix_fallocate(descriptor, 0, _ROOM_BYTES)
        finally:
            os.close(descriptor)
            path.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in _FULL or not isinstance(error.errno, int) or error.filename is not None:
            raise cannot_write(path.parent, error) from error


def matches(root: Path, pattern: str) -> list[Path]:
    """The paths below a directory that match, sorted; what vanishes during the look is not there."""
    try:
        return sorted(root.glob(pattern))
    except OSError:
        return []


def trusted_matches(root: Path, pattern: str) -> list[Path]:
    """The paths that match and may be believed: no directory between the root and them is open to others."""
    trusted: dict[Path, bool] = {}

    def is_trusted(directory: Path) -> bool:
        if directory not in trusted:
            try:
                found = directory.lstat()
            except OSError:
                return False
            alone = _is_ours(found) and _is_closed(found)
            trusted[directory] = alone and (directory == root or is_trusted(directory.parent))
        return trusted[directory]

    return [path for path in matches(root, pattern) if is_trusted(path.parent)]


def write_whole(path: Path, text: str, *, what: str) -> None:
    """Put the file in place at once: after a crash it has the old content or the new, never a part.

    `what` names it among the failpoints. Raises Environment when the disk does not let it.
    """
    private_directory(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        failpoint(f"{what}.begin")
        try:
            _write_synced(temporary, text, what)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        failpoint(f"{what}.renamed")
        sync_directory(path.parent)
        failpoint(f"{what}.done")
    except OSError as error:
        raise cannot_write(path, error) from error


def _write_synced(path: Path, text: str, what: str) -> None:
    """The file's bytes are on the disk when the call returns."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        failpoint(f"{what}.written")
        os.fsync(file.fileno())
        failpoint(f"{what}.synced")


def sync_directory(path: Path) -> None:
    """What was created, renamed and removed in a directory is so on the disk when the call returns."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> Environment:
    """The error for a state that cannot be written."""
    return Environment(f"cannot write {path}: {error.strerror}", hint="is the disk full or read-only?")


def sweep(directory: Path) -> None:
    """Remove the half-written files of processes that are no more."""
    for path in matches(directory, ".*.tmp"):
        pid = path.name.split(".")[-2]
        if not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(OSError):
                path.unlink()


def keep_as(path: Path, name: Path) -> None:
    """The file has a second name too, and keeps that content when another file takes its first. Raises OSError."""
    try:
        os.link(path, name)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        shutil.copyfile(path, name)  # A file system without hard links.
