"""The world as it is, with a meaning: engines, foreign processes, sockets and gaps. Values only."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pydantic import TypeAdapter

from sage_reconcile.core.facts import (
    AppliedFact,
    ExitFact,
    FootprintFact,
    Gap,
    ModelFact,
    ProgramFact,
    RecordFact,
    RouterFact,
)
from sage_reconcile.core.identity import EngineId, ProcessIdentity
from sage_reconcile.core.resolved import Resolved
from sage_reconcile.core.spec import EngineSpec, parse_written, served_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process that is no engine's of ours and uses memory of a device: a constraint, never a target."""

    pid: int
    name: str
    user: str
    used_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lingering:
    """Memory that a dead engine of ours has not given back yet: only the same engine may count on it."""

    engine: EngineId
    pid: int
    held_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU or MIG slice, and whose its memory is."""

    node: str
    index: int
    uuid: str
    name: str
    total_bytes: int
    # What the driver keeps for itself.
    reserved_bytes: int = 0
    # What processes use, ours and others'.
    used_bytes: int = 0
    # The part of it that is not our engines': of foreign processes, of dead ones, or of nobody that the driver names.
    foreign_bytes: int = 0
    holders: tuple[Holder, ...] = ()
    # The part of the foreign bytes that no live process holds: a driver frees the memory of the dead after a while.
    orphaned_bytes: int = 0
    # Whose of our engines' that was, as far as records tell.
    lingering: tuple[Lingering, ...] = ()
    # Why nothing may be placed here, in a sentence; empty when it may.
    closed: str = ""
    # Devices of one island reach each other fast.
    island: int = 0
    # The NUMA node of the host's memory near it; None where the driver does not tell.
    numa_node: int | None = None
    utilization_percent: int | None = None
    temperature_celsius: int | None = None
    power_watts: float | None = None
    troubles: tuple[str, ...] = ()
    # The UUID of the GPU that a slice is of; empty for a GPU.
    parent: str = ""
    # By which number CUDA knows it, in the order of the PCI bus; None: by its index.
    cuda_number: int | None = None

    @property
    def number(self) -> int:
        """What CUDA_VISIBLE_DEVICES calls it, where it is not called by its UUID."""
        return self.index if self.cuda_number is None else self.cuda_number

    @property
    def made_up(self) -> bool:
        """Whether there is no such device: world/gpus makes some up for plans that are only looked at."""
        return self.uuid.startswith("MOCK-")

    @property
    def unavailable_bytes(self) -> int:
        """Memory that no engine of ours can have."""
        return min(self.reserved_bytes + self.foreign_bytes, self.total_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One engine as it runs: (id, leader). Two of one id are an old and a new."""

    id: EngineId
    source: str
    # Canonical JSON of the spec as written: the label's, overlaid by policy that was updated since.
    written: str
    resolved: Resolved
    leader: ProcessIdentity
    leader_alive: bool
    # Live processes, the leader first.
    members: tuple[ProcessIdentity, ...]
    state: str
    reason: str = ""
    # How far a stop has come: "" | "draining" | "stopping".
    phase: str = ""
    proved: bool = False
    # Whether what happened to the process since its start is on record.
    has_record: bool = False
    health: str = "unasked"
    # The ports on which it answers at its own address.
    listens_on: tuple[int, ...] = ()
    # A sentence about sockets of it that other machines reach; empty when there are none.
    exposed: str = ""
    # A sentence about whoever else listens on its port; empty when nobody does. What answers there proves nothing then.
    intruder: str = ""
    in_flight: int = 0
    # What its members use of each device, by UUID, as the driver tells it.
    measured_bytes: tuple[tuple[str, int], ...] = ()
    # A sentence about memory that it uses where it was not placed; empty when it does not.
    misplaced: str = ""
    # The UUIDs of its devices that are lost.
    lost_devices: tuple[str, ...] = ()
    # Epoch seconds; 0 when not known.
    started_at: float = 0.0
    restarts: int = 0
    log: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """An inference engine that is not ours."""

    pid: int
    name: str
    user: str
    kind: str
    model: str
    # None when neither its command line nor a socket names one.
    port: int | None
    # What ties it to an engine of ours without proving it ours; empty when nothing does.
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A listening socket. `engine` is the engine whose member holds it, None when nobody of ours does."""

    address: str
    port: int
    pids: tuple[int, ...]
    # What to call the owner in a sentence: `pid 4242 (python)`, or `another user's process`.
    owner: str
    engine: EngineId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedState:
    """One look at the world, with a meaning."""

    taken_at: float
    node: str
    boot_id: str
    devices: tuple[Device, ...] = ()
    engines: tuple[Engine, ...] = ()
    foreign: tuple[Foreign, ...] = ()
    listeners: tuple[Listener, ...] = ()
    lowest_port: int = 1
    client_ports: tuple[int, int] = (0, 0)
    busy_ports: tuple[int, ...] = ()
    programs: tuple[ProgramFact, ...] = ()
    models: tuple[ModelFact, ...] = ()
    records: tuple[RecordFact, ...] = ()
    routers: tuple[RouterFact, ...] = ()
    exits: tuple[ExitFact, ...] = ()
    applied: tuple[AppliedFact, ...] = ()
    footprints: tuple[FootprintFact, ...] = ()
    gaps: tuple[Gap, ...] = ()


_JSON = TypeAdapter(ObservedState)


def observed_json(observed: ObservedState) -> str:
    """The one JSON form of a world: snapshots, scenarios and the fake host use it."""
    return _JSON.dump_json(observed, indent=2).decode()


def parse_observed(text: str | bytes) -> ObservedState:
    """What `observed_json` wrote. Raises pydantic.ValidationError for anything else."""
    return _JSON.validate_json(text)


def arranged(observed: ObservedState) -> ObservedState:
    """The same world with its devices and gaps as a look has them: a world in a file may have them in any order."""
    return replace(
        observed,
        devices=tuple(sorted(observed.devices, key=lambda device: (device.index, device.uuid))),
        gaps=tuple(sorted(observed.gaps, key=lambda gap: (gap.what, gap.subject, gap.why))),
    )


def project_engines(observed: ObservedState, project: str) -> tuple[Engine, ...]:
    """The engines of one project, in the order of their ids, an older leader before a newer."""
    mine = [engine for engine in observed.engines if engine.id.project == project]
    return tuple(sorted(mine, key=lambda engine: (engine.id, engine.leader.start_ticks, engine.leader.pid)))


def held_bytes(engine: Engine, uuid: str) -> int:
    """What an engine counts for on a device: what it was given, or what it uses where that is more.

    So it counts for all of it while its weights still load.
    """
    place = engine.resolved.placement
    declared = place.counted_bytes_per_device if uuid in place.devices else 0
    return max(declared, dict(engine.measured_bytes).get(uuid, 0))


def free_bytes(device: Device, engines: Iterable[Engine]) -> int:
    """What is free for placing: total - reserved - foreign - what our engines hold; below 0 when over-full."""
    return device.total_bytes - device.unavailable_bytes - sum(held_bytes(engine, device.uuid) for engine in engines)


def spec_of(engine: Engine) -> EngineSpec | None:
    """The engine's spec; None when this version of sage cannot read it."""
    return parse_written(engine.written)


def model_of(engine: Engine) -> str:
    """The model name that the engine serves."""
    spec = spec_of(engine)
    if spec is not None:
        return served_model(spec)
    written = json.loads(engine.written)
    return str(written.get("served_name") or written.get("model") or "?")


def untold_devices(observed: ObservedState) -> set[str]:
    """The UUIDs of devices of which the driver does not tell who uses what."""
    return {gap.subject for gap in observed.gaps if gap.what == "device memory"}


def is_about(gap: Gap, device: int | str) -> bool:
    """Whether a gap of a device is about the one of this index or UUID. A device that told its UUID has that alone."""
    return gap.subject == str(device) or (isinstance(device, int) and gap.why.startswith(f"gpu{device} "))


def pids_not_given_back(devices: Iterable[Device]) -> set[int]:
    """The pids of dead engines whose memory is not back: their records tell whose it is, and keep devices closed."""
    return {entry.pid for device in devices for entry in device.lingering}
