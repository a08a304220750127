"""What each device holds now, at most while a plan is carried out, and after it. Pure."""

from dataclasses import dataclass

from sage_reconcile.core.observed import ObservedState, free_bytes
from sage_reconcile.core.plan import Plan, after


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRow:
    """One device. Held is all that is not free for placing: ours, foreign and reserved."""

    node: str
    index: int
    uuid: str
    name: str
    total_bytes: int
    now_bytes: int
    peak_bytes: int
    after_bytes: int


def device_rows(plan: Plan, observed: ObservedState) -> tuple[DeviceRow, ...]:
    """A row for each device, in the order of their indexes."""
    worlds = [observed]
    for act in plan.acts:
        worlds.append(after(act, worlds[-1]))
    held = [_held(world) for world in worlds]
    return tuple(
        DeviceRow(
            node=device.node,
            index=device.index,
            uuid=device.uuid,
            name=device.name,
            total_bytes=device.total_bytes,
            now_bytes=held[0][device.uuid],
            peak_bytes=max(world[device.uuid] for world in held),
            after_bytes=held[-1][device.uuid],
        )
        for device in observed.devices
    )


def _held(world: ObservedState) -> dict[str, int]:
    return {device.uuid: device.total_bytes - free_bytes(device, world.engines) for device in world.devices}
