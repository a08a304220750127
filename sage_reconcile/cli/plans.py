"""`sage plan`, `sage apply` and `sage down`."""

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from sage_reconcile.cli.options import (
    Colour,
    LockTimeout,
    Observed,
    Paths,
    Project,
    Timeout,
    Yes,
    chosen,
    paint_for,
    seconds_option,
)
from sage_reconcile.errors import Usage

if TYPE_CHECKING:
    from sage_reconcile.app.planned import Planned
    from sage_reconcile.core.plan import PlanOptions

_CHANGES_PENDING = 2

NoPrune = Annotated[bool, typer.Option("--no-prune", help="Leave engines alone that no manifest asks for.")]
TakeOver = Annotated[bool, typer.Option("--take-over", help="Take the project over from another path.")]
AllowMoves = Annotated[
    bool, typer.Option("--allow-moves", help="Start running engines again on other devices where that makes room.")
]
OnFailure = Annotated[str, typer.Option(metavar="rollback|halt|continue", help="What to do when an engine fails.")]
Targets = Annotated[list[str] | None, typer.Argument(metavar="PATH|ID", help="Directories, files or ids.")]


def plan(
    paths: Paths = None,
    project: Project = None,
    output: Annotated[str, typer.Option("-o", "--output", metavar="text|json")] = "text",
    detailed_exitcode: Annotated[
        bool, typer.Option("--detailed-exitcode", help="Exit with 2 when there are changes.")
    ] = False,
    no_prune: NoPrune = False,
    take_over: TakeOver = False,
    allow_moves: AllowMoves = False,
    observed: Observed = None,
    color: Colour = "auto",
) -> None:
    """Show what apply would change, and why. Touches nothing."""
    from sage_reconcile.cli.outcome import blocked_error, show
    from sage_reconcile.core.plan import PlanOptions

    chosen("-o", output, ("text", "json"))
    options = PlanOptions(prune=not no_prune, take_over=take_over, allow_moves=allow_moves, only_shown=True)
    planned = _planned(tuple(paths or ()), project, observed, options)
    if output == "json":
        from sage_reconcile.render.plan_json import plan_json

        print(json.dumps(plan_json(planned.plan, planned.observed), indent=2))
    else:
        show(planned, paint_for(color))
    if observed is not None:
        from sage_reconcile.render.plan_json import timestamp

        seen = planned.observed
        print(f"note: this is for {seen.node} as it was at {timestamp(seen.taken_at)}", file=sys.stderr)
    if planned.plan.blocked:
        raise blocked_error(planned.plan)
    if detailed_exitcode and planned.plan.changes:
        raise typer.Exit(_CHANGES_PENDING)


def _planned(paths: tuple[str, ...], project: str | None, observed: str | None, options: "PlanOptions") -> "Planned":
    if observed is not None:
        from sage_reconcile.app import snapshots

        return snapshots.plan(paths, observed, project=project, options=options)
    from sage_reconcile.app import verbs

    return verbs.plan(paths, project=project, options=options)


def apply(
    paths: Paths = None,
    project: Project = None,
    yes: Yes = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and do nothing.")] = False,
    on_failure: OnFailure = "rollback",
    no_prune: NoPrune = False,
    allow_empty: Annotated[bool, typer.Option("--allow-empty", help="Apply what wants no engines.")] = False,
    take_over: TakeOver = False,
    allow_moves: AllowMoves = False,
    timeout: Timeout = None,
    lock_timeout: LockTimeout = "0s",
    no_wait: Annotated[bool, typer.Option("--no-wait", help="End once engines run, before they are ready.")] = False,
    color: Colour = "auto",
) -> None:
    """Make it so, or put back what was there."""
    from sage_reconcile.app import verbs
    from sage_reconcile.app.project import local_host
    from sage_reconcile.cli.outcome import Conversation, finish_apply

    chosen("--on-failure", on_failure, ("rollback", "halt", "continue"))
    paint = paint_for(color)
    conversation = Conversation(paint=paint, live_paint=paint_for(color, to_stderr=True), yes=yes)
    options = verbs.ApplyOptions(
        prune=not no_prune,
        allow_empty=allow_empty,
        take_over=take_over,
        on_failure=on_failure,
        ready_seconds=seconds_option("--timeout", timeout),
        lock_seconds=seconds_option("--lock-timeout", lock_timeout) or 0.0,
        waits=not no_wait,
        allow_moves=allow_moves,
        dry_run=dry_run,
    )
    watcher = conversation.watcher("Apply?")
    finish_apply(verbs.apply(tuple(paths or ()), watcher, options, project=project, host=local_host()), paint)
    if dry_run:
        print("dry run: nothing was done", file=sys.stderr)


def down(
    targets: Targets = None,
    project: Project = None,
    everything: Annotated[bool, typer.Option("--all", help="All engines of yours on this machine.")] = False,
    yes: Yes = False,
    lock_timeout: LockTimeout = "0s",
    color: Colour = "auto",
) -> None:
    """Stop engines, those that others depend on last."""
    from sage_reconcile.app import verbs
    from sage_reconcile.app.project import default_paths
    from sage_reconcile.cli.outcome import Conversation, finish

    named = targets or []
    if everything and named:
        raise Usage(f"--all means every engine, and {named[0]} some of them", hint="leave one of them out")
    # What exists on the disk is a path, and so is what cannot be an id.
    ids = tuple(target for target in named if not os.path.exists(target) and _spells_an_id(target))
    paths = tuple(target for target in named if target not in ids)
    if not (named or everything or project):
        paths = default_paths(())
    conversation = Conversation(paint=paint_for(color), live_paint=paint_for(color, to_stderr=True), yes=yes)
    outcomes = verbs.down(
        paths,
        ids,
        conversation.watcher("Stop them?"),
        project=project,
        everything=everything,
        lock_seconds=seconds_option("--lock-timeout", lock_timeout) or 0.0,
    )
    if not outcomes:
        print("nothing to stop")
    for outcome in outcomes:
        finish(outcome, paint_for(color), verb="down")


def _spells_an_id(target: str) -> bool:
    from sage_reconcile.core.identity import engine_id

    return engine_id("", target.rpartition(":")[2]) is not None and not target.endswith((".yaml", ".yml"))
