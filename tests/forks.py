"""A process that has sage loaded and forks commands from it: thousands of them, each a process of its own, in minutes.

What runs is the real command line; only the half second that Python and the imports take is paid once. One JSON line
asks (`python -m tests.forks`), one answers.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.oracle import Ran, environment, gpu_environment

ROOT = Path(__file__).resolve().parent.parent


@dataclass(kw_only=True)
class Command:
    """A command of sage that runs. `said` is the file that its output and errors go to, together."""

    pid: int
    said: Path
    began: float
    # Epoch seconds.
    began_at: float
    server: "Forks"

    def wait(self) -> Ran:
        """Until it has ended. The code is minus a signal's number when one ended it."""
        code = self.server.ask({"wait": self.pid})["code"]
        text = self.said.read_text(encoding="utf-8", errors="replace")
        return Ran(code=code, stdout=text, stderr=text, seconds=time.monotonic() - self.began)

    def told_after_seconds(self) -> float:
        """How long it was until it wrote its last line, whoever was waited for meanwhile."""
        return self.said.stat().st_mtime - self.began_at

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class Forks:
    """The process from which commands are forked."""

    def __init__(self, process: "subprocess.Popen[str]", directory: Path) -> None:
        self._process, self._directory, self._count = process, directory, 0
        self._gpus = gpu_environment(directory)

    def start(self, state: Path, *arguments: str, more_environment: Mapping[str, str] | None = None) -> Command:
        # The loader reads LD_LIBRARY_PATH when a program starts, and these commands start none.
        assert gpu_environment(state.parent) == self._gpus, "a place gets its GPUs before its commands are forked"
        self._count += 1
        said = self._directory / f"said-{self._count}"
        variables = environment(state) | dict(more_environment or {})
        began, began_at = time.monotonic(), time.time()
        answer = self.ask(
            {"run": arguments, "environment": variables, "said": str(said), "directory": str(state.parent)}
        )
        return Command(pid=answer["pid"], said=said, began=began, began_at=began_at, server=self)

    def run(self, state: Path, *arguments: str, **more_environment: str) -> Ran:
        return self.start(state, *arguments, more_environment=more_environment).wait()

    def ask(self, question: Mapping[str, object]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert isinstance(answer, dict)
        return answer


@contextlib.contextmanager
def forks(directory: Path) -> Iterator[Forks]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forks"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **gpu_environment(directory)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Forks(process, directory)
    finally:
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
            _, status = os.waitpid(question["wait"], 0)
            print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _become(question)
        print(json.dumps({"pid": pid}), flush=True)


def _become(question: dict[str, Any]) -> NoReturn:
    from sage_reconcile.cli.main import main as sage

    said = os.open(question["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for descriptor, number in ((nowhere, 0), (said, 1), (said, 2)):
        os.dup2(descriptor, number)
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
