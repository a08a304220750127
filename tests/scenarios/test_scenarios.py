"""Golden plans: a directory each, with the manifests, a world and the plan that a reader sees.

Where the command line has options they are in `options.json`, the fields of PlanOptions.

The world is the JSON of core.observed, the form in which a host is snapshot. `SNAP_UPDATE=1 pytest tests/scenarios`
writes the plans anew; the diff is what a reviewer reads.
"""

import json
import os
from pathlib import Path

import pytest

from sage_reconcile.core.audit import audit
from sage_reconcile.core.observed import parse_observed
from sage_reconcile.core.plan import Plan, PlanOptions, after
from sage_reconcile.core.planner import make_plan
from sage_reconcile.drive.executor import act_sentence
from sage_reconcile.render.plan_text import plan_text
from sage_reconcile.world.manifests import load

HERE = Path(__file__).resolve().parent
SCENARIOS = sorted(path.parent for path in HERE.glob("*/world.json"))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda path: path.name)
def test_the_plan_is_the_one_that_was_reviewed(scenario: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where lines break must not depend on where the clone lies.
    monkeypatch.chdir(scenario)
    observed = parse_observed((scenario / "world.json").read_bytes())
    desired = load(("manifests",), project="lab", home="/home/ada", directory="/srv/manifests")
    options = options_of(scenario)
    plan = make_plan(desired, observed, options)
    shown = told(plan, plan_text(plan, observed))
    golden = scenario / "plan.txt"
    if os.environ.get("SNAP_UPDATE"):
        golden.write_text(shown, encoding="utf-8")
    assert shown == golden.read_text(encoding="utf-8")
    assert audit(plan, desired, observed) == ()
    for act in plan.acts:
        observed = after(act, observed)
    assert make_plan(desired, observed, options).acts == ()


def options_of(scenario: Path) -> PlanOptions:
    """What the command line adds."""
    written = scenario / "options.json"
    return PlanOptions(**json.loads(written.read_text(encoding="utf-8"))) if written.exists() else PlanOptions()


def told(plan: Plan, text: str) -> str:
    """The plan as a reader sees it, then its acts, each with what must be done before it, and what must have ended."""
    acts = [
        f"  [{index}] {act_sentence(act)}{waits('after', act.after)}{waits('behind', getattr(act, 'behind', ()))}"
        for index, act in enumerate(plan.acts)
    ]
    return "\n".join([text, "", "Acts:", *(acts or ["  none"])]) + "\n"


def waits(word: str, acts: tuple[int, ...]) -> str:
    return f"  {word} {', '.join(map(str, acts))}" if acts else ""


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 12
