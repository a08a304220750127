"""How acts are carried out: the stop ladder, draining, overlap, and the order of signals. On a clock of its own."""

from dataclasses import replace

from sage_reconcile.core.facts import RouterFact
from sage_reconcile.core.observed import Device, ObservedState
from sage_reconcile.core.orders import Kill, Mark, Prove, Spawn, Terminate
from sage_reconcile.core.plan import Plan
from sage_reconcile.core.planner import make_plan
from sage_reconcile.core.progress import advance, begin
from sage_reconcile.drive.executor import execute
from tests.builders import desired, leaderless, running, wanted, world
from tests.fakes import FakeHost, MemoryJournal


def carried_out(plan: Plan, host: FakeHost) -> list[str]:
    execute(plan, host, MemoryJournal())
    return [type(order).__name__ for order in host.orders]


def test_a_stop_marks_asks_and_is_done_once_the_engine_is_gone() -> None:
    now = world(running("lab/chat", 8001, 100))
    host = FakeHost(world=now)
    assert carried_out(make_plan(desired(), now), host) == ["Mark", "Terminate"]
    assert host.orders[0] == Mark(engine=now.engines[0].id, leader=now.engines[0].leader, phase="stopping")


def test_an_engine_that_swallows_sigterm_is_asked_again_and_killed_after_its_grace() -> None:
    now = world(running("lab/chat", 8001, 100, update={"grace": "8s"}))
    host = FakeHost(world=now, deaf=frozenset({"lab/chat"}))
    orders = carried_out(make_plan(desired(), now), host)
    assert orders == ["Mark", "Terminate", "Terminate", "Terminate", "Terminate", "Kill"]
    assert 8.0 <= host.time < 10.0


def test_the_leader_alone_is_asked_and_all_members_are_killed() -> None:
    engine = running("lab/chat", 8001, 100, update={"grace": "1s"})
    child = replace(engine.leader, pid=101)
    now = world(replace(engine, members=(engine.leader, child)))
    host = FakeHost(world=now, deaf=frozenset({"lab/chat"}))
    carried_out(make_plan(desired(), now), host)
    asked = [order.processes for order in host.orders if isinstance(order, Terminate)]
    killed = [order.processes for order in host.orders if isinstance(order, Kill)]
    assert set(asked) == {(engine.leader,)}
    assert killed == [(engine.leader, child)]


def test_what_a_dead_leader_left_behind_is_asked_itself() -> None:
    engine = leaderless(running("lab/chat", 8001, 100), child_pid=555)
    now = world(engine)
    host = FakeHost(world=now)
    carried_out(make_plan(desired(wanted("lab/chat")), now), host)
    (asked,) = [order for order in host.orders if isinstance(order, Terminate)]
    assert asked.processes == engine.members


def test_a_stop_waits_until_every_router_has_let_go_and_carries_nothing() -> None:
    engine = running("lab/chat", 8001, 100)
    busy = RouterFact(pid=1, drained_from=(engine.leader,), in_flight=((engine.leader, 1),))
    now = replace(world(engine), routers=(busy, RouterFact(pid=2)))
    host = FakeHost(world=now)

    def routers_let_go(seen: ObservedState) -> None:
        if host.time >= 3:
            idle = RouterFact(pid=1, drained_from=(engine.leader,))
            host.world = replace(seen, routers=(idle, RouterFact(pid=2, drained_from=(engine.leader,))))

    host.on_look = routers_let_go
    carried_out(make_plan(desired(), now), host)
    phases = [order.phase for order in host.orders if isinstance(order, Mark)]
    assert phases == ["draining", "stopping"]
    assert 3.0 <= host.time < 5.0


def test_a_stop_whose_gpu_is_not_seen_any_more_fails_because_of_that() -> None:
    gpu = Device(node="box", index=0, uuid="GPU-a", name="H100", total_bytes=80 * 1024**3)
    engine = running("lab/chat", 8001, 100)
    place = replace(engine.resolved.placement, devices=("GPU-a",), device_indexes=(0,))
    now = replace(world(replace(engine, resolved=replace(engine.resolved, placement=place))), devices=(gpu,))
    plan = make_plan(desired(), now)
    progress, _ = advance(plan, begin(plan), now, 0.0)
    ended = replace(now, engines=(), listeners=(), devices=())
    progress, _ = advance(plan, progress, ended, 1.0)
    assert progress.entries[0].phase == "freeing"

    progress, _ = advance(plan, progress, ended, 100.0)

    (entry,) = progress.entries
    assert (entry.phase, entry.unseen) == ("failed", True)


def test_draining_ends_with_its_limit() -> None:
    engine = running("lab/chat", 8001, 100, update={"drain": "5s"})
    now = replace(world(engine), routers=(RouterFact(pid=2),))
    host = FakeHost(world=now)
    carried_out(make_plan(desired(), now), host)
    assert 5.0 <= host.time < 7.0
    assert host.world.engines == ()


def test_engines_that_do_not_depend_on_each_other_load_side_by_side() -> None:
    host = FakeHost(world=world(), load_seconds=100.0)
    plan = make_plan(desired(wanted("lab/a"), wanted("lab/b"), wanted("lab/c")), host.world)
    execute(plan, host, MemoryJournal())
    assert host.time < 150.0


def test_a_dependent_is_spawned_only_after_its_dependency_was_proved() -> None:
    host = FakeHost(world=world())
    plan = make_plan(desired(wanted("lab/app", depends_on=["lab/base"]), wanted("lab/base")), host.world)
    execute(plan, host, MemoryJournal())
    told = [(type(order).__name__, str(getattr(order, "engine", None) or order.act.engine)) for order in host.orders
            if isinstance(order, Spawn | Prove)]  # fmt: skip
    assert told == [("Spawn", "lab/base"), ("Prove", "lab/base"), ("Spawn", "lab/app"), ("Prove", "lab/app")]


def test_an_engine_that_starts_already_is_waited_for_and_not_touched() -> None:
    engine = running("lab/chat", 8001, 100, state="starting")
    now = world(engine)
    plan = make_plan(desired(wanted("lab/chat")), now)
    assert plan.acts == ()
    host = FakeHost(world=now, load_seconds=4.0)
    execute(plan, host, MemoryJournal())
    assert host.world.engines[0].state == "ready"
    assert [type(order).__name__ for order in host.orders] == ["Prove"]


def test_after_a_line_that_is_refused_a_stop_is_seen_through_and_nothing_begins() -> None:
    now = world(running("lab/deaf", 8001, 100, update={"grace": "2s"}), running("lab/quick", 8002, 101))
    plan = make_plan(desired(wanted("lab/deaf", max_model_len=64), wanted("lab/quick", max_model_len=64)), now)
    host = FakeHost(world=now, deaf=frozenset({"lab/deaf"}))
    journal = MemoryJournal(refuses={3})
    done = execute(plan, host, journal)
    # The refused line is that of the end of the quick one's stop; the start that would follow has none either.
    assert [entry.entry for entry in journal.entries] == ["act_begun", "act_begun", "act_begun", "act_done"]
    assert (done.progress.unwritten, done.failures) == ("cannot write /journal: No space left on device", ())
    assert host.world.engines == ()


# --- a signal that asks for an end ------------------------------------------------------------------------------------


def test_after_a_signal_no_further_order_is_given_at_whatever_round_it_comes() -> None:
    """Every number of rounds: what was begun stays as it is, and the next plan goes on from there."""
    before = world(running("lab/old", 8001, 100), running("lab/chat", 8002, 101))
    want = desired(wanted("lab/chat", max_model_len=512), wanted("lab/new", depends_on=["lab/chat"]))
    plan = make_plan(want, before)
    whole = FakeHost(world=before)
    execute(plan, whole, MemoryJournal())
    for rounds in range(20):
        asked = 0

        def comes(host: FakeHost, rounds: int = rounds) -> int:
            nonlocal asked
            asked += 1
            return 2 if asked > rounds else 0

        host = FakeHost(world=before, stop=comes)
        done = execute(plan, host, MemoryJournal())

        assert host.orders == whole.orders[: len(host.orders)]
        assert done.stop_signal == (2 if len(host.orders) < len(whole.orders) or asked > rounds else 0)
        assert rounds > 0 or host.orders == []
        rest = FakeHost(world=host.look())
        execute(make_plan(want, rest.world), rest, MemoryJournal())
        assert make_plan(want, rest.world).acts == ()
        assert len({engine.id for engine in rest.world.engines}) == len(rest.world.engines) == 2
