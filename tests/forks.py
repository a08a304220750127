"""A process that has sage loaded and forks commands from it: thousands of them, each a process of its own, in minutes.

What runs is the real command line; only the half second that Python and the imports take is paid once. One JSON line
asks (`python -m tests.forks`), one answers. Commands that go on while a test does (Place.started), that start under
other limits or libraries, or in namespaces, and those of tests/cli are started the long way, as a user's are.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.oracle import COMMAND_SECONDS, Ran, environment, gpu_libraries, run_sage

ROOT = Path(__file__).resolve().parent.parent

# What is read before sage's first line: the loader's and Python's own settings. A fork comes too late for them.
_READ_AT_THE_START = ("LD_", "PYTHON")


@dataclass(kw_only=True)
class Command:
    """A command of sage that runs. Its output and its errors go to these two files."""

    pid: int
    output: Path
    errors: Path
    began: float
    # Epoch seconds.
    began_at: float
    server: "Forks"

    def wait(self) -> Ran:
        """Until it has ended. The code is minus a signal's number when one ended it."""
        code = self.server.ask({"wait": self.pid, "seconds": COMMAND_SECONDS})["code"]
        assert code is not None, f"a command of sage hangs: it was ended after {COMMAND_SECONDS:g} s"
        seconds = time.monotonic() - self.began
        stdout, stderr = (path.read_text(encoding="utf-8", errors="replace") for path in (self.output, self.errors))
        return Ran(code=code, stdout=stdout, stderr=stderr, seconds=seconds)

    def told_after_seconds(self) -> float:
        """How long it was until it wrote its last line, whoever was waited for meanwhile."""
        return max(path.stat().st_mtime for path in (self.output, self.errors)) - self.began_at

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class Forks:
    """The process from which commands are forked; commands of places with GPUs are forked from another like it."""

    def __init__(self, process: "subprocess.Popen[str]", directory: Path, *, libraries: str = "") -> None:
        self._process, self._directory, self._count, self._questions = process, directory, 0, 0
        self._libraries = libraries
        self._with_gpus: Forks | None = None
        self._exits = contextlib.ExitStack()

    def start(
        self,
        state: Path,
        *arguments: str,
        directory: Path | None = None,
        more_environment: Mapping[str, str] | None = None,
    ) -> Command:
        libraries = gpu_libraries(state.parent)
        if libraries != self._libraries:
            return self._other(libraries).start(
                state, *arguments, directory=directory, more_environment=more_environment
            )
        self._count += 1
        output, errors = (self._directory / f"{stream}-{self._count}" for stream in ("output", "errors"))
        variables = environment(state) | dict(more_environment or {})
        began, began_at = time.monotonic(), time.time()
        answer = self.ask(
            {
                "run": arguments,
                "environment": variables,
                "streams": [os.devnull, str(output), str(errors)],
                "directory": str(directory or state.parent),
            }
        )
        return Command(pid=answer["pid"], output=output, errors=errors, began=began, began_at=began_at, server=self)

    def run(
        self,
        state: Path,
        *arguments: str,
        directory: Path | None = None,
        more_environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> Ran:
        """As oracle.run_sage, which does it where a fork would make a difference."""
        variables = more_environment or {}
        if before is not None or any(name.startswith(_READ_AT_THE_START) for name in variables):
            return run_sage(state, *arguments, directory=directory, more_environment=variables, before=before)
        return self.start(state, *arguments, directory=directory, more_environment=variables).wait()

    def _other(self, libraries: str) -> "Forks":
        assert libraries and not self._libraries, "no place loses its GPUs"
        if self._with_gpus is None:
            directory = self._directory / "with-gpus"
            directory.mkdir()
            self._with_gpus = self._exits.enter_context(forks(directory, libraries=libraries))
        return self._with_gpus

    def close(self) -> None:
        self._exits.close()

    def ask(self, question: Mapping[str, object]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._questions += 1
        self._process.stdin.write(json.dumps({**question, "number": self._questions}) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = {"number": 0}
        # A test whose time was up did not wait for its answer; the next one must not take it for its own.
        while answer["number"] < self._questions:
            answer = json.loads(self._process.stdout.readline())
        return answer


@contextlib.contextmanager
def forks(directory: Path, *, libraries: str = "") -> Iterator[Forks]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forks"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)} | ({"LD_LIBRARY_PATH": libraries} if libraries else {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    one = Forks(process, directory, libraries=libraries)
    try:
        yield one
    finally:
        one.close()
        assert process.stdin is not None
        process.stdin.close()
        process.wait(10)


def main() -> None:
    from sage_reconcile.app import project, serving, verbs, waiting  # noqa: F401 - loaded here, for all that are forked
    from sage_reconcile.cli import main as cli  # noqa: F401
    from sage_reconcile.cli import outcome  # noqa: F401
    from sage_reconcile.render import plan_json  # noqa: F401

    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = {"code": _code(question["wait"], question["seconds"])}
        else:
            answer = {"pid": os.fork()}
            if answer["pid"] == 0:
                _become(question)
        print(json.dumps({**answer, "number": question["number"]}), flush=True)


def _code(pid: int, seconds: float) -> int | None:
    """The exit code of a command, once it has ended; None when it had to be ended."""
    pidfd = os.pidfd_open(pid)
    has_ended, _, _ = select.select([pidfd], [], [], seconds)
    os.close(pidfd)
    if not has_ended:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) if has_ended else None


def _become(question: dict[str, Any]) -> NoReturn:
    from sage_reconcile.cli.main import main as sage

    modes = (os.O_RDONLY, *(os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND,) * 2)
    for number, (path, mode) in enumerate(zip(question["streams"], modes, strict=True)):
        os.dup2(os.open(path, mode), number)
    os.closerange(3, 64)
    os.environ.clear()
    os.environ.update(question["environment"])
    os.chdir(question["directory"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        sage(question["run"])
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
