"""The leak oracle: what a test must not leave behind, and what sage must agree about with the machine.

Goes in: a test's own directory and ports. Comes out: a sentence for each thing that is wrong; none when all is well.
It reads /proc and sockets by itself, and asks sage only where sage's word is what is judged.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from sage_reconcile.core.journal import parse_entry
from tests import fakenvml
from tests.fakenvml import Gpu, Mig, Process, Used

# A command of sage takes half a second by itself. This long means that it hangs.
COMMAND_SECONDS = 60.0

# The memory of a dead process comes back later than its port: on real GPUs within seconds.
_MEMORY_SECONDS = 10.0

# Who has this as 1 in the environment is a process of the test's own, and no engine.
STRANGER = "TEST_STRANGER"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A command of sage that has ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A live process that carries an engine's token."""

    pid: int
    session: int
    start_ticks: int
    engine: str
    # "PID:START_TICKS" of the engine's first process; empty at the gate.
    leader: str


def environment(state: Path) -> dict[str, str]:
    """sage's environment: a state directory and a lock of the test's own, its fake GPUs, and nothing else of sage."""
    # Without compiled modules every command would compile all of sage anew, which takes longer than the command.
    left_out = ("SAGE_", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    variables = {"SAGE_STATE_DIR": str(state), "SAGE_LOCK_FILE": str(state.with_name("lock"))}
    return kept | variables | gpu_environment(state.parent)


def gpu_file(root: Path) -> Path:
    """The file that says what GPUs a test has, if it has any."""
    return root / "nvml"


def gpu_environment(root: Path) -> dict[str, str]:
    """What makes a process see the test's fake GPUs; nothing where it has none."""
    file = gpu_file(root)
    return fakenvml.environment(fakenvml.library(), file) if file.exists() else {}


def gpu_libraries(root: Path) -> str:
    """LD_LIBRARY_PATH of a test's commands: the loader reads it when a program starts, so a fork comes too late."""
    return gpu_environment(root).get("LD_LIBRARY_PATH", "")


def run_sage(
    state: Path,
    *arguments: str,
    directory: Path | None = None,
    more_environment: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> Ran:
    """The real command line, as a process of its own and without a terminal.

    `before` runs in that process before it becomes sage.
    """
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "sage_reconcile", *arguments],
        cwd=directory or state.parent,
        env=environment(state) | dict(more_environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
        preexec_fn=before,
    )
    seconds = time.monotonic() - started
    return Ran(code=done.returncode, stdout=done.stdout, stderr=done.stderr, seconds=seconds)


def assert_no_leaks(
    state: Path,
    project_dir: Path | None,
    ports: range,
    said: Iterable[str] = (),
    *,
    again: bool = True,
    run: Callable[..., Ran] = run_sage,
) -> None:
    found = leaks(state, project_dir, ports, said, again=again, run=run)
    assert not found, "\n".join(found)


def leaks(
    state: Path,
    project_dir: Path | None,
    ports: range,
    said: Iterable[str] = (),
    *,
    again: bool = True,
    run: Callable[..., Ran] = run_sage,
    memory_seconds: float = _MEMORY_SECONDS,
) -> tuple[str, ...]:
    """All that is wrong, within the directory that holds the state.

    `project_dir` is the directory of manifests that was applied, None when nothing shall run any more; the lock lies
    beside the state. `said` are the outputs of the commands so far. `run` runs the commands that sage is asked with.
    `memory_seconds` is how long the memory of the dead may take to come back.

    1. No live process carries the token of an engine that no manifest asks for, and no engine runs twice.
    2. Whoever listens on one of the ports is a process of an engine.
    3. Nothing that was said or logged holds a traceback.
    4. Every line of every journal can be read.
    5. No file is half written.
    6. What is used of a fake GPU is what its file says, and what live engines and strangers hold of it.
    7. After an apply a plan is empty, and with `again` also: sage calls ready what the manifests ask for, and a further
       apply does nothing. These two cost a second.
    """
    wanted = wanted_ids(project_dir) if project_dir is not None else frozenset()
    found = [
        *_unwanted_processes(state.parent, wanted),
        *_strange_listeners(state.parent, ports),
        *_tracebacks(state, said),
        *_unreadable_journals(state),
        *_litter(state),
        *_strange_memory(state.parent, memory_seconds),
    ]
    if project_dir is not None:
        found += _unrest(run(state, "plan", str(project_dir), "--detailed-exitcode"))
        found += _unrest_of_a_second_apply(state, project_dir, wanted, run) if again else ()
    return tuple(found)


def wanted_ids(project_dir: Path) -> frozenset[str]:
    """The ids of all replicas that the manifests ask for."""
    ids = set()
    for path in [*project_dir.glob("*.yaml"), *project_dir.glob("*.yml")]:
        if path.stem == "sage":
            continue
        stack = yaml.safe_load(path.read_text(encoding="utf-8"))
        for engine in stack["engines"]:
            for replica in range(engine.get("replicas", 1)):
                ids.add(f"{stack['name']}/{engine['name']}" + (f"#{replica}" if replica else ""))
    return frozenset(ids)


def labelled(root: Path) -> tuple[Labelled, ...]:
    """The live processes with an engine's token whose manifests lie below `root`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (process := _labelled(int(entry.name), root)) is not None:
            found.append(process)
    return tuple(sorted(found, key=lambda process: (process.engine, process.start_ticks, process.pid)))


def _labelled(pid: int, root: Path) -> Labelled | None:
    variables = environ(pid)
    source = variables.get("SAGE_SOURCE")
    stat = stat_fields(pid)
    if "SAGE_ENGINE" not in variables or source is None or not Path(source).is_relative_to(root) or not stat:
        return None
    return Labelled(
        pid=pid,
        session=int(stat[3]),
        start_ticks=int(stat[19]),
        engine=variables["SAGE_ENGINE"],
        leader=variables.get("SAGE_LEADER", ""),
    )


def environ(pid: int) -> dict[str, str]:
    """A process's environment; empty when it is gone or may not be read."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    words = [word.decode(errors="replace").partition("=") for word in raw.split(b"\0") if word]
    return {name: value for name, _, value in words}


def stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat behind the command's name; empty when the process is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZXx" else fields


def alive(pid: int) -> bool:
    return bool(stat_fields(pid))


def _unwanted_processes(root: Path, wanted: frozenset[str]) -> list[str]:
    processes = labelled(root)
    found = [
        f"pid {process.pid} carries the token of {process.engine}, which nobody wants"
        for process in processes
        if process.engine not in wanted
    ]
    for engine in sorted(wanted):
        leaders = {process.leader for process in processes if process.engine == engine}
        if len(leaders) > 1:
            found.append(f"{engine} runs {len(leaders)} times: {', '.join(sorted(leaders))}")
    return found


def listened_ports() -> set[int]:
    """The ports on which somebody listens, at whatever address. To find out who it is costs much more."""
    # In /proc/net/tcp (proc(5)): own address and port, the other end's, and the state, of which 0A is TCP_LISTEN.
    tables = [Path(f"/proc/net/{name}") for name in ("tcp", "tcp6")]
    text = "".join(table.read_text(encoding="ascii") for table in tables if table.exists())
    return {int(port, 16) for port in re.findall(r": [0-9A-F]+:([0-9A-F]{4}) [0-9A-F]+:[0-9A-F]{4} 0A ", text)}


def _strange_listeners(root: Path, ports: range) -> list[str]:
    if not listened_ports() & set(ports):
        return []
    is_of_an_engine = _members(root)
    return [
        f"port {connection.laddr.port} is listened on by pid {connection.pid}, which is of no engine"
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port in ports
        if not is_of_an_engine(connection.pid)
    ]


def _members(root: Path) -> Callable[[int | None], bool]:
    """Whether a process is of an engine: it carries the token, or is in the session of one that does and leads it."""
    processes = labelled(root)
    pids = {process.pid for process in processes}
    sessions = {process.session for process in processes if process.session in pids}
    return lambda pid: pid in pids or _session(pid) in sessions


def _session(pid: int | None) -> int | None:
    fields = stat_fields(pid) if pid is not None else []
    return int(fields[3]) if fields else None


def _strange_memory(root: Path, seconds: float) -> list[str]:
    if not gpu_file(root).exists():
        return []
    deadline = time.monotonic() + seconds
    while (found := _memory_of_nobody(root)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _memory_of_nobody(root: Path) -> list[str]:
    file = gpu_file(root)
    entries = fakenvml.entries(file)
    is_of_an_engine = _members(root)
    live = [entry for entry in entries if isinstance(entry, Process) and _holds(entry)]
    found = [
        f"pid {holder.pid} holds {holder.mib} MiB of {holder.gpu} and is of no engine"
        for holder in live
        if not holder.elsewhere and not is_of_an_engine(holder.pid) and environ(holder.pid).get(STRANGER) != "1"
    ]
    for device in [entry for entry in entries if isinstance(entry, Gpu | Mig)]:
        known = [entry for entry in entries if isinstance(entry, Used) or entry in live]
        held_mib = sum(entry.mib for entry in known if _is_part(file, entry.gpu, device))
        used_mib = fakenvml.memory(file, device.uuid).used_mib
        if used_mib != held_mib:
            found.append(f"{used_mib} MiB of {device.uuid} are used, and the living hold {held_mib} MiB")
    return found


def _holds(process: Process) -> bool:
    fields = stat_fields(process.pid)
    return process.elsewhere or bool(fields) and process.start in (None, int(fields[19]))


def _is_part(file: Path, name: int | str, whole: Gpu | Mig) -> bool:
    try:
        part = fakenvml.device(file, name)
    except LookupError:
        # The test has taken the GPU away.
        return False
    return part == whole or isinstance(part, Mig) and fakenvml.device(file, part.gpu) == whole


def _tracebacks(state: Path, said: Iterable[str]) -> list[str]:
    found = [f"a traceback was shown: {text[-2000:]}" for text in said if "Traceback" in text]
    for path in sorted(state.rglob("*.log")):
        if "Traceback" in path.read_text(encoding="utf-8", errors="replace"):
            found.append(f"there is a traceback in {path.relative_to(state)}")
    return found


def _unreadable_journals(state: Path) -> list[str]:
    return [
        f"{path.relative_to(state)}:{number} cannot be read: {line[:200]!r}"
        for path in sorted(state.glob("*/journal.jsonl"))
        for number, line in enumerate(path.read_bytes().splitlines(), start=1)
        if parse_entry(line) is None
    ]


def _litter(state: Path) -> list[str]:
    return [f"{path.relative_to(state)} was left behind" for path in sorted(state.rglob(".*.tmp"))]


def unrecorded(state: Path) -> tuple[str, ...]:
    """A sentence for each running engine whose first process is on no record."""
    names = {path.stem.rpartition("@")[2] for path in state.glob("*/engines/*.json")}
    return tuple(
        f"{process.engine}, pid {process.pid}, runs and is on no record"
        for process in labelled(state.parent)
        if process.leader.startswith(f"{process.pid}:") and f"{process.pid}-{process.start_ticks}" not in names
    )


def _unrest(planned: Ran) -> list[str]:
    if planned.code == 0:
        return []
    return [f"a plan after an apply ends with {planned.code}: {planned.stdout}{planned.stderr}"]


def _unrest_of_a_second_apply(
    state: Path, project_dir: Path, wanted: frozenset[str], run: Callable[..., Ran]
) -> list[str]:
    found = []
    before, acts = _leaders(state.parent), _acts(state)
    applied = run(state, "apply", str(project_dir), "-y")
    if applied.code != 0:
        found.append(f"a further apply ends with {applied.code}: {applied.stderr}")
    if (_leaders(state.parent), _acts(state)) != (before, acts):
        found.append(f"a further apply did something: {applied.stdout}{applied.stderr}")
    told = run(state, "status", "-o", "json")
    rows: list[dict[str, Any]] = json.loads(told.stdout)["engines"]
    projects = {environ(process.pid).get("SAGE_PROJECT") for process in labelled(state.parent)}
    mine = {row["id"]: row["state"] for row in rows if row["project"] in projects}
    if mine != dict.fromkeys(wanted, "ready"):
        found.append(f"ready should be {sorted(wanted)}, and sage says {mine}")
    return found


def _leaders(root: Path) -> set[tuple[str, str]]:
    return {(process.engine, process.leader) for process in labelled(root)}


def _acts(state: Path) -> int:
    return sum(path.read_text(encoding="utf-8").count('"act_begun"') for path in state.glob("*/journal.jsonl"))
