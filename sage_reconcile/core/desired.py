"""What should run: engines wanted by manifests, or wanted back by a restore."""

from dataclasses import dataclass, field

from sage_reconcile.core.identity import EngineId, ProcessIdentity
from sage_reconcile.core.resolved import Resolved
from sage_reconcile.core.spec import EngineSpec, PortPools, RouterSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Exactly what ran before: the placement and the command to use again as they were."""

    resolved: Resolved
    # The process that ran, and how far a stop of it had come: as long as it is still so, there is nothing to put back.
    leader: ProcessIdentity
    phase: str = ""
    # Whether it was ready; what was not need not be ready to count as put back.
    ready: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One replica of one engine that should run."""

    id: EngineId
    spec: EngineSpec
    # Ids of engines of the same project, without replica numbers: all replicas of each must be ready first.
    depends_on: tuple[str, ...] = ()
    # The directory that relative paths on its command line mean, and that it runs in.
    directory: str = "/"
    # The manifests' path for its label; empty means the desired state's.
    source: str = ""
    # Where the engine is written down, "file:line:column"; empty for an engine that no file asks for.
    at: str = ""
    # Where each written field stands: (path such as "ready.timeout", "file:line:column").
    fields_at: tuple[tuple[str, str], ...] = ()
    # What must be used as it was; None leaves it to the planner. Only a restore pins.
    pin: Pin | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredState:
    """Everything that one project should run."""

    project: str
    # The real path of the manifests.
    source: str
    wanted: tuple[Wanted, ...]
    ports: PortPools = field(default_factory=PortPools)
    router: RouterSettings = field(default_factory=RouterSettings)
    # Stacks whose unwanted engines are stopped; None means every stack of the project.
    prune_stacks: tuple[str, ...] | None = None
    # Ids that may be stopped when nobody wants them; None leaves that to `prune_stacks`.
    prune_ids: frozenset[EngineId] | None = None
    # Bytes to keep free on each device.
    reserve_bytes: int = 0
    # Whether the hub may be asked for the shape of a model that is not in its cache.
    ask_hub: bool = False
    # "sha256:..." of the files read; empty when none were.
    digest: str = ""
