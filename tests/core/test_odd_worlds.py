"""Plans for worlds that no plan leaves behind: a GPU is lost, memory is where it should not be, the dead hold some."""

from dataclasses import replace

import pytest

from sage_reconcile.core.audit import audit
from sage_reconcile.core.facts import Gap
from sage_reconcile.core.plan import PlanOptions, StartEngine
from sage_reconcile.core.planner import make_plan, restore_target
from tests.builders import GIB, dead, desired, gpu, gpu_world, on_gpus, running, wanted, world
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


def test_the_order_in_which_two_processes_of_an_engine_were_seen_changes_no_note() -> None:
    """2026-11-28: the plan of a snapshot told what an engine leaves by whichever of its processes stood last in it."""
    devices = (gpu(0, 24, closed="the driver asks for a reset of this GPU"), gpu(1, 24))
    first, second = (on_gpus("lab/a", 8001 + n, 100 + n, devices[n : n + 1], 5) for n in range(2))
    now = gpu_world(devices, first, second)
    want = desired(wanted("lab/a", use_gpu=True, gpu_memory="8GiB", devices=[1]))

    plan = make_plan(want, now)

    assert make_plan(want, replace(now, engines=now.engines[::-1])) == plan
    assert any(note.startswith("lab/a leaves gpu0") for note in plan.notes)


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "auto"])
def test_a_group_that_moves_by_one_gpu_is_given_what_its_manifest_says(runtime: str) -> None:
    """2026-11-28: it was given what it held before, its context too, on the GPU that it keeps: more with each move."""
    devices = tuple(gpu(index, 24) for index in range(3))
    fields = {"runtime": runtime, "model": "org/m" if runtime != "auto" else "/models/m.gguf"}
    pair = on_gpus("lab/pair", 8001, 100, devices[:2], 10, context=0.9, uses=(11.4, 11.4), **fields)
    small = on_gpus("lab/small", 8002, 101, devices[2:], 4)
    now = gpu_world(devices, pair, small)
    want = desired(
        wanted("lab/pair", use_gpu=True, gpu_memory="10GiB", tensor_parallel=2, **fields),
        wanted("lab/small", use_gpu=True, gpu_memory="4GiB"),
        wanted("lab/new", use_gpu=True, gpu_memory="20GiB", devices=[0]),
    )

    plan = make_plan(want, now, PlanOptions(allow_moves=True))

    (moved,) = [step for step in plan.steps if step.action == "move"]
    assert moved.placement is not None
    assert (moved.placement.devices, moved.placement.memory_bytes_per_device) == (("GPU-1", "GPU-2"), 10 * GIB)
    assert audit(plan, want, now) == ()


def test_a_group_that_moves_leaves_a_gpu_that_is_closed() -> None:
    """2026-11-28: it was to start again on the closed one beside another, which the audit let not through (1)."""
    devices = (
        gpu(0, 24, closed="the driver asks for a reset of this GPU"),
        gpu(1, 24),
        gpu(2, 24),
        gpu(3, 24, foreign=((4000, 20),)),
    )
    pair = on_gpus("lab/pair", 8001, 100, devices[:2], 10)
    now = gpu_world(devices, pair)
    want = desired(
        wanted("lab/pair", use_gpu=True, gpu_memory="10GiB", tensor_parallel=2),
        wanted("lab/new", use_gpu=True, gpu_memory="20GiB", devices=[1]),
    )

    plan = make_plan(want, now, PlanOptions(allow_moves=True))

    assert (starts(plan), [str(entry.engine) for entry in plan.blocked]) == ({}, ["lab/new"])
    assert audit(plan, want, now) == ()


# --- what others depend on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", [{"label": "new"}, {"gpu_memory": "99GiB"}])
def test_nothing_starts_on_what_it_depends_on_while_that_is_kept_and_is_not_ready(edit: dict[str, str]) -> None:
    """2026-11-28: it did start where that engine's label was to be changed, or its successor had no place."""
    device = gpu(0, 24)
    base = replace(on_gpus("lab/base", 8001, 100, (device,), 5), state="unready", reason="it answers 500")
    want = desired(
        wanted("lab/base", **{"use_gpu": True, "gpu_memory": "5GiB", **edit}),
        wanted("lab/top", depends_on=["lab/base"]),
    )

    plan = make_plan(want, gpu_world((device,), base))

    assert "lab/top" not in starts(plan)
    assert {str(entry.engine): entry.reason for entry in plan.blocked}["lab/top"] == "dependency"


def test_a_start_waits_for_what_it_depends_on_though_that_has_no_place_for_its_successor() -> None:
    """2026-11-28: it did not where that engine's process was still starting."""
    device = gpu(0, 24)
    base = replace(on_gpus("lab/base", 8001, 100, (device,), 5), state="starting", health="loading")
    want = desired(
        wanted("lab/base", use_gpu=True, gpu_memory="99GiB"),
        wanted("lab/top", depends_on=["lab/base"]),
        wanted("lab/other"),
    )

    plan = make_plan(want, gpu_world((device,), base), PlanOptions(waits=False))

    needs = {str(act.engine): act.needs for act in plan.acts if isinstance(act, StartEngine)}
    assert needs == {"lab/top": (base.leader,), "lab/other": ()}
    assert [str(task.engine) for task in plan.awaited] == ["lab/base"]


def test_what_a_second_pass_starts_on_an_engine_that_is_starting_can_give_up_on_it() -> None:
    """2026-11-28: with --no-wait nobody waited for that engine, and the start that needed it waited for good."""
    device = gpu(0, 24, lingering=(("lab/b", 12),))
    base = replace(running("lab/base", 8901, 100), state="starting", health="loading")
    now = gpu_world((device,), base, records=(dead("lab/b", device, 12),))
    want = desired(
        wanted("lab/base"),
        wanted("lab/b", use_gpu=True, gpu_memory="4GiB"),
        wanted("lab/c", use_gpu=True, gpu_memory="18GiB", depends_on=["lab/base"]),
    )

    plan = make_plan(want, now, PlanOptions(waits=False))

    last = plan.acts[-1]
    assert isinstance(last, StartEngine) and (str(last.engine), last.needs) == ("lab/c", (base.leader,))
    assert [task.leader for task in plan.awaited] == [base.leader]


def test_what_is_put_back_starts_though_what_it_depends_on_is_no_longer_ready() -> None:
    """2026-11-28: an engine that hung while an apply failed kept those that depend on it down after the restore."""
    base, top = running("lab/base", 8901, 100), running("lab/top", 8902, 101, depends_on=["lab/base"])
    want = desired(wanted("lab/base"), wanted("lab/top", depends_on=["lab/base"], max_model_len=512))
    failed = make_plan(want, world(base, top))
    hung = world(replace(base, state="unready", reason="it does not answer"))

    restore = make_plan(restore_target(world(base, top), failed, want), hung, PlanOptions(restoring=True))

    assert (starts(restore), restore.blocked) == ({"lab/top": ()}, ())


def test_what_depends_on_the_successor_of_an_engine_that_is_not_ready_never_takes_its_place() -> None:
    """2026-11-28: the place went to what depends on it, which then could not start: neither did."""
    devices = (gpu(0, 24), gpu(1, 24))
    base = replace(on_gpus("lab/base", 8001, 100, devices[:1], 5), state="unready", reason="it answers 500")
    want = desired(
        wanted("lab/base", use_gpu=True, gpu_memory="20GiB", devices=[1]),
        wanted("lab/top", use_gpu=True, gpu_memory="22GiB", devices=[1], depends_on=["lab/base"]),
    )

    plan = make_plan(want, gpu_world(devices, base))

    assert starts(plan) == {"lab/base": ("GPU-1",)}


def test_what_a_refused_engine_would_wait_for_is_free_for_it() -> None:
    """2026-11-28: "needs 20.0, free 6.0, short 7.0", held by nobody: its own dead process had the 7.0 that lacked."""
    device = gpu(0, 24, foreign=((4000, 11),), lingering=(("lab/a", 7),))
    now = gpu_world((device,), records=(dead("lab/a", device, 7),))

    plan = make_plan(desired(wanted("lab/a", use_gpu=True, gpu_memory="20GiB")), now)

    (told,) = plan.blocked[0].devices
    assert (told.free_bytes, told.short_bytes, told.held_by) == (13 * GIB, 7 * GIB, ("foreign pid 4000 python (11.0)",))
    assert plan.blocked[0].would_help == ("gpu_memory <= 13.0GiB", "without foreign pid 4000 (python)")
