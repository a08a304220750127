"""What the router knows and counts: the table in force, requests outstanding, and backends that failed since.

Shared by the router's loop and the thread that observes. It knows nothing of HTTP.
"""

import threading
from collections.abc import Collection
from dataclasses import replace

from sage_reconcile.core.identity import ProcessIdentity
from sage_reconcile.core.routes import Backend, NoBackend, RouteTable, choose


class Traffic:
    """Thread-safe. Every method returns at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handed = RouteTable()
        # The table as handed over, less what was ejected since.
        self._table = self._handed
        self._outstanding: dict[ProcessIdentity, int] = {}
        # Ejected leaders, and the taken_at of the table that still called them ready.
        self._ejected: dict[ProcessIdentity, float] = {}

    def use(self, table: RouteTable) -> None:
        """Route by this table from now on. A newer observation than the one in force forgives what was ejected."""
        with self._lock:
            self._handed = table
            leaders = {backend.leader for backend in table.backends}
            self._ejected = {
                leader: taken_at
                for leader, taken_at in self._ejected.items()
                if leader in leaders and table.taken_at <= taken_at
            }
            self._table = self._without_ejected()

    def table(self) -> RouteTable:
        """The table in force. A backend that failed since it was taken is shown as unready."""
        with self._lock:
            return self._table

    def in_flight(self) -> tuple[tuple[ProcessIdentity, int], ...]:
        """Outstanding requests of each backend that has any, also of backends that have left the table."""
        with self._lock:
            return tuple(sorted(self._outstanding.items()))

    def take(self, kind: str, model: str | None, exclude: Collection[ProcessIdentity] = ()) -> Backend | NoBackend:
        """Choose a backend and count the request as outstanding there, in one step. Every take needs a give_back."""
        with self._lock:
            chosen = choose(self._table, kind, model, self._outstanding, exclude)
            if isinstance(chosen, Backend):
                self._outstanding[chosen.leader] = self._outstanding.get(chosen.leader, 0) + 1
            return chosen

    def give_back(self, leader: ProcessIdentity) -> None:
        """The request is answered or abandoned."""
        with self._lock:
            left = self._outstanding[leader] - 1
            if left:
                self._outstanding[leader] = left
            else:
                del self._outstanding[leader]

    def eject(self, leader: ProcessIdentity) -> None:
        """Send it nothing more until a newer observation calls it ready."""
        with self._lock:
            self._ejected[leader] = self._handed.taken_at
            self._table = self._without_ejected()

    def observed_ready(self, leader: ProcessIdentity) -> bool:
        """Whether the table as handed over calls this very process ready, ejected or not."""
        with self._lock:
            return any(backend.leader == leader and backend.state == "ready" for backend in self._handed.backends)

    def succeeded(self, backend: Backend) -> bool:
        """Whether the backend has left the table and another process has its port: who answers there is not it."""
        with self._lock:
            return all(other.leader != backend.leader for other in self._handed.backends) and any(
                (other.host, other.port) == (backend.host, backend.port) for other in self._handed.backends
            )

    def _without_ejected(self) -> RouteTable:
        if not self._ejected:
            return self._handed
        backends = tuple(
            replace(backend, state="unready", reason="it did not answer the router a moment ago")
            if backend.leader in self._ejected and backend.state == "ready"
            else backend
            for backend in self._handed.backends
        )
        return replace(self._handed, backends=backends)
