"""`sage status` and `sage logs`."""

import json
import sys
from typing import Annotated

import typer

from sage_reconcile.cli.options import Colour, Project, chosen, paint_for
from sage_reconcile.errors import Environment

_NOT_AS_WANTED = 2


def status(
    engine: Annotated[str | None, typer.Argument(metavar="[ID]")] = None,
    project: Project = None,
    output: Annotated[str, typer.Option("-o", "--output", metavar="text|json")] = "text",
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 2 when an engine is missing or not ready.")
    ] = False,
    color: Colour = "auto",
) -> None:
    """Show what runs, and what should and does not. Reads no manifest."""
    from sage_reconcile.app.status import status as look
    from sage_reconcile.render.status_text import status_json, status_text

    chosen("-o", output, ("text", "json"))
    found = look(engine, project)
    missing = tuple((entry.applied, entry.record) for entry in found.missing)
    uptimes = dict(found.uptimes)
    if output == "json":
        print(json.dumps(status_json(found.engines, missing, found.observed, uptimes), indent=2))
    else:
        print(status_text(found.engines, missing, found.observed, uptimes, paint_for(color)))
    if exit_code and not found.healthy:
        raise typer.Exit(_NOT_AS_WANTED)


def logs(
    engine: Annotated[str, typer.Argument(metavar="ID")],
    project: Project = None,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many of its last lines.")] = 50,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as it is written.")] = False,
    previous: Annotated[bool, typer.Option("--previous", help="The log of the process before this one.")] = False,
) -> None:
    """Show what an engine has said."""
    from sage_reconcile.app.status import followed, log_file
    from sage_reconcile.world.logs import tail

    path = log_file(engine, project, previous=previous)
    if not path.exists() and not follow:
        raise Environment(f"there is no log {path}", hint="the engine was not started with this state directory")
    for line in tail(str(path), lines):
        print(line)
    if follow:
        for text in followed(path):
            sys.stdout.write(text)
            sys.stdout.flush()
