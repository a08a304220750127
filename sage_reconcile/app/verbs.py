"""plan, apply and down: load, look, plan, ask, do."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from sage_reconcile.app.host import LocalHost
from sage_reconcile.app.planned import Planned, Watcher
from sage_reconcile.app.project import (
    load,
    local_host,
    refuse_newer_state,
    refuse_other_source,
    revision,
)
from sage_reconcile.core.desired import DesiredState
from sage_reconcile.core.device_notes import unproved
from sage_reconcile.core.identity import EngineId
from sage_reconcile.core.lookup import lookup
from sage_reconcile.core.observed import ObservedState, pids_not_given_back, project_engines
from sage_reconcile.core.plan import PlanOptions, StartEngine
from sage_reconcile.drive.reconciler import Outcome, apply_plan, sound_plan
from sage_reconcile.errors import Environment, InvalidManifests, Refused, Usage
from sage_reconcile.world.footprint_files import FootprintFiles
from sage_reconcile.world.journal_file import JournalFile
from sage_reconcile.world.lock import lock_paths, locked
from sage_reconcile.world.records import Records
from sage_reconcile.world.state import check_writable

# How long a look waits for answers while a plan is carried out: the next look comes soon.
_LOOP_ANSWER_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyOptions:
    """What the command line says about how an apply goes."""

    prune: bool = True
    allow_empty: bool = False
    take_over: bool = False
    # rollback | halt | continue
    on_failure: str = "rollback"
    # Replaces every engine's ready.timeout; None keeps them.
    ready_seconds: float | None = None
    lock_seconds: float = 0.0
    waits: bool = True
    allow_moves: bool = False
    # Only the plan is wanted; nothing is asked and nothing done.
    dry_run: bool = False
    # The port of the router that comes with it; None leaves it to the manifests.
    router_port: int | None = None

    @property
    def for_plan(self) -> PlanOptions:
        """What of it the plan depends on."""
        return PlanOptions(
            prune=self.prune,
            take_over=self.take_over,
            ready_seconds=self.ready_seconds,
            waits=self.waits,
            allow_moves=self.allow_moves,
            only_shown=self.dry_run,
        )


def plan(paths: tuple[str, ...], *, project: str | None, options: PlanOptions) -> Planned:
    """What `apply` would do now. Touches nothing. Raises Refused for another source, NewerState."""
    desired, host = load(paths, project), local_host()
    refuse_newer_state(host.root)
    return _planned(desired, host, options)


def apply(
    paths: tuple[str, ...], watcher: Watcher, options: ApplyOptions, *, project: str | None, host: LocalHost
) -> Outcome | Planned:
    """Make it so, or put back what was there.

    A plan with something blocked is returned instead, and nothing done; so is that of a dry run. Raises Refused without
    approval, for an empty directory, and for another source; Locked; Environment; NewerState.
    """
    desired = load(paths, project)
    if options.router_port is not None:
        desired = replace(desired, router=desired.router.model_copy(update={"port": options.router_port}))
    if not desired.wanted and not options.allow_empty:
        raise Refused(
            f"cannot apply {desired.source}: it wants no engines, so all of project {desired.project} would be stopped",
            hint="if that is meant: sage down, or --allow-empty",
        )
    if options.dry_run:
        refuse_newer_state(host.root)
        return _planned(desired, host, options.for_plan)
    with locked(lock_paths(os.environ), purpose=f"apply {desired.source}", wait_seconds=options.lock_seconds):
        refuse_newer_state(host.root)
        # A look also keeps the logs of engines from growing: an apply may be the only sage that ever runs here.
        host.measured.keeps = host.cuts_logs = True
        _make_room(host.root, desired.project, watcher)
        planned = _planned(desired, host, options.for_plan)
        if planned.plan.blocked and options.on_failure != "continue":
            return planned
        outcome = _carried_out(
            planned,
            host,
            watcher,
            revision=revision(desired, planned.observed, [entry.engine for entry in planned.plan.blocked]),
            on_failure=options.on_failure,
            ready_seconds=options.ready_seconds,
        )
        _keep_measured(host, desired.project, watcher)
        return outcome


def _planned(desired: DesiredState, host: LocalHost, options: PlanOptions) -> Planned:
    host.lookup = lookup(desired)
    observed = host.look()
    refuse_other_source(desired, observed, take_over=options.take_over)
    return Planned(plan=sound_plan(desired, observed, options), desired=desired, observed=observed)


def _make_room(root: Path, project: str, watcher: Watcher) -> None:
    """Before anything is stopped: what cannot be written down must not be begun, and what is damaged is set aside.

    Raises Environment and NewerState.
    """
    check_writable(root, project)
    for told in (*Records(root).mend(project), *JournalFile(root, project).mend(), *FootprintFiles(root).mend(project)):
        watcher.note(told)


def _keep_measured(host: LocalHost, project: str, watcher: Watcher) -> None:
    """What its engines were seen to take before, while and after it was done."""
    trouble = host.measured.keep(project)
    if trouble:
        watcher.note(trouble)


def down(
    paths: tuple[str, ...],
    ids: tuple[str, ...],
    watcher: Watcher,
    *,
    project: str | None,
    everything: bool,
    lock_seconds: float = 0.0,
    host: LocalHost | None = None,
) -> tuple[Outcome, ...]:
    """Stop engines in order: those of the paths' projects, those with these ids, or all of this user's.

    Needs no manifest to parse: a path's engines carry the path. `host` is one that has been looked through before; None
    makes a new one. Raises Refused, Usage, Locked, Environment, NewerState.
    """
    host = host or local_host()
    with locked(lock_paths(os.environ), purpose="down", wait_seconds=lock_seconds):
        refuse_newer_state(host.root)
        host.measured.keeps = True
        observed = host.look()
        asked = _asked(observed, paths, ids, project, everything=everything)
        targets = {engine.id for engine in observed.engines if asked(engine.id, engine.source)}
        missing = {applied.engine for applied in observed.applied} - {engine.id for engine in observed.engines}
        # What does not run any more and was asked to stop is no longer missed.
        gone = {engine for engine in missing if asked(engine, "")}
        outcomes = []
        for name in sorted({engine.project for engine in targets | gone}):
            _make_room(host.root, name, watcher)
            planned = _without(name, targets, observed)
            applied = {fact.engine: fact.written for fact in observed.applied if fact.engine.project == name}
            left = tuple(sorted((engine, text) for engine, text in applied.items() if engine not in targets | gone))
            outcomes.append(_carried_out(planned, host, watcher, revision=left, on_failure="halt"))
            _keep_measured(host, name, watcher)
            if outcomes[-1].result == "interrupted":
                break  # Nobody is asked about the next project any more.
        return tuple(outcomes)


def _carried_out(
    planned: Planned,
    host: LocalHost,
    watcher: Watcher,
    *,
    revision: tuple[tuple[EngineId, str], ...],
    on_failure: str,
    ready_seconds: float | None = None,
) -> Outcome:
    plan, desired, before = planned.plan, planned.desired, planned.observed
    watcher.show(planned)
    if plan.changes and not watcher.approve():
        raise Refused("not approved: nothing was done")
    applied = {fact.engine: fact.written for fact in before.applied if fact.engine.project == desired.project}
    asked_for = {engine for engine, _ in revision} | {entry.engine for entry in plan.blocked}
    if not plan.changes and not plan.awaited and dict(revision) == applied:
        _forget_the_dead(host, before, desired.project, asked_for)
        return Outcome(result="converged", plan=plan, observed=before)
    host.answer_seconds, host.cuts_logs = _LOOP_ANSWER_SECONDS, True
    with host.interruptible():
        outcome = apply_plan(
            plan,
            desired,
            before,
            host,
            JournalFile(host.root, desired.project),
            revision=revision,
            pid=os.getpid(),
            on_failure=on_failure,
            ready_seconds=ready_seconds,
            on_beat=watcher.on_beat,
            on_restore=watcher.on_restore,
        )
    started = {act.engine for act in plan.acts if isinstance(act, StartEngine)}
    for engine in outcome.observed.engines if outcome.result == "converged" else ():
        for sentence in unproved(engine, outcome.observed) if engine.id in started else ():
            watcher.note(f"{engine.id} {sentence}")
    kept = {"converged": asked_for, "restored": {applied.engine for applied in before.applied}}
    try:
        if outcome.result in kept:
            _forget_the_dead(host, host.look(), desired.project, kept[outcome.result])
    except Environment as error:
        # What came of the apply is told all the same.
        return replace(outcome, unwritten=outcome.unwritten or error.message)
    return outcome


def _forget_the_dead(host: LocalHost, observed: ObservedState, project: str, kept: set[EngineId]) -> None:
    """Records of processes that were stopped, replaced, or wanted by nobody any more have nothing left to hint at."""
    alive = {engine.leader for engine in observed.engines}
    replaced = {engine.id for engine in observed.engines if engine.leader_alive}
    holding = pids_not_given_back(observed.devices)
    records = Records(host.root)
    for record in records.read():
        if record.engine.project != project or record.leader in alive or record.leader.pid in holding:
            continue
        if record.phase in ("stopping", "stuck") or record.engine in replaced or record.engine not in kept:
            records.forget(record.engine, record.leader)


# --- down -------------------------------------------------------------------------------------------------------------


def _asked(
    observed: ObservedState, paths: tuple[str, ...], ids: tuple[str, ...], project: str | None, *, everything: bool
) -> Callable[[EngineId, str], bool]:
    """Whether an engine, with the manifests' path that it carries, is one that shall stop."""
    for path in paths:
        if not os.path.exists(path):
            raise InvalidManifests(f"there is no {path}")
    known = {engine.id for engine in observed.engines} | {applied.engine for applied in observed.applied}
    named = {engine for text in ids for engine in matching(text, known, project)}
    sources = {os.path.realpath(path) for path in paths if os.path.isdir(path)}
    projects = {_project_of(path, project) for path in paths if os.path.isdir(path)}
    stacks = {stack for path in paths if not os.path.isdir(path) for stack in _stacks_of(path, project)}
    if project is not None and not (paths or ids):
        projects.add(project)

    def asked(engine: EngineId, source: str) -> bool:
        by_path = source in sources or engine.project in projects or (engine.project, engine.stack) in stacks
        all_of_it = everything and project in (None, engine.project)
        return all_of_it or engine in named or by_path

    return asked


def _project_of(directory: str, project: str | None) -> str | None:
    """The project of a directory; None when its files do not parse: then only engines that carry its path are meant."""
    try:
        return load((directory,), project).project
    except InvalidManifests:
        return project


def _stacks_of(path: str, project: str | None) -> set[tuple[str, str]]:
    """The stacks that a file loads. Raises InvalidManifests: a file that does not parse names no stack."""
    desired = load((path,), project)
    return {(desired.project, stack) for stack in desired.prune_stacks or ()}


def _without(project: str, targets: set[EngineId], observed: ObservedState) -> Planned:
    """A plan for a desired state that wants nothing new, and in which just the targets may go."""
    engines = project_engines(observed, project)
    source = engines[0].source if engines else ""
    desired = DesiredState(project=project, source=source, wanted=(), prune_ids=frozenset(targets))
    options = PlanOptions(stop_reason="destroyed")
    return Planned(plan=sound_plan(desired, observed, options), desired=desired, observed=observed)


def matching(text: str, known: set[EngineId], project: str | None) -> set[EngineId]:
    """The engines that an id from the command line means: `stack/name` means every replica.

    Raises Usage when there is none, or when several projects have it.
    """
    found = {
        engine
        for engine in known
        if text in (engine.full, str(engine), str(engine.first), engine.first.full)
        and (project is None or engine.project == project)
    }
    if not found:
        meant = sorted(engine for engine in known if project in (None, engine.project))
        several = len({engine.project for engine in meant}) > 1
        there_is = ", ".join(engine.full if several else str(engine) for engine in meant) or "nothing"
        where = f" in project {project}" if project is not None else ""
        raise Usage(f"there is no engine {text}{where}; there is {there_is}")
    if len({engine.project for engine in found}) > 1:
        names = ", ".join(sorted(engine.full for engine in found))
        raise Usage(f"{text} is ambiguous: {names}", hint="name the project too")
    return found
