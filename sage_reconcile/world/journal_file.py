"""The journal: one line for each thing that was done, on the disk before the next is done."""

import os
from dataclasses import dataclass
from pathlib import Path

from sage_reconcile.core.facts import AppliedFact
from sage_reconcile.core.journal import (
    Entry,
    JournalBegun,
    Revisions,
    entry_json,
    is_newer,
    may_tell_of_revisions,
    parse_entry,
    shortened,
)
from sage_reconcile.world.damaged import set_aside
from sage_reconcile.world.failpoints import failpoint
from sage_reconcile.world.records import newer_state
from sage_reconcile.world.state import (
    cannot_write,
    keep_as,
    private_directory,
    sync_directory,
    trusted_matches,
    write_whole,
)

_NAME = "journal.jsonl"

# A journal that has grown longer is shortened before the next plan; the whole of it is kept as `.previous`.
_LONG_BYTES = 4 * 1024 * 1024
_SHORTENED_BYTES = 1024 * 1024

# No more than the last so many bytes of a journal are read: what is longer was not written by us.
_MOST_READ_BYTES = 16 * 1024 * 1024


class JournalFile:
    """The journal of one project."""

    def __init__(self, root: Path, project: str) -> None:
        self._path = private_directory(root / project) / _NAME

    def append(self, entry: Entry) -> None:
        """Add a line; it is on the disk when the call returns. Raises Environment."""
        line = entry_json(entry).encode() + b"\n"
        private_directory(self._path.parent)
        try:
            is_new = not self._path.exists()
            descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                failpoint("journal.opened")
                _write_line(descriptor, line)
                failpoint("journal.written")
                os.fdatasync(descriptor)
                failpoint("journal.synced")
            finally:
                os.close(descriptor)
            if is_new:
                sync_directory(self._path.parent)
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def mend(self) -> tuple[str, ...]:
        """Set a damaged journal aside and go on with what can be read of it; shorten a long one.

        Tells what was damaged. Raises Environment, and NewerState for the journal of a newer sage.
        """
        lines, is_whole = _lines(self._path)
        if any(is_newer(line) for line in lines):
            raise newer_state(self._path)
        entries = tuple(entry for line in lines if (entry := parse_entry(line)) is not None)
        told: tuple[str, ...] = ()
        if not is_whole or len(entries) < len(lines):
            kept_as = set_aside(self._path, self._path.parent, keep=True)
            told = (f"{self._path} was damaged: the whole of it is kept as {kept_as}",)
        elif _size(self._path) > _LONG_BYTES:
            previous = self._path.with_name(f"{_NAME}.previous")
            try:
                previous.unlink(missing_ok=True)
                keep_as(self._path, previous)
            except OSError as error:
                raise cannot_write(previous, error) from error
            entries = shortened(entries, _SHORTENED_BYTES)
        else:
            return ()
        entries = tuple(entry for entry in entries if not isinstance(entry, JournalBegun))
        text = "".join(f"{entry_json(entry)}\n" for entry in (JournalBegun(), *entries))
        write_whole(self._path, text, what="mended")
        return told

    def entries(self) -> tuple[Entry, ...]:
        return read_journal(self._path)


def _write_line(descriptor: int, line: bytes) -> None:
    """A whole line, on a line of its own: the last one may have been cut by a crash or a full disk."""
    size = os.fstat(descriptor).st_size
    if size == 0:
        line = entry_json(JournalBegun()).encode() + b"\n" + line
    elif os.pread(descriptor, 1, size - 1) != b"\n":
        line = b"\n" + line
    while line:
        line = line[os.write(descriptor, line) :]


def _lines(path: Path) -> tuple[list[bytes], bool]:
    """The lines of a journal, or those of its last part, and whether that is all and it can be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - _MOST_READ_BYTES)
            file.seek(start)
            text = file.read(_MOST_READ_BYTES)
    except FileNotFoundError:
        return [], True
    except OSError:
        return [], False
    lines = text.split(b"\n")
    # The last line ends with a line break, unless it was cut; the first of a part begins anywhere.
    return [line for line in (lines[1:] if start else lines) if line], start == 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def read_journal(path: Path) -> tuple[Entry, ...]:
    """What was done, as far as it can be read; a line that was cut by a crash tells nothing."""
    return _entries(_lines(path)[0])


def _entries(lines: list[bytes]) -> tuple[Entry, ...]:
    entries = [parse_entry(line) for line in lines]
    return tuple(entry for entry in entries if entry is not None and not isinstance(entry, JournalBegun))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What a journal said when it was last read."""

    # Its inode, time and size then.
    version: tuple[int, int, int]
    # Up to the end of its last whole line: how many bytes, the last of them, what they told, and who wrote them.
    read_bytes: int
    ending: bytes
    revisions: Revisions
    is_newer: bool
    # With what stands behind that.
    applied: tuple[AppliedFact, ...]


class AppliedRevisions:
    """The last applied revision of every project. Of a journal that has grown only what is new is read."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: dict[Path, _Seen] = {}

    def read(self) -> tuple[AppliedFact, ...]:
        self._look()
        return tuple(fact for _, seen in sorted(self._seen.items()) for fact in seen.applied)

    def newer(self) -> tuple[Path, ...]:
        """The journals that a newer sage wrote into."""
        self._look()
        return tuple(path for path, seen in sorted(self._seen.items()) if seen.is_newer)

    def _look(self) -> None:
        found: dict[Path, _Seen] = {}
        for path in trusted_matches(self._root, f"*/{_NAME}"):
            try:
                status = path.stat()
            except OSError:
                continue
            version = (status.st_ino, status.st_mtime_ns, status.st_size)
            before = self._seen.get(path)
            found[path] = before if before is not None and before.version == version else _read(path, version, before)
        self._seen = found


# So many bytes at the end of what was read must still be there for the rest to be taken as read.
_ENDING_BYTES = 256


def _read(path: Path, version: tuple[int, int, int], before: _Seen | None) -> _Seen:
    """A journal, or what is new in it."""
    known, text = _new_text(path, before if before is not None and before.version[0] == version[0] else None)
    revisions = known.revisions if known is not None else Revisions()
    whole, _, rest = text.rpartition(b"\n")
    lines, read_bytes = whole.split(b"\n"), len(text) - len(rest)
    for line in filter(may_tell_of_revisions, lines):
        revisions = _followed(revisions, line)
    # What was read of a part begins somewhere in the file: then the next look reads all of it again.
    ending = (known.ending if known is not None else b"") + text[:read_bytes]
    return _Seen(
        version=version,
        read_bytes=(known.read_bytes if known is not None else 0) + read_bytes,
        ending=ending[-_ENDING_BYTES:],
        revisions=revisions,
        is_newer=(known is not None and known.is_newer) or any(map(is_newer, (*lines, rest))),
        applied=_followed(revisions, rest).applied,
    )


def _new_text(path: Path, before: _Seen | None) -> tuple[_Seen | None, bytes]:
    """What stands behind what was read before, and that; None and the whole, or its last part, where that changed."""
    try:
        with path.open("rb") as file:
            if before is not None:
                file.seek(before.read_bytes - len(before.ending))
                if file.read(len(before.ending)) == before.ending:
                    return before, file.read(_MOST_READ_BYTES)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _MOST_READ_BYTES))
            return None, file.read(_MOST_READ_BYTES)
    except OSError:
        return None, b""


def _followed(revisions: Revisions, line: bytes) -> Revisions:
    entry = parse_entry(line)
    return revisions if entry is None else revisions.followed_by(entry)
