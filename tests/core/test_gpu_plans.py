"""Single plans on GPUs: the worlds in which a mistake was found once, and what the audit must never let through."""

from dataclasses import replace

import pytest

from sage_reconcile.core.audit import audit
from sage_reconcile.core.desired import DesiredState
from sage_reconcile.core.device_table import device_rows
from sage_reconcile.core.facts import Gap
from sage_reconcile.core.observed import ObservedState
from sage_reconcile.core.plan import Act, Plan, PlanOptions, StartEngine, StopEngine, after
from sage_reconcile.core.planner import make_plan, restore_target
from sage_reconcile.core.why import engine_why
from tests.builders import GIB, dead, desired, gpu, gpu_world, label_of, on_gpus, record, the_id, wanted


def starts(plan: Plan) -> dict[str, tuple[str, ...]]:
    """The devices of each start, by its engine."""
    return {str(act.engine): act.resolved.placement.devices for act in plan.acts if isinstance(act, StartEngine)}


def begins_before(plan: Plan, first: str, second: str) -> bool:
    """Whether the stop of the one has ended when the other starts."""
    stop = next(i for i, act in enumerate(plan.acts) if isinstance(act, StopEngine) and str(act.engine) == first)
    start = next(act for act in plan.acts if isinstance(act, StartEngine) and str(act.engine) == second)
    return stop in start.after


# --- mistakes that were made ------------------------------------------------------------------------------------------


def test_four_gpus_behind_two_switches_are_of_one_cpu() -> None:
    """2026-11-28: with pairs of GPUs behind switches, four GPUs could be of two CPUs where one would have done."""
    pairs = tuple(
        gpu(number, 10 if number == 1 else 80, island=number // 2, numa_node=number // 4) for number in range(8)
    )
    want = desired(wanted("lab/a", use_gpu=True, gpu_memory="40GiB", tensor_parallel=4))

    assert starts(make_plan(want, gpu_world(pairs))) == {"lab/a": ("GPU-4", "GPU-5", "GPU-6", "GPU-7")}


@pytest.mark.parametrize("runtime", ["vllm", "sglang"])
@pytest.mark.parametrize("total", [24, 80, 273])
@pytest.mark.parametrize("wish", ["1MiB", "5MiB", "15MiB", "30MiB", 1e-05, 0.0002])
def test_the_least_share_that_can_be_told_is_what_is_planned(runtime: str, total: float, wish: str | float) -> None:
    """2026-11-25: a share has four digits, and less than 0.0001 of a GPU was planned and more of it told."""
    now = gpu_world((gpu(0, total),))
    want = desired(wanted("lab/a", model="org/m", runtime=runtime, use_gpu=True, gpu_memory=wish))

    assert audit(make_plan(want, now), want, now) == ()


def test_what_is_kept_free_stays_free_while_a_plan_is_carried_out() -> None:
    """2026-11-25: the order of acts knew nothing of device_reserve, so a start took it until the next stop."""
    full = gpu(0, 24)
    now = gpu_world((full,), on_gpus("lab/old", 8001, 100, (full,), 8))
    smaller = wanted("lab/old", use_gpu=True, gpu_memory="3GiB")
    new = wanted("lab/new", use_gpu=True, gpu_memory="14GiB")
    want = replace(desired(smaller, new), reserve_bytes=4 * GIB)

    plan = make_plan(want, now)

    assert begins_before(plan, "lab/old", "lab/new")
    assert audit(plan, want, now) == ()


def test_a_restore_needs_no_reserve() -> None:
    """2026-11-25: an apply that brought a device_reserve and failed could not put back what had used it."""
    full = gpu(0, 24)
    now = gpu_world((full,), on_gpus("lab/a", 8001, 100, (full,), 22))
    want = replace(desired(wanted("lab/a", use_gpu=True, gpu_memory="10GiB")), reserve_bytes=4 * GIB)
    failed = make_plan(want, now)
    world = after(failed.acts[0], now)

    restore = make_plan(restore_target(now, failed, want), world, PlanOptions(restoring=True))

    assert (starts(restore), restore.blocked) == ({"lab/a": ("GPU-0",)}, ())


def test_a_restore_waits_for_what_the_failed_start_has_not_given_back() -> None:
    """2026-11-25: the memory of an engine that had just died kept out the one that it was to replace."""
    full = gpu(0, 24)
    now = gpu_world((full,), on_gpus("lab/old", 8001, 100, (full,), 20))
    want = desired(wanted("lab/new", use_gpu=True, gpu_memory="18GiB"))
    failed = make_plan(want, now)
    died = gpu_world((gpu(0, 24, lingering=(("lab/new", 18),)),), records=(dead("lab/new", full, 18),))
    target = restore_target(now, failed, want)

    restore = make_plan(target, died, PlanOptions(restoring=True))

    assert (starts(restore), restore.blocked) == ({"lab/old": ("GPU-0",)}, ())
    assert audit(restore, target, died) == ()


def test_what_the_dead_process_of_a_running_engine_holds_is_nobodys() -> None:
    """2026-11-25: with leave to move, its own lingering memory counted as free though nothing waited for it."""
    device = gpu(0, 24, lingering=(("lab/a", 5),))
    engine = on_gpus("lab/a", 8001, 100, (device,), 10)
    now = gpu_world((device,), engine)
    want = desired(wanted("lab/a", use_gpu=True, gpu_memory="10GiB"), wanted("lab/b", use_gpu=True, gpu_memory="12GiB"))

    plan = make_plan(want, now, PlanOptions(allow_moves=True))

    assert [str(entry.engine) for entry in plan.blocked] == ["lab/b"]
    assert audit(plan, want, now) == ()


def lingering_on_two() -> tuple[DesiredState, ObservedState]:
    """lab/b waits for its own memory on gpu0; what it does not need of that is free once it has started."""
    devices = (gpu(0, 24, lingering=(("lab/b", 12),)),)
    want = desired(
        wanted("lab/b", use_gpu=True, gpu_memory="4GiB"),
        wanted("lab/c", use_gpu=True, gpu_memory="10GiB"),
        wanted("lab/d", use_gpu=True, gpu_memory="9GiB"),
    )
    return want, gpu_world(devices, records=(dead("lab/b", devices[0], 12),))


def test_what_a_second_pass_starts_on_one_device_is_serialised_too() -> None:
    """2026-11-25: `behind` of a second pass named acts of the first one, and the audit let nothing through."""
    want, now = lingering_on_two()

    plan = make_plan(want, now)

    assert plan.blocked == ()
    assert audit(plan, want, now) == ()


def test_what_a_second_pass_starts_is_noted_too() -> None:
    """2026-11-25: a note of a later pass was lost, as that an engine's memory is a guess."""
    plan = make_plan(*lingering_on_two())

    told = [note.partition(":")[0] for note in plan.notes if "cannot be told" in note]
    assert sorted(told) == sorted(starts(plan)) == ["lab/b", "lab/c", "lab/d"]


def test_a_second_pass_moves_nothing_that_the_first_one_starts() -> None:
    """2026-11-25: with leave to move, a plan could stop a process that its own first act was to start."""
    devices = (gpu(0, 24, lingering=(("lab/b", 7),)), gpu(1, 24, foreign=((4000, 5),)))
    want = desired(wanted("lab/b", use_gpu=True, gpu_memory="10GiB"), wanted("lab/d", use_gpu=True, gpu_memory="20GiB"))
    now = gpu_world(devices, records=(dead("lab/b", devices[0], 7),))

    plan = make_plan(want, now, PlanOptions(allow_moves=True))

    assert starts(plan) == {"lab/b": ("GPU-0",)}
    assert audit(plan, want, now) == ()


def test_the_order_of_records_decides_no_port() -> None:
    """2026-11-25: of two dead engines that had had one port, the one whose record was read last got it."""
    device = gpu(0, 24)
    records = (
        replace(dead("lab/a", device, 5, pid=600), started_at=2.0),
        replace(dead("lab/b", device, 5, pid=601), started_at=1.0),
    )
    want = desired(wanted("lab/a", use_gpu=True, gpu_memory="5GiB"), wanted("lab/b", use_gpu=True, gpu_memory="5GiB"))
    plans = [make_plan(want, gpu_world((device,), records=order)) for order in (records, records[::-1])]
    assert plans[0] == plans[1]
    ports = {str(act.engine): act.resolved.placement.port for act in plans[0].acts if isinstance(act, StartEngine)}
    assert ports["lab/a"] == 8001


# --- what the audit never lets through --------------------------------------------------------------------------------


def bigger() -> tuple[DesiredState, ObservedState]:
    """An engine is replaced by a larger one and another is started, all on the only device that is open."""
    devices = (gpu(0, 24, lingering=(("lab/dead", 6),)), gpu(1, 24, closed="lab/x (pid 77) did not give it back"))
    now = gpu_world(devices, on_gpus("lab/a", 8001, 100, devices[:1], 8))
    return desired(
        wanted("lab/a", model="org/a", runtime="vllm", gpu_memory="9GiB", use_gpu=True),
        wanted("lab/b", model="org/b", runtime="vllm", gpu_memory="8GiB", use_gpu=True),
    ), now


def with_acts(plan: Plan, change: dict[int, Act]) -> Plan:
    return replace(plan, acts=tuple(change.get(index, act) for index, act in enumerate(plan.acts)))


def start_of(plan: Plan, engine: str) -> tuple[int, StartEngine]:
    return next(
        (index, act)
        for index, act in enumerate(plan.acts)
        if isinstance(act, StartEngine) and str(act.engine) == engine
    )


def placed_on(act: StartEngine, device: str, index: int, **fields: object) -> StartEngine:
    place = replace(act.resolved.placement, devices=(device,), device_indexes=(index,), **fields)  # type: ignore[arg-type]
    env = {**dict(act.env), "CUDA_VISIBLE_DEVICES": str(index)}
    return replace(act, resolved=replace(act.resolved, placement=place), env=tuple(sorted(env.items())))


def with_env(act: StartEngine, **changed: str | None) -> StartEngine:
    env = {name: value for name, value in {**dict(act.env), **changed}.items() if value is not None}
    return replace(act, env=tuple(sorted(env.items())))


def over_full(plan: Plan) -> Plan:
    """By the bytes of one CUDA context."""
    index, act = start_of(plan, "lab/b")
    device = act.resolved.placement
    return with_acts(plan, {index: placed_on(act, device.devices[0], 0, memory_bytes_per_device=9 * GIB - GIB // 2)})


def started_before_the_stop(plan: Plan) -> Plan:
    """Nothing waits any more for what frees its memory: starts first, in the order of the list too."""
    first = [replace(act, after=(), behind=()) for act in plan.acts if isinstance(act, StartEngine)]
    last = [replace(act, behind=()) for act in plan.acts if isinstance(act, StopEngine)]
    return replace(plan, acts=(*first, *last))


def without_behind(plan: Plan) -> Plan:
    return replace(plan, acts=tuple(replace(act, behind=()) for act in plan.acts))  # type: ignore[call-arg]


def on_the_closed_device(plan: Plan) -> Plan:
    index, act = start_of(plan, "lab/b")
    return with_acts(plan, {index: placed_on(act, "GPU-1", 1)})


def on_an_unknown_device(plan: Plan) -> Plan:
    index, act = start_of(plan, "lab/b")
    return with_acts(plan, {index: placed_on(act, "GPU-9", 9)})


def shown_another_device(plan: Plan) -> Plan:
    index, act = start_of(plan, "lab/b")
    return with_acts(plan, {index: with_env(act, CUDA_VISIBLE_DEVICES="1")})


def shown_every_device(plan: Plan) -> Plan:
    index, act = start_of(plan, "lab/b")
    return with_acts(plan, {index: with_env(act, CUDA_VISIBLE_DEVICES=None)})


def counting_otherwise(plan: Plan) -> Plan:
    index, act = start_of(plan, "lab/b")
    return with_acts(plan, {index: with_env(act, CUDA_DEVICE_ORDER=None)})


def on_anothers_lingering_memory(plan: Plan) -> Plan:
    """What lab/dead has not given back, which nobody waits for."""
    index, act = start_of(plan, "lab/b")
    return with_acts(plan, {index: placed_on(act, "GPU-0", 0, memory_bytes_per_device=12 * GIB)})


def twice_on_one_device(plan: Plan) -> Plan:
    index, act = start_of(plan, "lab/b")
    place = replace(act.resolved.placement, devices=("GPU-0", "GPU-0"), device_indexes=(0, 0))
    changed = replace(act, resolved=replace(act.resolved, placement=place))
    return with_acts(plan, {index: with_env(changed, CUDA_VISIBLE_DEVICES="0,0")})


def told_more_than_planned(plan: Plan) -> Plan:
    index, act = start_of(plan, "lab/b")
    words = list(act.resolved.argv)
    words[words.index("--gpu-memory-utilization") + 1] = "0.9"
    return with_acts(plan, {index: replace(act, resolved=replace(act.resolved, argv=tuple(words)))})


@pytest.mark.parametrize(
    ("bug", "law"),
    [
        (over_full, "no device is over-full"),
        (started_before_the_stop, "no device is over-full"),
        (without_behind, "order"),
        (on_the_closed_device, "only devices that are there"),
        (on_an_unknown_device, "only devices that are there"),
        (shown_another_device, "an engine sees its planned devices"),
        (shown_every_device, "an engine sees its planned devices"),
        (counting_otherwise, "an engine sees its planned devices"),
        (on_anothers_lingering_memory, "no device is over-full"),
        (twice_on_one_device, "an engine sees its planned devices"),
        (told_more_than_planned, "the memory planned is the memory told"),
    ],
)
def test_a_planted_bug_is_a_violation(bug: object, law: str) -> None:
    want, now = bigger()
    plan = make_plan(want, now)
    assert audit(plan, want, now) == () and plan.blocked == ()

    harmed = bug(plan)  # type: ignore[operator]

    assert law in {violation.law for violation in audit(harmed, want, now)}


def test_a_slice_is_shown_by_its_uuid_alone() -> None:
    """Its index is that of the whole GPU."""
    slice_of = replace(gpu(0, 20, uuid="MIG-0"), parent="GPU-0")
    now, want = gpu_world((slice_of,)), desired(wanted("lab/a", use_gpu=True, gpu_memory="5GiB"))
    plan = make_plan(want, now)
    index, act = start_of(plan, "lab/a")
    assert dict(act.env)["CUDA_VISIBLE_DEVICES"] == "MIG-0"
    assert audit(plan, want, now) == ()

    harmed = with_acts(plan, {index: with_env(act, CUDA_VISIBLE_DEVICES="0")})

    assert [found.law for found in audit(harmed, want, now)] == ["an engine sees its planned devices"]


def test_a_reserve_that_is_taken_is_a_violation() -> None:
    device = gpu(0, 24)
    want, now = desired(wanted("lab/a", use_gpu=True, gpu_memory="22GiB")), gpu_world((device,))
    plan = make_plan(want, now)
    kept_free = replace(want, reserve_bytes=4 * GIB)
    assert [found.law for found in audit(plan, kept_free, now)] == ["no device is over-full"]


# --- what is out of sight ---------------------------------------------------------------------------------------------


def test_nothing_is_decided_on_gpus_that_cannot_be_seen_and_the_cpu_goes_on() -> None:
    """Unknown is not gone: what runs on them is kept, though another is wanted in its place."""
    gap = Gap(what="devices", why="the NVIDIA driver did not answer in 5 s")
    now = gpu_world((), on_gpus("lab/a", 8001, 100, (gpu(0),), 20), gaps=(gap,))
    want = desired(wanted("lab/a", use_gpu=True, gpu_memory="30GiB"), wanted("lab/cpu"))

    plan = make_plan(want, now)

    assert [(str(entry.engine), entry.reason) for entry in plan.blocked] == [("lab/a", "not_observed")]
    assert [str(act.engine) for act in plan.acts] == ["lab/cpu"]


# --- replicas ---------------------------------------------------------------------------------------------------------


def test_replicas_have_devices_of_their_own_and_are_replaced_one_after_the_other() -> None:
    devices = (gpu(0, 24), gpu(1, 24))
    homes = {"lab/a": 0, "lab/a#1": 1}
    now = gpu_world(devices, *(on_gpus(name, 8001 + n, 100 + n, (devices[n],), 8) for name, n in homes.items()))
    want = desired(*(wanted(name, use_gpu=True, gpu_memory="10GiB") for name in homes))

    plan = make_plan(want, now)

    assert starts(plan) == {"lab/a": ("GPU-0",), "lab/a#1": ("GPU-1",)}
    assert [(type(act), str(act.engine), act.after) for act in plan.acts] == [
        (StopEngine, "lab/a", ()),
        (StartEngine, "lab/a", (0,)),
        (StopEngine, "lab/a#1", (1,)),
        (StartEngine, "lab/a#1", (2,)),
    ]
    fresh = make_plan(want, gpu_world(devices))
    assert set(starts(fresh).values()) == {("GPU-0",), ("GPU-1",)}


def test_no_row_of_the_device_table_passes_its_device() -> None:
    device = gpu(0, 24, reserved=0.5)
    now = gpu_world((device,), on_gpus("lab/a", 8001, 100, (device,), 15), on_gpus("lab/b", 8901, 101, (device,), 5))
    want = desired(wanted("lab/a", use_gpu=True, gpu_memory="17GiB"), wanted("lab/c", use_gpu=True, gpu_memory="3GiB"))
    (row,) = device_rows(make_plan(want, now), now)
    assert [size / GIB for size in (row.now_bytes, row.peak_bytes, row.after_bytes)] == [20.5, 20.5, 20.5]


def test_why_tells_of_the_place_before_as_the_plan_took_it() -> None:
    """The record of a later process that ran on the CPU says nothing of a GPU: an older one does."""
    devices = (gpu(0, 24), gpu(1, 24))
    later = on_gpus("lab/a", 8001, 701, (devices[0],), 4)
    cpu = replace(later.resolved.placement, devices=(), device_indexes=())
    later = replace(later, resolved=replace(later.resolved, placement=cpu))
    on_the_cpu = record(later, label=label_of(later), started_at=11.0)
    want = desired(wanted("lab/a", use_gpu=True, gpu_memory="4GiB"))
    now = gpu_world(devices, records=(dead("lab/a", devices[1], 4), on_the_cpu))

    plan = make_plan(want, now)

    assert starts(plan) == {"lab/a": ("GPU-1",)}
    assert engine_why(the_id("lab/a"), want, now, plan).why_there == "it was there before"
