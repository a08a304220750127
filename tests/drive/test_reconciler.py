"""What an apply does when an act fails: every act of thirty plans, on a host in memory."""

import random
from dataclasses import replace

import pytest

from sage_reconcile.core.desired import DesiredState
from sage_reconcile.core.journal import PlanBegun, PlanEnded, RestoreBegun
from sage_reconcile.core.observed import Engine, ObservedState
from sage_reconcile.core.plan import Plan, PlanOptions, StartEngine, StopEngine
from sage_reconcile.core.planner import make_plan
from sage_reconcile.core.progress import Order, Spawned
from sage_reconcile.drive.reconciler import Outcome, apply_plan
from sage_reconcile.errors import Environment
from tests.builders import desired, running, the_id, wanted, world
from tests.core.test_worlds import random_desired, random_world
from tests.fakes import FakeHost, MemoryJournal

PLANS = 30


def plans() -> list[tuple[DesiredState, ObservedState, Plan]]:
    """Thirty plans of at least three acts, starts and stops among them, with nothing blocked."""
    found = []
    for seed in range(10_000):
        rng = random.Random(seed)
        want, now = random_desired(rng), random_world(rng)
        if len({engine.id for engine in now.engines}) < len(now.engines):
            continue  # Two processes of one engine: which of them ran before is not one answer.
        plan = make_plan(want, now)
        kinds = {type(act) for act in plan.acts}
        if len(plan.acts) >= 3 and {StartEngine, StopEngine} <= kinds and not plan.blocked:
            found.append((want, now, plan))
        if len(found) == PLANS:
            return found
    raise AssertionError("the generator makes too few plans")


def applied(want: DesiredState, now: ObservedState, host: FakeHost, on_failure: str = "rollback") -> Outcome:
    plan = make_plan(want, now)
    return apply_plan(plan, want, now, host, MemoryJournal(), revision=(), pid=1, on_failure=on_failure)


def ran(observed: ObservedState) -> dict[object, tuple[object, ...]]:
    """What ran: each engine with its spec, command, place and source."""
    return {
        engine.id: (engine.written, engine.resolved, engine.source)
        for engine in observed.engines
        if engine.leader_alive
    }


@pytest.mark.parametrize("how", ["refused", "exits", "hangs"])
def test_whichever_start_fails_the_world_is_as_before(how: str) -> None:
    failures = 0
    for want, now, plan in plans():
        for failing in range(sum(isinstance(act, StartEngine) for act in plan.acts)):
            host = FakeHost(world=now, fails=lambda number, act, failing=failing: how if number == failing else "")
            outcome = applied(want, now, host)
            assert outcome.result == "restored"
            assert ran(host.world) == ran(now)
            failures += 1
    assert failures > PLANS


def test_whichever_stop_fails_it_says_stuck_and_nothing_is_placed_over_it() -> None:
    failures = 0
    for want, now, plan in plans():
        for act in plan.acts:
            if not isinstance(act, StopEngine):
                continue
            host = FakeHost(world=now, undead=frozenset({str(act.engine)}))
            outcome = applied(want, now, host)
            assert outcome.result == "stuck"
            assert any(engine.leader == act.leader for engine in host.world.engines)
            assert sum(engine.resolved.placement.port == act.port for engine in host.world.engines) == 1
            failures += 1
    assert failures > PLANS


def test_a_restore_that_fails_too_says_stuck() -> None:
    now = world(running("lab/chat", 8001, 100))
    want = desired(wanted("lab/chat", max_model_len=64))
    host = FakeHost(world=now, fails=lambda number, act: "exits")
    outcome = applied(want, now, host)
    assert outcome.result == "stuck"
    assert [failure.why for failure in outcome.restore_failures] == ["exited with code 1 before it was ready"]


def test_an_engine_that_the_apply_did_not_touch_keeps_its_process() -> None:
    other = running("lab/other", 8901, 101)
    now = world(running("lab/chat", 8001, 100), other)
    want = desired(wanted("lab/chat", max_model_len=64), wanted("lab/other"))
    host = FakeHost(world=now, fails=lambda number, act: "exits" if number == 0 else "")
    assert applied(want, now, host).result == "restored"
    assert other.leader in {engine.leader for engine in host.world.engines}


def test_halt_leaves_things_as_they_are() -> None:
    now = world(running("lab/chat", 8001, 100))
    want = desired(wanted("lab/chat", max_model_len=64))
    host = FakeHost(world=now, fails=lambda number, act: "exits")
    outcome = applied(want, now, host, on_failure="halt")
    assert (outcome.result, outcome.restore, host.world.engines) == ("halted", None, ())


def test_continue_carries_out_what_does_not_wait_for_the_failure() -> None:
    now = world()
    want = desired(wanted("lab/a"), wanted("lab/b", depends_on=["lab/a"]), wanted("lab/c"))
    host = FakeHost(world=now, fails=lambda number, act: "exits" if str(act.engine) == "lab/a" else "")
    outcome = applied(want, now, host, on_failure="continue")
    assert outcome.result == "halted"
    assert [str(engine.id) for engine in host.world.engines] == ["lab/c"]


def test_a_policy_edit_of_a_failed_apply_is_taken_back() -> None:
    chat = running("lab/chat", 8001, 100, label="old")
    want = desired(wanted("lab/chat", label="new"), wanted("lab/bad"))
    host = FakeHost(world=world(chat), fails=lambda number, act: "exits")
    assert applied(want, world(chat), host).result == "restored"
    (engine,) = host.world.engines
    assert (engine.written, engine.leader) == (chat.written, chat.leader)


def test_the_journal_tells_the_plan_the_failure_the_restore_and_the_end() -> None:
    now = world(running("lab/chat", 8001, 100))
    want = desired(wanted("lab/chat", max_model_len=64))
    journal = MemoryJournal()
    host = FakeHost(world=now, fails=lambda number, act: "exits" if number == 0 else "")
    apply_plan(make_plan(want, now), want, now, host, journal, revision=(), pid=1)
    assert [entry.entry for entry in journal.entries] == [
        "plan_begun", "act_begun", "act_done", "act_begun", "act_failed",
        "restore_begun", "act_begun", "act_done", "plan_ended",
    ]  # fmt: skip
    begun, restored, ended = (journal.entries[index] for index in (0, 5, 8))
    assert isinstance(begun, PlanBegun)
    assert begun.acts == ("stop lab/chat pid 100", "start lab/chat port 8001")
    assert isinstance(restored, RestoreBegun)
    assert restored.acts == ("start lab/chat port 8001",)
    assert isinstance(ended, PlanEnded)
    assert ended.outcome == "restored"


def test_an_engine_that_drained_before_still_drains_after_a_restore() -> None:
    draining: Engine = replace(running("other/slow", 8901, 101, state="draining"), phase="draining")
    now = world(draining)
    want = desired(wanted("lab/bad"), prune_stacks=("lab",))
    host = FakeHost(world=now, fails=lambda number, act: "exits")
    assert applied(want, now, host).result == "restored"
    assert host.world.engines == (draining,)


# --- a signal that asks for an end, and a machine that is full --------------------------------------------------------


def test_an_interrupted_apply_puts_nothing_back_and_says_how_far_it_came() -> None:
    now = world(running("lab/chat", 8001, 100))
    want = desired(wanted("lab/chat", max_model_len=512), wanted("lab/next", depends_on=["lab/chat"]))
    plan = make_plan(want, now)
    host = FakeHost(world=now, stop=lambda host: 15 if host.starts else 0)
    journal = MemoryJournal()

    outcome = apply_plan(plan, want, now, host, journal, revision=(), pid=1)

    assert (outcome.result, outcome.stop_signal, outcome.done, outcome.restore) == ("interrupted", 15, 1, None)
    assert journal.entries[-1] == PlanEnded(at=journal.entries[-1].at, outcome="interrupted")
    assert not any(isinstance(entry, RestoreBegun) for entry in journal.entries)


def test_a_signal_while_it_is_put_back_ends_that_too() -> None:
    now = world(running("lab/chat", 8001, 100))
    want = desired(wanted("lab/chat", max_model_len=512))
    plan = make_plan(want, now)
    host = FakeHost(
        world=now,
        fails=lambda number, act: "exits" if number == 0 else "",
        stop=lambda host: 2 if host.starts == 2 else 0,
    )

    outcome = apply_plan(plan, want, now, host, MemoryJournal(), revision=(), pid=1)

    assert (outcome.result, outcome.stop_signal) == ("interrupted", 2)
    assert [failure.engine for failure in outcome.failures] == [the_id("lab/chat")]


def test_a_failure_of_the_machine_is_told_from_one_of_the_engine() -> None:
    now = world()
    want = desired(wanted("lab/chat"))
    full = FullHost(world=now)

    outcome = apply_plan(make_plan(want, now), want, now, full, MemoryJournal(), revision=(), pid=1)

    assert [(failure.environment, failure.why) for failure in outcome.failures] == [(True, "cannot write /state")]
    assert outcome.result == "restored"


class FullHost(FakeHost):
    """A machine on whose disk nothing can be written down."""

    def do(self, order: Order) -> Spawned | None:
        raise Environment("cannot write /state")


# --- not waiting ------------------------------------------------------------------------------------------------------


def test_without_waiting_only_what_others_depend_on_is_waited_for() -> None:
    starting = running("lab/base", 8001, 100, state="starting")
    now = world(starting, running("lab/slow", 8002, 101, state="starting"))
    want = desired(
        wanted("lab/base"),
        wanted("lab/slow"),
        wanted("lab/app", depends_on=["lab/base"]),
        wanted("lab/front", depends_on=["lab/app"]),
    )

    plan = make_plan(want, now, PlanOptions(waits=False))

    assert [task.engine for task in plan.awaited] == [the_id("lab/base")]
    waits = {act.engine.name: act.waits for act in plan.acts if isinstance(act, StartEngine)}
    assert waits == {"app": True, "front": False}
