"""Asks every door of the machine once, in an order in which each question knows what to ask, and assembles the answers.

The doors are stated here as what is needed of them; who stands behind them is app's business.
"""

from dataclasses import replace
from typing import Protocol

from sage_reconcile.core.assembly import assemble
from sage_reconcile.core.facts import Facts, HealthFact
from sage_reconcile.core.observed import Engine, ObservedState


class Doors(Protocol):
    """Where facts come from."""

    def facts(self) -> Facts:
        """Everything but what engines say of themselves."""

    def healths(self, engines: tuple[Engine, ...]) -> tuple[HealthFact, ...]:
        """What these engines say, as far as it is known by now."""


def observe(doors: Doors) -> ObservedState:
    """One look. Engines are asked only once it is known which there are, and only those that hold their own port."""
    facts = doors.facts()
    unasked = assemble(facts)
    answering = tuple(
        engine
        for engine in unasked.engines
        if engine.leader_alive and engine.resolved.placement.port in engine.listens_on and not engine.intruder
    )
    if not answering:
        return unasked
    healths = doors.healths(answering)
    if any(fact.health in ("refused", "broken") for fact in healths):
        # It listened when it was seen, and hung up: what ended since is gone, and not unwell.
        facts = doors.facts()
    return assemble(replace(facts, healths=healths))
