"""The clock by which sage waits: it never goes back, and stands still while sage does."""

import time
from dataclasses import dataclass, field

# Two questions are a pause and a look apart, a fraction of a second. Where more lies between, sage was stopped: by
# Ctrl-Z, a freezer or a paused machine. What it did not see must not count against an engine that was ready meanwhile.
LONGEST_SECONDS = 2.0


@dataclass(slots=True)
class WatchedClock:
    """Seconds since it was made, of each time between two questions so many at most."""

    _seconds: float = 0.0
    _asked_at: float = field(default_factory=time.monotonic)

    def now(self) -> float:
        asked_at = time.monotonic()
        self._seconds += min(asked_at - self._asked_at, LONGEST_SECONDS)
        self._asked_at = asked_at
        return self._seconds
