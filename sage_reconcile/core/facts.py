"""Raw facts: what the doors of world saw. core.assembly.assemble says what they mean."""

from dataclasses import dataclass, field

from sage_reconcile.core.identity import EngineId, ProcessIdentity
from sage_reconcile.core.shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFact:
    """One process of the machine."""

    identity: ProcessIdentity
    parent_pid: int
    session: int
    uid: int
    user: str
    # The letter of proc(5): Z and X are dead, whatever else answers for them.
    status: str
    argv: tuple[str, ...]
    # The SAGE_* variables of its environment; None when the environment could not be read.
    label: tuple[tuple[str, str], ...] | None = ()
    threads: int = 1
    # The log files of sage's engines that its output goes to.
    output: tuple[str, ...] = ()

    @property
    def alive(self) -> bool:
        """A process whose first thread has ended shows as a zombie while others of its threads still run."""
        return self.status not in ("Z", "X", "x") or (self.status == "Z" and self.threads > 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerFact:
    """One listening TCP socket."""

    address: str
    port: int
    uid: int
    # The processes that hold it open; empty when no process that may be looked into does.
    pids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProcess:
    """What one process uses of a device, as the driver tells it."""

    pid: int
    used_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFact:
    """A GPU, or a MIG slice of one: then the GPU itself is no device."""

    # The GPU's index as NVML counts, which promises no order; slices have that of their GPU.
    index: int
    uuid: str
    name: str
    total_bytes: int
    # What the driver keeps for itself; total is not used + free.
    reserved_bytes: int
    # Used by processes, without what is reserved.
    used_bytes: int
    processes: tuple[DeviceProcess, ...] = ()
    # Whether the driver told for every process what it uses.
    processes_known: bool = True
    # None, here and below, where the device does not offer it.
    utilization_percent: int | None = None
    temperature_celsius: int | None = None
    power_watts: float | None = None
    # Sentences about what is wrong with it.
    troubles: tuple[str, ...] = ()
    # What the driver asks for to make it well again, as NVML calls it: "gpu_reset"; empty: nothing that it tells.
    recovery_action: str = ""
    numa_node: int | None = None
    bus_id: str = ""
    # The UUID of the GPU that a slice is of; empty for a GPU.
    parent: str = ""
    # UUIDs of the GPUs that it reaches through NVLink; of a slice, those of its GPU.
    links: tuple[str, ...] = ()
    # UUIDs of the GPUs that it reaches through PCIe switches alone. Not asked for where a GPU has NVLink.
    switched: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramFact:
    """A program that an engine may need."""

    name: str
    # The words that start it; empty when it is missing.
    argv: tuple[str, ...]
    # Why it is missing and how to get it; empty when it is there.
    why: str = ""
    # Something that differs when the program does; empty when nothing tells.
    version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFact:
    """A model that an engine may need: a path, or a hub id, of which only the cache on this machine is looked at."""

    model: str
    # Why it cannot be used; empty when it can.
    why: str = ""
    # What its files tell of its memory; None when nobody looked, or it cannot be told.
    shape: ModelShape | None = None
    # Why its shape cannot be told; empty when it can.
    shape_why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthFact:
    """What an engine answered to GET on its health path, and to GET /v1/models where that was asked."""

    leader: ProcessIdentity
    # "ok" (200), "loading" (503), "refused" (no connection), "broken" (it ended before an answer), "silent" (no answer
    # in time), "odd" (anything else).
    health: str
    detail: str = ""
    # Model names listed; None when not asked or not answered.
    models: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordFact:
    """What sage wrote down about one engine process: hints that a label cannot hold."""

    engine: EngineId
    leader: ProcessIdentity
    # Whether it was begun when the process was; one made after the state was lost does not know what came before.
    from_start: bool = False
    # JSON of the policy fields as last updated; None when they are still those of the label.
    policy: str | None = None
    # The manifests' path after --take-over; None when it is still that of the label.
    source: str | None = None
    # "" | "draining" | "stopping": how far a stop has come.
    phase: str = ""
    # It has answered one request of its kind since it started.
    proved: bool = False
    # The label that the process was started with; empty when this sage's state did not see that.
    label: tuple[tuple[str, str], ...] = ()
    # What the last request of its kind got instead of an answer; empty when none failed.
    proof_failure: str = ""
    # The port that it was placed on.
    port: int = 0
    started_at: float = 0.0
    # What nobody held of its devices when it started, by UUID: that was never its own.
    orphaned: tuple[tuple[str, int], ...] = ()
    restarts: int = 0
    log: str = ""
    # ProgramFact.version of its program when it was started; None when nobody wrote that down.
    program_version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFact:
    """What one live router says of itself."""

    pid: int
    # Leaders that it no longer sends requests to because they drain.
    drained_from: tuple[ProcessIdentity, ...] = ()
    in_flight: tuple[tuple[ProcessIdentity, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitFact:
    """How a process that this very sage started ended."""

    engine: EngineId
    leader: ProcessIdentity
    # The exit code; negative is minus the signal's number.
    code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedFact:
    """An engine of the last revision that was applied."""

    engine: EngineId
    written: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FootprintFact:
    """What ready engines were seen to take of the device of which they took most: the most over all looks and runs."""

    # core.needs.footprint_key of what was written, the device's name, and the program's version.
    key: str
    device_name: str
    version: str
    peak_bytes: int
    # The most that was used beyond what was told; None where nothing was told.
    beyond_bytes: int | None = None
    # The most of what was told that was not left for the KV cache, by the engine's own log; 0 where that does not say.
    non_kv_bytes: int = 0
    # What the log of that run said; 0 where it did not.
    weights_bytes: int = 0
    kv_cache_bytes: int = 0
    graphs_bytes: int = 0
    kv_tokens: int = 0

    @property
    def size(self) -> tuple[int, ...]:
        """Which of several of one name is the largest, whatever their order: only equal ones have the same."""
        beyond = -1 if self.beyond_bytes is None else self.beyond_bytes
        by_log = (self.weights_bytes, self.kv_cache_bytes, self.graphs_bytes, self.kv_tokens)
        return (self.peak_bytes, self.non_kv_bytes, beyond, *by_log)

    @property
    def order(self) -> tuple[str, str, str, tuple[int, ...]]:
        return self.key, self.device_name, self.version, self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Something that should have been seen and could not be: not gone, not free, unknown."""

    what: str
    why: str
    # The pid, port or device that it is about; empty when it is about all of them.
    subject: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownEngine:
    """An engine as this very sage last saw it: its processes stay its own, even when their environment cannot be read.

    Between exec and the new program's start an environment reads empty (proc(5)), and a child may wipe its own.
    """

    leader: ProcessIdentity
    label: tuple[tuple[str, str], ...]
    members: tuple[ProcessIdentity, ...]
    # Whether it was seen to be ready once: losing the state directory must not take that from it.
    proved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One look at one machine."""

    taken_at: float
    node: str
    boot_id: str
    uid: int
    # The inode of the pid namespace; pids of another one mean nothing here.
    namespace: int = 0
    processes: tuple[ProcessFact, ...] = ()
    # sage itself and its ancestors: never members of an engine.
    own_pids: tuple[int, ...] = ()
    listeners: tuple[ListenerFact, ...] = ()
    devices: tuple[DeviceFact, ...] = ()
    # The lowest TCP port that this user may listen on.
    lowest_port: int = 1
    # The first and last port that the kernel gives to clients; (0, 0) for none.
    client_ports: tuple[int, int] = (0, 0)
    # Ports on which nobody listens and nobody could now: of those that were asked about.
    busy_ports: tuple[int, ...] = ()
    programs: tuple[ProgramFact, ...] = ()
    models: tuple[ModelFact, ...] = ()
    healths: tuple[HealthFact, ...] = ()
    records: tuple[RecordFact, ...] = ()
    known: tuple[KnownEngine, ...] = ()
    routers: tuple[RouterFact, ...] = ()
    exits: tuple[ExitFact, ...] = ()
    applied: tuple[AppliedFact, ...] = ()
    footprints: tuple[FootprintFact, ...] = ()
    gaps: tuple[Gap, ...] = field(default=())
