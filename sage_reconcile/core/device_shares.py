"""Whose the bytes of a device are, part by part. Pure."""

from typing import Literal

from sage_reconcile.core.observed import Device, Engine, Holder, Lingering, ObservedState, held_bytes

# Bytes, and who has them: an engine of ours, a foreign process, a dead engine, no process that the driver names, or the
# driver itself.
Share = tuple[int, Engine | Holder | Lingering | Literal["unnamed", "reserved"]]


def shares(device: Device, observed: ObservedState) -> tuple[Share, ...]:
    """All parts of a device that are not free; ours first, the driver's last."""
    ours: list[Share] = [(held, engine) for engine in observed.engines if (held := held_bytes(engine, device.uuid))]
    foreign: list[Share] = [(holder.used_bytes, holder) for holder in device.holders]
    dead: list[Share] = [(entry.held_bytes, entry) for entry in device.lingering]
    unnamed = device.foreign_bytes - sum(size for size, _ in (*foreign, *dead))
    rest: list[Share] = [(unnamed, "unnamed"), (device.reserved_bytes, "reserved")]
    return (*ours, *foreign, *dead, *((size, who) for size, who in rest if size > 0))
