"""The doors to processes, with real ones: the gate, the port that is held, and signals that cannot hit a stranger."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from sage_reconcile.app.host import LocalHost
from sage_reconcile.core.identity import ProcessIdentity
from sage_reconcile.core.orders import Spawn, Spawned
from sage_reconcile.core.plan import StartEngine
from sage_reconcile.core.resolved import Placement, Resolved
from sage_reconcile.core.spec import canonical_json, written_fields
from sage_reconcile.errors import Environment
from sage_reconcile.world import processes, sockets
from tests.builders import spec, the_id

BOOT = processes.boot_id()
NODE = processes.node_name()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def gated(tmp_path: Path, *argv: str, port: int = 0, hold: bool = True) -> processes.Gated:
    log = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    try:
        return processes.spawn(
            Placement(node=NODE, host="127.0.0.1", port=port or free_port()),
            argv or ("/bin/sleep", "60"),
            {"SAGE_TEST": "yes"},
            directory="/",
            log_fd=log,
            boot=BOOT,
            hold=hold,
        )
    finally:
        os.close(log)


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that waits to be signalled."""
    process = subprocess.Popen(["/bin/sleep", "60"])
    yield process
    process.kill()
    process.wait()


def identity_of(process: "subprocess.Popen[bytes]") -> ProcessIdentity:
    found = processes.identity(process.pid, node=NODE, boot=BOOT)
    assert found is not None
    return found


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_a_process_whose_sage_dies_before_the_release_exits_and_never_runs_its_program(tmp_path: Path) -> None:
    waiting = gated(tmp_path, "/bin/sh", "-c", f"touch {tmp_path}/ran")
    waiting.abandon()
    assert waiting.process.returncode == 111
    assert not (tmp_path / "ran").exists()


def test_a_released_process_keeps_its_identity_and_names_itself(tmp_path: Path) -> None:
    waiting = gated(tmp_path, "/bin/sh", "-c", "echo $SAGE_LEADER; exec sleep 60")
    waiting.release()
    ours = waiting.identity
    try:
        until(lambda: (tmp_path / "log").read_text(), "it runs")
        assert (tmp_path / "log").read_text() == f"{ours.pid}:{ours.start_ticks}:{processes.pid_namespace()}\n"
        assert processes.identity(ours.pid, node=NODE, boot=BOOT) == ours
        found = processes.stat(ours.pid)
        assert found is not None and found.session == ours.pid
    finally:
        assert processes.send_signal(ours, signal.SIGKILL, boot=BOOT)
        waiting.process.wait()


def test_an_engine_inherits_the_allow_list_and_nothing_else() -> None:
    ours = {"PATH": "/bin", "HOME": "/h", "LC_ALL": "C", "HF_HOME": "/hf", "HF_TOKEN": "t", "SSL_CERT_FILE": "/c"}
    theirs = {"AWS_SECRET_ACCESS_KEY": "x", "LD_PRELOAD": "/x", "PYTHONPATH": "/x", "CUDA_VISIBLE_DEVICES": "0"}
    assert processes.inherited(ours | theirs | {"SAGE_STATE_DIR": "/s", "HTTP_PROXY": "p"}) == ours


def start(port: int, *argv: str) -> StartEngine:
    the_spec = spec("chat")
    return StartEngine(
        step=0,
        after=(),
        engine=the_id("lab/chat"),
        source="/srv",
        written=canonical_json(written_fields(the_spec)),
        resolved=Resolved(
            placement=Placement(node=NODE, host="127.0.0.1", port=port), runtime="command", argv=argv, directory="/"
        ),
        env=(("CUDA_VISIBLE_DEVICES", ""),),
        kind="llm",
        model="chat",
        health_path="/health",
        ready_seconds=10,
        waits=True,
        needs=(),
        hold=True,
    )


def test_an_engine_that_cannot_be_written_down_is_never_started(tmp_path: Path) -> None:
    root = tmp_path / "state"
    (root / "lab").mkdir(parents=True, mode=0o700)
    (root / "lab").chmod(0o700)
    root.chmod(0o700)
    (root / "lab" / "engines").write_text("in the way of the records")
    with pytest.raises(Environment, match="engines"):
        LocalHost(root=root).do(Spawn(act=start(free_port(), "/bin/sh", "-c", f"touch {tmp_path}/ran")))
    assert not (tmp_path / "ran").exists()


def test_an_engine_is_on_record_before_its_program_runs(tmp_path: Path) -> None:
    """The program itself looks for the record at its first breath."""
    root = tmp_path / "state"
    host = LocalHost(root=root)
    looks = f"ls {root}/lab/engines > {tmp_path}/seen; exec sleep 60"
    result = host.do(Spawn(act=start(free_port(), "/bin/sh", "-c", looks)))
    assert isinstance(result, Spawned) and result.leader is not None
    try:
        until(lambda: (tmp_path / "seen").exists() and (tmp_path / "seen").read_text(), "it looked")
        assert f"{result.leader.pid}-{result.leader.start_ticks}.json" in (tmp_path / "seen").read_text()
    finally:
        processes.send_signal(result.leader, signal.SIGKILL, boot=BOOT)
        until(lambda: host.look().exits, "it is gone")


# --- ports ------------------------------------------------------------------------------------------------------------


def test_a_taken_port_is_found_before_anything_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(processes.CannotSpawn, match="cannot be bound"):
        gated(tmp_path, port=taken.getsockname()[1])


def test_a_held_port_is_refused_to_a_plain_binder_and_free_for_an_engine(tmp_path: Path) -> None:
    port = free_port()
    waiting = gated(tmp_path, port=port)
    try:
        with socket.socket() as plain, pytest.raises(OSError, match="in use"):
            plain.bind(("127.0.0.1", port))
        for options in ((socket.SO_REUSEADDR,), (socket.SO_REUSEPORT,), (socket.SO_REUSEADDR, socket.SO_REUSEPORT)):
            with socket.socket() as engine:
                for option in options:
                    engine.setsockopt(socket.SOL_SOCKET, option, 1)
                engine.bind(("127.0.0.1", port))
                engine.listen()
    finally:
        waiting.abandon()


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_listening_socket_is_found_with_its_holder(family: socket.AddressFamily, address: str) -> None:
    with socket.create_server((address, 0), family=family) as server:
        found, gaps = sockets.listeners([os.getpid()])
        (mine,) = [fact for fact in found if fact.port == server.getsockname()[1]]
        assert (mine.address, mine.pids, mine.uid, gaps) == (address, (os.getpid(),), os.getuid(), ())


# --- signals ----------------------------------------------------------------------------------------------------------


def test_a_later_process_with_the_same_pid_is_never_signalled(sleeper: "subprocess.Popen[bytes]") -> None:
    earlier = replace(identity_of(sleeper), start_ticks=identity_of(sleeper).start_ticks - 1)
    assert not processes.send_signal(earlier, signal.SIGKILL, boot=BOOT)
    assert sleeper.poll() is None


def test_a_process_of_another_boot_is_never_signalled(sleeper: "subprocess.Popen[bytes]") -> None:
    before = replace(identity_of(sleeper), boot_id="an earlier boot")
    assert not processes.send_signal(before, signal.SIGKILL, boot=BOOT)
    assert sleeper.poll() is None


def test_sage_and_its_ancestors_are_never_signalled() -> None:
    for pid in processes.own_pids():
        found = processes.identity(pid, node=NODE, boot=BOOT)
        if found is not None:
            assert not processes.send_signal(found, signal.SIGCONT, boot=BOOT)


def test_the_right_process_is_signalled(sleeper: "subprocess.Popen[bytes]") -> None:
    assert processes.send_signal(identity_of(sleeper), signal.SIGTERM, boot=BOOT)
    assert sleeper.wait(timeout=5) == -signal.SIGTERM
    assert not processes.send_signal(replace(identity_gone(sleeper)), signal.SIGTERM, boot=BOOT)


def identity_gone(process: "subprocess.Popen[bytes]") -> ProcessIdentity:
    return ProcessIdentity(node=NODE, boot_id=BOOT, pid=process.pid, start_ticks=1)


def test_a_zombie_has_no_identity() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    until(lambda: (found := processes.stat(child.pid)) is not None and found.status == "Z", "it is a zombie")
    assert processes.identity(child.pid, node=NODE, boot=BOOT) is None
    child.wait()


def test_a_name_with_spaces_and_brackets_does_not_confuse_the_fields(tmp_path: Path) -> None:
    strange = tmp_path / "a) S 1 (b"
    strange.symlink_to("/bin/sleep")
    process = subprocess.Popen([strange, "60"])
    try:
        found = processes.stat(process.pid)
        assert found is not None
        assert found.parent_pid == os.getpid()
    finally:
        process.kill()
        process.wait()


def test_threads_of_the_kernel_are_not_looked_into() -> None:
    """They have no program, no environment and no memory of a GPU, and on a large machine there are thousands."""
    found, _ = processes.processes(node="box", boot="boot")
    pids = {fact.identity.pid for fact in found}

    assert os.getpid() in pids
    # In a container there are none to be seen, and pid 2 is anybody.
    if Path("/proc/2/comm").exists() and Path("/proc/2/comm").read_text() == "kthreadd\n":
        children = {pid for pid in psutil.pids() if (seen := processes.stat(pid)) and 2 in (pid, seen.parent_pid)}
        assert children and not children & pids
