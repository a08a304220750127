"""The journal: one line for each thing that was done, on the disk before the next is done."""

import os
from pathlib import Path

from sage_reconcile.core.facts import AppliedFact
from sage_reconcile.core.journal import Entry, entry_json, last_applied, parse_entry
from sage_reconcile.errors import Environment
from sage_reconcile.world.state import matches, private_directory

_NAME = "journal.jsonl"


class JournalFile:
    """The journal of one project."""

    def __init__(self, root: Path, project: str) -> None:
        self._path = private_directory(root / project) / _NAME

    def append(self, entry: Entry) -> None:
        """Add a line; it is on the disk when the call returns. Raises Environment."""
        line = entry_json(entry).encode() + b"\n"
        private_directory(self._path.parent)
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                _write_line(descriptor, line)
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise Environment(
                f"cannot write the journal {self._path}: {error.strerror}", hint="is the disk full or read-only?"
            ) from error

    def entries(self) -> tuple[Entry, ...]:
        return read_journal(self._path)


def _write_line(descriptor: int, line: bytes) -> None:
    """A whole line, on a line of its own: the last one may have been cut by a crash or a full disk."""
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        line = b"\n" + line
    while line:
        line = line[os.write(descriptor, line) :]


def read_journal(path: Path) -> tuple[Entry, ...]:
    """Every entry that can be read; a line that was cut by a crash is no entry."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return ()
    return tuple(entry for line in lines if (entry := parse_entry(line)) is not None)


class AppliedRevisions:
    """The last applied revision of every project, read again only when a journal has changed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen: dict[Path, tuple[tuple[int, int], tuple[AppliedFact, ...]]] = {}

    def read(self) -> tuple[AppliedFact, ...]:
        applied: list[AppliedFact] = []
        for path in matches(self._root, f"*/{_NAME}"):
            try:
                found = path.stat()
            except OSError:
                continue
            version = (found.st_mtime_ns, found.st_size)
            if path not in self._seen or self._seen[path][0] != version:
                self._seen[path] = (version, last_applied(read_journal(path)))
            applied += self._seen[path][1]
        return tuple(applied)
