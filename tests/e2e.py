"""A place for one end-to-end test: manifests, a state directory, a lock and ports that no other test has.

The command line and the engines are real processes. The engines are tests/fake_engine.py unless a test says otherwise.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sage_reconcile.core.journal import Entry, parse_entry
from tests import fakenvml
from tests.oracle import (
    STRANGER,
    Ran,
    alive,
    assert_no_leaks,
    environ,
    environment,
    gpu_file,
    labelled,
    leaks,
    listened_ports,
    run_sage,
)

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py").resolve()

_FIRST_PORT, _LAST_PORT = 23000, 29999
# 8 ports for llms, 6 for embedding servers, 2 that nobody uses; the rest are spare: for routers and for strangers.
_BLOCK = 24
_POOLED = 16

# A busy machine with two cores takes a while; what waits this long has failed.
DEADLINE_SECONDS = 15.0

_T = TypeVar("_T")


def until(found: Callable[[], _T], what: str, seconds: float = DEADLINE_SECONDS) -> _T:
    """What `found` returns, once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)
    return value


def fake(name: str, *modes: str, kind: str = "llm", **fields: Any) -> dict[str, Any]:
    """An engine of a manifest: the fake one, in these modes, without a GPU and quick to be stopped."""
    command = [sys.executable, "-S", str(FAKE_ENGINE), "--port", "{port}", "--host", "{host}", "--model", "{model}"]
    return {
        "name": name,
        "kind": kind,
        "model": f"{name}-model",
        "runtime": "command",
        "use_gpu": False,
        "command": [*command, "--kind", kind, *modes],
        "update": {"grace": "1s", "drain": "10s"},
        **fields,
    }


@dataclass(kw_only=True)
class Place:
    """Where one test works. `ports` are those that sage may choose from, `spare` those that it may not.

    `run` runs its commands: oracle.run_sage, or the quicker Forks.run.
    """

    root: Path
    project: str
    ports: range
    spare: range
    run: Callable[..., Ran] = run_sage
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.manifests.mkdir()
        self.write_settings(self.manifests)

    @property
    def manifests(self) -> Path:
        return self.root / "manifests"

    @property
    def state(self) -> Path:
        return self.root / "state"

    def write_settings(self, directory: Path) -> None:
        """A sage.yaml, so that the directory is this place's project."""
        first = self.ports.start
        pools = {
            "llm": f"{first}-{first + 7}",
            "embedding": f"{first + 8}-{first + 13}",
            "rerank": f"{first + 14}-{first + 15}",
        }
        settings = {"project": self.project, "ports": pools, "router": {"port": self.spare[-1]}}
        (directory / "sage.yaml").write_text(json.dumps(settings, indent=1), encoding="utf-8")

    def write(self, *engines: dict[str, Any], stack: str = "lab", directory: Path | None = None) -> Path:
        """A stack of these engines, in place of the one of that name."""
        path = (directory or self.manifests) / f"{stack}.yaml"
        # JSON is YAML.
        text = json.dumps({"version": 1, "name": stack, "engines": engines}, indent=1)
        path.write_text(text, encoding="utf-8")
        return path

    @property
    def nvml(self) -> Path:
        """The file of the fake GPUs, for what tests/fakenvml offers and `gpus` does not."""
        return gpu_file(self.root)

    def gpus(self, *machine: fakenvml.Entry, ahead_seconds: int = 0) -> None:
        """From now on commands see this machine, in place of the one before; what processes hold they go on holding.

        Without it they see the real one. Commands that are forked need it before the first of them.
        """
        fakenvml.write_state(self.nvml, *machine, ahead_seconds=ahead_seconds)

    def gpu_fake(self, name: str, *modes: str, mib: int, **fields: Any) -> dict[str, Any]:
        """An engine of a manifest: the fake one, on a GPU, of which it takes so much."""
        claims = ("--fake-nvml", str(self.nvml), "--gpu-memory", str(mib))
        return fake(name, *claims, *modes, **{"use_gpu": True, "gpu_memory": f"{mib}MiB", **fields})

    @contextmanager
    def foreign_on(self, gpu: int | str, mib: int, seconds: int = 600) -> Iterator["subprocess.Popen[bytes]"]:
        """A process that is nobody's engine and holds so much of a GPU, for so long at most."""
        with stranger("/bin/sleep", str(seconds)) as process:
            fakenvml.claim(self.nvml, fakenvml.device(self.nvml, gpu).uuid, process.pid, mib)
            yield process

    def used_mib(self, gpu: int | str) -> int:
        """What is used of a GPU or slice, whatever NVML is told to say of it."""
        return fakenvml.memory(self.nvml, gpu).used_mib

    def held_mib(self) -> dict[str, dict[str, int]]:
        """What each engine that runs holds of which GPU, by the engine's id and the GPU's UUID: not from sage."""
        holders = [entry for entry in fakenvml.entries(self.nvml) if isinstance(entry, fakenvml.Process)]
        held: dict[str, dict[str, int]] = {}
        for process in labelled(self.root):
            mine = held.setdefault(process.engine, {})
            for holder in holders:
                if (holder.pid, holder.start) == (process.pid, process.start_ticks):
                    mine[str(holder.gpu)] = mine.get(str(holder.gpu), 0) + holder.mib
        return held

    def sage(
        self,
        *arguments: str,
        expect: int = 0,
        directory: Path | None = None,
        before: Callable[[], None] | None = None,
        **more_environment: str,
    ) -> Ran:
        """A command that has to end with this exit code. `before` runs in its process before it becomes sage."""
        ran = self.run(self.state, *arguments, directory=directory, more_environment=more_environment, before=before)
        self.said.append(ran.stderr)
        assert ran.code == expect, f"sage {' '.join(arguments)} ended with {ran.code}: {ran.stdout}\n{ran.stderr}"
        return ran

    def apply(self, *options: str, expect: int = 0, **more_environment: str) -> Ran:
        return self.sage("apply", str(self.manifests), "-y", *options, expect=expect, **more_environment)

    @contextmanager
    def started(self, *arguments: str, **more_environment: str) -> Iterator["subprocess.Popen[str]"]:
        """A command that goes on while the test does."""
        process = subprocess.Popen(
            [sys.executable, "-m", "sage_reconcile", *arguments],
            cwd=self.root,
            env=environment(self.state) | more_environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            self.said.append(process.communicate()[1])

    def plan(self, *options: str, expect: int = 0) -> dict[str, Any]:
        """The JSON of `sage plan`."""
        ran = self.sage("plan", str(self.manifests), "-o", "json", *options, expect=expect)
        return _object(ran.stdout)

    def status(self, *options: str, expect: int = 0) -> dict[str, Any]:
        """The JSON of `sage status`, of this project's engines."""
        return _object(self.sage("status", "-p", self.project, "-o", "json", *options, expect=expect).stdout)

    def engines(self) -> dict[str, dict[str, Any]]:
        """Each engine of the status, by its id."""
        return {row["id"]: row for row in self.status()["engines"]}

    def pids(self) -> dict[str, int]:
        """The first process of each engine that runs, by the engine's id: from /proc, not from sage."""
        processes = labelled(self.root)
        leaders = {
            process.engine: process.pid for process in processes if process.leader.partition(":")[0] == str(process.pid)
        }
        return dict(sorted(leaders.items()))

    def homes(self) -> dict[str, int]:
        """The port of each engine that runs, by the engine's id: from the labels, not from sage."""
        placements = {name: json.loads(environ(pid)["SAGE_PLACEMENT"]) for name, pid in self.pids().items()}
        return {name: placement["placement"]["port"] for name, placement in placements.items()}

    def failing(self, *wishes: str) -> dict[str, str]:
        """The environment in which a command fulfils these wishes at its failpoints (world/failpoints.py).

        What it reached is in `reached` afterwards.
        """
        self.trace.unlink(missing_ok=True)
        return {"SAGE_TEST": "1", "SAGE_FAILPOINTS": ",".join(wishes), "SAGE_FAILPOINT_TRACE": str(self.trace)}

    @property
    def trace(self) -> Path:
        return self.root / "failpoints"

    def journal(self) -> tuple[Entry, ...]:
        lines = (self.state / self.project / "journal.jsonl").read_bytes().splitlines()
        entries = [parse_entry(line) for line in lines]
        return tuple(entry for entry in entries if entry is not None)

    def log(self, engine: str) -> str:
        """What an engine has said: `engine` is its id."""
        path = self.state / self.project / "logs" / f"{engine}.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def assert_at_rest(self, *, again: bool = False) -> None:
        """The oracle, after an apply that converged; `again` applies once more."""
        assert_no_leaks(self.state, self.manifests, self.ports, self.said, again=again, run=self.run)

    def assert_nothing_left(self) -> None:
        """The oracle, when nothing shall run."""
        assert_no_leaks(self.state, None, self.ports, self.said)

    def leave(self) -> None:
        """Stop what runs here, as a user would. What is left after that is a failure, and then ended by its pid."""
        trouble = []
        if labelled(self.root):
            down = self.run(self.state, "down", "-p", self.project, "-y")
            self.said.append(down.stderr)
            if down.code != 0:
                trouble.append(f"sage down ended with {down.code}: {down.stderr}")
        trouble += leaks(self.state, None, self.ports, self.said)
        for process in labelled(self.root):
            kill(process.pid)
        assert not trouble, "\n".join(trouble)


@contextmanager
def place_in(root: Path, run: Callable[..., Ran] = run_sage) -> Iterator[Place]:
    """A place below a directory; it is left clean, or the test fails."""
    with _block() as first:
        place = Place(
            root=root,
            project=f"t{first}-{os.getpid()}",
            ports=range(first, first + _POOLED),
            spare=range(first + _POOLED, first + _BLOCK),
            run=run,
        )
        yield place
        place.leave()


@contextmanager
def _block() -> Iterator[int]:
    """The first of a block of ports that are this test's alone, on the whole machine.

    An abstract socket is the token: the kernel lets one process have it, and takes it back when that process ends.
    Each worker begins at another block, and each test at the next, so that a port is not used again at once.
    """
    listened = listened_ports()
    starts = list(range(_FIRST_PORT, _LAST_PORT - _BLOCK, _BLOCK))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    begin = worker * 97 + time.monotonic_ns() // 10**8
    for turn in range(len(starts)):
        first = starts[(begin + turn) % len(starts)]
        with socket.socket(socket.AF_UNIX) as token:
            try:
                token.bind(f"\0sage-tests-ports-{first}")
            except OSError:
                continue
            if not listened & set(range(first, first + _BLOCK)):
                yield first
                return
    raise AssertionError("no block of ports is free for this test")


@contextmanager
def stranger(*command: str, directory: Path | None = None, **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that is nobody's engine, ended with the test. It must be left alone by everything that sage does."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SAGE_")}
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=kept | {STRANGER: "1"} | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def kill(pid: int) -> None:
    """SIGKILL, and wait until the process is gone."""
    if alive(pid):
        os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), f"pid {pid} ends")


def listens(port: int) -> bool:
    return port in listened_ports()


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    assert isinstance(value, dict)
    return value
