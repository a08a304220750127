"""`sage status`, `why`, `logs`, `wait`, `gpu` and `snapshot`: what is, and why."""

import json
import shutil
import sys
import time
from typing import Annotated

import typer

from sage_reconcile.cli.options import Colour, Out, Paths, Project, chosen, paint_for, print_or_write, seconds_option
from sage_reconcile.cli.streams import reader_left
from sage_reconcile.errors import Environment

_NOT_AS_WANTED = 2

_UNBOUNDED_COLUMNS = 100_000

# How often a log that is followed is looked at.
_FOLLOW_SECONDS = 0.2


def status(
    engine: Annotated[str | None, typer.Argument(metavar="ID")] = None,
    project: Project = None,
    output: Annotated[str, typer.Option("-o", "--output", metavar="text|json")] = "text",
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 2 when an engine is missing or not ready.")
    ] = False,
    color: Colour = "auto",
) -> None:
    """Show what runs, and what should and does not. Reads no manifest."""
    from sage_reconcile.app.status import status as look
    from sage_reconcile.render.lines import WIDTH
    from sage_reconcile.render.status_text import status_json, status_text

    chosen("-o", output, ("text", "json"))
    found = look(engine, project)
    missing = tuple((entry.applied, entry.record) for entry in found.missing)
    uptimes = dict(found.uptimes)
    if output == "json":
        print(json.dumps(status_json(found.engines, missing, found.observed, uptimes), indent=2))
    else:
        # What reads a table from a file or a pipe wants a line for each engine.
        width = max(shutil.get_terminal_size().columns, WIDTH) if sys.stdout.isatty() else _UNBOUNDED_COLUMNS
        print(status_text(found.engines, missing, found.observed, uptimes, paint_for(color), width))
    if exit_code and not found.healthy:
        raise typer.Exit(_NOT_AS_WANTED)


def logs(
    engine: Annotated[str, typer.Argument(metavar="ID")],
    project: Project = None,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many of its last lines.")] = 50,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as it is written.")] = False,
    previous: Annotated[bool, typer.Option("--previous", help="The log of the process before this one.")] = False,
    color: Colour = "auto",
) -> None:
    """Show what an engine has said."""
    from sage_reconcile.app.status import log_file
    from sage_reconcile.world.logs import end_of, followed, tail

    path = log_file(engine, project, previous=previous)
    if not path.exists() and not follow:
        hint = "the engine was not started with this state directory, or its log was deleted"
        raise Environment(f"there is no log {path}", hint="no process of it ran before this one" if previous else hint)
    if not follow:
        for line in tail(path, lines):
            print(line)
        return
    # What is written while the tail is shown comes after it, once.
    end = end_of(path)
    for line in tail(path, lines, end=end):
        print(line)
    sys.stdout.flush()
    for text in followed(path, end, pause=lambda: time.sleep(_FOLLOW_SECONDS)):
        sys.stdout.write(text)
        sys.stdout.flush()
        if reader_left(sys.stdout):
            return


def wait(
    engines: Annotated[list[str], typer.Argument(metavar="ID")],
    goal: Annotated[str, typer.Option("--for", metavar="ready|stopped", help="What to wait for.")] = "ready",
    timeout: Annotated[str, typer.Option(metavar="DURATION", help="How long to wait.")] = "10m",
    project: Project = None,
    color: Colour = "auto",
) -> None:
    """Wait until engines are ready, or stopped."""
    from sage_reconcile.app.waiting import wait as wait_here

    chosen("--for", goal, ("ready", "stopped"))
    wait_here(tuple(engines), project=project, goal=goal, limit_seconds=seconds_option("--timeout", timeout) or 0.0)


def gpu(
    project: Annotated[
        str | None, typer.Option("-p", "--project", help="Only the GPUs that engines of this project are on.")
    ] = None,
    output: Annotated[str, typer.Option("-o", "--output", metavar="text|json")] = "text",
    color: Colour = "auto",
) -> None:
    """Show the GPUs, and whose their memory is."""
    from sage_reconcile.app.project import local_host
    from sage_reconcile.render.gpu_text import gpu_json, gpu_text

    chosen("-o", output, ("text", "json"))
    observed = local_host().look()
    if output == "json":
        print(json.dumps(gpu_json(observed, project), indent=2))
    else:
        print(gpu_text(observed, paint_for(color), project))


def why(
    target: Annotated[str, typer.Argument(metavar="ID|gpuN")],
    paths: Paths = None,
    project: Project = None,
    output: Annotated[str, typer.Option("-o", "--output", metavar="text|json")] = "text",
    color: Colour = "auto",
) -> None:
    """Explain an engine or a GPU: where, why there, why not, whose bytes."""
    from sage_reconcile.app.why import why as ask
    from sage_reconcile.render.why_json import why_json
    from sage_reconcile.render.why_text import why_text

    chosen("-o", output, ("text", "json"))
    answer = ask(target, tuple(paths or ()), project)
    if output == "json":
        print(json.dumps(why_json(answer.engines, answer.devices, answer.observed), indent=2))
    else:
        print(why_text(answer.engines, answer.devices, answer.observed, paint_for(color)))
    if answer.note:
        print(f"note: {answer.note}", file=sys.stderr)


def snapshot(
    paths: Paths = None,
    project: Project = None,
    out: Out = None,
    color: Colour = "auto",
) -> None:
    """Write down what is seen on this machine, with all that a plan of the manifests asks, for --observed elsewhere."""
    from sage_reconcile.app.snapshots import take

    text, note = take(tuple(paths or ()), project)
    print_or_write(text, out)
    if note:
        print(f"note: {note}", file=sys.stderr)
