"""Reading the beginning of a file that may be anything: a FIFO, a directory, cut short, or lying about itself.

Only regular files are read, only from their beginning, and never more than the caller allows.
"""

import json
import os
import stat
from typing import Any, Protocol


class BadFile(Exception):
    """A file cannot be taken; the message is a sentence that names it."""


class Readable(Protocol):
    """A file of which the beginning can be read."""

    @property
    def path(self) -> str:
        """What messages call it."""
        ...

    @property
    def size_bytes(self) -> int: ...

    def read(self, length: int, *, offset: int) -> bytes:
        """Exactly `length` bytes. Raises BadFile when the file ends before."""
        ...


class HeaderFile:
    """An open regular file. Use as a context: it closes what it opened."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            # Without O_NONBLOCK, opening a FIFO would wait for its writer.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise BadFile(f"{path}: {why}") from error
        found = os.fstat(self._descriptor)
        self.size_bytes = found.st_size
        if not stat.S_ISREG(found.st_mode):
            os.close(self._descriptor)
            raise BadFile(f"{path} is not a regular file")

    def __enter__(self) -> "HeaderFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, length: int, *, offset: int) -> bytes:
        """Exactly `length` bytes.

        Raises BadFile when the file ends before, without reading anything where its size already tells.
        """
        if length < 0 or offset < 0 or offset + length > self.size_bytes:
            raise BadFile(f"{self.path} is cut short: it ends at byte {self.size_bytes:,}")
        pieces, missing = [], length
        while missing:
            try:
                piece = os.pread(self._descriptor, min(missing, 1 << 24), offset + length - missing)
            except OSError as error:
                raise BadFile(f"{self.path}: {error.strerror}") from error
            if not piece:
                raise BadFile(f"{self.path} is cut short: it got shorter while it was read")
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)


def read_json(file: Readable, *, largest_bytes: int) -> dict[str, Any]:
    """The JSON object in a file. Raises BadFile."""
    if file.size_bytes > largest_bytes:
        raise BadFile(f"{file.path} is larger than {largest_bytes:,} bytes")
    return json_object(file.read(file.size_bytes, offset=0), file.path)


# A list or an object takes some 100 bytes of memory, so that these many of them stay below half a gigabyte.
_MOST_OBJECTS = 1_000_000
_MOST_VALUES = 8_000_000
# Python keeps a text with one wide character at four bytes per character.
_LARGEST_WIDE_BYTES = 32 * 1024 * 1024


def json_object(content: bytes, path: str) -> dict[str, Any]:
    """The JSON object in these bytes.

    Raises BadFile for anything else, before it would cost memory that the bytes do not justify.
    """
    if content.count(b"{") + content.count(b"[") > _MOST_OBJECTS or content.count(b",") > _MOST_VALUES:
        raise BadFile(f"{path} holds more values than any model has")
    if len(content) > _LARGEST_WIDE_BYTES and not content.isascii():
        raise BadFile(f"{path} is too large for a file with characters outside ASCII")
    try:
        found = json.loads(content)
    except RecursionError as error:
        raise BadFile(f"{path} is nested too deeply") from error
    except ValueError as error:
        raise BadFile(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadFile(f"{path} does not hold a JSON object")
    return found
