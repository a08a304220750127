"""Processes that hang, survive, hide, die and are mistaken for others; programs and machines that can start none.

Catalogue P5, P9 to P16, P18, P19, P24 to P26. What needs pids of its own runs in a pid namespace.
"""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sage_reconcile.app.host import LocalHost
from sage_reconcile.core.desired import DesiredState
from sage_reconcile.core.identity import ProcessIdentity
from sage_reconcile.core.journal import ActBegun, ActDone, PlanBegun
from sage_reconcile.core.observed import Engine, ObservedState
from sage_reconcile.core.orders import Kill, Spawn
from sage_reconcile.core.plan import StartEngine
from sage_reconcile.core.planner import make_plan
from sage_reconcile.drive.reconciler import Outcome, apply_plan
from sage_reconcile.world import processes
from sage_reconcile.world.records import Records
from tests import builders
from tests.e2e import FAKE_ENGINE, Place, fake, kill, listens, place_in, stranger, until
from tests.fakes import FakeHost, MemoryJournal
from tests.namespaces import CAP_SYS_PTRACE, inside, mount, without
from tests.oracle import Ran, alive, environ, environment, labelled, run_sage, stat_fields

CHAOS = os.environ.get("CHAOS") == "1"

# How often a pid is given to an innocent.
REUSES = 1000 if CHAOS else 200

_QUICK = {"grace": "0.4s", "drain": "10s"}


# --- P5, P9 to P13: engines that do not end by themselves -------------------------------------------------------------


def test_p5_engine_that_never_listens_is_ended_with_its_whole_group(place: Place) -> None:
    place.write(fake("hangs", "--bind-after", "60", "--fork-child", "--child-ignore-term", update=_QUICK))

    ran = place.apply("--timeout", "1s", expect=5)

    port = place.ports[0]
    assert f"lab/hangs not ready after 1 s: does not listen on 127.0.0.1:{port} yet" in ran.stderr
    assert labelled(place.root) == ()
    assert not listens(port)
    place.write(fake("hangs"))
    place.apply()
    assert place.homes() == {"lab/hangs": port}


def test_p9_stop_is_done_only_once_the_whole_group_and_the_port_are_gone(place: Place) -> None:
    """The leader and its worker are deaf, and the worker has the port too."""
    place.write(
        fake("chat", "--ignore-term", "--fork-child", "--child-ignore-term", "--child-holds-port", update=_QUICK)
    )
    place.apply()
    leader, port = place.pids()["lab/chat"], place.homes()["lab/chat"]
    child = child_of(place)

    place.sage("down", str(place.manifests), "-y")

    assert not alive(leader) and not alive(child)
    assert not listens(port)
    begun, done, _ = place.journal()[-3:]
    assert isinstance(begun, ActBegun) and isinstance(done, ActDone)
    # The grace is 0.4 s; the rest is looking.
    assert done.at - begun.at < 4
    place.assert_nothing_left()


def test_p10_worker_that_holds_the_port_of_a_killed_leader_is_ended_before_the_restart_on_that_port(
    place: Place,
) -> None:
    place.write(fake("chat", "--fork-child", "--child-ignore-term", "--child-holds-port", update=_QUICK))
    place.apply()
    leader, port = place.pids()["lab/chat"], place.homes()["lab/chat"]
    child = child_of(place)
    kill(leader)
    assert listens(port)

    row = place.engines()["lab/chat"]
    place.apply()

    assert (row["state"], row["pid"], row["members"]) == ("failed", None, [child])
    assert not alive(child)
    assert child_of(place) != child
    begun = [entry for entry in place.journal() if isinstance(entry, PlanBegun)][-1]
    assert [act.split()[0] for act in begun.acts] == ["stop", "start"]
    assert place.homes() == {"lab/chat": port}
    place.assert_at_rest()


@pytest.mark.parametrize("leader_is_killed", [False, True], ids=["leader alive", "leader killed"])
def test_p11_daemon_with_a_session_of_its_own_is_found_by_its_label_and_ended(
    place: Place, leader_is_killed: bool
) -> None:
    place.write(
        fake("chat", "--fork-child", "--child-setsid", "--child-double-fork", "--child-ignore-term", update=_QUICK)
    )
    place.apply()
    leader, child = place.pids()["lab/chat"], child_of(place)
    assert stat_fields(child)[1] != str(leader)
    if leader_is_killed:
        kill(leader)

    place.sage("down", str(place.manifests), "-y")

    assert not alive(child)
    place.assert_nothing_left()


def test_p12_child_without_a_label_is_found_by_its_session_and_the_record_when_its_leader_is_gone(place: Place) -> None:
    place.write(fake("chat", "--fork-child", "--child-wipe-environ", "--child-ignore-term", update=_QUICK))
    place.apply()
    leader, child = place.pids()["lab/chat"], child_of(place)
    try:
        kill(leader)

        row = place.engines()["lab/chat"]
        place.apply()

        assert (row["state"], row["pid"], row["members"]) == ("failed", None, [child])
        assert not alive(child)
    finally:
        kill(child)
    place.assert_at_rest()


def test_p12_child_without_a_label_and_a_session_is_shown_with_a_note_and_never_signalled(place: Place) -> None:
    """Nothing but its output ties it to the engine."""
    place.write(fake("chat", "--fork-child", "--child-setsid", "--child-wipe-environ", update=_QUICK))
    place.apply()
    child = child_of(place)
    try:
        place.sage("down", str(place.manifests), "-y")

        assert alive(child)
        (shown,) = [one for one in place.status()["foreign"] if one["pid"] == child]
        assert str(place.state / place.project / "logs" / "lab" / "chat.log") in shown["note"]
    finally:
        kill(child)
    place.assert_nothing_left()


# A session of its own, and after a sign a program with an empty environment in the same process.
_TURNCOAT = """
import os, sys, time
os.setsid()
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
os.execve("/bin/sleep", ["sleep", "600"], dict())
"""


def test_p12_child_that_gives_up_its_label_while_sage_works_stays_a_member(place: Place) -> None:
    """As long as this sage works it knows whom it has seen; the next one could not tell (it shows a stranger)."""
    sign = place.root / "sign"
    chat = fake("chat")
    child = f'{shlex.join([sys.executable, "-c", _TURNCOAT, str(sign)])} & exec "$@"'
    place.write({**chat, "command": ["/bin/sh", "-c", child, "sh", *chat["command"]]})
    place.apply()
    leader = place.pids()["lab/chat"]
    host = LocalHost(root=place.state)
    before = chat_of(place, host.look())
    (turncoat,) = {process.pid for process in before.members} - {leader}

    sign.touch()
    until(lambda: not environ(turncoat), "it has given up its label")
    kill(leader)
    after = chat_of(place, host.look())

    os.kill(turncoat, signal.SIGKILL)
    assert (after.leader_alive, [process.pid for process in after.members]) == (False, [turncoat])


def chat_of(place: Place, observed: ObservedState) -> Engine:
    (engine,) = (one for one in observed.engines if one.id.full == f"{place.project}:lab/chat")
    return engine


def test_p13_engine_that_survives_sigkill_is_stuck_and_its_port_is_given_to_nobody() -> None:
    """Simulated: no process of a test can be made to survive SIGKILL, as one in an uninterruptible sleep does."""
    engine = builders.running("lab/chat", 8000, 100, update={"grace": "1s"})
    now = builders.world(engine)
    host = FakeHost(world=now, undead=frozenset({"lab/chat"}))
    edited = builders.desired(builders.wanted("lab/chat", args=["--more"]))
    newcomer = builders.desired(*edited.wanted, builders.wanted("lab/other"))

    outcome = _carried_out(edited, host)
    later = _carried_out(newcomer, host)

    assert outcome.result == "stuck"
    assert later.result != "converged"
    assert "SIGKILL does not end pid 100" in outcome.failures[0].why
    assert any(isinstance(order, Kill) for order in host.orders)
    assert engine.leader in {one.leader for one in host.world.engines if one.state == "stuck"}
    placed = {act.resolved.placement.port for act in later.plan.acts if isinstance(act, StartEngine)}
    spawned = [str(order.act.engine) for order in host.orders if isinstance(order, Spawn)]
    assert 8000 not in placed
    assert "lab/chat" not in spawned and "lab/other" in spawned


def _carried_out(wish: DesiredState, host: FakeHost) -> Outcome:
    seen = host.look()
    return apply_plan(make_plan(wish, seen), wish, seen, host, MemoryJournal(), revision=(), pid=1)


def child_of(place: Place) -> int:
    """The child that the chat engine says it has."""
    (pid,) = re.findall(r"child pid (\d+)", place.log("lab/chat"))
    return int(pid)


# --- P14: a pid that was given to somebody else -----------------------------------------------------------------------

# The pid that is used again and again inside the namespace.
_PID = 4000


def test_p14_later_process_with_the_pid_of_an_earlier_one_is_never_signalled() -> None:
    """The earlier one lived longer than a clock tick (10 ms), as every engine does: start times are told in ticks."""
    assert inside(("pid",), give_pids_away, str(REUSES)).split() == [str(REUSES), "reuses,", "0", "hits"]


@pytest.mark.parametrize("moment", ["signal.begin", "signal.opened"])
def test_p14_process_that_takes_the_pid_while_a_signal_is_being_sent_is_not_hit(tmp_path: Path, moment: str) -> None:
    times = 100 if CHAOS else 20

    said = inside(("pid",), give_pids_away_meanwhile, str(tmp_path / "trace"), moment, str(times))

    assert said.split() == [str(times), "reuses,", "0", "hits"]


def test_p14_down_ends_the_engine_and_not_the_innocent_that_has_the_pid_of_its_leader(tmp_path: Path) -> None:
    """A record and the label of a child both name the pid, and the innocent has made the session of that number."""
    inside(("pid",), stop_an_engine_whose_pid_went_to_an_innocent, str(tmp_path))


def give_pids_away(times: str) -> None:
    node, boot = processes.node_name(), processes.boot_id()
    hits = 0
    for _ in range(int(times)):
        earlier = _born(_PID)
        target = processes.identity(earlier, node=node, boot=boot)
        assert target is not None
        _wait_for_the_tick_after(target)
        _ended(earlier)
        innocent = _born(_PID)
        processes.send_signal(target, signal.SIGKILL, boot=boot)
        hits += _was_hit(innocent)
    print(f"{times} reuses, {hits} hits")


def give_pids_away_meanwhile(trace: str, moment: str, times: str) -> None:
    node, boot = processes.node_name(), processes.boot_id()
    os.environ |= {"SAGE_TEST": "1", "SAGE_FAILPOINTS": f"{moment}=stop", "SAGE_FAILPOINT_TRACE": trace}
    hits = 0
    for _ in range(int(times)):
        Path(trace).unlink(missing_ok=True)
        earlier = _born(_PID)
        target = processes.identity(earlier, node=node, boot=boot)
        assert target is not None
        sender = os.fork()
        if sender == 0:
            os._exit(processes.send_signal(target, signal.SIGKILL, boot=boot))
        assert os.WIFSTOPPED(os.waitpid(sender, os.WUNTRACED)[1])
        if moment == "signal.begin":  # Once the pidfd is open, the tick does not matter.
            _wait_for_the_tick_after(target)
        _ended(earlier)
        innocent = _born(_PID)
        os.kill(sender, signal.SIGCONT)
        assert os.waitpid(sender, 0)[1] == 0, "it says that it signalled somebody"
        hits += _was_hit(innocent)
    print(f"{times} reuses, {hits} hits")


def stop_an_engine_whose_pid_went_to_an_innocent(root: str) -> None:
    with place_in(Path(root)) as place:
        place.write(fake("chat", "--fork-child", "--child-setsid", "--child-ignore-term", update=_QUICK))
        place.apply()
        leader, child = place.pids()["lab/chat"], child_of(place)
        _ended(leader)
        innocent = _born(leader, leads_session=True)

        place.sage("down", str(place.manifests), "-y")

        assert not alive(child)
        assert not _was_hit(innocent)


def _born(pid: int, *, leads_session: bool = False) -> int:
    """A process of this very pid, which waits to be signalled. Only where this process is PID 1."""
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1), encoding="ascii")
    child = os.fork()
    if child == 0:
        if leads_session:
            os.setsid()
        while True:
            signal.pause()
    assert child == pid
    return pid


def _ended(pid: int) -> None:
    """Killed and reaped: the pid is free."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _was_hit(innocent: int) -> bool:
    """Whether anything but this SIGTERM of ours ends it."""
    os.kill(innocent, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(innocent, 0)[1]) != -signal.SIGTERM


def _wait_for_the_tick_after(target: ProcessIdentity) -> None:
    tick_seconds = 1 / os.sysconf("SC_CLK_TCK")
    while time.clock_gettime(time.CLOCK_BOOTTIME) < (target.start_ticks + 1) * tick_seconds:
        time.sleep(tick_seconds / 10)


# --- P15: another boot ------------------------------------------------------------------------------------------------


def test_p15_after_a_reboot_records_name_nobody_and_everything_starts_anew(place: Place) -> None:
    """Not a real reboot: records and routers' files are rewritten as an earlier boot would have left them.

    Their pids and start times are those of innocents of ours, so that only the boot tells them apart.
    """
    place.write(fake("chat"), fake("other"))
    place.apply()
    homes = place.homes()
    for pid in place.pids().values():
        kill(pid)
    with ExitStack() as innocents:
        sleepers = [innocents.enter_context(stranger("/bin/sleep", "60")) for _ in range(3)]
        identities = [_identity(sleeper.pid) for sleeper in sleepers]
        old = rewritten_as_of_another_boot(place, identities)

        steps = [(step["action"], step["engine"], step["reason"]) for step in place.plan()["steps"]]
        status = place.engines()
        place.apply()

        assert steps == [("start", "lab/chat", "after_reboot"), ("start", "lab/other", "after_reboot")]
        assert {name: row["pid"] for name, row in status.items()} == {"lab/chat": None, "lab/other": None}
        assert [sleeper.poll() for sleeper in sleepers] == [None] * 3
        assert place.homes() == homes
        place.assert_at_rest()
        assert not [path for path in old if path.exists()]


def rewritten_as_of_another_boot(place: Place, innocents: list[ProcessIdentity]) -> list[Path]:
    """Put the innocents into the places of the engines' processes and of a router. The paths of the records."""
    records = Records(place.state)
    earlier = records.read()
    boot = "00000000-0000-0000-0000-000000000000"
    for record, innocent in zip(earlier, innocents, strict=False):
        leader = replace(innocent, boot_id=boot)
        named = f"{leader.pid}:{leader.start_ticks}:{processes.pid_namespace()}"
        label = tuple((name, named if name == "SAGE_LEADER" else value) for name, value in record.label)
        records.write(replace(record, leader=leader, label=label, phase="draining", proved=True))
        records.write_proof(record.engine, leader, failure="")
        records.forget(record.engine, record.leader)
    router = place.state / "routers" / f"{innocents[-1].pid}.json"
    router.parent.mkdir(mode=0o700)
    router.write_text(json.dumps({"pid": innocents[-1].pid}), encoding="utf-8")
    router.with_suffix(".lock").touch(mode=0o600)
    return sorted((place.state / place.project / "engines").iterdir())


def _identity(pid: int) -> ProcessIdentity:
    found = processes.identity(pid, node=processes.node_name(), boot=processes.boot_id())
    assert found is not None
    return found


# --- P16: the dead that are not buried --------------------------------------------------------------------------------


def test_p16_engines_whose_bodies_are_never_reaped_count_as_dead(tmp_path: Path) -> None:
    inside(("pid",), live_where_nobody_reaps, str(tmp_path))


def live_where_nobody_reaps(root: str) -> None:
    """PID 1 of this namespace is this test, and it waits for none of the engines."""
    with place_in(Path(root)) as place:
        place.write(fake("chat"), fake("other"))
        place.apply()
        first, homes = place.pids(), place.homes()
        for pid in first.values():
            kill(pid)
        assert [_letter(pid) for pid in first.values()] == ["Z", "Z"]

        steps = [(step["action"], step["engine"], step["reason"]) for step in place.plan()["steps"]]
        states = {name: (row["state"], row["pid"]) for name, row in place.engines().items()}
        place.apply()

        assert steps == [("start", "lab/chat", "crashed"), ("start", "lab/other", "crashed")]
        assert states == {"lab/chat": ("missing", None), "lab/other": ("missing", None)}
        assert place.homes() == homes
        place.assert_at_rest()
        place.sage("down", str(place.manifests), "-y")
        place.assert_nothing_left()


@pytest.fixture
def threadless(place: Place) -> Iterator[int]:
    """The pid of an engine that serves, and whose first thread has ended; the oracle takes it for a zombie."""
    place.write(fake("chat", "--first-thread-ends", update=_QUICK))
    place.apply()
    pid = place.pids()["lab/chat"]
    os.kill(pid, signal.SIGUSR1)
    until(lambda: _letter(pid) == "Z", "its first thread has ended")
    yield pid
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    until(lambda: not listens(place.ports[0]), "it has ended")


def test_p16_engine_whose_first_thread_has_ended_counts_as_alive_and_can_be_stopped(
    place: Place, threadless: int
) -> None:
    (row,) = place.status()["engines"]
    plan = place.plan()
    place.sage("down", str(place.manifests), "-y")

    assert (row["pid"], row["members"]) == (threadless, [threadless])
    assert plan["steps"] == []
    assert not listens(place.ports[0])


def test_p16_engine_whose_first_thread_has_ended_still_holds_its_port(place: Place, threadless: int) -> None:
    row = place.engines()["lab/chat"]

    assert (row["pid"], row["state"], row["reason"]) == (threadless, "ready", "")


def _letter(pid: int) -> str:
    """The letter of proc(5) for a process's state, also of a zombie; empty when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


# --- P18, P19: what is lost, and what is somebody else's --------------------------------------------------------------


@pytest.mark.parametrize("moment", ["gate.released", *(["journal.synced@2", "gate.recorded"] if CHAOS else [])])
def test_p18_state_directory_that_vanishes_in_the_middle_of_an_apply_costs_no_engine(place: Place, moment: str) -> None:
    """The apply may fail for it. Nothing runs twice or unknown, and the next one goes on."""
    place.write(fake("back"), fake("front", depends_on=["back"]))
    with place.started("apply", str(place.manifests), "-y", **place.failing(f"{moment}=stop")) as process:
        until(lambda: _letter(process.pid) == "T", "sage has come there")
        shutil.rmtree(place.state)
        process.send_signal(signal.SIGCONT)
        assert process.wait(20) in (0, 5, 6, 12)
    kept = place.pids()

    place.apply()

    assert place.pids().items() >= kept.items()
    place.assert_at_rest(again=True)


@pytest.fixture
def vllm(place: Place, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An engine of a runtime that sage knows by its command line; its program is the fake engine, on PATH."""
    program = place.root / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\n"
        "import runpy, sys\n"
        "words = sys.argv\n"
        "kept = [word for name in ('--port', '--host') for word in (name, words[words.index(name) + 1])]\n"
        "model = words[words.index('--served-model-name') + 1]\n"
        "sys.argv = ['fake', *kept, '--model', model]\n"
        f"sys.path.insert(0, {str(FAKE_ENGINE.parent)!r})\n"
        f"runpy.run_path({str(FAKE_ENGINE)!r}, run_name='__main__')\n",
        encoding="utf-8",
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return {
        "name": "chat",
        "model": "org/model",
        "runtime": "vllm",
        "use_gpu": False,
        "served_name": f"{place.project}-chat",
        "update": _QUICK,
    }


def test_p19_identical_engine_that_was_started_by_hand_is_shown_and_never_touched(
    place: Place, vllm: dict[str, Any]
) -> None:
    place.write(vllm)
    place.apply()
    (pid,) = place.pids().values()
    words = _argv(pid)
    place.sage("down", str(place.manifests), "-y")
    with stranger(*words, directory=place.manifests) as twin:
        until(lambda: listens(place.ports[0]), "the twin listens")

        place.apply()

        assert _argv(twin.pid) == words
        (shown,) = [one for one in place.status()["foreign"] if one["pid"] == twin.pid]
        assert (shown["model"], shown["port"]) == (vllm["served_name"], place.ports[0])
        assert place.homes() == {"lab/chat": place.ports[1]}
        place.sage("down", str(place.manifests), "-y")
        assert twin.poll() is None


def test_p19_identical_engine_of_a_command_is_shown_too(place: Place) -> None:
    place.write(fake("chat"))
    place.apply()
    (pid,) = place.pids().values()
    words = _argv(pid)
    place.sage("down", str(place.manifests), "-y")
    with stranger(*words, directory=place.manifests) as twin:
        until(lambda: listens(place.ports[0]), "the twin listens")
        place.apply()

        foreign = {one["pid"]: one["port"] for one in place.status()["foreign"]}

        assert twin.poll() is None
        assert foreign.get(twin.pid) == place.ports[0]


def _argv(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]


_LABEL = ("SAGE_PROJECT", "SAGE_SOURCE", "SAGE_ENGINE", "SAGE_SPEC", "SAGE_PLACEMENT", "SAGE_LEADER")


def test_p19_processes_with_a_part_of_a_label_or_a_forged_one_are_never_signalled(place: Place) -> None:
    place.write(fake("chat", update=_QUICK))
    place.apply()
    (pid,) = place.pids().values()
    label = {name: value for name, value in environ(pid).items() if name.startswith("SAGE_")}
    assert sorted(label) == sorted(_LABEL)
    elsewhere = label["SAGE_LEADER"].rpartition(":")[0] + ":4026531"
    forged = [
        *({name: value for name, value in label.items() if name != missing} for missing in _LABEL),
        label | {"SAGE_LEADER": elsewhere},
        label | {"SAGE_LEADER": "1"},
        label | {"SAGE_PLACEMENT": "{}"},
        label | {"SAGE_SPEC": "not JSON"},
        label | {"SAGE_ENGINE": "no id"},
    ]
    with ExitStack() as strangers:
        sleepers = [strangers.enter_context(stranger("/bin/sleep", "60", **one)) for one in forged]
        place.write(fake("chat", "--tokens", "3", update=_QUICK))

        place.apply()
        members = [row["members"] for row in place.status()["engines"]]
        place.sage("down", str(place.manifests), "-y")

        assert len(members) == 1 and not {sleeper.pid for sleeper in sleepers} & set(members[0])
        assert [sleeper.poll() for sleeper in sleepers] == [None] * len(forged)


def test_p19_session_leader_with_a_label_that_names_no_leader_is_never_signalled(place: Place) -> None:
    """As an engine at its gate, and yet none: the gate is a shell of sage's, and this is not."""
    place.write(fake("chat", update=_QUICK))
    place.apply()
    (pid,) = place.pids().values()
    label = {name: value for name, value in environ(pid).items() if name.startswith("SAGE_")}
    del label["SAGE_LEADER"]
    with stranger("/usr/bin/setsid", "/bin/sleep", "60", **label) as sleeper:
        until(lambda: stat_fields(sleeper.pid)[3] == str(sleeper.pid), "it leads a session")

        place.apply()
        place.sage("down", str(place.manifests), "-y")

        assert sleeper.poll() is None


# What the gate does: the process names itself, and becomes its program.
_SELF_NAMED = 'export SAGE_LEADER="$$:$(cut -d" " -f22 /proc/$$/stat):$0"; exec "$@"'


def test_p18_engine_of_a_newer_sage_is_taken_as_it_is_and_not_started_twice(place: Place) -> None:
    """2026-11-28: where its label had a field that this sage does not know, apply started a second one beside it."""
    place.write(fake("chat", update=_QUICK))
    place.apply()
    (pid,) = place.pids().values()
    words, label = _argv(pid), {name: environ(pid)[name] for name in _LABEL}
    place.sage("down", str(place.manifests), "-y")
    resolved = json.loads(label["SAGE_PLACEMENT"])
    newer = resolved | {"of_later": 1, "placement": resolved["placement"] | {"numa_nodes": [0]}}
    label |= {"SAGE_PLACEMENT": json.dumps(newer), "SAGE_OF_LATER": "1"}
    namespace = label.pop("SAGE_LEADER").rpartition(":")[2]
    with stranger("/usr/bin/setsid", "/bin/sh", "-c", _SELF_NAMED, namespace, *words, **label) as theirs:
        until(lambda: listens(place.ports[0]), "the engine listens")

        place.apply()

        assert place.pids() == {"lab/chat": theirs.pid}
        assert place.engines()["lab/chat"]["state"] == "ready"
        place.sage("down", str(place.manifests), "-y")
        assert theirs.wait(10) is not None


def test_p19_engines_of_another_project_are_left_alone(place: Place) -> None:
    other = other_project(place)
    place.sage("apply", str(other), "-y")
    theirs = place.pids()
    place.write(fake("chat", update=_QUICK))

    place.apply()
    place.sage("down", str(place.manifests), "-y")
    place.apply()
    place.sage("down", "-p", place.project, "-y")

    assert place.pids() == theirs
    place.sage("down", str(other), "-y")


def test_p19_down_of_all_engines_of_one_project_leaves_the_others_alone(tmp_path: Path) -> None:
    """In a pid namespace: should it go wrong, the engines of other tests must not be within reach."""
    inside(("pid",), stop_all_of_one_project, str(tmp_path))


def stop_all_of_one_project(root: str) -> None:
    with place_in(Path(root)) as place:
        other = other_project(place)
        place.sage("apply", str(other), "-y")
        theirs = place.pids()
        place.write(fake("chat", update=_QUICK))
        place.apply()

        place.sage("down", "--all", "-p", place.project, "-y")

        left = place.pids()
        place.sage("down", "--all", "-y")
        assert left == theirs


def other_project(place: Place) -> Path:
    """A directory of manifests beside the place's own, of another project with one engine."""
    other = place.root / "other"
    other.mkdir()
    settings = json.loads((place.manifests / "sage.yaml").read_text(encoding="utf-8"))
    settings["project"] = f"{place.project}-other"
    (other / "sage.yaml").write_text(json.dumps(settings), encoding="utf-8")
    place.write(fake("chat", update=_QUICK), directory=other, stack="theirs")
    return other


def test_p19_machine_that_hides_other_processes_is_worked_on_all_the_same(tmp_path: Path) -> None:
    """2026-11-28: /proc with hidepid=1 refuses to show even sage's own ancestors, and every command ended with 1.

    What holds privileges that sage lacks is hidden from it, whoever's it is: here all but sage and what it starts.
    """
    for number, hidden in enumerate(("hidepid=1", "hidepid=2")):
        inside(("mount", "pid"), hide_others, str(tmp_path / str(number)), hidden)


def hide_others(root: str, hidden: str) -> None:
    # A group that may see all the same is the machine's root's, unless another is named: root of all is in that.
    of_all = Path("/proc/self/gid_map").read_text(encoding="ascii").split()[-1] == "4294967295"
    mount("-o", f"remount,{hidden}" + (",gid=65534" if of_all else ""), "/proc")
    # Not by PID 1 itself, of which sage as its child would ask nothing.
    inside((), work_where_others_are_hidden, root)


def work_where_others_are_hidden(root: str) -> None:
    Path(root).mkdir()
    with place_in(Path(root)) as place:
        place.write(fake("chat", update=_QUICK))
        for command, *options in (("plan",), ("apply", "-y"), ("plan",), ("down", "-y")):
            place.sage(command, str(place.manifests), *options, before=without(CAP_SYS_PTRACE))
        place.sage("status", before=without(CAP_SYS_PTRACE))


def test_p19_login_shell_and_its_jobs_outlive_the_engines_that_were_started_from_it(place: Place) -> None:
    place.write(fake("chat", update=_QUICK))
    sage = f"{sys.executable} -m sage_reconcile"
    script = f"/bin/sleep 60 & {sage} apply manifests -y && {sage} down manifests -y && kill $! && echo still here"

    done = subprocess.run(
        ["/bin/sh", "-c", script],
        cwd=place.root,
        env=environment(place.state),
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["still here"])
    place.assert_nothing_left()


# --- P24: programs that cannot run here -------------------------------------------------------------------------------


def test_p24_program_that_is_not_executable_is_refused_at_the_plan(place: Place) -> None:
    program = program_of(place, b"#!/bin/sh\nexit 0\n", mode=0o644)
    place.write(fake("chat", command=[program, "--port", "{port}"]), fake("good"))

    (blocked,) = place.plan(expect=4)["blocked"]
    place.apply(expect=4)

    assert (blocked["engine"], blocked["reason"]) == ("lab/chat", "program_missing")
    assert program in blocked["why"]
    assert labelled(place.root) == ()


def test_p24_program_without_its_interpreter_is_told_and_leaves_nothing(place: Place) -> None:
    program = program_of(place, b"#!/no/such/interpreter\n")

    ran = failed_start(place, program)

    assert program in ran.stderr and "not found" in ran.stderr


_OTHER_MACHINE = 22 if os.uname().machine != "s390x" else 62  # EM_S390 and EM_X86_64, elf(5)


def test_p24_program_of_another_architecture_is_told_and_leaves_nothing(place: Place) -> None:
    """A header that is whole, and then what a program may hold: also a line that is a command to a shell."""
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\0" + _OTHER_MACHINE.to_bytes(2, "little") + bytes(44)
    program = program_of(place, header + b"\n>made-by-garbage\n")

    ran = failed_start(place, program)

    assert re.search(
        "cannot be executed|another architecture|format error", " ".join((ran.stdout + ran.stderr).split())
    )
    assert not (place.manifests / "made-by-garbage").exists()


def test_p24_text_that_is_no_script_is_not_run_as_one(place: Place) -> None:
    program = program_of(place, b"Read me first\n>made-by-garbage\nnothing-of-this-name\n")

    ran = failed_start(place, program)

    assert not (place.manifests / "made-by-garbage").exists()
    assert re.search("cannot be executed|not a program|format error", " ".join((ran.stdout + ran.stderr).split()))


def failed_start(place: Place, program: str) -> Ran:
    """An engine of this program is applied beside a good one. Refused by the plan, or found out at the start."""
    place.write(fake("good"))
    place.apply()
    before = place.pids()
    place.write(fake("good"), fake("chat", command=[program, "--port", "{port}"]))
    ran = run_sage(place.state, "apply", str(place.manifests), "-y")
    place.said.append(ran.stderr)
    assert ran.code in (4, 5), ran.stderr
    assert place.pids() == before
    place.write(fake("good"))
    place.assert_at_rest()
    return ran


def program_of(place: Place, content: bytes, mode: int = 0o755) -> str:
    path = place.root / "program"
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


# --- P25: a machine at its end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wish", ["gate.begin=EAGAIN", "gate.begin=MemoryError"])
def test_p25_fork_that_the_kernel_refuses_fails_the_apply_and_the_next_one_converges(place: Place, wish: str) -> None:
    """By a failpoint, as the kernel would at the fork; descriptors and threads run out for real below."""
    place.write(fake("good"))
    place.apply()
    good = place.pids()
    place.write(fake("good"), fake("new"))

    ran = place.apply(expect=5, **place.failing(wish))

    assert "lab/new cannot start" in ran.stderr
    assert place.pids() == good
    place.apply()
    assert place.pids().items() > good.items()
    place.assert_at_rest()


# From too few for Python itself to enough for everything.
_DESCRIPTORS = range(4, 33) if CHAOS else (5, 8, 10, 14)


def test_p25_whatever_number_of_descriptors_there_is_nothing_is_left_or_set_aside(place: Place) -> None:
    place.write(fake("good"))
    place.apply()
    good = place.pids()
    records = sorted((place.state / place.project / "engines").iterdir())
    codes = set()
    for number in _DESCRIPTORS:
        place.write(fake("good"), fake("new"))
        ran = run_sage(
            place.state,
            *("apply", str(place.manifests), "-y"),
            before=partial(resource.setrlimit, resource.RLIMIT_NOFILE, (number, number)),
        )
        if "Fatal Python error" in ran.stderr:
            continue  # Sage has not begun.
        codes.add(ran.code)
        place.said.append(ran.stderr)
        assert ran.code in (0, 5, 12), f"{number} descriptors: {ran.code} {ran.stdout} {ran.stderr}"
        if ran.code == 0:
            place.write(fake("good"))
            place.apply()
        assert place.pids() == good, f"{number} descriptors"
        assert sorted((place.state / place.project / "engines").iterdir()) == records, f"{number} descriptors"

    assert codes >= {0, 5}
    assert not (place.state / place.project / "damaged").exists()
    place.assert_at_rest()


def test_p25_no_thread_that_can_be_started_ends_an_apply_cleanly(place: Place) -> None:
    """RLIMIT_NPROC refuses threads and forks, and spares root; stacks that no memory can hold refuse threads to all."""
    place.write(fake("good"))
    place.apply()
    good = place.pids()
    place.write(fake("good"), fake("new"))
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if hard != resource.RLIM_INFINITY:
        pytest.skip("the size of stacks is limited here")

    ran = run_sage(
        place.state,
        *("apply", str(place.manifests), "-y"),
        before=lambda: resource.setrlimit(resource.RLIMIT_STACK, (1 << 47, resource.RLIM_INFINITY)),
    )

    place.said.append(ran.stderr)
    assert ran.code in (5, 12), f"{ran.code} {ran.stdout} {ran.stderr}"
    assert place.pids() == good
    place.apply()
    place.assert_at_rest()


@pytest.mark.skipif(os.getuid() == 0, reason="RLIMIT_NPROC does not bind root")
def test_p25_no_process_that_can_be_forked_ends_an_apply_cleanly(place: Place) -> None:
    place.write(fake("new"))

    ran = run_sage(
        place.state,
        *("apply", str(place.manifests), "-y"),
        before=lambda: resource.setrlimit(resource.RLIMIT_NPROC, (1, 1)),
    )

    place.said.append(ran.stderr)
    assert ran.code in (5, 12), f"{ran.code} {ran.stdout} {ran.stderr}"
    assert place.pids() == {}
    place.apply()
    place.assert_at_rest()


# --- P26: killed from outside -----------------------------------------------------------------------------------------


def test_p26_engine_that_is_killed_while_it_loads_fails_the_apply_and_the_signal_is_told(place: Place) -> None:
    place.write(fake("good"))
    place.apply()
    good = place.pids()
    place.write(fake("good"), fake("loads", "--ready-after", "60"))
    with place.started("apply", str(place.manifests), "-y") as process:
        pid = until(lambda: place.pids().get("lab/loads"), "the engine loads")
        os.kill(pid, signal.SIGKILL)

        _, stderr = process.communicate(timeout=15)

    assert process.returncode == 5
    assert "lab/loads was ended by signal 9 before it was ready" in stderr
    assert place.pids() == good
    place.write(fake("good"))
    place.assert_at_rest()
