"""All commands, and the one place where an exit code is decided."""

import contextlib
import errno
import os
import signal
import sys
from types import FrameType
from typing import Annotated, Any, NoReturn, TextIO

import typer

from sage_reconcile import __version__
from sage_reconcile.cli import manifests, plans, serve, status
from sage_reconcile.cli.streams import ensure_streams
from sage_reconcile.errors import Environment, SageError
from sage_reconcile.world.failpoints import refuse_outside_tests

# Not sage's mistake, wherever it comes up: no room on the disk, no descriptor, no process, no memory left.
_MACHINE_IS_AT_ITS_END = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM,
)  # fmt: skip

_INTERRUPTED = "interrupted: sage status says what runs"

INTERNAL, USAGE, INTERRUPTED, TERMINATED = 1, 64, 130, 143

app = typer.Typer(
    name="sage",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"sage {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show sage's version and exit.")
    ] = False,
) -> None:
    """Run the inference engines that are written down in a directory of manifests, and nothing else."""


app.command()(manifests.validate)
app.command()(manifests.schema)
app.command()(plans.plan)
app.command()(plans.apply)
app.command()(serve.up)
app.command()(plans.down)
app.command()(status.status)
app.command()(status.why)
app.command()(status.wait)
app.command()(status.logs)
app.command()(status.gpu)
app.command()(status.snapshot)
app.command()(serve.serve)


# typer may carry a click of its own, so its classes are found through those that it offers.
_CliMistake: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


class Terminated(BaseException):
    """SIGTERM came."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and leave with its exit code; errors.py says what each means."""
    signal.signal(signal.SIGTERM, _terminated)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # As nohup leaves it.
        signal.signal(signal.SIGHUP, _hung_up)
    ensure_streams()
    code = _run(arguments)
    for stream in (sys.stdout, sys.stderr):
        code = _flushed(stream, code)
    sys.exit(code)


def _flushed(stream: TextIO, code: int) -> int:
    """The exit code once the stream has taken everything; Python would complain at its end if it had not."""
    try:
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if code == Environment.exit_code:
            return code  # It was told when it was tried first.
        return _told(f"error: cannot write: {error.strerror}", code or Environment.exit_code)
    return code


def _run(arguments: list[str] | None) -> int:
    if not (sys.argv[1:] if arguments is None else arguments):
        with contextlib.redirect_stdout(sys.stderr):
            app(args=["--help"], standalone_mode=False, prog_name="sage")
        return USAGE
    try:
        refuse_outside_tests(os.environ)
        code: Any = app(args=arguments, standalone_mode=False, prog_name="sage")
    except SageError as error:
        return _told(error.report(), error.exit_code)
    except _CliMistake as error:
        return _told(f"error: {_cli_mistake(error)}", USAGE)
    except (KeyboardInterrupt, typer.Abort):
        return _told(_INTERRUPTED, INTERRUPTED)
    except Terminated:
        return _told("terminated: sage status says what runs", TERMINATED)
    except MemoryError:
        return _told("error: there is not enough memory for sage to work", Environment.exit_code)
    except Exception as error:  # noqa: BLE001 - the edge: whatever is left is our own mistake, and no traceback is shown
        return _unexpected(error)
    if code == INTERRUPTED:
        # typer makes an exit code of a KeyboardInterrupt by itself, and says nothing.
        return _told(_INTERRUPTED, INTERRUPTED)
    return code if isinstance(code, int) else 0


def _cli_mistake(error: Exception) -> str:
    """What is wrong with the command line, with the argument or option that is meant, and where to read on."""
    told = getattr(error, "format_message", error.__str__)().rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{told[:1].lower()}{told[1:]}\n  hint: see {context.command_path if context else 'sage'} --help"


def _unexpected(error: Exception) -> int:
    if os.environ.get("SAGE_DEBUG"):
        raise error
    if isinstance(error, OSError) and error.errno in _MACHINE_IS_AT_ITS_END:
        return _told(f"error: the machine does not let sage work: {error.strerror}", Environment.exit_code)
    return _told(
        f"error: sage itself failed: {type(error).__name__}: {error}\n"
        "  hint: this is a bug; SAGE_DEBUG=1 shows where it is",
        INTERNAL,
    )


def _told(text: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
    return code


def _terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated


def _hung_up(_number: int, _frame: FrameType | None) -> None:
    """A terminal that is closed ends a command as SIGTERM does. Once: the kernel tells of it, and then the shell."""
    signal.signal(signal.SIGHUP, lambda _number, _frame: None)
    signal.raise_signal(signal.SIGTERM)
