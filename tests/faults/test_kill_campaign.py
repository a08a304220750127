"""P1: sage is killed at every failpoint and at random moments, while it starts, replaces, stops and puts back engines.

`make chaos` runs all of it (CHAOS=1); `make test` a tenth of the failpoints and 15 moments. docs/reliability.md has the
figures of the last whole run.
"""

import os
import random
import time
from collections.abc import Callable

import pytest

from sage_reconcile.world import failpoints
from tests.e2e import Place
from tests.faults.campaign import Campaign
from tests.forks import Forks

CHAOS = os.environ.get("CHAOS") == "1"
# Each share of a campaign is a test, so that two workers take turns.
SHARES = 8 if CHAOS else 2
MOMENTS = 200 if CHAOS else 16
EVERY = 1 if CHAOS else 10
SEED = int(os.environ.get("SEED", "1"))

# Failpoints that no apply or down of this campaign comes to, and where they are met instead.
ELSEWHERE = {
    "router": "tests/router and tests/faults/test_serving.py: only a router writes its file",
    "mended": "test_disk.py d4 and d5: only a damaged or long journal is written anew",
    "damaged": "test_disk.py d4 and d5",
    "log.copied": "test_logs.py: only a long log is cut",
    "log.cut": "test_logs.py",
    "footprints": "test_measured.py and world/test_footprint_files.py: only engines on GPUs are measured",
    "gate.abandoned": "test_ports.py n1: only a start that was refused at the gate",
}


@pytest.fixture
def campaign(place: Place, commands: Forks) -> Campaign:
    one = Campaign(place=place, forks=commands)
    one.swing()
    assert one.run(*one.apply).code == 0
    return one


def _swings(campaign: Campaign) -> tuple[str, ...]:
    campaign.swing()
    return campaign.apply


def _breaks(campaign: Campaign) -> tuple[str, ...]:
    campaign.break_one()
    return campaign.apply


def _goes(campaign: Campaign) -> tuple[str, ...]:
    return campaign.down


CHANGES: dict[str, Callable[[Campaign], tuple[str, ...]]] = {"swing": _swings, "break": _breaks, "down": _goes}


def _settle(campaign: Campaign, change: str) -> None:
    """Before the next kill the world is whole again, as the manifests of the last swing want it."""
    if change == "break":
        campaign.mend()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("change", CHANGES)
def test_p1_killed_at_a_failpoint_leaves_nothing_that_one_apply_does_not_put_right(
    campaign: Campaign, change: str, share: int
) -> None:
    places = _places(campaign, change)[share * EVERY :: SHARES * EVERY]
    killed = 0
    for name, number in places:
        words = CHANGES[change](campaign)
        when = f"{change} killed at {name}@{number}"
        ran = campaign.run(*words, **campaign.place.failing(f"{name}@{number}=kill"))

        # Which place comes how often differs a little from run to run: an engine may be asked once more.
        if ran.code == -9:
            killed += 1
            campaign.assert_sound_after_a_kill(when)
        _settle(campaign, change)
        campaign.assert_converges(when)
    assert killed > len(places) * 2 // 3, f"only {killed} of {len(places)} were kills"


def _places(campaign: Campaign, change: str) -> tuple[tuple[str, int], ...]:
    """The places that such a change comes to when nothing kills it."""
    words = CHANGES[change](campaign)
    campaign.run(*words, **campaign.place.failing())
    places = campaign.reached()
    _settle(campaign, change)
    campaign.assert_converges(change)
    return places


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("share", range(SHARES))
def test_p1_killed_at_a_random_moment_leaves_nothing_that_one_apply_does_not_put_right(
    campaign: Campaign, share: int
) -> None:
    rng = random.Random(SEED * 1000 + share)
    campaign.swing()
    whole_seconds = campaign.run(*campaign.apply).seconds
    killed = 0
    for number in range(MOMENTS // SHARES):
        change = rng.choice(["swing", "swing", "break", "down"])
        words = CHANGES[change](campaign)
        after_seconds = rng.uniform(0, whole_seconds)
        when = f"seed {SEED}, share {share}, kill {number}: {change} killed after {after_seconds:.4f} s"
        command = campaign.start(*words)
        time.sleep(after_seconds)  # The moment is what is tried: nothing announces it.
        command.kill()
        ran = command.wait()
        killed += ran.code == -9

        campaign.assert_sound_after_a_kill(when)
        _settle(campaign, change)
        campaign.assert_converges(when)
    assert killed > MOMENTS // SHARES // 3, "most of them were too late to be kills"


def test_p1_every_failpoint_is_come_to(campaign: Campaign) -> None:
    """A place that nobody comes to is one that nobody was killed at."""
    come_to: set[str] = set()
    for change in CHANGES:
        come_to |= {name for name, _ in _places(campaign, change)}

    left = {name for name in failpoints.NAMES if name not in come_to}
    unexplained = {name for name in left if name not in ELSEWHERE and name.partition(".")[0] not in ELSEWHERE}
    assert unexplained == set()
