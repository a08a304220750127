"""What a reader of a plan should know about devices, beyond what is done: sentences. Pure."""

from collections.abc import Iterable, Iterator, Mapping

from sage_reconcile.core.compare import Comparison, processes_of
from sage_reconcile.core.desired import DesiredState
from sage_reconcile.core.figure_notes import notes_of_a_figure, notes_of_a_need
from sage_reconcile.core.identity import EngineId
from sage_reconcile.core.ledger import DRIVER_SLACK_BYTES
from sage_reconcile.core.needs import need_of, shape_of
from sage_reconcile.core.observed import Device, Engine, ObservedState, spec_of, untold_devices
from sage_reconcile.core.plan import Blocked
from sage_reconcile.core.puzzle import last_devices
from sage_reconcile.core.quantities import gib
from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes import is_served, runtime_of
from sage_reconcile.core.spec import EngineSpec

# A better figure is news where it differs by more than this from what an engine was given.
_NEWS_SHARE = 0.10


def device_notes(
    places: Mapping[EngineId, Placement],
    found: Comparison,
    refused: Iterable[Blocked],
    desired: DesiredState,
    observed: ObservedState,
) -> tuple[str, ...]:
    """What starts, then what has no device, then what runs, then the devices that are not seen."""
    specs = {wanted.id: wanted.spec for wanted in desired.wanted if wanted.pin is None}
    notes: list[str] = []
    for engine, place in sorted(places.items()):
        if place.devices:
            notes += _of_a_start(engine, place, specs.get(engine), observed)
    for blocked in sorted(refused, key=lambda blocked: blocked.engine):
        if blocked.devices and blocked.engine in specs:
            notes += notes_of_a_need(blocked.engine, specs[blocked.engine], observed)
    for running in found.unchanged:
        notes += _of_a_running_one(running, observed)
    used = {uuid for place in places.values() for uuid in place.devices}
    used |= {uuid for running in found.unchanged for uuid in running.resolved.placement.devices}
    notes += [gap.why for gap in observed.gaps if gap.what == "device memory" and gap.subject in used]
    if any(place.devices for place in places.values()) and any(device.made_up for device in observed.devices):
        notes.append("the GPUs are made up (SAGE_GPU_MOCK_COUNT): this plan can be looked at, and not applied")
    notes += [f"{gap.why}: nothing is placed there" for gap in observed.gaps if gap.what in ("device", "lost device")]
    return tuple(notes)


def _of_a_start(engine: EngineId, place: Placement, spec: EngineSpec | None, observed: ObservedState) -> Iterator[str]:
    runs = processes_of(engine, observed)
    home = last_devices(engine, runs, observed)
    for device in observed.devices:
        if device.closed and device.uuid in home and device.uuid not in place.devices:
            yield f"{engine} leaves gpu{device.index}, where nothing new is started: {device.closed}"
        yield from _left_behind(engine, runs, device, place)
        for entry in device.lingering:
            if entry.engine == engine and device.uuid in place.devices:
                yield (
                    f"{engine} waits for {gib(entry.held_bytes)} GiB of gpu{device.index} that its last process (pid "
                    f"{entry.pid}) has not given back yet"
                )
    if spec is None:
        return
    yield from notes_of_a_figure(engine, spec, place, observed)
    remarks = runtime_of(spec).remarks(spec, shape_of(spec, observed), place.memory_bytes_per_device)
    yield from (f"{engine}: {remark}" for remark in remarks)
    if not place.memory_told:
        yield f"{engine}: {runtime_of(spec).name} cannot be told to keep to {gib(place.memory_bytes_per_device)} GiB"


def _left_behind(engine: EngineId, runs: tuple[Engine, ...], device: Device, place: Placement) -> Iterator[str]:
    """What processes that outlived the engine's first one hold of a device: they are ended before it starts."""
    for run in runs:
        held = dict(run.measured_bytes).get(device.uuid, 0)
        if not run.leader_alive and held and device.uuid in place.devices:
            pids = ", ".join(str(member.pid) for member in run.members)
            yield f"{engine} waits for {gib(held)} GiB of gpu{device.index} that pid {pids} of its last process holds"


def unproved(engine: Engine, observed: ObservedState) -> tuple[str, ...]:
    """What a ready engine should hold of its devices and does not, in words: nothing proves then that it runs there."""
    used = dict(engine.measured_bytes)
    unknown = untold_devices(observed)
    return tuple(
        f"holds no memory of gpu{device.index}: nothing proves that it runs there"
        for device in observed.devices
        if engine.state == "ready" and device.uuid in engine.resolved.placement.devices and device.uuid not in unknown
        if not used.get(device.uuid, 0) and device.orphaned_bytes <= DRIVER_SLACK_BYTES
    )


def _of_a_running_one(engine: Engine, observed: ObservedState) -> Iterator[str]:
    place, used = engine.resolved.placement, dict(engine.measured_bytes)
    yield from (f"{engine.id} {sentence}" for sentence in unproved(engine, observed))
    unknown = untold_devices(observed)
    for device in observed.devices:
        if device.uuid not in place.devices:
            continue
        if device.closed:
            yield f"{engine.id} runs on gpu{device.index}, where nothing new is started: {device.closed}"
        if device.uuid in unknown:
            continue
        uses, given = used.get(device.uuid, 0), place.counted_bytes_per_device
        if uses > given + DRIVER_SLACK_BYTES:
            yield f"{engine.id} uses {gib(uses)} GiB of gpu{device.index}, and was given {gib(given)}"
        yield from _of_a_better_figure(engine, device, observed)


def _of_a_better_figure(engine: Engine, device: Device, observed: ObservedState) -> Iterator[str]:
    """What runs keeps what it was given; what was measured since counts at its next start."""
    spec, given = spec_of(engine), engine.resolved.placement.counted_bytes_per_device
    if spec is None or not is_served(spec):
        return
    claim = need_of(spec, observed).on(device.uuid)
    if claim.source == "measured" and abs(claim.counted_bytes - given) > _NEWS_SHARE * given:
        yield (
            f"{engine.id} was given {gib(given)} GiB of gpu{device.index}; a start would now be given "
            f"{gib(claim.counted_bytes)}, measured"
        )
