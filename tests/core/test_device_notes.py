"""What a plan says of the figures that it goes by: guesses, words that have none, and budgets that are too small."""

from typing import Any

import pytest

from sage_reconcile.core.facts import FootprintFact, ModelFact
from sage_reconcile.core.needs import footprint_key
from sage_reconcile.core.plan import Plan
from sage_reconcile.core.planner import make_plan
from tests.gpu_worlds import GIB, LLAMA_8B, LLAMA_70B, MODELS, desired, h100, machine, wants

NOWHERE = ModelFact(model="org/Foo-70B", shape_why="org/Foo-70B is not in the hub's cache")


def plan(*footprints: FootprintFact, **fields: Any) -> Plan:
    """Of one engine on two H100."""
    want = desired(wants("chat/a", **{"max_model_len": 8192, **fields}))
    return make_plan(want, machine(h100(0), h100(1), models=(*MODELS, NOWHERE), footprints=footprints))


# --- of refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "source"),
    [
        ({"model": "org/Foo-70B"}, "guessed by its name"),
        ({"model": LLAMA_70B}, "computed"),
        ({"model": LLAMA_8B, "gpu_memory": "90GiB"}, "declared"),
    ],
)
def test_a_refusal_says_from_what_the_need_is_known(fields: dict[str, Any], source: str) -> None:
    (blocked,) = plan(**fields).blocked
    assert f"GiB ({source}), none fits" in blocked.why


def test_a_guess_by_which_an_engine_is_refused_is_told() -> None:
    """2026-11-25: only an engine that had a place was said to be guessed."""
    assert plan(model="org/Foo-70B").notes == (
        "chat/a: 179.5 GiB is a guess by its model's name: org/Foo-70B is not in the hub's cache",
    )


# --- of words and budgets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dtype": "float99"}, "dtype: float99 is not known here and counts as 16 bits"),
        ({"quantization": "nonsense"}, "quantization: nonsense counts for nothing: its files are not quantised"),
        ({"args": ["--kv-cache-dtype", "fp3"]}, "the type fp3 of its cache is not known here and counts as 16 bits"),
    ],
)
def test_a_word_that_has_no_figure_is_told(fields: dict[str, Any], words: str) -> None:
    """2026-11-25: it counted as 16 bits, and nothing said so."""
    assert [note.startswith(f"chat/a: {words}") for note in plan(**fields).notes] == [True]


@pytest.mark.parametrize(
    "fields", [{"dtype": "bfloat16"}, {"quantization": "fp8"}, {"args": ["--kv-cache-dtype", "fp8"]}, {}]
)
def test_a_word_that_has_a_figure_is_not(fields: dict[str, Any]) -> None:
    assert plan(**fields).notes == ()


@pytest.mark.parametrize("runtime", ["vllm", "sglang"])
@pytest.mark.parametrize("size", ["10GiB", 1e-9])
def test_a_budget_with_which_an_engine_is_not_likely_to_start_is_told(runtime: str, size: str | float) -> None:
    """2026-11-25: ten GiB for a model of fifteen were planned without a word."""
    (note,) = plan(runtime=runtime, gpu_memory=size).notes
    assert note.startswith("chat/a: gpu_memory gives it ") and "for one sequence of 8,192 tokens" in note


def test_a_budget_that_was_enough_once_is_enough() -> None:
    written = {"gpu_memory": "10GiB", "args": ["--cpu-offload-gb", "8"]}
    key = footprint_key(wants("chat/a", max_model_len=8192, **written).spec, told=True)
    ran = FootprintFact(key=key, device_name=h100(0).name, version="", peak_bytes=10 * GIB)

    assert plan(ran, **written).notes == ()
    assert len(plan(**written).notes) == 1


@pytest.mark.parametrize("fields", [{"gpu_memory": "20GiB"}, {"gpu_memory": 0.9}, {"gpu_memory": "auto"}])
def test_a_budget_that_is_enough_is_not_told(fields: dict[str, Any]) -> None:
    assert plan(**fields).notes == ()
