"""The manifest files of one directory: paths in, the bytes of every file out, each read once.

Nothing is skipped in silence: an engine that is missing from the manifests is an engine to stop, so whatever cannot
be read is a problem. Must not know: YAML.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from sage_reconcile.world.manifest_problems import TOP, Problem, Source

# Larger than any manifest that a person wrote: a thousand engines take 300 KB.
_LARGEST_FILE_BYTES = 1024 * 1024
_MOST_FILES = 1000
SETTINGS_NAMES = ("sage.yaml", "sage.yml")


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestFile:
    """One file that was read: its name in the directory, and the way the user spells it."""

    name: str
    file: str
    content: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """All files that belong to some paths of one directory, sorted by name."""

    # The real path of the directory.
    directory: str
    # Whether the directory itself was asked for, and not only files in it.
    whole: bool
    files: tuple[ManifestFile, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """One file to read: the path as the user spells it, its directory's real path, and its name in there."""

    file: str
    directory: str
    name: str


class _Unreadable(Exception):
    """A file or directory cannot be taken; the problem says why."""

    def __init__(self, file: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.problem = Source(file=file).problem(TOP, message, hint)


def read(paths: tuple[str, ...]) -> Reading:
    """The files that the paths name, and the settings beside them; all paths must mean one directory."""
    assert paths
    asked: dict[str, _Asked] = {}
    problems: list[Problem] = []
    directories: list[str] = []
    whole = False
    for path in paths:
        try:
            is_directory, found = _asked(path)
        except _Unreadable as unreadable:
            problems.append(unreadable.problem)
            continue
        directory = found[0].directory
        if directory not in directories:
            directories.append(directory)
        if len(directories) > 1 and directory != directories[0]:
            hint = "one call takes the manifests of one directory; run sage once for each"
            message = f"not in the same project as {paths[0]}: this is {directory}, that is {directories[0]}"
            problems.append(Source(file=path).problem(TOP, message, hint))
            continue
        whole = whole or is_directory
        for one in found:
            asked.setdefault(one.name, one)
    asked.pop("", None)
    files, unreadable_files = _read_all(sorted(asked.values(), key=lambda one: os.fsencode(one.name)))
    return Reading(
        directory=directories[0] if directories else "/",
        whole=whole,
        files=files,
        problems=tuple(problems) + unreadable_files,
    )


def digest(files: tuple[ManifestFile, ...]) -> str:
    """One hash over the names and bytes of all files."""
    total = hashlib.sha256()
    for one in files:
        for part in (os.fsencode(one.name), one.content):
            # With its length before it, a part cannot be mistaken for two others.
            total.update(b"%d:" % len(part) + part)
    return f"sha256:{total.hexdigest()}"


def _asked(path: str) -> tuple[bool, tuple[_Asked, ...]]:
    """Whether the path is a directory, and its files; a first one without a name only carries the directory."""
    try:
        mode = os.stat(path).st_mode
    # ValueError: a NUL in the path, or a letter that no file name can hold.
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and os.path.islink(path):
            mode = stat.S_IFLNK
        else:
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            message = "there is no such file or directory" if missing else f"cannot be read: {_reason(error)}"
            raise _Unreadable(path or '""', message) from None
    if stat.S_ISDIR(mode):
        directory = os.path.realpath(path)
        names = _names(path)
        return True, (
            _Asked(file=path, directory=directory, name=""),
            *(_Asked(file=os.path.join(path, name), directory=directory, name=name) for name in names),
        )
    beside, name = os.path.split(path)
    directory = os.path.realpath(beside or ".")
    settings = [one for one in SETTINGS_NAMES if one != name and os.path.lexists(os.path.join(directory, one))]
    return False, (
        _Asked(file=path, directory=directory, name=name),
        *(_Asked(file=os.path.join(beside, one), directory=directory, name=one) for one in settings),
    )


def _names(directory: str) -> tuple[str, ...]:
    try:
        names = [name for name in os.listdir(directory) if name.endswith((".yaml", ".yml")) and name[0] != "."]
    except OSError as error:
        raise _Unreadable(directory, f"cannot be listed: {_reason(error)}") from None
    if len(names) > _MOST_FILES:
        raise _Unreadable(directory, f"holds {len(names)} manifests: more than {_MOST_FILES} are not read")
    return tuple(names)


def _read_all(asked: list[_Asked]) -> tuple[tuple[ManifestFile, ...], tuple[Problem, ...]]:
    files: list[ManifestFile] = []
    problems: list[Problem] = []
    for one in asked:
        try:
            files.append(ManifestFile(name=one.name, file=one.file, content=_content(one)))
        except _Unreadable as unreadable:
            problems.append(unreadable.problem)
    return tuple(files), tuple(problems)


def _content(asked: _Asked) -> bytes:
    inside = _inside(asked)
    try:
        directory = os.open(asked.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Looked at before it is opened, because opening some devices is already an act.
            _refuse_irregular(asked, os.stat(inside, dir_fd=directory, follow_symlinks=False))
            opened = os.open(inside, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        finally:
            os.close(directory)
        try:
            return _bytes(asked, opened)
        finally:
            os.close(opened)
    except OSError as error:
        raise _Unreadable(asked.file, f"cannot be read: {_reason(error)}") from None


def _inside(asked: _Asked) -> str:
    """The file's path below its directory, with symbolic links followed; they may not lead out of it."""
    try:
        target = os.path.realpath(os.path.join(asked.directory, asked.name), strict=True)
    except OSError as error:
        why = "a symbolic link that goes in circles" if error.errno == errno.ELOOP else _reason(error)
        raise _Unreadable(asked.file, f"cannot be read: {why}") from None
    inside = os.path.relpath(target, asked.directory)
    if inside.split(os.sep)[0] == os.pardir:
        hint = "put the file itself into the directory"
        raise _Unreadable(asked.file, "is a symbolic link that leads out of its directory", hint)
    return inside


def _bytes(asked: _Asked, opened: int) -> bytes:
    before = os.fstat(opened)
    _refuse_irregular(asked, before)
    if before.st_size > _LARGEST_FILE_BYTES:
        raise _Unreadable(asked.file, f"is larger than {_LARGEST_FILE_BYTES // 1024} KiB: that is no manifest")
    content = b"".join(_pieces(opened))
    after = os.fstat(opened)
    if (before.st_size, before.st_mtime_ns, len(content)) != (after.st_size, after.st_mtime_ns, after.st_size):
        raise _Unreadable(asked.file, "changed while it was being read", "try again when its writer has finished")
    return content


def _pieces(opened: int) -> Iterator[bytes]:
    """What the file holds, up to one byte over the limit."""
    left = _LARGEST_FILE_BYTES + 1
    while left > 0 and (piece := os.read(opened, left)):
        left -= len(piece)
        yield piece


def _refuse_irregular(asked: _Asked, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kinds = (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISLNK, "a symbolic link that has just appeared"),
    )
    what = next((name for matches, name in kinds if matches(status.st_mode)), "a device")
    raise _Unreadable(asked.file, f"is {what}, not a file", "a manifest is a regular file: move this elsewhere")


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or "it is not a name that a file can have"
