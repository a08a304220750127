"""Ctrl-C and SIGTERM, taken as a wish to end between two acts."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


@dataclass(slots=True, kw_only=True)
class Interrupts:
    """What was heard so far."""

    # The signal that asked for an end; 0 as long as none came.
    number: int = 0

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Inside, the first SIGINT or SIGTERM is heard; the second does what it did before."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in numbers}

        def asked(number: int, _frame: FrameType | None) -> None:
            self.number = number
            restore()

        def restore() -> None:
            for number, disposition in before.items():
                signal.signal(number, disposition)

        # A signal that is ignored, as SIGINT is in the background of a script, stays ignored.
        for number in numbers:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, asked)
        try:
            yield
        finally:
            restore()
