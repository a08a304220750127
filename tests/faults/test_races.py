"""Several at once, and the same again and again: one winner of every race, and nothing left after any number of turns.

`make chaos` runs 200 races of 8 and 1,000 cycles (CHAOS=1); `make test` a few of each.
"""

import os
import subprocess
import sys

import pytest

from tests.e2e import Place, fake
from tests.fakenvml import Gpu
from tests.faults.campaign import Campaign
from tests.forks import Forks
from tests.oracle import environment, labelled

CHAOS = os.environ.get("CHAOS") == "1"
RACES = 200 if CHAOS else 3
RACERS = 8
CYCLES = 1000 if CHAOS else 5
GPU_CYCLES = 1000 if CHAOS else 30
PROJECTS = 10 if CHAOS else 1


@pytest.mark.timeout(7200)
def test_p20_of_eight_applies_at_once_one_works_and_seven_name_it(place: Place, commands: Forks) -> None:
    campaign = Campaign(place=place, forks=commands)
    # The winner has the lock as long as its engine loads, so that nobody comes too late for the race.
    place.write(fake("chat", "--ready-after", "0.5"), fake("embed", kind="embedding"))
    for race in range(RACES):
        runs = [campaign.start(*campaign.apply) for _ in range(RACERS)]
        pids = [command.pid for command in runs]
        ended = [command.wait() for command in runs]

        codes = sorted(ran.code for ran in ended)
        assert codes == [0] + [8] * (RACERS - 1), f"race {race}: {codes}: {[ran.stderr for ran in ended]}"
        winner = pids[next(number for number, ran in enumerate(ended) if ran.code == 0)]
        losers = [ran for ran in ended if ran.code == 8]
        assert all(f"pid {winner} " in ran.stderr for ran in losers), f"race {race}: {losers}"
        # Under a second each; here eight of them share what cores there are.
        told = [command.told_after_seconds() for command, ran in zip(runs, ended, strict=True) if ran.code == 8]
        assert max(told) < 1.0, f"race {race}: {told}"
        leaders = {process.engine: process.leader for process in labelled(place.root)}
        assert len(labelled(place.root)) == len(leaders) == 2, f"race {race}: {leaders}"
        assert campaign.run(*campaign.down).code == 0
    place.assert_nothing_left()


@pytest.mark.timeout(7200)
def test_p20_applies_of_two_projects_and_a_loop_like_watch_take_turns(place: Place, commands: Forks) -> None:
    other = place.root / "other" / "manifests"
    other.mkdir(parents=True)
    pool = f"{place.ports[4]}-{place.ports[7]}"
    (other / "sage.yaml").write_text(f'{{"project": "{place.project}-b", "ports": {{"llm": "{pool}"}}}}')
    place.write(fake("chat"))
    place.write(fake("chat"), directory=other)
    campaign = Campaign(place=place, forks=commands)
    for turn in range(PROJECTS * 3):
        words = [("apply", str(directory), "-y", "--lock-timeout", "30s") for directory in (place.manifests, other)]
        codes = [command.wait().code for command in [campaign.start(*each) for each in words * 2]]

        assert codes == [0] * 4, f"turn {turn}"
        assert len(labelled(place.root)) == 2, f"turn {turn}"
    assert campaign.run("down", "-p", f"{place.project}-b", "-y").code == 0
    place.assert_at_rest(again=True)


PROGRAM = r"""
import difflib, os, re, sys, threading, time
from pathlib import Path
from sage_reconcile.app.project import local_host
from sage_reconcile.app.verbs import ApplyOptions, Watcher, apply, down
from sage_reconcile.render.plan_text import plan_text

manifests, state, cycles = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
plans = []
watcher = Watcher(
    show=lambda planned: plans.append(plan_text(planned.plan, planned.observed)),
    approve=lambda: True,
    on_beat=lambda beat: None,
    on_restore=lambda plan: None,
    note=print,
)

def held():
    # A question that was asked in the background may take a moment to come to its end.
    deadline = time.monotonic() + 10
    while threading.active_count() > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    files = sorted(str(path.relative_to(state)) for path in state.rglob("*"))
    # Without numbers: a pid is told with four digits or with five.
    sizes = sum(len(re.sub(rb"[0-9]+", b"", path.read_bytes())) for path in state.rglob("*.log*"))
    return len(os.listdir("/proc/self/fd")), threading.active_count(), files, sizes

def cycle(host):
    plans.clear()
    applied = apply((manifests,), watcher, ApplyOptions(), project=None, host=host)
    assert applied.result == "converged", (applied.failures, applied.plan.notes)
    (outcome,) = down((manifests,), (), watcher, project=None, everything=False, host=host)
    assert outcome.result == "converged", (outcome.failures, outcome.plan.notes)
    return tuple(plans)

host = local_host()
cycle(host)
first, before = cycle(host), held()
last = first
for _ in range(cycles - 2):
    last = cycle(host)
difference = [*difflib.unified_diff("".join(first).splitlines(), "".join(last).splitlines(), lineterm="", n=0)]
print("plans are the same:", first == last, difference)
print("held before and after:", before == held(), before, held())
"""


@pytest.mark.timeout(7200)
def test_a_process_that_starts_and_stops_engines_again_and_again_keeps_nothing(place: Place) -> None:
    place.write(fake("chat"), fake("embed", kind="embedding"))
    assert_keeps_nothing(place, CYCLES)


@pytest.mark.timeout(7200)
def test_a_process_that_starts_and_stops_gpu_engines_again_and_again_leaves_the_gpus_as_they_were(place: Place) -> None:
    """They hold memory of two GPUs, and a stranger holds some all the time."""
    place.gpus(Gpu(index=0), Gpu(index=1))
    place.write(place.gpu_fake("chat", mib=20000), place.gpu_fake("embed", mib=5000, kind="embedding"))
    with place.foreign_on(0, 60000, seconds=7200):
        assert_keeps_nothing(place, GPU_CYCLES)

        assert (place.used_mib(0), place.used_mib(1)) == (60000, 0)


def assert_keeps_nothing(place: Place, cycles: int) -> None:
    """Start and stop what the manifests want so often, in one process: it plans, and holds, in the end as at first."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(place.manifests), str(place.state), str(cycles)],
        env=environment(place.state),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    plans, held = done.stdout.splitlines()
    assert plans == "plans are the same: True []"
    assert held.startswith("held before and after: True"), held
    place.assert_nothing_left()
