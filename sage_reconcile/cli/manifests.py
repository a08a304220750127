"""`sage validate` and `sage schema`: manifests, offline."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sage_reconcile.cli.options import Observed, Out, Paths, Project, chosen, print_or_write

if TYPE_CHECKING:
    from sage_reconcile.core.desired import DesiredState
    from sage_reconcile.world.manifest_problems import ProblemsFound


def validate(
    paths: Paths = None,
    project: Project = None,
    output: Annotated[str, typer.Option("-o", "--output", metavar="text|json|github")] = "text",
    observed: Observed = None,
) -> None:
    """Check manifests without looking at the machine; with --observed, also whether all has a place there."""
    from sage_reconcile.world.manifest_problems import ProblemsFound

    chosen("-o", output, ("text", "json", "github"))
    try:
        if observed is not None:
            _validate_there(tuple(paths or ()), project, output, observed)
            return
        from sage_reconcile.app.project import load

        desired = load(tuple(paths or ()), project)
    except ProblemsFound as found:
        if output == "json":
            print(json.dumps({"format_version": "1.0", "valid": False, "problems": _problems(found)}, indent=2))
        elif output == "github":
            for problem in _problems(found):
                print(_annotation(problem["file"], problem["line"], problem["column"], problem["message"]))
        raise
    if output == "json":
        print(json.dumps({"format_version": "1.0", "valid": True, "problems": []}, indent=2))
    elif output == "text":
        print(_valid(desired))


def _validate_there(paths: tuple[str, ...], project: str | None, output: str, file: str) -> None:
    """Whether what these manifests want has a place on the machine of a snapshot. Raises what `plan` raises."""
    from sage_reconcile.app import snapshots
    from sage_reconcile.cli.outcome import blocked_error
    from sage_reconcile.core.plan import PlanOptions
    from sage_reconcile.render.plan_json import timestamp, validation_json
    from sage_reconcile.render.plan_text import blocked_lines, blocked_sentence

    planned = snapshots.plan(paths, file, project=project, options=PlanOptions(only_shown=True))
    plan, seen = planned.plan, planned.observed
    if output == "json":
        print(json.dumps(validation_json(plan, seen), indent=2))
    elif output == "github":
        for blocked in plan.blocked:
            place, line, column = (blocked.at or "::").rsplit(":", 2)
            print(_annotation(place, line, column, blocked_sentence(blocked)))
    else:
        print(_valid(planned.desired))
        lines = [line for one in plan.blocked for line in blocked_lines(one, kept=one.engine in plan.kept)]
        print("\n".join(lines) if lines else f"all of it has a place on {seen.node}, as of {timestamp(seen.taken_at)}")
    if plan.blocked:
        raise blocked_error(plan)


def _valid(desired: "DesiredState") -> str:
    stacks = len({wanted.id.stack for wanted in desired.wanted})
    return f"valid: project {desired.project}, {stacks} stacks, {len(desired.wanted)} engines"


def _annotation(file: str, line: object, column: object, message: str) -> str:
    """A line that GitHub shows beside the line of the file."""
    return f"::error file={file},line={line},col={column}::{message.replace('%', '%25')}"


def _problems(found: "ProblemsFound") -> list[dict[str, Any]]:
    return [
        {
            "file": problem.file,
            "line": problem.line,
            "column": problem.column,
            "message": problem.message,
            "hint": problem.hint,
        }
        for problem in found.problems
    ]


def schema(out: Out = None) -> None:
    """Print the JSON Schema of a manifest, for editors and CI."""
    from sage_reconcile.core.schema import stack_schema_json

    text = stack_schema_json()
    print_or_write(text, out)
