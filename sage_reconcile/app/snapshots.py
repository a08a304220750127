"""Snapshots: one is taken of this machine, and plans are made from one of any machine.

A plan from a snapshot looks at the manifests and the snapshot, and at nothing else of the machine that it is made on:
what looks is loaded only to take one.
"""

import os

from sage_reconcile.app.planned import Planned
from sage_reconcile.app.project import load, load_if_there, refuse_other_source
from sage_reconcile.core.lookup import Lookup, lookup, seen_for
from sage_reconcile.core.observed import ObservedState
from sage_reconcile.core.plan import PlanOptions
from sage_reconcile.core.quantities import HIGHEST_PORT, LOWEST_PORT
from sage_reconcile.core.snapshot import ManifestsPlace, Snapshot, parse_snapshot, snapshot_json
from sage_reconcile.drive.reconciler import sound_plan
from sage_reconcile.errors import InvalidManifests, NewerState
from sage_reconcile.world.snapshot_file import snapshot_bytes
from sage_reconcile.world.state import home


def take(paths: tuple[str, ...], project: str | None) -> tuple[str, str]:
    """The JSON of one look that answers all that a plan for these manifests asks, and a note; "" for none."""
    from sage_reconcile.app.project import local_host

    desired, note = load_if_there(paths, project)
    host = local_host()
    asked = lookup(desired) if desired is not None else Lookup()
    # All ports: which of them are asked about may change in the manifests.
    every_port = frozenset(range(LOWEST_PORT, HIGHEST_PORT + 1))
    host.lookup = Lookup(programs=asked.programs, models=asked.models, ports=every_port)
    place = ManifestsPlace(source=desired.source, home=str(home(os.environ))) if desired is not None else None
    return snapshot_json(Snapshot(observed=host.look(), manifests=place)), note


def plan(paths: tuple[str, ...], file: str, *, project: str | None, options: PlanOptions) -> Planned:
    """The plan that the machine of the snapshot in `file` would have made when it was taken.

    Raises InvalidManifests for manifests or a snapshot that cannot be read, NewerState, Refused.
    """
    snapshot = _read(file)
    desired = load(paths, project, place=snapshot.manifests)
    observed = seen_for(desired, snapshot.observed)
    _refuse_newer_state(observed)
    # Without a place, nothing says which directory of that machine these manifests are.
    if snapshot.manifests is not None:
        refuse_other_source(desired, observed, take_over=options.take_over)
    return Planned(plan=sound_plan(desired, observed, options), desired=desired, observed=observed)


def _read(file: str) -> Snapshot:
    try:
        return parse_snapshot(snapshot_bytes(file))
    except ValueError as error:
        hint = "take it anew there, with this version of sage: sage snapshot PATH --out FILE"
        raise InvalidManifests(f"cannot use the snapshot {file}: {error}", hint=hint) from error


def _refuse_newer_state(observed: ObservedState) -> None:
    gap = next((gap for gap in observed.gaps if gap.what == "state"), None)
    if gap is not None:
        raise NewerState(f"cannot plan for {observed.node}: {gap.why}, and this one does not know its format")
