"""What a plan says of the figures that it goes by: guesses, words that have none, and budgets that are too small."""

from typing import Any

import pytest

from sage_reconcile.core.facts import FootprintFact, ModelFact
from sage_reconcile.core.plan import Plan
from sage_reconcile.core.planner import make_plan
from tests.gpu_worlds import LLAMA_8B, LLAMA_70B, MODELS, desired, h100, machine, wants

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
