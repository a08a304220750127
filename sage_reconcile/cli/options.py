"""Options that several commands share, and where their output goes."""

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from sage_reconcile.errors import Environment, Usage
from sage_reconcile.render.paint import Paint

Paths = Annotated[
    list[str] | None, typer.Argument(metavar="PATH", help="Manifest files or directories; default: manifests/.")
]
Project = Annotated[str | None, typer.Option("-p", "--project", help="The project's name.")]
Out = Annotated[str | None, typer.Option("--out", metavar="FILE", help="Write it to this file.")]
Observed = Annotated[
    str | None,
    typer.Option("--observed", metavar="FILE", help="Plan for the machine of this snapshot, not for this one."),
]
Timeout = Annotated[
    str | None, typer.Option("--timeout", metavar="DURATION", help="How long an engine may take to be ready.")
]
LockTimeout = Annotated[
    str, typer.Option("--lock-timeout", metavar="DURATION", help="How long to wait for another sage.")
]
Yes = Annotated[bool, typer.Option("-y", "--yes", "--auto-approve", help="Do not ask.")]

_NUMBER = re.compile(r"\d{1,9}(?:\.\d{1,6})?", re.ASCII)


def _known_colour(colour: str) -> str:
    """For every command, also one that has nothing to colour. Raises Usage."""
    if colour not in ("auto", "always", "never"):
        raise Usage(f'--color is "{colour}", and can be auto, always or never')
    return colour


Colour = Annotated[
    str,
    typer.Option("--color", metavar="auto|always|never", callback=_known_colour, help="Colour in the output."),
]


def paint_for(colour: str, *, to_stderr: bool = False) -> Paint:
    """Colour for a terminal, unless NO_COLOR is set (https://no-color.org)."""
    stream = sys.stderr if to_stderr else sys.stdout
    automatic = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return Paint(colour == "always" or (colour == "auto" and automatic))


def chosen(name: str, value: str, choices: tuple[str, ...]) -> str:
    """The value, if it is one of the choices. Raises Usage."""
    if value not in choices:
        raise Usage(f'{name} is "{value}", and can be {", ".join(choices)}')
    return value


def seconds_option(name: str, value: str | None) -> float | None:
    """A duration such as 30s, or a number of seconds, as in manifests; None stays None. Raises Usage."""
    from sage_reconcile.core.quantities import seconds_of

    if value is None:
        return None
    try:
        return seconds_of(float(value) if _NUMBER.fullmatch(value) else value)
    except ValueError as error:
        raise Usage(f"{name}: {error}") from error


def print_or_write(text: str, out: str | None) -> None:
    """A result on stdout, or in a file. Raises Environment when the file cannot be written."""
    if out is None:
        print(text)
        return
    try:
        Path(out).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise Environment(f"cannot write {out}: {error.strerror}") from error
