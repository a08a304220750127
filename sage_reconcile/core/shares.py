"""What programs are told that take a share of what is free when they start. Pure.

It follows from the order of the acts: all that comes before a start on its devices has ended when it begins.
"""

from dataclasses import replace

from sage_reconcile.core.desired import DesiredState, Wanted
from sage_reconcile.core.drafting import resolved
from sage_reconcile.core.needs import rounded_down, shape_of
from sage_reconcile.core.observed import ObservedState, free_bytes
from sage_reconcile.core.placement import with_free
from sage_reconcile.core.plan import Act, StartEngine, Step, after
from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes import runtime_of


def told_shares(
    acts: tuple[Act, ...], steps: tuple[Step, ...], desired: DesiredState, observed: ObservedState
) -> tuple[tuple[Act, ...], tuple[Step, ...]]:
    """The acts in their order, and the steps, with shares of what is free at each start.

    What is put back is told what it was told.
    """
    wanted = {one.id: one for one in desired.wanted if one.pin is None}
    told: list[Act] = []
    changed = list(steps)
    world = observed
    for act in acts:
        if isinstance(act, StartEngine) and act.engine in wanted:
            act = _told(act, wanted[act.engine], world)
            step = changed[act.step]
            changed[act.step] = replace(step, placement=act.resolved.placement, argv=act.resolved.argv)
        told.append(act)
        world = after(act, world)
    return tuple(told), tuple(changed)


def _told(act: StartEngine, wanted: Wanted, world: ObservedState) -> StartEngine:
    place, runtime = act.resolved.placement, runtime_of(wanted.spec)
    if runtime.static_bytes is None or not place.devices:
        return act
    free = max(_free(act, place, world), 1)
    static = runtime.static_bytes(wanted.spec, shape_of(wanted.spec, world), place.memory_bytes_per_device)
    return replace(act, resolved=resolved(wanted, with_free(place, free, rounded_down(static / free)), world))


def _free(act: StartEngine, place: Placement, world: ObservedState) -> int:
    """On the device with the least, once the engine's own dead have given back, and its CUDA context stands."""
    started = after(act, world)
    return min(
        free_bytes(device, started.engines) + place.memory_bytes_per_device
        for device in started.devices
        if device.uuid in place.devices
    )
