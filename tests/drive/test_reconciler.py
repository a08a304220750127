"""What an apply does when an act fails: every act of thirty plans, on a host in memory."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest

from sage_reconcile.core.desired import DesiredState
from sage_reconcile.core.journal import ActBegun, PlanBegun, PlanEnded, RestoreBegun
from sage_reconcile.core.observed import Engine, ObservedState
from sage_reconcile.core.orders import Order, Prove, Spawn, Spawned
from sage_reconcile.core.plan import Plan, PlanOptions, StartEngine, StopEngine
from sage_reconcile.core.planner import make_plan
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


# --- a journal that takes no line -------------------------------------------------------------------------------------


@dataclass
class RecordedHost(FakeHost):
    """A host that no start reaches but with a line of its own in the journal."""

    journal: MemoryJournal = field(default_factory=MemoryJournal)

    def do(self, order: Order) -> Spawned | None:
        if isinstance(order, Spawn):
            assert self.starts < begun_starts(self.journal), f"{order.act.engine} is started unrecorded"
        return super().do(order)


def begun_starts(journal: MemoryJournal) -> int:
    """How many starts the journal tells to have begun."""
    acts: tuple[str, ...] = ()
    begun = 0
    for entry in journal.entries:
        if isinstance(entry, PlanBegun | RestoreBegun):
            acts = entry.acts
        elif isinstance(entry, ActBegun):
            begun += acts[entry.act].startswith("start ")
    return begun


def applied_with(want: DesiredState, now: ObservedState, journal: MemoryJournal) -> tuple[Outcome, FakeHost]:
    host = RecordedHost(world=now, journal=journal)
    return apply_plan(make_plan(want, now), want, now, host, journal, revision=(), pid=1), host


def lines_of(want: DesiredState, now: ObservedState) -> int:
    """How many lines the journal has of an apply to which nothing happens."""
    journal = MemoryJournal()
    applied_with(want, now, journal)
    return len(journal.entries)


def test_whichever_line_is_refused_once_the_apply_is_done_or_the_world_is_as_before() -> None:
    results: Counter[str] = Counter()
    for want, now, _ in plans():
        lines = lines_of(want, now)
        for number in range(2, lines + 1):
            outcome, host = applied_with(want, now, MemoryJournal(refuses={number}))
            assert outcome.unwritten == "cannot write /journal: No space left on device"
            assert outcome.down == outcome.stopped == ()
            if outcome.result == "restored":
                assert ran(host.world) == ran(now)
            else:
                assert outcome.result == "converged"
                assert make_plan(want, host.world).acts == ()
            results[outcome.result] += 1
    # The end of the plan, and of the acts that end last, are all that is left to be written once everything is done.
    assert results["converged"] >= 2 * PLANS
    assert results["restored"] > 2 * PLANS


def test_where_the_journal_takes_no_line_any_more_it_says_which_engines_are_down_and_one_apply_heals_it() -> None:
    results: Counter[str] = Counter()
    for want, now, plan in plans():
        asked_to_stop = {act.engine for act in plan.acts} - {wish.id for wish in want.wanted}
        for number in range(2, lines_of(want, now) + 1):
            outcome, host = applied_with(want, now, MemoryJournal(refuses=range(number, 1000)))
            down = {engine.id for engine in now.engines if engine.leader_alive} - {
                engine.id for engine in host.world.engines
            }
            assert set(outcome.down) | set(outcome.stopped) == (set() if outcome.result == "converged" else down)
            assert set(outcome.stopped) <= asked_to_stop and not set(outcome.down) & asked_to_stop
            results[outcome.result] += 1

            again, host = applied_with(want, host.world, MemoryJournal())
            assert again.result == "converged"
            assert set(outcome.down) <= {engine.id for engine in host.world.engines}
    assert results["stuck"] > PLANS and results["restored"] >= PLANS


def test_an_apply_whose_first_line_is_refused_does_nothing() -> None:
    now = world(running("lab/chat", 8001, 100))
    host = FakeHost(world=now)
    want = desired(wanted("lab/chat", max_model_len=64))
    with pytest.raises(Environment):
        apply_plan(make_plan(want, now), want, now, host, MemoryJournal(refuses={1}), revision=(), pid=1)
    assert host.orders == []


def test_what_cannot_be_written_down_is_not_begun_and_nor_is_what_would_begin_beside_it() -> None:
    """The lines of a round are written before its first order, so that none is undone again for the other's sake."""
    now = world(running("lab/a", 8001, 100), running("lab/b", 8002, 101))
    want = desired(wanted("lab/a", max_model_len=64), wanted("lab/b", max_model_len=64))
    outcome, host = applied_with(want, now, MemoryJournal(refuses={3}))
    assert (outcome.result, host.orders) == ("restored", [])


def test_where_the_heading_of_what_is_put_back_is_refused_too_nothing_is_put_back() -> None:
    """Acts are told by their number in the plan of the last heading: without its own they would tell something else."""
    now = world(running("lab/chat", 8001, 100), running("lab/other", 8002, 101))
    want = desired(wanted("lab/chat", max_model_len=64), wanted("lab/other"))
    outcome, host = applied_with(want, now, MemoryJournal(refuses={4, 5}))
    assert (outcome.result, outcome.down, outcome.stopped) == ("stuck", (the_id("lab/chat"),), ())
    assert not any(isinstance(order, Spawn) for order in host.orders)


def test_halt_leaves_what_was_done_before_the_refused_line_and_says_what_is_down() -> None:
    now = world(running("lab/chat", 8001, 100), running("lab/old", 8002, 101))
    want = desired(wanted("lab/chat", max_model_len=64), wanted("lab/new"))
    journal = MemoryJournal(refuses={6})
    host = RecordedHost(world=now, journal=journal)
    plan = make_plan(want, now)
    outcome = apply_plan(plan, want, now, host, journal, revision=(), pid=1, on_failure="halt")
    assert (outcome.result, outcome.restore) == ("halted", None)
    assert [engine.id for engine in host.world.engines] == [the_id("lab/new")]
    assert (outcome.down, outcome.stopped) == ((the_id("lab/chat"),), (the_id("lab/old"),))


def test_a_proof_that_cannot_be_written_down_is_a_failure_that_is_put_back() -> None:
    now = world(running("lab/chat", 8001, 100))
    want = desired(wanted("lab/chat", max_model_len=64))
    refusals = iter(["cannot write /proof"])
    host = ForgetfulHost(world=now, refusals=refusals)
    outcome = applied(want, now, host)
    assert (outcome.result, outcome.unwritten) == ("restored", "cannot write /proof")
    assert ran(host.world) == ran(now)


@dataclass
class ForgetfulHost(FakeHost):
    """A machine on which the first looks after a proof, as many as there are refusals, cannot write it down."""

    refusals: Iterator[str] = iter(())

    def look(self) -> ObservedState:
        seen = super().look()
        if any(isinstance(order, Prove) for order in self.orders):
            for why in self.refusals:
                proved = next(order.leader for order in self.orders if isinstance(order, Prove))
                self._change(proved, proved=False, state="starting")
                raise Environment(why)
        return seen


def test_a_second_signal_is_told_although_the_end_cannot_be_written_down() -> None:
    now = world(running("lab/chat", 8001, 100))
    want = desired(wanted("lab/chat", max_model_len=512))

    def leave(host: FakeHost) -> int:
        raise KeyboardInterrupt

    host = FakeHost(world=now, stop=leave)
    with pytest.raises(KeyboardInterrupt):
        apply_plan(make_plan(want, now), want, now, host, MemoryJournal(refuses={2}), revision=(), pid=1)


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
