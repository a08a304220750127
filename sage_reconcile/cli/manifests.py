"""`sage validate` and `sage schema`: manifests, offline."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sage_reconcile.cli.options import Colour, Observed, Out, Paths, Project, chosen, paint_for, print_or_write
from sage_reconcile.errors import InvalidManifests, Refused, SageError

if TYPE_CHECKING:
    from sage_reconcile.core.desired import DesiredState
    from sage_reconcile.render.paint import Paint


def validate(
    paths: Paths = None,
    project: Project = None,
    output: Annotated[str, typer.Option("-o", "--output", metavar="text|json|github")] = "text",
    observed: Observed = None,
    color: Colour = "auto",
) -> None:
    """Check manifests without looking at the machine; with --observed, also whether all has a place there."""
    chosen("-o", output, ("text", "json", "github"))
    paint = paint_for(color)
    try:
        if observed is not None:
            _validate_there(tuple(paths or ()), project, output, observed, paint)
            return
        from sage_reconcile.app.project import load

        desired = load(tuple(paths or ()), project)
    except (InvalidManifests, Refused) as error:
        problems = _problems(error, observed or (paths or [""])[0])
        if output == "json":
            print(json.dumps({"format_version": "1.0", "valid": False, "problems": problems}, indent=2))
        elif output == "github":
            for problem in problems:
                text = problem["message"] + (f"\nhint: {problem['hint']}" if problem["hint"] else "")
                print(_annotation(problem["file"], problem["line"], problem["column"], text))
        raise
    if output == "json":
        print(json.dumps({"format_version": "1.0", "valid": True, "problems": []}, indent=2))
    elif output == "text":
        print(_valid(desired))


def _validate_there(paths: tuple[str, ...], project: str | None, output: str, file: str, paint: "Paint") -> None:
    """Whether what these manifests want has a place on the machine of a snapshot. Raises what `plan` raises."""
    from sage_reconcile.app import snapshots
    from sage_reconcile.cli.outcome import blocked_error
    from sage_reconcile.core.plan import PlanOptions
    from sage_reconcile.render.plan_json import timestamp, validation_json
    from sage_reconcile.render.plan_text import blocked_lines, blocked_text

    planned = snapshots.plan(paths, file, project=project, options=PlanOptions(only_shown=True))
    plan, seen = planned.plan, planned.observed
    if output == "json":
        print(json.dumps(validation_json(plan, seen), indent=2))
    elif output == "github":
        for blocked in plan.blocked:
            place, line, column = (blocked.at or "::").rsplit(":", 2)
            print(_annotation(place, line, column, blocked_text(blocked)))
    else:
        print(_valid(planned.desired))
        lines = [line for one in plan.blocked for line in blocked_lines(one, kept=one.engine in plan.kept, paint=paint)]
        print("\n".join(lines) if lines else f"all of it has a place on {seen.node}, as of {timestamp(seen.taken_at)}")
    if plan.blocked:
        raise blocked_error(plan)


def _valid(desired: "DesiredState") -> str:
    stacks = len({wanted.id.stack for wanted in desired.wanted})
    return f"valid: project {desired.project}, {_counted(stacks, 'stack')}, {_counted(len(desired.wanted), 'engine')}"


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _annotation(file: str, line: object, column: object, message: str) -> str:
    """A line that GitHub shows beside the line of the file; the escapes are those of its workflow commands."""
    place = _escaped(file).replace(":", "%3A").replace(",", "%2C")
    return f"::error file={place},line={line},col={column}::{_escaped(message)}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _problems(error: SageError, file: str) -> list[dict[str, Any]]:
    """What is wrong with the manifests, each mistake at its place; else what is wrong with `file`."""
    from sage_reconcile.world.manifest_problems import ProblemsFound

    if not isinstance(error, ProblemsFound):
        return [{"file": file, "line": 1, "column": 1, "message": error.message, "hint": error.hint}]
    return [
        {
            "file": problem.file,
            "line": problem.line,
            "column": problem.column,
            "message": problem.message,
            "hint": problem.hint,
        }
        for problem in error.problems
    ]


def schema(out: Out = None, project: Project = None, color: Colour = "auto") -> None:
    """Print the JSON Schema of a manifest, for editors and CI: it is the same for every project."""
    from sage_reconcile.core.schema import stack_schema_json

    text = stack_schema_json()
    print_or_write(text, out)
