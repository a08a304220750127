"""`sage serve`: the router."""

import sys
from typing import Annotated

import typer


def serve(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 8000,
) -> None:
    """Serve one OpenAI-compatible address in front of whatever runs."""
    from sage_reconcile.app.serving import serve as serve_here

    def listening(url: str) -> None:
        print(f"serving {url}/v1 (Ctrl-C drains and stops)", file=sys.stderr, flush=True)

    serve_here(host, port, listening)
