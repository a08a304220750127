"""The standard streams of a command: there whatever was closed, and quiet once their reader has left.

`sage plan | head -1` is no trouble: the reader went away by its own will, so what is still written goes nowhere, and
the command does what it was asked and ends with the exit code that is due.
"""

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Outlet(io.FileIO):
    """A file descriptor that takes everything once nobody reads it: a pipe's reader left, a terminal was closed."""

    reader_left = False

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._is_terminal = self.isatty()

    def write(self, written: "ReadableBuffer", /) -> int:
        try:
            return super().write(written)
        except OSError as error:
            # A terminal that was closed answers EIO (tty_ioctl(4), hangup); so does a broken disk.
            if not isinstance(error, BrokenPipeError) and not (self._is_terminal and error.errno == errno.EIO):
                raise
            self.reader_left = True
            return memoryview(written).nbytes


def ensure_streams() -> None:
    """Standard streams that were closed go nowhere, and letters that a stream's encoding lacks are escaped."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
            # Not closed with this object, which is replaced below: the next file opened would take the number, and
            # what is told would be written into it.
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    sys.stdout, sys.stderr = _tolerant(sys.stdout), _tolerant(sys.stderr)


def _tolerant(stream: TextIO) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Outlet(stream.fileno())),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def reader_left(stream: TextIO) -> bool:
    """Whether what was written last found nobody to read it."""
    outlet = getattr(getattr(stream, "buffer", None), "raw", None)
    return isinstance(outlet, _Outlet) and outlet.reader_left
