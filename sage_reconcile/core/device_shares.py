"""Whose the bytes of a device are, part by part. Pure."""

from collections.abc import Iterable
from typing import Literal

from sage_reconcile.core.identity import EngineId
from sage_reconcile.core.observed import Device, Engine, Holder, Lingering, ObservedState, held_bytes
from sage_reconcile.core.quantities import gib

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


def devices_of(project: str, observed: ObservedState) -> tuple[Device, ...]:
    """The devices on which engines of a project have a place or hold memory, whether they still run or not."""
    mine = [engine for engine in observed.engines if engine.id.project == project]
    return tuple(
        device
        for device in observed.devices
        if any(device.uuid in engine.resolved.placement.devices or held_bytes(engine, device.uuid) for engine in mine)
        or any(entry.engine.project == project for entry in device.lingering)
    )


def engine_holders(device: Device, engines: Iterable[Engine], project: str) -> list[tuple[int, str]]:
    """(bytes, name) of engines that hold some of a device; those of other projects are named with it."""
    return [(size, called(engine.id, project)) for engine in engines if (size := held_bytes(engine, device.uuid))]


def foreign_holders(device: Device) -> list[tuple[int, str]]:
    """(bytes, name) of foreign processes that hold some of a device."""
    return [(holder.used_bytes, f"foreign pid {holder.pid} {holder.name}") for holder in device.holders]


def called(engine: EngineId, project: str) -> str:
    """An engine's id, with its project where that is another."""
    return str(engine) if engine.project == project else engine.full


def holders_text(held: Iterable[tuple[int, str]]) -> tuple[str, ...]:
    """Who holds how much, the most first: "lab/embed (6.9)", with GiB."""
    return tuple(f"{who} ({gib(size)})" for size, who in sorted(held, key=lambda entry: (-entry[0], entry[1])))
