"""Seeded random worlds with GPUs: what never happens to their memory, whatever runs and whatever is wanted.

What a device holds is counted here by code of its own: facts of the world and placements, nothing of the planner's.
"""

import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from typing import TypeVar

import pytest

from sage_reconcile.core.audit import audit
from sage_reconcile.core.cures import of_one_engine
from sage_reconcile.core.desired import DesiredState, Wanted
from sage_reconcile.core.facts import FootprintFact, Gap, ModelFact
from sage_reconcile.core.identity import EngineId
from sage_reconcile.core.needs import footprint_key, shape_of
from sage_reconcile.core.observed import Device, Engine, ObservedState, observed_json, parse_observed
from sage_reconcile.core.plan import Plan, PlanOptions, StartEngine, StopEngine, after
from sage_reconcile.core.planner import make_plan, restore_target
from sage_reconcile.core.runtimes import runtime_of
from sage_reconcile.core.spec import written_fields
from sage_reconcile.drive.reconciler import apply_plan
from tests.builders import GIB, dead, desired, gpu, gpu_world, mig_slice, on_gpus, running, shape, wanted
from tests.core.test_worlds import alike, carried_out
from tests.fakes import FakeHost, MemoryJournal

# How many worlds each property sees. A longer run: GPU_WORLDS=20000 pytest tests/core/test_gpu_worlds.py.
WORLDS = int(os.environ.get("GPU_WORLDS", "250"))
# How many of them are applied.
APPLIES = WORLDS // 4
# How many small instances are compared with a search through all that there is.
INSTANCES = int(os.environ.get("GPU_INSTANCES", "1200"))

NAMES = ("lab/a", "lab/b", "lab/c", "lab/d", "other/e", "other/e#1", "other/e#2")
PORTS = (8001, 8901, 8002, 8900, 8902, 8903, 8904, 8905)
SIZES = (2, 5, 8, 10, 12, 20, 22, 40)
# Two that are never asked for in one world: a model whose shape is known, and one that has only a name.
SHAPE = shape(6, heads=8)
MODELS = (ModelFact(model="/models/known.gguf", shape=SHAPE), ModelFact(model="org/known", shape=SHAPE))

T = TypeVar("T")


def random_devices(rng: random.Random) -> tuple[Device, ...]:
    devices: list[Device] = []
    for index in range(rng.choice((0, 1, 1, 2, 2, 3, 3))):
        if rng.random() < 0.15:
            devices += [mig_slice(index, number, **trouble(rng)) for number in range(rng.randrange(1, 3))]
        else:
            devices.append(gpu(index, rng.choice((24, 24, 80)), island=rng.randrange(2), **trouble(rng)))
    return tuple(devices[:3])


def trouble(rng: random.Random) -> dict[str, object]:
    fields: dict[str, object] = {"reserved": rng.choice((0, 0.5))}
    if rng.random() < 0.3:
        count = rng.choice((1, 1, 2))
        fields["foreign"] = tuple((pid, rng.choice((1, 5, 9))) for pid in rng.sample(range(4000, 4009), count))
    if rng.random() < 0.2:
        fields["lingering"] = ((rng.choice(NAMES), rng.choice((2, 5, 7))),)
    if rng.random() < 0.1:
        fields["nobody"] = rng.choice((0.03, 3))
    if rng.random() < 0.1:
        fields["closed"] = "lab/x (pid 77) ended, and 2.0 GiB did not come back"
    return fields


def random_fields(rng: random.Random, devices: tuple[Device, ...]) -> dict[str, object]:
    """What one writes about an engine and its GPUs."""
    fields: dict[str, object] = {}
    if rng.random() < 0.25:
        fields = {"model": f"org/m{rng.randrange(2)}", "runtime": "vllm"}
    if rng.random() < 0.2:
        fields["max_model_len"] = rng.choice((512, 1024))
    if rng.random() < 0.2:
        fields["label"] = rng.choice(("one", "two"))
    if rng.random() < 0.2:
        return {**fields, "model": "/models/cpu.gguf", "runtime": "auto"}
    fields["use_gpu"] = True
    if rng.random() < 0.9:
        fields["gpu_memory"] = rng.choice((*(f"{size}GiB" for size in SIZES), 0.25, 0.6))
    elif rng.random() < 0.7:
        fields["model"] = "org/known" if "runtime" in fields else "/models/known.gguf"
    if rng.random() < 0.2:
        fields["tensor_parallel"] = rng.choice((2, 2, 3))
    if rng.random() < 0.2 and devices:
        pins = [rng.choice((device.uuid, device.index)) for device in rng.sample(devices, rng.randrange(len(devices)))]
        pins += rng.choice(((), (), (), (7,), ("GPU-gone",)))
        fields |= {"devices": tuple(dict.fromkeys(pins))} if pins else {}
    return fields


def on_devices(rng: random.Random, text: str, port: int, pid: int, devices: tuple[Device, ...]) -> Engine:
    """An engine that runs on some of the devices, whatever is free there; it was put there in another time."""
    fields = random_fields(rng, devices)
    fields.pop("devices", None)
    if not devices or "use_gpu" not in fields:
        fields = {name: value for name, value in fields.items() if name not in ("gpu_memory", "tensor_parallel")}
        return running(
            text, port, pid, state=rng.choice(("ready", "ready", "starting")), **{**fields, "use_gpu": False}
        )
    whole = [device for device in devices if not device.parent]
    if fields.get("runtime") == "vllm" and not whole:
        fields |= {"runtime": "auto", "model": "/models/slice.gguf"}
    first = rng.choice(whole if fields.get("runtime") == "vllm" else devices)
    alike = [device for device in devices if device.name == first.name and not device.parent]
    count = min(int(str(fields.get("tensor_parallel", 1))), len(alike) or 1)
    fields |= {"tensor_parallel": count} if count > 1 else {}
    home = tuple(rng.sample(alike, count)) if count > 1 else (first,)
    fields["gpu_memory"] = f"{(size := rng.choice(SIZES))}GiB"
    return on_gpus(
        text,
        port,
        pid,
        tuple(sorted(home, key=lambda device: device.index)),
        size,
        context=rng.choice((0, 0.5)),
        uses=rng.choice((None, (size + 1,) * count, (size / 2,) * count, (0,) * count)),
        state=rng.choice(("ready", "ready", "ready", "starting", "unready", "draining")),
        project=rng.choice(("lab",) * 6 + ("elsewhere",)),
        **fields,
    )


def random_world(rng: random.Random) -> ObservedState:
    devices = random_devices(rng)
    engines: list[Engine] = []
    ports = rng.sample(PORTS, len(PORTS))
    for number, name in enumerate(rng.sample(NAMES, rng.randrange(len(NAMES)))):
        engine = on_devices(rng, name, ports.pop(), 100 + number, devices)
        if engine.state == "draining":
            engine = replace(engine, phase=rng.choice(("draining", "stopping")))
        if engine.measured_bytes and rng.random() < 0.1:
            # It uses memory where it was not placed.
            other = rng.choice(devices).uuid
            engine = replace(engine, measured_bytes=tuple(sorted({**dict(engine.measured_bytes), other: GIB}.items())))
        engines.append(engine)
    records = tuple(
        dead(name, rng.choice(devices), rng.choice(SIZES), pid=600 + number)
        for number, name in enumerate(NAMES)
        if devices and rng.random() < 0.1
    )
    gaps: tuple[Gap, ...] = ()
    if devices and rng.random() < 0.1:
        # One is lost: what runs on it is still there.
        lost, *rest = rng.sample(devices, len(devices))
        gaps = (Gap(what="lost device", why=f"gpu{lost.index} has fallen off the bus", subject=lost.uuid),)
        devices = tuple(sorted(rest, key=lambda device: (device.index, device.uuid)))
    elif rng.random() < 0.1:
        why = "the driver does not tell which process uses what of it"
        untold = (Gap(what="device memory", why=f"{one.uuid}: {why}", subject=one.uuid) for one in devices)
        gaps = tuple(sorted(untold, key=lambda gap: gap.subject))
    return replace(gpu_world(devices, *engines, records=records, gaps=gaps), models=MODELS)


def random_desired(rng: random.Random, observed: ObservedState) -> DesiredState:
    """Some of what runs as it runs, some of it otherwise, and some that is new."""
    runs = {str(engine.id): engine for engine in observed.engines if engine.id.project == "lab"}
    engines: list[Wanted] = []
    for name in sorted(rng.sample(NAMES, rng.randrange(len(NAMES) + 1))):
        if name in runs and rng.random() < 0.5:
            engines.append(as_it_runs(runs[name]))
        else:
            engines.append(wanted(name, **random_fields(rng, observed.devices)))
    reserve = rng.choice((0, 0, 0, GIB, 3 * GIB))
    return replace(desired(*engines), reserve_bytes=reserve)


def random_footprints(rng: random.Random, want: DesiredState, observed: ObservedState) -> tuple[FootprintFact, ...]:
    """What some of what is wanted was measured to take of some devices; some of it by two projects."""
    facts: list[FootprintFact] = []
    for one in want.wanted:
        if one.spec.use_gpu and observed.devices and rng.random() < 0.3:
            fact = FootprintFact(
                key=footprint_key(one.spec, told=runtime_of(one.spec).tells(one.spec, shape_of(one.spec, observed))),
                device_name=rng.choice(observed.devices).name,
                version="",
                peak_bytes=rng.choice(SIZES) * GIB,
                beyond_bytes=rng.choice((None, 0, GIB)),
            )
            facts.append(fact)
            if rng.random() < 0.5:
                facts.append(replace(fact, beyond_bytes=rng.choice((None, 2 * GIB, 3 * GIB))))
    return tuple(facts)


def as_it_runs(engine: Engine) -> Wanted:
    (kept,) = restore_target(world_of(engine), Plan(project="lab", source="", digest=""), desired()).wanted
    return replace(kept, pin=None, at="lab.yaml:4:5")


def world_of(engine: Engine) -> ObservedState:
    return gpu_world((), replace(engine, leader_alive=True))


@cache
def case(seed: int) -> tuple[DesiredState, ObservedState, Plan]:
    rng = random.Random(seed)
    now = random_world(rng)
    want = random_desired(rng, now)
    now = replace(now, footprints=random_footprints(rng, want, now))
    return want, now, make_plan(want, now, options_of(seed))


def options_of(seed: int) -> PlanOptions:
    return PlanOptions(allow_moves=seed % 3 == 0)


# --- what is counted here ---------------------------------------------------------------------------------------------


def counted(engine: Engine, uuid: str) -> int:
    place = engine.resolved.placement
    given = place.memory_bytes_per_device + place.context_bytes_per_device if uuid in place.devices else 0
    return max(given, *(size for where, size in engine.measured_bytes if where == uuid), 0)


def room(device: Device, waiting: EngineId, reserve: int) -> int:
    """What our engines may hold together once this one starts, which waits for what its dead process had."""
    own = sum(entry.held_bytes for entry in device.lingering if entry.engine == waiting)
    return device.total_bytes - device.reserved_bytes - device.foreign_bytes + own - reserve


def assert_fits(act: StartEngine, before: ObservedState, reserve: int, seed: int) -> None:
    """Right after its start each of its devices holds what is on it; nothing else says that it does."""
    there = {device.uuid: device for device in before.devices}
    place = act.resolved.placement
    for uuid in place.devices:
        device = there[uuid]
        assert not device.closed, f"seed {seed}: {act.engine} on a closed device"
        holds = sum(counted(engine, uuid) for engine in before.engines)
        holds += place.memory_bytes_per_device + place.context_bytes_per_device
        assert holds <= room(device, act.engine, reserve), f"seed {seed}: {act.engine} makes {uuid} over-full"


def some_order(plan: Plan, rng: random.Random) -> Iterator[int]:
    """An order in which the acts may end, as `after` and `behind` allow it."""
    done: set[int] = set()
    while len(done) < len(plan.acts):
        may = [
            index
            for index, act in enumerate(plan.acts)
            if index not in done and {*act.after, *getattr(act, "behind", ())} <= done
        ]
        index = rng.choice(may)
        done.add(index)
        yield index


# --- properties of plans ----------------------------------------------------------------------------------------------


def test_no_prefix_of_a_plan_breaks_a_law() -> None:
    for seed in range(WORLDS):
        want, now, plan = case(seed)
        assert audit(plan, want, now) == (), f"seed {seed}"


def test_nothing_is_left_to_do_after_a_plan() -> None:
    for seed in range(WORLDS):
        want, now, plan = case(seed)
        # With leave to move, memory that came back meanwhile may be reason enough for a move.
        came_back = any(device.lingering for device in now.devices)
        options = PlanOptions() if came_back else options_of(seed)
        rest = make_plan(want, carried_out(plan, now), options)
        assert rest.acts == (), f"seed {seed}"
        assert {entry.engine for entry in rest.blocked} == {entry.engine for entry in plan.blocked}, f"seed {seed}"


def test_no_order_that_the_plan_allows_makes_a_device_over_full() -> None:
    for seed in range(WORLDS):
        want, now, plan = case(seed)
        for turn in range(3):
            world = now
            for index in some_order(plan, random.Random(f"{seed} {turn}")) if turn else range(len(plan.acts)):
                act = plan.acts[index]
                if isinstance(act, StartEngine):
                    assert_fits(act, world, want.reserve_bytes, seed)
                world = after(act, world)


def test_no_start_overlaps_another_act_on_its_devices() -> None:
    for seed in range(WORLDS):
        _, _, plan = case(seed)
        for later, act in enumerate(plan.acts):
            for earlier in range(later):
                first = plan.acts[earlier]
                if not devices_of(act) & devices_of(first) or not {type(act), type(first)} & {StartEngine}:
                    continue
                assert earlier in waited_for(plan, later), f"seed {seed}: {earlier} and {later}"


def devices_of(act: object) -> set[str]:
    return set(act.resolved.placement.devices if isinstance(act, StartEngine) else getattr(act, "devices", ()))


def waited_for(plan: Plan, index: int) -> set[int]:
    """All that has ended when the act begins."""
    own = {*plan.acts[index].after, *getattr(plan.acts[index], "behind", ())}
    return own.union(*(waited_for(plan, earlier) for earlier in own))


def test_every_start_is_shown_exactly_its_devices() -> None:
    for seed in range(WORLDS):
        _, now, plan = case(seed)
        indexes = {device.uuid: str(device.index) for device in now.devices}
        for act in plan.acts:
            if not isinstance(act, StartEngine):
                continue
            env, place = dict(act.env), act.resolved.placement
            shown = [indexes[uuid] for uuid in place.devices] if act.resolved.runtime == "vllm" else place.devices
            assert env["CUDA_VISIBLE_DEVICES"] == ",".join(shown), f"seed {seed}"
            assert env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID", f"seed {seed}"
            assert place.device_indexes == tuple(int(indexes[uuid]) for uuid in place.devices), f"seed {seed}"
            assert len(set(place.devices)) == len(place.devices), f"seed {seed}"


def test_every_start_has_as_many_devices_as_it_asks_for_alike_and_among_its_pins() -> None:
    for seed in range(WORLDS):
        want, now, plan = case(seed)
        there = {device.uuid: device for device in now.devices}
        specs = {one.id: one.spec for one in want.wanted}
        for act in plan.acts:
            if not isinstance(act, StartEngine):
                continue
            spec, homes = specs[act.engine], [there[uuid] for uuid in act.resolved.placement.devices]
            assert len(homes) == (spec.tensor_parallel if spec.use_gpu else 0), f"seed {seed}"
            assert len({(home.name, home.total_bytes) for home in homes}) <= 1, f"seed {seed}"
            pins = spec.devices
            assert pins is None or all(home.uuid in pins or home.index in pins for home in homes), f"seed {seed}"
            assert not any(home.parent for home in homes) or (spec.runtime != "vllm" and len(homes) == 1), (
                f"seed {seed}"
            )


def test_nothing_that_runs_as_wanted_is_moved_without_leave() -> None:
    for seed in range(WORLDS):
        want, now, plan = case(seed)
        moved = {step.engine for step in plan.steps if step.action == "move"}
        assert not moved or options_of(seed).allow_moves, f"seed {seed}"
        still = make_plan(want, now) if moved else plan
        stopped = {act.leader for act in still.acts if isinstance(act, StopEngine)}
        unchanged = {step.engine for step in plan.steps if step.action == "move"} | set(plan.unchanged)
        for engine in now.engines:
            if engine.id in unchanged and sum(other.id == engine.id for other in now.engines) == 1:
                assert engine.leader not in stopped, f"seed {seed}"


def anyhow(rng: random.Random, facts: tuple[T, ...]) -> tuple[T, ...]:
    return tuple(rng.sample(facts, len(facts)))


def test_the_order_of_facts_and_files_never_changes_a_plan() -> None:
    for seed in range(WORLDS):
        want, now, plan = case(seed)
        rng = random.Random(seed)
        shuffled = replace(
            now,
            devices=anyhow(rng, tuple(replace(one, holders=anyhow(rng, one.holders)) for one in now.devices)),
            engines=anyhow(rng, now.engines),
            listeners=anyhow(rng, now.listeners),
            records=anyhow(rng, now.records),
            models=anyhow(rng, now.models),
            programs=anyhow(rng, now.programs),
            footprints=anyhow(rng, now.footprints),
            gaps=anyhow(rng, now.gaps),
        )
        other = replace(want, wanted=anyhow(rng, want.wanted))
        assert make_plan(other, shuffled, options_of(seed)) == plan, f"seed {seed}"


def test_another_project_is_never_touched_and_a_blocked_engine_is_kept() -> None:
    for seed in range(WORLDS):
        _, now, plan = case(seed)
        assert all(act.engine.project == "lab" for act in plan.acts), f"seed {seed}"
        blocked = {entry.engine for entry in plan.blocked}
        assert not blocked & {act.engine for act in plan.acts}, f"seed {seed}"
        end = carried_out(plan, now)
        assert all(engine in end.engines for engine in now.engines if engine.id.project != "lab"), f"seed {seed}"


def test_a_world_survives_its_json_form() -> None:
    for seed in range(WORLDS // 4):
        _, now, _ = case(seed)
        assert parse_observed(observed_json(now)) == now, f"seed {seed}"


def test_the_worlds_are_not_dull() -> None:
    seen: Counter[str] = Counter()
    for seed in range(WORLDS):
        _, now, plan = case(seed)
        seen.update(step.action for step in plan.steps if step.placement and step.placement.devices)
        seen.update(f"blocked: {entry.reason}" for entry in plan.blocked)
        starts = [act for act in plan.acts if isinstance(act, StartEngine) and act.resolved.placement.devices]
        seen["several devices"] += any(len(act.resolved.placement.devices) > 1 for act in starts)
        seen["behind"] += any(act.behind for act in starts)
        seen["measured"] += any(act.resolved.placement.memory_source == "measured" for act in starts)
        seen["several holders"] += any(len(device.holders) > 1 for device in now.devices)
        seen["several measurements"] += len(now.footprints) > len({fact.key for fact in now.footprints})
        there = {device.uuid: device for device in now.devices}
        for act in starts:
            homes = [there[uuid] for uuid in act.resolved.placement.devices]
            seen["on a slice"] += any(home.parent for home in homes)
            seen["on what lingers of its own"] += any(
                entry.engine == act.engine for home in homes for entry in home.lingering
            )
    wanted_kinds = ("start", "recreate", "several devices", "behind", "on a slice", "on what lingers of its own")
    wanted_kinds += ("measured", "several measurements", "several holders", "blocked: memory", "blocked: device_pin")
    assert all(seen[kind] >= WORLDS / 100 for kind in wanted_kinds), seen


# --- small instances, against a search through all that there is ------------------------------------------------------


def small(rng: random.Random) -> tuple[DesiredState, ObservedState]:
    """Up to three devices and four engines: some stay, some are replaced, some go, some come."""
    devices = tuple(
        gpu(index, rng.choice((24, 24, 80)), **trouble(rng)) for index in range(rng.choice((1, 2, 2, 3, 3)))
    )
    engines: list[Engine] = []
    wishes: list[Wanted] = []
    free = {device.uuid: device.total_bytes - device.reserved_bytes - device.foreign_bytes for device in devices}
    for number, name in enumerate(("lab/a", "lab/b", "lab/c", "lab/d")):
        could = [device for device in devices if free[device.uuid] >= 5 * GIB]
        size = rng.choice((5, 8, 10, 12, 20))
        if could and rng.random() < 0.6:
            home = rng.choice(could)
            size = size if size * GIB <= free[home.uuid] else 5
            engine = on_gpus(name, PORTS[number], 100 + number, (home,), size)
            free[home.uuid] -= size * GIB
            engines.append(engine)
            if rng.random() < 0.6:
                wishes.append(as_it_runs(engine))
                continue
        if rng.random() < 0.8:
            fields = random_fields(rng, devices)
            fields.pop("model", None) if fields.get("model") in ("org/known", "/models/known.gguf") else None
            fields["depends_on"] = tuple(str(one.id) for one in wishes if rng.random() < 0.25)
            fields = {"gpu_memory": f"{size}GiB", "use_gpu": True, **fields, "devices": None}
            if rng.random() < 0.15:
                fields = {"use_gpu": False, "model": "/models/cpu.gguf", "depends_on": fields["depends_on"]}
            wishes.append(wanted(name, **fields))
    return desired(*wishes), gpu_world(devices, *engines)


def need(one: Wanted, device: Device) -> int:
    """What a manifest asks of a device by its documents: a size or a share, and the context of a vLLM beside it.

    Its start waits for what its own dead process has not given back, all of it.
    """
    spec = one.spec
    context = 0 if spec.runtime != "vllm" else round((0.9 if spec.tensor_parallel > 1 else 0.5) * GIB)
    wish = spec.gpu_memory
    size = int(wish * device.total_bytes) if isinstance(wish, float) else int(wish.removesuffix("B"))
    own = sum(entry.held_bytes for entry in device.lingering if entry.engine == one.id)
    return size + context - own


def stays(one: Wanted, engine: Engine | None) -> bool:
    """Whether it runs as it is wanted; a label and what it waits for are no reason to start it anew."""
    return engine is not None and set(differing(one, engine)) <= {"label", "depends_on"}


def differing(one: Wanted, engine: Engine) -> list[str]:
    """The fields in which what is wanted is not as it runs."""
    new, old = written_fields(one.spec), written_fields(as_it_runs(engine).spec)
    return [name for name in {**new, **old} if (new.get(name) or None) != (old.get(name) or None)]


def fewest_left_out(want: DesiredState, now: ObservedState, *, moves: bool) -> int:
    """Of all that is wanted, how many cannot be had at the least, by trying every place of every engine and none."""
    runs = {engine.id: engine for engine in now.engines}
    settled = {one.id for one in want.wanted if stays(one, runs.get(one.id))}
    choices: list[list[tuple[int, ...] | None]] = []
    # What gets a new label in the same plan is not moved by it.
    movable = {one.id for one in want.wanted if moves and one.id in settled and not differing(one, runs[one.id])}
    asking = [one for one in want.wanted if one.id not in settled or (one.id in movable and one.spec.use_gpu)]
    for one in asking:
        count = one.spec.tensor_parallel if one.spec.use_gpu else 0
        groups: list[tuple[int, ...] | None] = [
            group
            for group in combinations(range(len(now.devices)), count)
            if len({(now.devices[number].name, now.devices[number].total_bytes) for number in group}) <= 1
            and not any(now.devices[number].closed for number in group)
        ]
        if one.id in settled:
            groups = [home_of(runs[one.id], now), *(group for group in groups if group != home_of(runs[one.id], now))]
        else:
            groups.append(None)
        choices.append(groups)
    staying = [engine for engine in now.engines if engine.id in settled and engine.id not in {one.id for one in asking}]
    return min(
        groups.count(None)
        for groups in product(*choices)
        if stand_together(asking, groups, runs, settled) and fits(asking, groups, staying, settled, runs, now)
    )


def stand_together(
    asking: list[Wanted],
    groups: tuple[tuple[int, ...] | None, ...],
    runs: dict[EngineId, Engine],
    settled: set[EngineId],
) -> bool:
    """Whether all that something new depends on has a place, too, or runs already."""
    missing = {str(one.id) for one, group in zip(asking, groups, strict=True) if group is None and one.id not in runs}
    return not any(
        missing & set(one.depends_on)
        for one, group in zip(asking, groups, strict=True)
        if group is not None and one.id not in settled
    )


def home_of(engine: Engine, now: ObservedState) -> tuple[int, ...]:
    uuids = [device.uuid for device in now.devices]
    return tuple(uuids.index(uuid) for uuid in engine.resolved.placement.devices)


def fits(
    asking: list[Wanted],
    groups: tuple[tuple[int, ...] | None, ...],
    staying: list[Engine],
    settled: set[EngineId],
    runs: dict[EngineId, Engine],
    now: ObservedState,
) -> bool:
    for number, device in enumerate(now.devices):
        holds = sum(counted(engine, device.uuid) for engine in staying)
        arrives = False
        for one, group in zip(asking, groups, strict=True):
            if group is None and one.id in runs:
                holds += counted(runs[one.id], device.uuid)
            if group is None or number not in group:
                continue
            at_home = one.id in settled and group == home_of(runs[one.id], now)
            arrives |= not at_home
            holds += counted(runs[one.id], device.uuid) if at_home else need(one, device)
        if arrives and holds > device.total_bytes - device.reserved_bytes - device.foreign_bytes:
            return False
    return True


@pytest.mark.parametrize("moves", [False, True])
def test_no_more_is_refused_than_must_be(moves: bool) -> None:
    complete = moved = waiting = 0
    count = INSTANCES // 2 if moves else INSTANCES
    for seed in range(count):
        want, now = small(random.Random(seed))
        if any(need(one, device) < 0 for one in want.wanted for device in now.devices if one.spec.use_gpu):
            continue  # What comes back beyond what it takes is nobody's before it is back.
        plan = make_plan(want, now, PlanOptions(allow_moves=moves))
        assert len(plan.blocked) == fewest_left_out(want, now, moves=moves), f"seed {seed}"
        assert audit(plan, want, now) == (), f"seed {seed}"
        complete += not plan.blocked
        moved += any(step.action == "move" for step in plan.steps)
        waiting += any(entry.reason == "dependency" for entry in plan.blocked)
    assert count / 4 < complete < count and waiting > count / 50
    assert not moves or moved >= count // 300


def cured(cure: str, blocked: EngineId, want: DesiredState, now: ObservedState) -> Plan:
    """The plan once a refusal's advice was followed."""
    if cure == "--allow-moves":
        return make_plan(want, now, PlanOptions(allow_moves=True))
    if found := re.fullmatch(r"(gpu_memory|max_model_len|tensor_parallel)(?: <=|:) (.*)", cure):
        fields = {found[1]: found[2] if found[1] == "gpu_memory" else int(found[2])}
        written = tuple(
            replace(one, spec=one.spec.model_copy(update=fields)) if of_one_engine(one.id, blocked) else one
            for one in want.wanted
        )
        return make_plan(replace(want, wanted=written), now)
    if found := re.fullmatch(r"replicas: (.*)", cure):
        fewer = tuple(
            one for one in want.wanted if not (of_one_engine(one.id, blocked) and one.id.replica >= int(found[1]))
        )
        return make_plan(replace(want, wanted=fewer), now)
    if found := re.fullmatch(r"without foreign pid (\d+) .*", cure):
        return make_plan(want, replace(now, devices=tuple(without(device, int(found[1])) for device in now.devices)))
    name = cure.removeprefix("without ")
    assert name != cure, cure
    return make_plan(
        replace(want, wanted=tuple(one for one in want.wanted if str(one.id) != name)),
        replace(now, engines=tuple(engine for engine in now.engines if str(engine.id) != name)),
    )


def without(device: Device, pid: int) -> Device:
    gone = sum(holder.used_bytes for holder in device.holders if holder.pid == pid)
    return replace(
        device,
        holders=tuple(holder for holder in device.holders if holder.pid != pid),
        foreign_bytes=device.foreign_bytes - gone,
        used_bytes=device.used_bytes - gone,
    )


def test_what_a_refusal_says_would_help_helps() -> None:
    told: Counter[str] = Counter()
    for seed in range(INSTANCES // 3):
        want, now = small(random.Random(seed))
        if any(device.lingering for device in now.devices):
            continue  # Advice is for the world in which the dead have given back what starts of this plan wait for.
        plan = make_plan(want, now)
        for entry in plan.blocked:
            for cure in entry.would_help:
                told[re.sub(r"[ /\d].*", "", cure.removeprefix("without "))] += 1
                after_it = cured(cure, entry.engine, want, now)
                assert entry.engine not in {other.engine for other in after_it.blocked}, f"seed {seed}: {cure}"
    assert len(told) >= min(4, INSTANCES // 300), told


# --- applies ----------------------------------------------------------------------------------------------------------


def is_sound(now: ObservedState) -> bool:
    """Whether every device holds what is on it, and can be had: what a restore may count on."""
    return all(
        not device.closed
        and sum(counted(engine, device.uuid) for engine in now.engines)
        <= device.total_bytes - device.reserved_bytes - device.foreign_bytes
        for device in now.devices
    )


def watched(seed: int, **fields: object) -> FakeHost:
    """A host whose devices are looked at with every look: what is used, not what is planned."""
    _, now, _ = case(seed)
    sound = is_sound(now)

    def look(world: ObservedState) -> None:
        for device in world.devices:
            used = device.foreign_bytes + sum(
                dict(engine.measured_bytes).get(device.uuid, 0) for engine in world.engines
            )
            assert used == device.used_bytes, f"seed {seed}"
            assert not sound or used <= device.total_bytes - device.reserved_bytes, f"seed {seed}: {device.uuid}"

    return FakeHost(world=now, on_look=look, late_seconds=(seed % 3) * 2.0, **fields)  # type: ignore[arg-type]


def test_an_apply_ends_with_all_that_was_planned() -> None:
    """With memory that comes back at once, or only seconds after an engine ended."""
    converged = 0
    for seed in range(APPLIES * 2):
        want, now, plan = case(seed)
        if plan.blocked or not plan.acts:
            continue
        outcome = apply_plan(plan, want, now, watched(seed), MemoryJournal(), revision=(), pid=1)
        assert outcome.result == "converged", f"seed {seed}: {outcome.failures}"
        converged += 1
    assert converged > APPLIES / 5


@pytest.mark.parametrize("how", ["refused", "exits"])
def test_a_failed_apply_puts_back_every_engine_on_its_devices(how: str) -> None:
    failed = 0
    for seed in range(APPLIES * 2):
        want, now, plan = case(seed)
        starts = sum(isinstance(act, StartEngine) for act in plan.acts)
        if plan.blocked or not starts or not is_sound(now) or now.gaps:
            continue
        failing = random.Random(seed).randrange(starts)
        host = watched(seed, fails=lambda number, act, failing=failing: how if number == failing else "")
        outcome = apply_plan(plan, want, now, host, MemoryJournal(), revision=(), pid=1)
        assert outcome.result == "restored", f"seed {seed}: {outcome.failures} {outcome.restore_failures}"
        failed += 1
        for engine in now.engines:
            (found,) = [found for found in host.world.engines if found.id == engine.id]
            assert alike(found) == alike(engine), f"seed {seed}"
    assert failed > APPLIES / 8
