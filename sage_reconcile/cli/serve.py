"""`sage serve` and `sage up`: the router, alone or after an apply."""

import sys
from typing import Annotated

import typer

from sage_reconcile.cli.options import Colour, LockTimeout, Paths, Project, Timeout, Yes, paint_for, seconds_option


def serve(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8000,
    project: Annotated[
        str | None, typer.Option("-p", "--project", help="Serve the engines of this project, and of no other.")
    ] = None,
    color: Colour = "auto",
) -> None:
    """Serve one OpenAI-compatible address in front of whatever runs."""
    from sage_reconcile.app.serving import serve as serve_here

    def listening(url: str) -> None:
        print(f"serving {url}/v1 (Ctrl-C drains and stops)", file=sys.stderr, flush=True)

    serve_here(host, port, listening, project=project)


def up(
    paths: Paths = None,
    project: Project = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The router's port; default: sage.yaml's, else 8000.")
    ] = None,
    yes: Yes = False,
    timeout: Timeout = None,
    lock_timeout: LockTimeout = "0s",
    color: Colour = "auto",
) -> None:
    """Apply, then serve in the foreground. Ctrl-C lets running requests finish and stops the engines."""
    from sage_reconcile.app.serving import up as up_here
    from sage_reconcile.app.verbs import ApplyOptions
    from sage_reconcile.cli.outcome import Conversation, finish, finish_apply

    paint = paint_for(color)
    conversation = Conversation(paint=paint, live_paint=paint_for(color, to_stderr=True), yes=yes)

    def listening(url: str) -> None:
        # Whoever says yes to this has said yes to the stop that ends it.
        conversation.yes = True
        print(f"serving {url}/v1 (Ctrl-C drains, and stops the engines)", file=sys.stderr, flush=True)

    up_here(
        tuple(paths or ()),
        conversation.watcher("Apply?"),
        ApplyOptions(
            ready_seconds=seconds_option("--timeout", timeout),
            lock_seconds=seconds_option("--lock-timeout", lock_timeout) or 0.0,
        ),
        project=project,
        port=port,
        on_ready=listening,
        tell=conversation.note,
        applied=lambda came_of_it: finish_apply(came_of_it, paint),
        stopped=lambda outcome: finish(outcome, paint, verb="down"),
    )
