"""What a refusal says would help: as much as the engine can do with, and each cure fits when it is written."""

from dataclasses import replace
from typing import Any

import pytest

from sage_reconcile.core.desired import DesiredState, Wanted
from sage_reconcile.core.observed import Device
from sage_reconcile.core.plan import Blocked, Plan
from sage_reconcile.core.planner import make_plan
from tests.gpu_worlds import LLAMA_8B, LLAMA_70B, MIB, desired, h100, holder, machine, on_gpu, wants

# Two and eight H100 as they come, and two of 24 GiB.
TWO, EIGHT = tuple(map(h100, range(2))), tuple(map(h100, range(8)))
SMALL = tuple(h100(index, name="NVIDIA L4", total_bytes=24576 * MIB) for index in range(2))


def copies(count: int, **fields: Any) -> DesiredState:
    """One engine of a 70B, as so many replicas."""
    names = ["chat/big", *(f"chat/big#{number}" for number in range(1, count))]
    return desired(*(wants(name, **{"model": LLAMA_70B, **fields}) for name in names))


def refused(plan: Plan) -> Blocked:
    """The one refusal, or the first of those of replicas."""
    assert plan.blocked
    return plan.blocked[0]


def cures(want: DesiredState, *devices: Device, **fields: Any) -> tuple[str, ...]:
    return refused(make_plan(want, machine(*devices, **fields))).would_help


def fits(*engines: Wanted, devices: tuple[Device, ...]) -> bool:
    return not make_plan(desired(*engines), machine(*devices)).blocked


# --- of one engine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["vllm", "sglang"])
def test_no_less_memory_is_offered_than_the_weights_take(runtime: str) -> None:
    """2026-11-25: gpu_memory <= 78.5GiB was to help a model with 131 GiB of weights."""
    big = {"model": LLAMA_70B, "max_model_len": 8192, "runtime": runtime}

    assert cures(desired(wants("chat/big", **big)), *TWO) == ("tensor_parallel: 2",)
    assert fits(wants("chat/big", **big, tensor_parallel=2), devices=TWO)


@pytest.mark.parametrize("fields", [{}, {"gpu_memory": "40GiB"}], ids=["computed", "declared"])
def test_a_group_of_more_gpus_than_there_are_is_offered_a_smaller_one(fields: dict[str, Any]) -> None:
    """2026-11-28: tensor_parallel 4 on two GPUs was short of memory, of 0 bytes of it, and nothing would help."""
    four = {"model": LLAMA_8B, "max_model_len": 8192, "tensor_parallel": 4, **fields}

    entry = refused(make_plan(desired(wants("chat/a", **four)), machine(*TWO)))

    assert (entry.reason, entry.would_help) == ("no_device", ("tensor_parallel: 2",))
    assert fits(wants("chat/a", **four | {"tensor_parallel": 2}), devices=TWO)


def test_of_a_group_in_two_directions_either_is_offered_smaller() -> None:
    long = {"model": LLAMA_8B, "max_model_len": 8192, "tensor_parallel": 2, "pipeline_parallel": 2}

    assert cures(desired(wants("chat/a", **long)), *TWO) == ("tensor_parallel: 1", "pipeline_parallel: 1")


def test_no_smaller_group_is_offered_where_it_would_not_hold_the_model() -> None:
    entry = refused(make_plan(desired(wants("chat/a", model=LLAMA_70B, tensor_parallel=4)), machine(*SMALL)))

    assert (entry.reason, entry.would_help) == ("no_device", ())


def test_less_memory_is_offered_where_more_was_written_than_it_takes() -> None:
    given = {"model": LLAMA_8B, "max_model_len": 8192, "gpu_memory": "60GiB"}
    busy = h100(0, holders=(holder(4242, 40),))

    first, *_ = cures(desired(wants("chat/a", **given)), busy)

    assert first == "gpu_memory <= 38.5GiB"
    assert fits(wants("chat/a", **given | {"gpu_memory": "38.5GiB"}), devices=(busy,))


def test_fewer_sequences_at_once_are_offered() -> None:
    many = {"model": LLAMA_8B, "max_model_len": 8192, "max_concurrent_requests": 64}
    (device, *_) = SMALL

    offered = cures(desired(wants("chat/a", **many)), device)

    (most,) = [int(cure.split()[-1]) for cure in offered if cure.startswith("max_concurrent_requests <= ")]
    assert 1 <= most < 64
    assert fits(wants("chat/a", **many | {"max_concurrent_requests": most}), devices=(device,))
    assert not fits(wants("chat/a", **many | {"max_concurrent_requests": most + 1}), devices=(device,))


def test_a_shorter_context_and_more_devices_are_offered() -> None:
    """2026-11-25: neither was, and gpu_memory <= 22.9GiB was less than one sequence of the context takes."""
    long = {"model": LLAMA_8B, "max_model_len": 131072}

    assert cures(desired(wants("chat/a", **long)), *SMALL) == ("tensor_parallel: 2", "max_model_len <= 32768")
    assert fits(wants("chat/a", **long, tensor_parallel=2), devices=SMALL)
    assert fits(wants("chat/a", model=LLAMA_8B, max_model_len=32768), devices=SMALL)
    assert not fits(wants("chat/a", model=LLAMA_8B, max_model_len=49152), devices=SMALL)


def test_a_context_that_is_the_model_s_own_may_be_shortened_too() -> None:
    assert cures(desired(wants("chat/a", model=LLAMA_8B)), SMALL[0]) == ("max_model_len <= 32768",)


def test_layers_are_split_over_a_divisor_of_the_heads_that_is_there() -> None:
    three = desired(wants("chat/big", model=LLAMA_70B, max_model_len=8192, devices=(0, 1, 2)))
    assert cures(three, *EIGHT)[0] == "tensor_parallel: 2"
    full = tuple(h100(index, holders=(holder(4000 + index, 30),)) for index in range(3))
    assert cures(desired(wants("chat/big", model=LLAMA_70B, max_model_len=8192)), *full) == ()


def test_a_command_is_offered_no_context_and_no_split_that_nobody_would_tell_it() -> None:
    program = {"model": LLAMA_70B, "runtime": "command", "command": ["llama-server", "{memory_bytes}"]}
    assert cures(desired(wants("chat/big", **program)), *TWO) == ()


def test_more_stages_than_layers_are_no_want_of_devices() -> None:
    """2026-11-25: "needs 64 GPUs x 5.4 GiB, 2 fit", where no number of GPUs would do."""
    for runtime in ("vllm", "sglang"):
        engine = wants("chat/a", model=LLAMA_8B, pipeline_parallel=64, runtime=runtime)
        one = refused(make_plan(desired(engine), machine(*TWO)))
        assert (one.reason, one.why) == ("parallelism", "pipeline_parallel: 64 is more than its 32 layers")
        assert one.would_help == ("pipeline_parallel <= 32",)


# --- of replicas ------------------------------------------------------------------------------------------------------


def test_replicas_are_not_each_other_s_cure() -> None:
    """2026-11-25: "without chat/big#1" was to help chat/big#2, and no manifest says that."""
    want = copies(3, tensor_parallel=4, max_model_len=131072)

    found = cures(want, *EIGHT)

    assert found == ("tensor_parallel: 8", "max_model_len <= 16384", "replicas: 2")
    for cure in found:
        assert not make_plan(written(want, cure), machine(*EIGHT)).blocked, cure


def test_where_none_has_a_place_fewer_replicas_are_no_cure() -> None:
    first, second = make_plan(copies(2, max_model_len=8192), machine(*TWO)).blocked
    assert (first.would_help, second.would_help) == (("tensor_parallel: 2",), ())


def test_replicas_that_run_are_started_anew_for_a_cure() -> None:
    fields = {"model": LLAMA_70B, "tensor_parallel": 2, "max_model_len": 8192}
    first = on_gpu("chat/big", 8001, 100, 0, 1, gib=73.8, **fields)
    want = copies(2, **fields)

    found = cures(want, *TWO, engines=(first,))

    assert found[-1] == "replicas: 1"
    for cure in found:
        assert not make_plan(written(want, cure), machine(*TWO, engines=(first,))).blocked, cure


def written(want: DesiredState, cure: str) -> DesiredState:
    """The manifests once a cure is written into them."""
    name, value = cure.replace(" <=", ":").split(": ")
    if name == "replicas":
        return replace(want, wanted=tuple(one for one in want.wanted if one.id.replica < int(value)))
    specs = [one.spec.model_copy(update={name: int(value)}) for one in want.wanted]
    return replace(want, wanted=tuple(replace(one, spec=spec) for one, spec in zip(want.wanted, specs, strict=True)))
