"""Plans for worlds that no plan leaves behind: a GPU is lost, memory is where it should not be, the dead hold some."""

from dataclasses import replace

from sage_reconcile.core.audit import audit
from sage_reconcile.core.facts import Gap
from sage_reconcile.core.plan import PlanOptions
from sage_reconcile.core.planner import make_plan
from tests.builders import GIB, dead, desired, gpu, gpu_world, on_gpus, wanted
from tests.core.test_gpu_plans import starts

LOST = Gap(what="lost device", why="gpu0 has fallen off the bus", subject="GPU-0")


def test_of_an_engine_that_lost_a_gpu_and_one_that_wants_its_other_one_is_started() -> None:
    """2026-11-28: what it still holds of the other GPU was given away, then kept: neither was started."""
    devices = (gpu(0, 24), gpu(1, 24, island=1), gpu(2, 24))
    halved = on_gpus("lab/pair", 8001, 100, (devices[0], devices[2]), 12, pipeline_parallel=2)
    halved = replace(halved, state="unready", reason="gpu0 is lost", lost_devices=("GPU-0",))
    now = gpu_world(devices[1:], halved, gaps=(LOST,))
    pair = wanted("lab/pair", use_gpu=True, gpu_memory="12GiB", pipeline_parallel=2)
    want = desired(pair, wanted("lab/new", use_gpu=True, gpu_memory="20GiB", devices=[2]))

    plan = make_plan(want, now)

    assert starts(plan) == {"lab/pair": ("GPU-1", "GPU-2")}
    assert [str(entry.engine) for entry in plan.blocked] == ["lab/new"]
    assert audit(plan, want, now) == ()


def test_leave_to_move_gives_nobody_the_memory_that_an_engine_took_where_it_was_not_placed() -> None:
    """2026-11-28: `sage plan --allow-moves` ended with 1, for the audit let no such plan through."""
    devices = (gpu(0, 24, closed="the driver asks for a reset of this GPU"), gpu(1, 24))
    pinned = {"use_gpu": True, "gpu_memory": "5GiB", "devices": (0,)}
    stray = on_gpus("lab/a", 8001, 100, devices[:1], 5, **pinned)
    stray = replace(stray, measured_bytes=(("GPU-0", 5 * GIB), ("GPU-1", 8 * GIB)), misplaced="uses 8.0 GiB of gpu1")
    now = gpu_world(devices, stray)
    want = desired(wanted("lab/a", **pinned), wanted("lab/b", use_gpu=True, gpu_memory="20GiB"))

    plan = make_plan(want, now, PlanOptions(allow_moves=True))

    assert audit(plan, want, now) == ()
    assert [(str(entry.engine), entry.devices[1].free_bytes) for entry in plan.blocked] == [("lab/b", 16 * GIB)]


def test_what_a_dead_process_holds_is_not_waited_for_by_its_engine_on_another_device() -> None:
    """2026-11-28: the audit took it to come back, and so a share that SGLang is told of what is free for too large."""
    device = gpu(0, 24, lingering=(("lab/b", 7),))
    now = gpu_world((device,), records=(dead("lab/b", device, 7),))
    want = desired(wanted("lab/b"), wanted("lab/c", model="org/c", runtime="sglang", use_gpu=True, gpu_memory=0.6))

    plan = make_plan(want, now)

    assert starts(plan) == {"lab/b": (), "lab/c": ("GPU-0",)}
    assert audit(plan, want, now) == ()


def test_a_start_on_what_the_dead_process_of_an_engine_elsewhere_holds_is_a_violation() -> None:
    device = gpu(0, 24)
    want = desired(wanted("lab/b"), wanted("lab/c", use_gpu=True, gpu_memory="20GiB"))
    plan = make_plan(want, gpu_world((device,)))

    held = gpu_world((gpu(0, 24, lingering=(("lab/b", 7),)),), records=(dead("lab/b", device, 7),))

    assert [found.law for found in audit(plan, want, held)] == ["no device is over-full"]
