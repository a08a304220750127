"""From paths to a desired state, and to the machine that it is for. Looks at nothing but manifests by itself."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sage_reconcile.core.desired import DesiredState
from sage_reconcile.core.identity import EngineId
from sage_reconcile.core.lookup import Lookup, lookup
from sage_reconcile.core.observed import ObservedState, project_engines
from sage_reconcile.core.snapshot import ManifestsPlace
from sage_reconcile.errors import InvalidManifests, Refused, Usage
from sage_reconcile.world import manifests
from sage_reconcile.world.footprint_files import FootprintFiles
from sage_reconcile.world.journal_file import AppliedRevisions
from sage_reconcile.world.records import Records, newer_state
from sage_reconcile.world.state import home, state_root, trusted_root

if TYPE_CHECKING:  # Else a plan that looks at no machine would load all that looks at one.
    from sage_reconcile.app.host import LocalHost

# The directory that is meant when no path is given.
DEFAULT_PATH = "manifests"


def load(
    paths: tuple[str, ...],
    project: str | None,
    environment: Mapping[str, str] = os.environ,
    place: ManifestsPlace | None = None,
) -> DesiredState:
    """What the manifests want. Raises InvalidManifests, and Usage when there is nothing to read.

    `place` is where they lie on the machine that they are for; None: where they lie here.
    """
    desired = manifests.load(
        default_paths(paths),
        project=project,
        home=place.home if place is not None else str(home(environment)),
        directory=place.source if place is not None else None,
    )
    if not desired.source.isprintable():
        raise InvalidManifests(
            f"cannot use {desired.source!r}: its name holds bytes that are no text", hint="rename it"
        )
    return desired


def default_paths(paths: tuple[str, ...]) -> tuple[str, ...]:
    """The paths, or `manifests/` where it exists. Raises Usage."""
    if paths:
        return paths
    if Path(DEFAULT_PATH).is_dir():
        return (DEFAULT_PATH,)
    raise Usage("no PATH is given, and there is no directory manifests/ here", hint="name a directory of manifests")


def load_if_there(paths: tuple[str, ...], project: str | None) -> tuple[DesiredState | None, str]:
    """What the manifests want, for a command that can do without; and why they are left out, if that is worth a note.

    Those that are named must be good: raises InvalidManifests.
    """
    if not paths and not Path(DEFAULT_PATH).is_dir():
        return None, ""
    try:
        return load(paths, project), ""
    except InvalidManifests:
        if paths:
            raise
        return None, f"{DEFAULT_PATH}/ is left out, because it is not valid: sage validate tells why"


def local_host(desired: DesiredState | None = None, environment: Mapping[str, str] = os.environ) -> "LocalHost":
    """This machine, ready to be asked about a desired state, or just looked at.

    Raises Environment when the state is not ours alone: it could name any process of ours as an engine.
    """
    from sage_reconcile.app.host import LocalHost

    root = trusted_root(state_root(environment))
    return LocalHost(root=root, lookup=lookup(desired) if desired else Lookup())


def refuse_newer_state(root: Path) -> None:
    """Raises NewerState: nothing is done without what a newer sage wrote down, and nothing is written over it."""
    found = (*Records(root).newer(), *AppliedRevisions(root).newer(), *FootprintFiles(root).newer())
    if found:
        raise newer_state(found[0])


def refuse_other_source(desired: DesiredState, observed: ObservedState, *, take_over: bool) -> None:
    """Two directories that claim one project would each prune the other's engines. Raises Refused."""
    in_scope = [
        engine
        for engine in project_engines(observed, desired.project)
        if desired.prune_stacks is None or engine.id.stack in desired.prune_stacks
    ]
    others = {engine.source for engine in in_scope} - {desired.source}
    if others and not take_over:
        raise Refused(
            f"cannot apply {desired.source}: project {desired.project} runs from {', '.join(sorted(others))}",
            hint="give one of them another project: in sage.yaml, or apply with --take-over",
        )
    renamed = {engine.id.project for engine in observed.engines if engine.source == desired.source} - {desired.project}
    if renamed:
        raise Refused(
            f"cannot apply {desired.source} as project {desired.project}: it runs as {', '.join(sorted(renamed))}",
            hint=f"stop that first: sage down -p {min(renamed)}, or keep the project's name",
        )


def revision(
    desired: DesiredState, observed: ObservedState, blocked: Iterable[EngineId] = ()
) -> tuple[tuple[EngineId, str], ...]:
    """All that the project runs once the desired state is applied: it, and the stacks that it does not speak of.

    Of what is blocked it is what was applied before, or runs all the same; what never ran is not remembered.
    """
    from sage_reconcile.core.compare import written

    left = set(blocked)
    mine = {wanted.id: written(wanted) for wanted in desired.wanted if wanted.id not in left}
    before = {fact.engine: fact.written for fact in observed.applied if fact.engine.project == desired.project}
    runs = {engine.id: engine.written for engine in observed.engines if engine.leader_alive}
    kept = {engine: text for engine, text in (runs | before).items() if engine in left}
    others = {
        engine: text
        for engine, text in before.items()
        if desired.prune_stacks is not None and engine.stack not in desired.prune_stacks
    }
    return tuple(sorted((others | mine | kept).items()))
