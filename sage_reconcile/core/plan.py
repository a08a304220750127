"""A plan: exact acts in an order, the steps that a reader sees, and what stays undone and why. Values only."""

from dataclasses import dataclass, replace

from sage_reconcile.core.diff import FieldChange
from sage_reconcile.core.identity import EngineId, ProcessIdentity
from sage_reconcile.core.observed import Device, Engine, Listener, ObservedState
from sage_reconcile.core.refusal import Shortfall
from sage_reconcile.core.resolved import Placement, Resolved


@dataclass(frozen=True, slots=True, kw_only=True)
class StopEngine:
    """The engine is stopped: every member gone, its port free."""

    step: int
    # Indexes of the acts that must be done before this one begins.
    after: tuple[int, ...]
    engine: EngineId
    leader: ProcessIdentity
    port: int
    drain_seconds: float
    grace_seconds: float
    # The UUIDs of the devices whose memory must be back before it is done.
    devices: tuple[str, ...] = ()
    # Indexes of the acts on the same devices that must have ended, however, before this one begins.
    behind: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StartEngine:
    """The engine runs and is ready: it has answered a request of its kind."""

    step: int
    after: tuple[int, ...]
    engine: EngineId
    source: str
    # Canonical JSON of the spec as written; it becomes the process's label.
    written: str
    resolved: Resolved
    # Environment variables beyond the inherited allow-list and the label.
    env: tuple[tuple[str, str], ...]
    kind: str
    # The model name that the engine serves.
    model: str
    health_path: str
    ready_seconds: float
    # Whether the start is done only once the engine is ready; else once it runs.
    waits: bool
    # Engines that run and are not ready yet, and must be before this one starts.
    needs: tuple[ProcessIdentity, ...]
    # Whether a bound socket of ours keeps the port free until the engine binds it.
    hold: bool
    # Indexes of the acts on the same devices that must have ended, however, before this one begins.
    behind: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RelabelEngine:
    """The engine's policy is what is written now; its process is not touched."""

    step: int
    after: tuple[int, ...]
    engine: EngineId
    leader: ProcessIdentity
    written: str
    source: str


Act = StopEngine | StartEngine | RelabelEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Awaited:
    """An engine that is as it should be and not ready yet: nothing is done to it, and the apply waits for it."""

    engine: EngineId
    leader: ProcessIdentity
    kind: str
    model: str
    host: str
    port: int
    health_path: str
    ready_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a reader sees of one engine's change."""

    # start | stop | recreate | move | update
    action: str
    engine: EngineId
    kind: str
    runtime: str
    model: str
    reason: str
    cause: str
    # None for a stop of an engine, and for an update.
    placement: Placement | None = None
    changes: tuple[FieldChange, ...] = ()
    argv: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocked:
    """An engine that should change and cannot. If it runs, it is kept as it is."""

    engine: EngineId
    reason: str
    why: str
    would_help: tuple[str, ...] = ()
    # Each device as the engine finds it; empty where devices are not what is missing.
    devices: tuple[Shortfall, ...] = ()
    at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Where the world left what was applied."""

    engine: EngineId
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that will be done, in order; nothing is left to decide."""

    project: str
    source: str
    # "sha256:..." of the manifests.
    digest: str
    steps: tuple[Step, ...] = ()
    acts: tuple[Act, ...] = ()
    awaited: tuple[Awaited, ...] = ()
    blocked: tuple[Blocked, ...] = ()
    drift: tuple[Drift, ...] = ()
    notes: tuple[str, ...] = ()
    unchanged: tuple[EngineId, ...] = ()
    # Engines of the project that nothing asks for and that this plan leaves alone.
    kept: tuple[EngineId, ...] = ()
    # (id, canonical JSON of its spec) of all that is wanted.
    desired: tuple[tuple[EngineId, str], ...] = ()
    # proved | budget: whether the placement is known to be the best.
    optimality: str = "proved"

    @property
    def changes(self) -> bool:
        return bool(self.acts)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What the command line adds to the manifests."""

    prune: bool = True
    # The reason told for stops: "removed", or "destroyed" for `sage down`.
    stop_reason: str = "removed"
    # The reason told for starts and recreates of pinned engines.
    restoring: bool = False
    # Take over engines that another manifest directory of the same project started.
    take_over: bool = False
    # Replaces every engine's ready.timeout; None keeps them.
    ready_seconds: float | None = None
    # Whether a start is done only once its engine is ready; what others depend on is waited for all the same.
    waits: bool = True
    # Whether running engines may be started again elsewhere to make room.
    allow_moves: bool = False
    # Whether it is only looked at and never carried out: then devices that are made up will do.
    only_shown: bool = False


def after(act: Act, observed: ObservedState) -> ObservedState:
    """The world once an act is done. Programs, models and foreign processes stay as they are."""
    match act:
        case StopEngine():
            return _without(observed, act.leader)
        case StartEngine():
            return _with_started(observed, act)
        case RelabelEngine():
            return replace(observed, engines=tuple(_relabelled(engine, act) for engine in observed.engines))


def _without(observed: ObservedState, leader: ProcessIdentity) -> ObservedState:
    pids = {process.pid for engine in observed.engines if engine.leader == leader for process in engine.members}
    return replace(
        observed,
        engines=tuple(engine for engine in observed.engines if engine.leader != leader),
        listeners=tuple(listener for listener in observed.listeners if not pids & set(listener.pids)),
    )


def _with_started(observed: ObservedState, act: StartEngine) -> ObservedState:
    leader = next_identity(observed)
    placement = act.resolved.placement
    engine = Engine(
        id=act.engine,
        source=act.source,
        written=act.written,
        resolved=act.resolved,
        leader=leader,
        leader_alive=True,
        members=(leader,),
        state="ready",
        proved=True,
        has_record=True,
        health="ok",
        listens_on=(placement.port,),
    )
    listener = Listener(
        address=placement.host,
        port=placement.port,
        pids=(leader.pid,),
        owner=f"pid {leader.pid}",
        engine=act.engine,
    )
    return replace(
        observed,
        devices=tuple(_without_lingering(device, act) for device in observed.devices),
        engines=(*observed.engines, engine),
        listeners=(*observed.listeners, listener),
    )


def _without_lingering(device: Device, act: StartEngine) -> Device:
    """An engine starts where its last process was only once that has given its memory back."""
    own = [entry for entry in device.lingering if entry.engine == act.engine]
    if device.uuid not in act.resolved.placement.devices or not own:
        return device
    back = sum(entry.held_bytes for entry in own)
    return replace(
        device,
        lingering=tuple(entry for entry in device.lingering if entry not in own),
        used_bytes=device.used_bytes - back,
        foreign_bytes=device.foreign_bytes - back,
        orphaned_bytes=device.orphaned_bytes - back,
    )


def next_identity(observed: ObservedState) -> ProcessIdentity:
    """The identity of a process that does not exist yet, in a simulated world."""
    processes = [process for engine in observed.engines for process in engine.members]
    processes += [exit_fact.leader for exit_fact in observed.exits]
    pids = {process.pid for process in processes} | {pid for listener in observed.listeners for pid in listener.pids}
    ticks = [process.start_ticks for process in processes]
    return ProcessIdentity(
        node=observed.node,
        boot_id=observed.boot_id,
        pid=max(pids, default=999) + 1,
        start_ticks=max(ticks, default=0) + 1,
    )


def _relabelled(engine: Engine, act: RelabelEngine) -> Engine:
    if engine.leader != act.leader:
        return engine
    state = "ready" if engine.phase == "draining" else engine.state
    return replace(engine, written=act.written, source=act.source, phase="", state=state)
