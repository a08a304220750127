"""The oracle's questions to a sage that lives on: does its router serve what is ready, and does it hold ever more?

It is asked over HTTP, and /proc is read; what is ready is said by another sage, with a look of its own.
"""

import http.client
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.e2e import Place, until

# The router looks every 0.4 s, and so late may what it serves be.
_SOON_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a process holds of the system."""

    descriptors: int
    threads: int

    def within(self, other: "Held") -> bool:
        return self.descriptors <= other.descriptors and self.threads <= other.threads


def held(pid: int) -> Held:
    return Held(
        descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())), threads=len(list(Path(f"/proc/{pid}/task").iterdir()))
    )


def assert_serves_what_is_ready(place: Place, port: int) -> None:
    """Of the models with the project in their name: a router sees all engines of its user, other tests' too."""

    def told() -> set[str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/v1/models")
        entries = json.loads(connection.getresponse().read())["data"]
        connection.close()
        return {entry["id"] for entry in entries if place.project in entry["id"]}

    def ready() -> set[str]:
        rows = place.engines().values()
        return {row["model"] for row in rows if row["state"] == "ready" and place.project in row["model"]}

    until(lambda: told() == ready(), "the router serves what is ready, and nothing else", _SOON_SECONDS)


def assert_holds_no_more_after(pid: int, cycle: Callable[[], None], *, cycles: int) -> None:
    """After any number of cycles a process holds what it held after two."""
    for _ in range(2):
        cycle()
    before = held(pid)
    for _ in range(cycles):
        cycle()
    # A connection or a question to an engine may be under way.
    until(lambda: held(pid).within(before), f"pid {pid} holds no more than {before}, and not {held(pid)}")
