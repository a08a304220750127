"""A question under way in a thread of its own: an answer that may never come must not keep anybody waiting."""

import errno
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Pending(Generic[_T]):
    """What `ask` returns, once it does.

    A daemon thread, which the interpreter does not wait for at its end: an engine or a driver that never answers must
    not keep a command from returning. The executors of concurrent.futures do wait.
    """

    # Raises OSError when no thread can be started.
    def __init__(self, ask: Callable[[], _T]) -> None:
        self.begun_at = time.monotonic()
        self._answers: list[_T] = []
        self._answered = threading.Event()
        try:
            threading.Thread(target=self._run, args=(ask,), daemon=True).start()
        except RuntimeError as error:
            # The kernel's EAGAIN, which Python tells as a mistake of the program (pthread_create(3)).
            raise OSError(errno.EAGAIN, "no thread can be started") from error

    def _run(self, ask: Callable[[], _T]) -> None:
        try:
            self._answers.append(ask())
        finally:
            self._answered.set()

    def answer(self, *, wait_seconds: float = 0.0) -> _T | None:
        """The answer; None while there is none, and for ever when `ask` raised."""
        self._answered.wait(max(wait_seconds, 0.0))
        return self._answers[0] if self._answers else None
