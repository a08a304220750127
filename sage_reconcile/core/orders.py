"""Orders: the smallest things that a host is told to do; each returns at once. Values only."""

from dataclasses import dataclass

from sage_reconcile.core.identity import EngineId, ProcessIdentity
from sage_reconcile.core.plan import RelabelEngine, StartEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawn:
    """Start a process behind the gate, write down its identity, release it."""

    act: StartEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Write into the engine's record how far its stop has come: "draining", "stopping" or "stuck"."""

    engine: EngineId
    leader: ProcessIdentity
    phase: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminate:
    """SIGTERM to these processes of the engine, each looked at again before."""

    engine: EngineId
    leader: ProcessIdentity
    processes: tuple[ProcessIdentity, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """SIGKILL to these processes of the engine, each looked at again before."""

    engine: EngineId
    leader: ProcessIdentity
    processes: tuple[ProcessIdentity, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prove:
    """Ask one request of its kind, in the background; the answer comes back as a fact."""

    engine: EngineId
    leader: ProcessIdentity
    kind: str
    model: str
    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Relabel:
    """Write the engine's policy into its record."""

    act: RelabelEngine


Order = Spawn | Mark | Terminate | Kill | Prove | Relabel


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawned:
    """What came of a Spawn: the process, or why there is none."""

    # None when nothing was started.
    leader: ProcessIdentity | None
    why: str = ""
    # Whether that is because its devices cannot be seen.
    unseen: bool = False
