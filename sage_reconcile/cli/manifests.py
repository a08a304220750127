"""`sage validate` and `sage schema`: manifests, offline."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sage_reconcile.cli.options import Out, Paths, Project, chosen, print_or_write

if TYPE_CHECKING:
    from sage_reconcile.world.manifest_problems import ProblemsFound


def validate(
    paths: Paths = None,
    project: Project = None,
    output: Annotated[str, typer.Option("-o", "--output", metavar="text|json|github")] = "text",
) -> None:
    """Check manifests without looking at the machine."""
    from sage_reconcile.app.project import load
    from sage_reconcile.world.manifest_problems import ProblemsFound

    chosen("-o", output, ("text", "json", "github"))
    try:
        desired = load(tuple(paths or ()), project)
    except ProblemsFound as found:
        if output == "json":
            print(json.dumps({"format_version": "1.0", "valid": False, "problems": _problems(found)}, indent=2))
        elif output == "github":
            for problem in _problems(found):
                place = f"file={problem['file']},line={problem['line']},col={problem['column']}"
                print(f"::error {place}::{problem['message'].replace('%', '%25')}")
        raise
    if output == "json":
        print(json.dumps({"format_version": "1.0", "valid": True, "problems": []}, indent=2))
    elif output == "text":
        stacks = len({wanted.id.stack for wanted in desired.wanted})
        print(f"valid: project {desired.project}, {stacks} stacks, {len(desired.wanted)} engines")


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
