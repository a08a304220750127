"""Seeded random worlds: the bad things that never happen, whatever runs and whatever is wanted."""

import json
import os
import random
from dataclasses import replace

import pytest

from sage_reconcile.core.audit import audit
from sage_reconcile.core.desired import DesiredState, Wanted
from sage_reconcile.core.observed import Engine, ObservedState, observed_json, parse_observed
from sage_reconcile.core.plan import Plan, PlanOptions, StopEngine, after
from sage_reconcile.core.planner import make_plan, restore_target
from sage_reconcile.drive.reconciler import apply_plan
from tests.builders import desired, foreign_listener, leaderless, record, running, wanted, world
from tests.fakes import FakeHost, MemoryJournal

# How many worlds each property sees. A longer run: WORLDS=100000 pytest tests/core/test_worlds.py.
WORLDS = int(os.environ.get("WORLDS", "600"))

PORTS = (8001, 8901, 8002, 8900, 8902)
NAMES = ("lab/a", "lab/b", "lab/c", "lab/d", "other/e", "other/e#1")


def random_world(rng: random.Random) -> ObservedState:
    engines: list[Engine] = []
    ports = rng.sample(PORTS, len(PORTS))
    for number, name in enumerate(rng.sample(NAMES, rng.randrange(len(NAMES)))):
        if not ports:
            break
        engine = running(
            name,
            ports.pop(),
            100 + number,
            project=rng.choice(["lab"] * 5 + ["elsewhere"]),
            state=rng.choice(["ready"] * 4 + ["starting", "unready", "draining"]),
            **random_fields(rng),
        )
        if engine.state == "draining":
            engine = replace(engine, phase=rng.choice(["draining", "stopping"]))
        if rng.random() < 0.1:
            engine = leaderless(engine, 500 + number)
        engines.append(engine)
        if rng.random() < 0.05 and ports:
            engines.append(replace(running(name, ports.pop(), 200 + number), id=engine.id))
    foreign = tuple(foreign_listener(port, 900 + port) for port in ports if rng.random() < 0.2)
    records = tuple(record(engine) for engine in engines if rng.random() < 0.7)
    return world(*engines, listeners=foreign, records=records)


def random_fields(rng: random.Random) -> dict[str, object]:
    fields: dict[str, object] = {}
    if rng.random() < 0.3:
        fields["max_model_len"] = rng.choice([512, 1024])
    if rng.random() < 0.3:
        fields["label"] = rng.choice(["one", "two"])
    if rng.random() < 0.1:
        fields["args"] = [rng.choice(["--x", "--y"])]
    return fields


def random_desired(rng: random.Random) -> DesiredState:
    names = sorted(rng.sample(NAMES, rng.randrange(len(NAMES))))
    fixed = rng.sample(PORTS, len(PORTS))
    engines: list[Wanted] = []
    for number, name in enumerate(names):
        fields = random_fields(rng)
        if rng.random() < 0.35 and fixed:
            fields["port"] = fixed.pop()
        if rng.random() < 0.05:
            fields["use_gpu"] = True
        earlier = sorted({entry.split("#")[0] for entry in names[:number]} - {name.split("#")[0]})
        if earlier and rng.random() < 0.25:
            fields["depends_on"] = [rng.choice(earlier)]
        engines.append(wanted(name, **fields))
    scope = rng.choice([None, None, None, ("lab",)])
    if scope is not None:
        engines = [engine for engine in engines if engine.id.stack == "lab"]
    return desired(*engines, prune_stacks=scope)


def worlds() -> list[int]:
    return list(range(WORLDS))


def case(seed: int) -> tuple[random.Random, DesiredState, ObservedState]:
    rng = random.Random(seed)
    return rng, random_desired(rng), random_world(rng)


def carried_out(plan: Plan, observed: ObservedState) -> ObservedState:
    for act in plan.acts:
        observed = after(act, observed)
    return observed


def test_no_prefix_of_a_plan_breaks_a_law() -> None:
    for seed in worlds():
        _, want, now = case(seed)
        assert audit(make_plan(want, now), want, now) == (), f"seed {seed}"


def test_nothing_is_left_to_do_after_a_plan() -> None:
    for seed in worlds():
        _, want, now = case(seed)
        plan = make_plan(want, now)
        rest = make_plan(want, carried_out(plan, now))
        assert rest.acts == (), f"seed {seed}"
        assert {blocked.engine for blocked in rest.blocked} == {blocked.engine for blocked in plan.blocked}, (
            f"seed {seed}"
        )


def test_no_order_that_the_plan_allows_shares_a_port_or_runs_an_engine_twice() -> None:
    for seed in worlds():
        rng, want, now = case(seed)
        plan = make_plan(want, now)
        done: set[int] = set()
        seen = now
        while len(done) < len(plan.acts):
            free = [i for i, act in enumerate(plan.acts) if i not in done and set(act.after) <= done]
            index = rng.choice(free)
            seen = after(plan.acts[index], seen)
            done.add(index)
            known = {engine.leader for engine in now.engines}
            started = [engine for engine in seen.engines if engine.leader not in known]
            ports = [engine.resolved.placement.port for engine in seen.engines]
            assert all(ports.count(engine.resolved.placement.port) == 1 for engine in started), f"seed {seed}"
            ids = [engine.id for engine in seen.engines]
            assert all(ids.count(engine.id) == 1 for engine in started), f"seed {seed}"


def test_the_order_of_facts_and_files_never_changes_a_plan() -> None:
    for seed in worlds():
        rng, want, now = case(seed)
        shuffled = replace(
            now,
            engines=tuple(rng.sample(now.engines, len(now.engines))),
            listeners=tuple(rng.sample(now.listeners, len(now.listeners))),
            records=tuple(rng.sample(now.records, len(now.records))),
        )
        other = replace(want, wanted=tuple(rng.sample(want.wanted, len(want.wanted))))
        assert make_plan(other, shuffled) == make_plan(want, now), f"seed {seed}"


def test_another_project_and_foreign_listeners_are_never_touched() -> None:
    for seed in worlds():
        _, want, now = case(seed)
        plan = make_plan(want, now)
        assert all(act.engine.project == "lab" for act in plan.acts), f"seed {seed}"
        end = carried_out(plan, now)
        assert [listener for listener in end.listeners if listener.engine is None] == [
            listener for listener in now.listeners if listener.engine is None
        ], f"seed {seed}"
        assert [engine for engine in end.engines if engine.id.project != "lab"] == [
            engine for engine in now.engines if engine.id.project != "lab"
        ], f"seed {seed}"


def test_an_engine_without_a_home_for_its_successor_is_never_stopped() -> None:
    for seed in worlds():
        _, want, now = case(seed)
        plan = make_plan(want, now)
        blocked = {entry.engine for entry in plan.blocked}
        stopped = {act.engine for act in plan.acts if isinstance(act, StopEngine)}
        assert not blocked & stopped, f"seed {seed}"


def test_a_world_survives_its_json_form() -> None:
    for seed in worlds()[:200]:
        _, _, now = case(seed)
        assert parse_observed(observed_json(now)) == now, f"seed {seed}"


def alike(engine: Engine) -> tuple[object, ...]:
    """What must be the same about an engine that was put back."""
    return engine.id, json.loads(engine.written), engine.resolved, engine.source


@pytest.mark.parametrize("how", ["refused", "exits", "hangs"])
def test_a_failed_apply_restores_every_engine_that_ran(how: str) -> None:
    failed = 0
    for seed in worlds():
        rng, want, now = case(seed)
        plan = make_plan(want, now)
        starts = sum(hasattr(act, "resolved") for act in plan.acts)
        if plan.blocked or not starts:
            continue
        failing = rng.randrange(starts)
        host = FakeHost(world=now, fails=lambda number, act, failing=failing: how if number == failing else "")
        outcome = apply_plan(plan, want, now, host, MemoryJournal(), revision=(), pid=1)
        assert outcome.result == "restored", f"seed {seed}: {outcome.restore_failures}"
        failed += 1
        lives = [engine for engine in now.engines if engine.leader_alive]
        newest = {engine.id: engine for engine in lives}
        for engine in lives:
            assert sum(alike(engine)[0] == found.id for found in host.world.engines) == 1 or (
                engine.id.project != "lab"
            ), f"seed {seed}"
        for the_id, engine in newest.items():
            if sum(found.id == the_id for found in now.engines) > 1:
                continue  # Of two processes of one engine, either may be the one that is kept.
            found = next(found for found in host.world.engines if found.id == the_id)
            assert alike(found) == alike(engine), f"seed {seed}"
        touched = {act.engine for act in plan.acts}
        for engine in newest.values():
            # Of two processes of one engine, the leftover is ended sooner or later.
            if engine.id not in touched and sum(found.id == engine.id for found in lives) == 1:
                assert any(found.leader == engine.leader for found in host.world.engines), f"seed {seed}"
    assert failed > WORLDS / 5


def test_restoring_again_after_a_restore_gives_no_steps() -> None:
    for seed in worlds()[:500]:
        _, want, now = case(seed)
        target = restore_target(now, make_plan(want, now), want)
        plan = make_plan(target, now, PlanOptions(restoring=True))
        rest = make_plan(target, carried_out(plan, now), PlanOptions(restoring=True))
        assert rest.acts == (), f"seed {seed}"


def test_both_processes_of_an_engine_that_runs_twice_on_one_port_can_be_stopped() -> None:
    """2026-11-25: `sage down` ended with 1, because the audit let no two stops on one port overlap."""
    first = running("lab/a", 8001, 100)
    twin = replace(running("lab/a", 8001, 200), id=first.id)
    now, nothing = world(first, twin), desired()
    plan = make_plan(nothing, now)
    assert [type(act) for act in plan.acts] == [StopEngine, StopEngine]
    assert audit(plan, nothing, now) == ()
