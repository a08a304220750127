"""All commands, and the one place where an exit code is decided."""

import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import click
import typer

from sage_reconcile.cli import manifests, plans, serve, status
from sage_reconcile.errors import SageError

INTERNAL, USAGE, INTERRUPTED, TERMINATED = 1, 64, 130, 143

app = typer.Typer(
    name="sage",
    help="Run the inference engines that are written down in a directory of manifests, and nothing else.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(manifests.validate)
app.command()(manifests.schema)
app.command()(plans.plan)
app.command()(plans.apply)
app.command()(plans.down)
app.command()(status.status)
app.command()(status.logs)
app.command()(serve.serve)


class Terminated(BaseException):
    """SIGTERM came."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and leave with its exit code; errors.py says what each means."""
    signal.signal(signal.SIGTERM, _terminated)
    code = _run(arguments)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            # The reader has left, as `sage status | head -1` does. Python would complain once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _run(arguments: list[str] | None) -> int:
    try:
        code: Any = app(args=arguments, standalone_mode=False, prog_name="sage")
    except SageError as error:
        return _told(error.report(), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        return _told(error.format_message(), USAGE)
    except click.ClickException as error:
        return _told(f"error: {error.format_message()}\n  hint: see sage --help", USAGE)
    except (KeyboardInterrupt, click.Abort):
        return _told("interrupted: sage status says what runs", INTERRUPTED)
    except Terminated:
        return _told("terminated: sage status says what runs", TERMINATED)
    except BrokenPipeError:
        return 0
    except Exception as error:  # noqa: BLE001 - the edge: whatever is left is our own mistake, and no traceback is shown
        if os.environ.get("SAGE_DEBUG"):
            raise
        return _told(
            f"error: sage itself failed: {type(error).__name__}: {error}\n"
            "  hint: this is a bug; SAGE_DEBUG=1 shows where it is",
            INTERNAL,
        )
    return code if isinstance(code, int) else 0


def _told(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


def _terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated
