"""Why an engine is where it is, or has no place; and why a device has no more to give. Pure.

Goes in: what is wanted, if anything, what is observed, and the plan from one to the other. Comes out: values for a
reader. Decides nothing: what it tells is what the planner goes by.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sage_reconcile.core.compare import current_process, processes_of, why_missing
from sage_reconcile.core.desired import DesiredState, Wanted
from sage_reconcile.core.device_shares import Share, engine_holders, foreign_holders, holders_text, shares
from sage_reconcile.core.footprint import Footprint, footprint
from sage_reconcile.core.identity import EngineId, in_stack
from sage_reconcile.core.needs import Claim, Need, device_count, need_of, shape_of, why_no_shape
from sage_reconcile.core.observed import Device, Engine, ObservedState, free_bytes, spec_of
from sage_reconcile.core.plan import Blocked, Plan, Step, after
from sage_reconcile.core.puzzle import NOT_PINNED, last_devices, why_not
from sage_reconcile.core.refusal import Shortfall
from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes import is_served, runtime_of
from sage_reconcile.core.spec import EngineSpec, needs_gpu, parse_written


@dataclass(frozen=True, slots=True, kw_only=True)
class Waited:
    """An engine that another depends on."""

    name: str
    # As a status has it; "missing" when it does not run.
    state: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWhy:
    """One engine: what it is, where, why there, and what it needs."""

    id: EngineId
    # None when it is written in a way that this version cannot read.
    spec: EngineSpec | None
    # Where it is written down; empty when no manifest that was read asks for it.
    at: str
    # The process; None when it does not run.
    engine: Engine | None
    # Why it does not run; empty when it does.
    missing: str
    # What a plan would do with it; None for nothing, or when no manifests were read.
    step: Step | None
    # Why a plan cannot do it; None when it can.
    blocked: Blocked | None
    # Where it would be after the plan, or is; None when nowhere.
    place: Placement | None
    why_there: str
    # What it needs of a device that is there; None without devices, or on the CPU.
    claim: Claim | None
    told: bool
    # Term by term; None when the model's shape is not known.
    footprint: Footprint | None
    # What the model's files told, or why they told nothing; empty on the CPU.
    files: str
    waits_for: tuple[Waited, ...]
    # Whether the plan does anything at all.
    acts: bool
    # Each device after the plan, as it finds it without itself; empty on the CPU.
    devices: tuple[Shortfall, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceWhy:
    """One device: whose its bytes are, and what is left."""

    index: int
    # None when it is not seen.
    device: Device | None
    shares: tuple[Share, ...] = ()
    free_bytes: int = 0
    # What sage.yaml keeps free.
    reserve_bytes: int = 0
    # Steps of the plan that put an engine here.
    coming: tuple[Step, ...] = ()
    # Sentences about what could not be seen of it.
    gaps: tuple[str, ...] = ()
    # Engines that were placed here and whose device is lost.
    stranded: tuple[Engine, ...] = ()


def engine_why(the_id: EngineId, desired: DesiredState | None, observed: ObservedState, plan: Plan | None) -> EngineWhy:
    """All that is known of an engine that runs, is wanted, or was applied."""
    wanted = next((one for one in desired.wanted if one.id == the_id), None) if desired is not None else None
    running = [engine for engine in observed.engines if engine.id == the_id]
    engine = current_process(running)[0] if running else None
    spec = wanted.spec if wanted is not None else _spec(the_id, engine, observed)
    step = next((step for step in plan.steps if step.engine == the_id), None) if plan is not None else None
    blocked = next((one for one in plan.blocked if one.engine == the_id), None) if plan is not None else None
    place = engine.resolved.placement if engine is not None else None
    if step is not None and step.placement is not None:
        place = step.placement
    on_gpu = spec is not None and needs_gpu(spec)
    need = need_of(spec, observed) if spec is not None and on_gpu else None
    devices = _devices(the_id, spec, need, place, desired, observed, plan) if spec is not None and need else ()
    return EngineWhy(
        id=the_id,
        spec=spec,
        at=wanted.at if wanted is not None else "",
        engine=engine,
        missing="" if engine is not None else why_missing(the_id, observed),
        step=step,
        blocked=blocked,
        place=place,
        why_there=_why_there(the_id, spec, place, step, devices, observed),
        claim=_claim(need, place),
        told=need is not None and need.told,
        footprint=_footprint(spec, observed) if spec is not None and on_gpu else None,
        files=_files(spec, observed) if spec is not None and on_gpu else "",
        waits_for=tuple(_waited(name, the_id, observed) for name in _depends_on(the_id, wanted, spec)),
        acts=plan is not None and bool(plan.acts),
        devices=blocked.devices if blocked is not None and blocked.devices else devices,
    )


def device_why(
    index: int, desired: DesiredState | None, observed: ObservedState, plan: Plan | None
) -> tuple[DeviceWhy, ...]:
    """The device of an index, all slices of it, or why it is not seen; nothing when nobody ever heard of it."""
    seen = [device for device in observed.devices if device.index == index]
    found = tuple(
        DeviceWhy(
            index=index,
            device=device,
            shares=shares(device, observed),
            free_bytes=free_bytes(device, observed.engines),
            reserve_bytes=desired.reserve_bytes if desired is not None else 0,
            coming=tuple(step for step in (plan.steps if plan else ()) if _goes_to(step, device)),
            gaps=_gaps_of({device.uuid, str(index)}, observed),
        )
        for device in seen
    )
    if found:
        return found
    placed = [engine for engine in observed.engines if index in engine.resolved.placement.device_indexes]
    uuids = {uuid for engine in placed for uuid in _uuids_of(index, engine.resolved.placement)}
    gaps = tuple(gap.why for gap in observed.gaps if gap.subject in uuids or f"gpu{index} " in gap.why)
    if not gaps and not placed:
        return ()
    return (DeviceWhy(index=index, device=None, gaps=gaps, stranded=tuple(placed)),)


def _goes_to(step: Step, device: Device) -> bool:
    return step.placement is not None and device.uuid in step.placement.devices


def _gaps_of(subjects: set[str], observed: ObservedState) -> tuple[str, ...]:
    return tuple(gap.why for gap in observed.gaps if gap.subject in subjects)


def _uuids_of(index: int, place: Placement) -> list[str]:
    pairs = zip(place.devices, place.device_indexes, strict=False)
    return [uuid for uuid, number in pairs if number == index]


# --- an engine --------------------------------------------------------------------------------------------------------


def _spec(the_id: EngineId, engine: Engine | None, observed: ObservedState) -> EngineSpec | None:
    """The spec of an engine that no manifest asks for: its label's, or the last one that was applied."""
    written = next((applied.written for applied in observed.applied if applied.engine == the_id), "")
    spec = spec_of(engine) if engine is not None else parse_written(written)
    return spec if spec is not None and is_served(spec) else None


def _claim(need: Need | None, place: Placement | None) -> Claim | None:
    """What it needs of the device that it is on, or else of the first one."""
    if need is None or not need.claims:
        return None
    claims = dict(need.claims)
    uuid = next((uuid for uuid in place.devices if uuid in claims), None) if place is not None else None
    return claims[uuid] if uuid is not None else need.claims[0][1]


def _footprint(spec: EngineSpec, observed: ObservedState) -> Footprint | None:
    shape = shape_of(spec, observed)
    return footprint(shape, runtime_of(spec).serving(spec)) if shape is not None else None


def _files(spec: EngineSpec, observed: ObservedState) -> str:
    shape = shape_of(spec, observed)
    if shape is None:
        return f"not known: {why_no_shape(spec, observed) or 'its files were not looked at'}"
    read = {"tensors": "the headers of its weights", "total": "its config.json and the size of its weights"}
    known = "" if shape.known else ", a family that was never compared with a measurement"
    return f"{shape.family}{known}, {shape.layers} layers, from {read.get(shape.basis, 'its config.json alone')}"


def _depends_on(the_id: EngineId, wanted: Wanted | None, spec: EngineSpec | None) -> tuple[str, ...]:
    if wanted is not None:
        return wanted.depends_on
    names = spec.depends_on if spec is not None else ()
    return tuple(in_stack(name, the_id.stack) for name in names)


def _waited(name: str, the_id: EngineId, observed: ObservedState) -> Waited:
    """The worst of its replicas: all of them must be ready."""
    found = [
        engine for engine in observed.engines if engine.id.project == the_id.project and str(engine.id.first) == name
    ]
    if not found:
        return Waited(name=name, state="missing", reason="it does not run")
    worst = min(found, key=lambda engine: (engine.state == "ready", engine.id))
    return Waited(name=name, state=worst.state, reason=worst.reason)


def _devices(
    the_id: EngineId,
    spec: EngineSpec,
    need: Need,
    place: Placement | None,
    desired: DesiredState | None,
    observed: ObservedState,
    plan: Plan | None,
) -> tuple[Shortfall, ...]:
    """Each device once the plan is carried out, as the engine finds it without itself."""
    world = observed
    for act in plan.acts if plan is not None else ():
        world = after(act, world)
    others = [engine for engine in world.engines if engine.id != the_id]
    reserve = desired.reserve_bytes if desired is not None else 0
    here = place.devices if place is not None else ()
    return tuple(
        _shortfall(
            the_id,
            device,
            need,
            others,
            reserve,
            why_not="" if device.uuid in here else _why_not(spec, device),
            is_here=device.uuid in here,
        )
        for device in world.devices
    )


def _why_not(spec: EngineSpec, device: Device) -> str:
    """Why the device is out of the question for an engine of these manifests; empty when it is not."""
    slices, count = runtime_of(spec).takes_slices, device_count(spec)
    pinned = spec.devices is None or device.uuid in spec.devices or device.index in spec.devices
    return why_not(device, count=count, takes_slices=slices) or ("" if pinned else NOT_PINNED)


def _shortfall(
    the_id: EngineId,
    device: Device,
    need: Need,
    others: Iterable[Engine],
    reserve_bytes: int,
    *,
    why_not: str,
    is_here: bool,
) -> Shortfall:
    own = sum(entry.held_bytes for entry in device.lingering if entry.engine == the_id)
    others = tuple(others)
    free = free_bytes(device, others) - reserve_bytes + own
    held = engine_holders(device, others, the_id.project) + foreign_holders(device)
    missing = 0 if is_here else max(need.on(device.uuid).counted_bytes - free, 0)
    return Shortfall(
        index=device.index,
        uuid=device.uuid,
        total_bytes=device.total_bytes,
        free_bytes=free,
        short_bytes=missing,
        held_by=holders_text(held),
        why_not=why_not,
    )


def _why_there(
    the_id: EngineId,
    spec: EngineSpec | None,
    place: Placement | None,
    step: Step | None,
    devices: tuple[Shortfall, ...],
    observed: ObservedState,
) -> str:
    """What decided over its devices, in the order in which it decides."""
    if spec is not None and not needs_gpu(spec):
        return "use_gpu: false" if spec.use_gpu is False else f"{spec.kind} engines use no GPU unless use_gpu: true"
    if place is None or not place.devices:
        return ""
    if step is not None and step.action == "stop":
        return "it is there until the plan stops it"
    if spec is not None and spec.devices is not None and _among(place, spec.devices):
        return f"its manifest has devices: [{', '.join(map(str, spec.devices))}]"
    if step is None or step.placement is None:
        return "what runs stays where it is"
    if step.action == "move":
        return "moved to make room for others"
    if last_devices(the_id, processes_of(the_id, observed), observed) == place.devices:
        return "it was there before"
    fitting = [entry.uuid for entry in devices if not entry.short_bytes and not entry.why_not]
    if len(fitting) <= len(place.devices):
        roomy = [entry.uuid for entry in devices if not entry.short_bytes]
        return "nothing else has room for it" if len(roomy) == len(fitting) else "nothing else that has room will do"
    return f"of {len(fitting)} devices with room, the best for all engines together"


def _among(place: Placement, pins: tuple[int | str, ...]) -> bool:
    pairs = zip(place.devices, place.device_indexes, strict=True)
    return all(uuid in pins or index in pins for uuid, index in pairs)
