"""What a plan says beyond its acts: its notes on memory that was computed or is not used, and how sure it is."""

from dataclasses import replace

import pytest

from sage_reconcile.core.desired import DesiredState
from sage_reconcile.core.facts import ModelFact
from sage_reconcile.core.observed import ObservedState
from sage_reconcile.core.planner import make_plan
from sage_reconcile.render.plan_json import plan_json
from sage_reconcile.render.plan_text import plan_text
from tests.builders import desired, gpu, gpu_world, on_gpus, shape, wanted


def said(want: DesiredState, now: ObservedState) -> str:
    """The printed plan, without its line breaks."""
    return " ".join(plan_text(make_plan(want, now), now).split())


@pytest.mark.parametrize(("known", "noted"), [(False, True), (True, False)])
def test_a_family_that_was_never_compared_gets_a_margin_and_the_plan_says_so(known: bool, noted: bool) -> None:
    model = ModelFact(model="org/new", shape=shape(15, family="newcomer", known=known, basis="config"))
    want = desired(wanted("lab/a", model="org/new", runtime="vllm", use_gpu=True, max_model_len=4096))
    now = replace(gpu_world((gpu(0, 80),)), models=(model,))

    margin = 'note: lab/a: with a margin of 1.5 GiB: no model of the family "newcomer" was compared with a measurement'
    assert (margin in said(want, now)) == noted


@pytest.mark.parametrize("uses", [(0, 0), (0, 8), (8, 8)])
def test_each_device_of_which_a_ready_engine_holds_nothing_is_noted(uses: tuple[float, float]) -> None:
    devices = (gpu(0, 24), gpu(1, 24))
    engine = on_gpus("lab/a", 8001, 100, devices, 8, uses=uses)
    want = desired(wanted("lab/a", use_gpu=True, gpu_memory="8GiB", tensor_parallel=2))

    text = said(want, gpu_world(devices, engine))

    for index, used in enumerate(uses):
        note = f"note: lab/a holds no memory of gpu{index}: nothing proves that it runs there"
        assert (note in text) == (not used)


@pytest.mark.parametrize(("count", "optimality"), [(2, "proved"), (16, "budget")])
def test_a_plan_says_whether_its_search_tried_all_places_or_ended_with_its_budget(count: int, optimality: str) -> None:
    """Sixteen engines of as many sizes on eight GPUs of as many: too many ways to try them all."""
    now = gpu_world(tuple(gpu(index, 80, reserved=index / 64) for index in range(8)))
    want = desired(*(wanted(f"lab/e{n:02}", use_gpu=True, gpu_memory=f"{9 + n}GiB") for n in range(count)))

    plan = make_plan(want, now)

    assert plan_json(plan, now)["optimality"] == optimality
    ended = "the search for places ended before it had tried all: there may be better ones"
    assert (ended in said(want, now)) == (optimality == "budget")
