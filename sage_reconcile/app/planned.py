"""A plan with what it was made from, and whoever is told of it. Values only: they load nothing that looks."""

from collections.abc import Callable
from dataclasses import dataclass

from sage_reconcile.core.desired import DesiredState
from sage_reconcile.core.observed import ObservedState
from sage_reconcile.core.plan import Plan
from sage_reconcile.drive.executor import Beat


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan with what it was made from."""

    plan: Plan
    desired: DesiredState
    observed: ObservedState


@dataclass(frozen=True, slots=True, kw_only=True)
class Watcher:
    """Whoever is told how an apply goes, and asked whether it may."""

    show: Callable[[Planned], None]
    # Asked once the plan was shown; True lets it be carried out.
    approve: Callable[[], bool]
    on_beat: Callable[[Beat], None]
    # Told the plan that puts things back.
    on_restore: Callable[[Plan], None]
    # Told a sentence about something that was found and did not stop anything.
    note: Callable[[str], None]
