"""What was decided for one engine: its placement, and the exact command that its process runs.

Engines carry it as long as they run, and a newer sage may have written more: fields that are not known are passed over.
"""

import json

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sage_reconcile.core.spec import canonical_json


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="ignore"))
class Placement:
    """Where one replica lives. Only core.placement makes one; nothing can be started without it.

    There is no default device: `devices` is empty for an engine that sees no GPU, and names exactly the GPUs that it
    sees otherwise.
    """

    node: str
    host: str
    port: int
    # UUIDs, in the order in which the engine counts them.
    devices: tuple[str, ...] = ()
    device_indexes: tuple[int, ...] = ()
    # What the engine is told to use of each, where it can be told; else what it is expected to use.
    memory_bytes_per_device: int = 0
    # What it takes beyond that, as the CUDA context, which no budget of an engine counts.
    context_bytes_per_device: int = 0
    # The share of each device that `memory_bytes_per_device` is, rounded down; 0 on the CPU.
    memory_fraction: float = 0.0
    # What the plan leaves free on the fullest of them for an engine that must be told a share of that; else 0.
    free_at_start_bytes: int = 0
    # The share of it that such an engine is told, rounded down; else 0.
    fraction_of_free: float = 0.0
    # measured | declared | computed | name | none
    memory_source: str = "none"
    # Whether the engine is told to keep to that memory.
    memory_told: bool = False

    @property
    def counted_bytes_per_device(self) -> int:
        """What the engine counts for on each of its devices."""
        return self.memory_bytes_per_device + self.context_bytes_per_device


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="ignore"))
class Resolved:
    """What was resolved when an engine was started; it stays as long as the engine runs."""

    placement: Placement
    runtime: str
    argv: tuple[str, ...]
    # The directory that it runs in.
    directory: str
    # JSON of the identity fields' defaults at the time of the start: what an unwritten field meant.
    defaults: str = "{}"


_JSON = TypeAdapter(Resolved)


def resolved_json(resolved: Resolved) -> str:
    """Canonical JSON of what was resolved."""
    return canonical_json(_JSON.dump_python(resolved, mode="json"))


def parse_resolved(text: str) -> Resolved | None:
    """What `resolved_json` wrote; None for anything else."""
    try:
        found = _JSON.validate_json(text)
        defaults = json.loads(found.defaults)
    except (ValidationError, ValueError, RecursionError):
        return None
    return found if found.argv and isinstance(defaults, dict) else None
