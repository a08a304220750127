"""One look asks twice when its answers do not fit together."""

from dataclasses import dataclass, field

import pytest

from sage_reconcile.core.facts import Facts, HealthFact
from sage_reconcile.core.observed import Engine
from sage_reconcile.drive.observer import observe
from tests.core.test_observed import facts, healthy, leader, own_port, proved


@dataclass(kw_only=True)
class Doors:
    """What the machine shows, look by look, and what its engine says."""

    shown: list[Facts]
    health: str
    looks: int = field(default=0)

    def facts(self) -> Facts:
        self.looks += 1
        return self.shown[min(self.looks, len(self.shown)) - 1]

    def healths(self, engines: tuple[Engine, ...]) -> tuple[HealthFact, ...]:
        return (healthy(self.health),)


RUNS = facts(leader(), listeners=(own_port(100),), records=(proved(),))


@pytest.mark.parametrize("health", ["refused", "broken"])
def test_an_engine_that_ended_before_it_answered_is_gone_and_not_unwell(health: str) -> None:
    doors = Doors(shown=[RUNS, facts(records=(proved(),))], health=health)
    assert observe(doors).engines == ()


def test_an_engine_that_answers_is_looked_at_once() -> None:
    doors = Doors(shown=[RUNS], health="ok")
    assert [engine.state for engine in observe(doors).engines] == ["ready"]
    assert doors.looks == 1
