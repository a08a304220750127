"""Engines come, change, fail and go: the real command line over real processes, and the leak oracle after each test."""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from sage_reconcile.core.journal import ActBegun, ActDone, PlanBegun, PlanEnded
from tests.e2e import FAKE_ENGINE, Place, fake, kill, listens, stranger, until
from tests.fakenvml import Gpu, Used, claim, gpu_uuid
from tests.forks import forks
from tests.oracle import STRANGER, alive, assert_no_leaks, environ, environment, labelled, leaks
from tests.seed_preset import SEED_PRESET
from tests.tiny_gguf import write_tiny_gguf

# --- coming and going -------------------------------------------------------------------------------------------------


def test_two_engines_come_up_ready_stay_as_they_are_and_leave_nothing(place: Place) -> None:
    place.write(fake("chat", label="Chat"), fake("embed", kind="embedding"))

    place.apply()

    pids = place.pids()
    rows = place.engines()
    assert {name: (row["state"], row["kind"], row["pid"]) for name, row in rows.items()} == {
        "lab/chat": ("ready", "llm", pids["lab/chat"]),
        "lab/embed": ("ready", "embedding", pids["lab/embed"]),
    }
    assert (rows["lab/chat"]["label"], rows["lab/chat"]["model"]) == ("Chat", "chat-model")
    assert [rows[name]["port"] for name in ("lab/chat", "lab/embed")] == [place.ports[0], place.ports[8]]
    assert all(row["declared"] and row["spec_current"] for row in rows.values())
    place.assert_at_rest(again=True)
    assert place.pids() == pids

    place.sage("down", str(place.manifests), "-y")

    assert place.pids() == {}
    place.assert_nothing_left()


def test_losing_the_state_directory_loses_no_engine(place: Place) -> None:
    place.write(fake("chat"), fake("embed", kind="embedding"))
    place.apply()
    facts = ("kind", "port", "pid", "model", "state", "runtime", "base_url")
    before = {name: {fact: row[fact] for fact in facts} for name, row in place.engines().items()}

    shutil.rmtree(place.state)

    after = {name: {fact: row[fact] for fact in facts} for name, row in place.engines().items()}
    assert after == before
    place.apply()
    assert {name: row["pid"] for name, row in before.items()} == place.pids()
    place.assert_at_rest(again=True)
    shutil.rmtree(place.state)
    place.sage("down", str(place.manifests), "-y")
    assert place.pids() == {}
    place.assert_nothing_left()


def test_engine_that_was_killed_is_missed_and_comes_back_on_its_port(place: Place) -> None:
    place.write(fake("chat"), fake("spare"), fake("embed", kind="embedding"))
    place.apply()
    pids, port = place.pids(), place.homes()["lab/chat"]

    kill(pids["lab/chat"])

    row = {row["id"]: row for row in place.status("--exit-code", expect=2)["engines"]}["lab/chat"]
    assert (row["state"], row["reason"], row["pid"]) == ("missing", f"pid {pids['lab/chat']} is gone", None)
    plan = place.plan("--detailed-exitcode", expect=2)
    assert [drift["engine"] for drift in plan["drift"]] == ["lab/chat"]
    assert [(step["engine"], step["reason"], step["port"]) for step in plan["steps"]] == [("lab/chat", "crashed", port)]
    place.apply()
    healed = place.engines()["lab/chat"]
    assert (healed["state"], healed["port"], healed["restarts"]) == ("ready", port, 1)
    now = place.pids()
    assert now.pop("lab/chat") != pids.pop("lab/chat")
    assert now == pids
    place.assert_at_rest()


def test_port_of_a_crashed_engine_waits_for_it_while_a_newcomer_comes(place: Place) -> None:
    place.write(fake("chat"))
    place.apply()
    port = place.homes()["lab/chat"]
    kill(place.pids()["lab/chat"])
    # Its name sorts first.
    place.write(fake("a-newcomer"), fake("chat"))

    place.apply()

    assert place.homes()["lab/chat"] == port


# --- changing ---------------------------------------------------------------------------------------------------------


def test_edit_of_what_a_process_is_replaces_that_engine_only(place: Place) -> None:
    place.write(fake("chat"), fake("other"))
    place.apply()
    before = place.pids()
    place.write(fake("chat", "--tokens", "3"), fake("other"))

    (step,) = place.plan()["steps"]
    place.apply()

    assert (step["action"], step["engine"], step["reason"]) == ("recreate", "lab/chat", "spec_changed")
    assert [(change["path"], change["at"].split(":")[0][-8:]) for change in step["changes"]] == [
        ("command", "lab.yaml")
    ]
    after = place.pids()
    assert after["lab/other"] == before["lab/other"]
    assert after["lab/chat"] != before["lab/chat"] and not alive(before["lab/chat"])
    assert place.homes()["lab/chat"] == place.ports[0]
    place.assert_at_rest()


def test_edit_of_policy_is_taken_up_without_a_restart_and_outlives_one(place: Place) -> None:
    place.write(fake("chat", label="Chat"))
    place.apply()
    pids = place.pids()
    place.write(fake("chat", label="Chat for all", aliases=["gpt-x"], max_concurrent_requests=3))

    (step,) = place.plan()["steps"]
    place.apply()

    assert (step["action"], step["reason"]) == ("update", "policy_changed")
    assert [change["path"] for change in step["changes"]] == ["aliases", "label", "max_concurrent_requests"]
    row = place.engines()["lab/chat"]
    assert (row["state"], row["spec_current"], row["label"]) == ("ready", True, "Chat for all")
    assert place.pids() == pids
    place.assert_at_rest()
    kill(pids["lab/chat"])
    place.apply()
    assert place.engines()["lab/chat"]["label"] == "Chat for all"


def test_engine_that_left_its_file_is_stopped_alone_unless_nothing_is_pruned(place: Place) -> None:
    place.write(fake("chat"), fake("old"), fake("embed", kind="embedding"))
    place.apply()
    pids = place.pids()
    place.write(fake("chat"), fake("embed", kind="embedding"))

    place.apply("--no-prune")
    assert place.pids() == pids

    place.apply()
    del pids["lab/old"]
    assert place.pids() == pids


def test_single_file_prunes_its_own_stack_only(place: Place) -> None:
    lab = place.write(fake("chat"), fake("old"))
    place.write(fake("search", kind="embedding"), stack="rag")
    place.apply()
    pids = place.pids()
    place.write(fake("chat"))
    (place.manifests / "rag.yaml").unlink()

    place.sage("apply", str(lab), "-y")
    del pids["lab/old"]
    assert place.pids() == pids

    # Only the directory as a whole says that the other stack is no more.
    place.apply()
    del pids["rag/search"]
    assert place.pids() == pids


def test_replicas_are_processes_of_their_own_and_the_last_goes_first(place: Place) -> None:
    place.write(fake("chat", replicas=2))
    place.apply()
    rows, pids = place.engines(), place.pids()
    assert {name: (row["replica"], row["port"], row["state"]) for name, row in rows.items()} == {
        "lab/chat": (0, place.ports[0], "ready"),
        "lab/chat#1": (1, place.ports[1], "ready"),
    }
    place.assert_at_rest()

    place.write(fake("chat"))
    place.apply()

    assert place.pids() == {"lab/chat": pids["lab/chat"]}


def test_dependent_engine_starts_only_once_its_dependency_is_ready(place: Place) -> None:
    place.write(fake("a-front", depends_on=["z-back"]), fake("z-back", "--ready-after", "0.7"))

    place.apply()

    ticks = {process.engine: process.start_ticks for process in labelled(place.root)}
    waited_seconds = (ticks["lab/a-front"] - ticks["lab/z-back"]) / os.sysconf("SC_CLK_TCK")
    assert waited_seconds >= 0.7
    begun = next(entry for entry in place.journal() if isinstance(entry, PlanBegun))
    back, front = (
        next(index for index, act in enumerate(begun.acts) if act.startswith(f"start lab/{name} "))
        for name in ("z-back", "a-front")
    )
    order = [(type(entry), entry.act) for entry in place.journal() if isinstance(entry, ActBegun | ActDone)]
    assert order.index((ActDone, back)) < order.index((ActBegun, front))


# --- failing to start -------------------------------------------------------------------------------------------------


def test_the_live_line_of_an_engine_says_what_it_lacks_while_it_is_waited_for(place: Place) -> None:
    """2026-11: "starting" and the first line of its log for ten minutes, while what was wrong was known at once."""
    place.write(fake("chat", "--wrong-kind"), fake("loads", "--bind-after", "60", update={"grace": "0.4s"}))

    screen = on_a_terminal(place, "apply", str(place.manifests), "-y", "--timeout", "2s")

    live = [line for line in screen.splitlines() if "  starting  " in line]
    assert any("lab/chat  starting  1s  does not serve kind llm" in line for line in live), screen
    # What loads says more by itself than that it does not listen yet.
    assert any("lab/loads  starting  1s  fake engine for" in line for line in live), screen


def on_a_terminal(place: Place, *words: str) -> str:
    """All that a command writes where a terminal shows it."""
    ours, theirs = pty.openpty()
    shown = b""
    with subprocess.Popen(
        [sys.executable, "-m", "sage_reconcile", *words],
        cwd=place.root,
        env=environment(place.state),
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    ):
        os.close(theirs)
        with contextlib.suppress(OSError):  # EIO once the command has closed its side.
            while read := os.read(ours, 65536):
                shown += read
    os.close(ours)
    return shown.decode()


@pytest.mark.parametrize(
    ("modes", "why", "last_line"),
    [
        (["--exit-code", "7"], "exited with code 7 before it was ready", "error: told to exit with 7"),
        pytest.param(["--never-ready"], "not ready after 2 s", "fake engine for bad-model", marks=pytest.mark.chaos),
        (["--wrong-kind"], "not ready after 2 s: does not serve kind llm", "fake engine for bad-model"),
        (["--listen-port", "SPARE"], "not ready after 2 s: listens on 127.0.0.1:SPARE", "fake engine for bad-model"),
        pytest.param(["--mute"], "not ready after 2 s", "fake engine for bad-model", marks=pytest.mark.chaos),
    ],
    ids=["exits at once", "never ready", "wrong kind", "listens elsewhere", "never answers"],
)
def test_apply_that_fails_puts_back_what_ran_before(place: Place, modes: list[str], why: str, last_line: str) -> None:
    place.write(fake("chat"), fake("other"))
    place.apply()
    before = place.pids()
    spare = str(place.spare[0])
    modes = [mode.replace("SPARE", spare) for mode in modes]
    # The bad one comes last, so that the chat engine has been replaced when it fails.
    place.write(fake("chat", "--tokens", "3"), fake("other"), fake("bad", *modes, depends_on=["chat"]))

    ran = place.apply("--timeout", "2s", expect=5)

    assert why.replace("SPARE", spare) in ran.stderr
    assert f"| {last_line}" in ran.stderr
    after = place.pids()
    assert set(after) == {"lab/chat", "lab/other"}
    assert after["lab/other"] == before["lab/other"]
    assert after["lab/chat"] != before["lab/chat"]
    assert "--tokens" not in Path(f"/proc/{after['lab/chat']}/cmdline").read_text(encoding="utf-8").split("\0")
    row = place.engines()["lab/chat"]
    assert (row["state"], row["port"], row["spec_current"]) == ("ready", place.ports[0], True)
    assert not listens(int(spare))


def test_failed_start_leaves_a_log_to_read_and_the_earlier_log_is_kept(place: Place) -> None:
    place.write(fake("chat", "--log-bytes", "100"))
    place.apply()
    place.write(fake("chat", "--exit-code", "3"), fake("new", "--exit-code", "4", depends_on=[]))

    place.apply(expect=5)

    first, *_, last = place.sage("logs", "lab/new").stdout.splitlines()
    assert first.startswith("fake engine for new-model") and last == "error: told to exit with 4"
    assert place.sage("logs", "lab/chat", "-n", "1").stdout.splitlines() == ["x" * 99]
    previous = place.sage("logs", "lab/chat", "--previous").stdout
    assert "told to exit with 3" in previous or "x" * 99 in previous


def test_log_that_is_not_there_is_told_apart_from_an_engine_that_is_not(place: Place) -> None:
    """2026-11-28: once the state was deleted, `logs` said that there was no such engine, while it ran."""
    place.write(fake("chat"))
    place.apply()
    told = place.sage("logs", "lab/chat", "--previous", "-p", place.project, expect=12).stderr
    assert "no process of it ran before" in told
    shutil.rmtree(place.state)

    assert "there is no log" in place.sage("logs", "lab/chat", "-p", place.project, expect=12).stderr

    told = place.sage("logs", "lab/nope", "-p", place.project, expect=64).stderr
    assert told == f"error: there is no engine lab/nope in project {place.project}; there is lab/chat\n"


@pytest.mark.parametrize("on_failure", ["halt", "continue"])
def test_failed_apply_that_shall_not_restore_leaves_the_good_ones_running(place: Place, on_failure: str) -> None:
    place.write(fake("bad", "--exit-code", "1"), fake("good"))

    place.apply("--on-failure", on_failure, expect=6)

    assert "lab/bad" not in place.pids()
    if on_failure == "continue":
        assert place.engines()["lab/good"]["state"] == "ready"


def test_engine_that_a_halted_apply_stopped_has_not_crashed(place: Place) -> None:
    """2026-11-28: status said that its process was gone, and the next plan that it had crashed."""
    slow = {"grace": "10s", "drain": "1s"}
    place.write(fake("chat", "--term-delay", "1.5", update=slow))
    place.apply()
    (pid,) = place.pids().values()
    place.write(fake("chat", "--tokens", "3"), fake("bad", "--exit-code", "1"))

    place.apply("--on-failure", "halt", expect=6)

    because = f"pid {pid} was stopped, and not started again"
    assert place.engines()["lab/chat"]["reason"] == because
    place.write(fake("chat", "--tokens", "3"))
    (step,) = place.plan()["steps"]
    assert (step["reason"], step["cause"]) == ("restored", because)
    place.apply()
    assert place.engines()["lab/chat"]["restarts"] == 0


# --- failing to stop --------------------------------------------------------------------------------------------------


def test_engine_that_does_not_hear_the_first_sigterm_is_ended_within_its_grace(place: Place) -> None:
    """test_processes.py p9 has one that hears none."""
    place.write(fake("chat", "--swallow-terms", "1"))
    place.apply()
    (pid,) = place.pids().values()

    place.sage("down", str(place.manifests), "-y")

    assert not alive(pid)
    begun, done, _ = place.journal()[-3:]
    assert isinstance(begun, ActBegun) and isinstance(done, ActDone)
    # The grace is 1 s; the rest is looking.
    assert done.at - begun.at < 4
    place.assert_nothing_left()


def test_p13_engine_under_sigstop_is_told_apart_from_a_ready_one_and_can_be_stopped(place: Place) -> None:
    place.write(fake("chat"))
    place.apply()
    (pid,) = place.pids().values()
    os.kill(pid, signal.SIGSTOP)

    (row,) = place.status("--exit-code", expect=2)["engines"]
    place.sage("down", str(place.manifests), "-y")

    assert (row["state"], row["pid"]) == ("unready", pid)
    assert not alive(pid)
    place.assert_nothing_left()


def test_engine_that_is_killed_while_it_is_asked_is_missing_and_not_unready(place: Place) -> None:
    place.write(fake("chat"))
    place.apply()
    (home,) = place.homes().values()
    (pid,) = place.pids().values()
    os.kill(pid, signal.SIGSTOP)

    with place.started("status", "-p", place.project, "-o", "json", "--exit-code") as asking:
        until(lambda: is_connected_to(home), "sage asks the engine that cannot answer")
        kill(pid)
        stdout, _ = asking.communicate(timeout=15)

    (row,) = json.loads(stdout)["engines"]
    assert asking.returncode == 2
    assert (row["state"], row["pid"]) == ("missing", None)


def test_child_in_a_session_of_its_own_that_outlives_its_leader_is_ended_before_the_engine_starts_again(
    place: Place,
) -> None:
    """test_processes.py p10 has one in the session of its engine."""
    place.write(fake("chat", "--fork-child", "--child-ignore-term", "--child-setsid"))
    place.apply()
    (leader,) = place.pids().values()
    child = child_of(place)

    kill(leader)

    (row,) = place.status()["engines"]
    assert (row["state"], row["pid"], row["members"]) == ("failed", None, [child])
    place.apply()
    assert not alive(child)
    assert child_of(place) != child
    begun = [entry for entry in place.journal() if isinstance(entry, PlanBegun)][-1]
    assert [act.split()[0] for act in begun.acts] == ["stop", "start"]
    place.assert_at_rest()


def test_child_that_gave_up_its_label_and_its_session_is_left_alone(place: Place) -> None:
    """Nothing proves any more that it is ours. A stop of its engine cannot reach it, and must not wait for it."""
    place.write(fake("chat", "--fork-child", "--child-setsid", "--child-wipe-environ"))
    place.apply()
    (leader,) = place.pids().values()
    child = child_of(place)
    try:
        kill(leader)
        place.apply()

        assert alive(child)
    finally:
        kill(child)
    place.sage("down", str(place.manifests), "-y")
    # The second process of the engine has forked one too.
    kill(child_of(place))
    place.assert_nothing_left()


def test_child_without_a_label_in_the_session_of_its_engine_is_ended_with_it(place: Place) -> None:
    place.write(fake("chat", "--fork-child", "--child-ignore-term", "--child-wipe-environ"))
    place.apply()
    child = child_of(place)

    try:
        place.sage("down", str(place.manifests), "-y")

        assert not alive(child)
    finally:
        kill(child)


def is_connected_to(port: int) -> bool:
    """Whether some client has a connection to this port of the machine."""
    connections = psutil.net_connections("tcp4")
    return any(it.status == psutil.CONN_ESTABLISHED and it.raddr and it.raddr.port == port for it in connections)


def child_of(place: Place) -> int:
    """The child that the chat engine says it has."""
    (pid,) = re.findall(r"child pid (\d+)", place.log("lab/chat"))
    return int(pid)


# --- never failing towards deletion -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "code"),
    [("emptied", 10), ("vanished", 3), ("unparsable", 3), ("another path", 3), ("settings only half written", 3)],
)
def test_p22_manifests_that_are_not_there_stop_nothing(place: Place, trouble: str, code: int) -> None:
    stack = place.write(fake("chat"))
    place.apply()
    pids = place.pids()
    target = place.manifests
    match trouble:
        case "emptied":
            stack.unlink()
        case "vanished":
            shutil.rmtree(target)
        case "unparsable":
            stack.write_text(stack.read_text(encoding="utf-8")[:200], encoding="utf-8")
        case "another path":
            target = place.root / "nowhere"
        case "settings only half written":
            (target / "sage.yaml").write_text("project: [", encoding="utf-8")

    ran = place.sage("apply", str(target), "-y", expect=code)

    assert "error: " in ran.stderr
    assert place.pids() == pids
    if trouble == "emptied":
        place.apply("--allow-empty")
        assert place.pids() == {}
        place.assert_nothing_left()


def test_engines_of_manifests_that_no_longer_parse_can_be_stopped(place: Place) -> None:
    place.write(fake("chat"))
    place.apply()
    for path in place.manifests.iterdir():
        path.write_text("{ not: [a manifest", encoding="utf-8")

    place.sage("down", str(place.manifests), "-y")

    assert place.pids() == {}
    place.assert_nothing_left()


def test_nothing_is_done_without_approval(place: Place) -> None:
    place.write(fake("chat"))

    place.sage("apply", str(place.manifests), expect=10)
    assert place.pids() == {}

    place.apply()
    pids = place.pids()
    place.sage("apply", str(place.manifests))  # There is nothing to approve.
    ran = place.sage("down", str(place.manifests), expect=10)
    assert place.pids() == pids
    assert "hint: add -y" in ran.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["apply", "--bogus"],
        ["apply"],
        ["apply", "manifests", "--timeout", "soon"],
        ["apply", "manifests", "--on-failure", "panic"],
        ["plan", "manifests", "-o", "xml"],
        ["status", "lab/nobody"],
        ["down", "lab/nobody", "-y"],
        ["logs", "lab/nobody"],
        ["serve", "--port", "no"],
    ],
    ids=lambda arguments: " ".join(["sage", *arguments]),
)
def test_command_that_makes_no_sense_ends_with_64(place: Place, arguments: list[str]) -> None:
    (place.root / "elsewhere").mkdir()
    directory = place.root if "manifests" in arguments else place.root / "elsewhere"

    ran = place.sage(*arguments, expect=64, directory=directory)

    assert ran.stdout == ""
    assert ran.stderr.lstrip().startswith("error: " if arguments else "Usage: sage")


# --- what cannot be done here and now ---------------------------------------------------------------------------------


def test_port_of_somebody_else_is_refused_and_told_and_left_to_them(place: Place) -> None:
    port = place.spare[0]
    place.write(fake("chat", port=port), fake("other"))
    with stranger(sys.executable, str(FAKE_ENGINE), "--port", str(port)) as holder:
        until(lambda: listens(port), "the stranger listens")

        plan = place.plan(expect=4)
        ran = place.apply(expect=4)

        assert [(one["engine"], one["reason"]) for one in plan["blocked"]] == [("lab/chat", "port_taken")]
        assert f"pid {holder.pid}" in plan["blocked"][0]["why"]
        assert f"pid {holder.pid}" in ran.stdout
        assert place.pids() == {}
        assert holder.poll() is None
    until(lambda: not listens(port), "the port is free")
    place.apply()
    assert place.homes()["lab/chat"] == port


def test_port_of_the_pool_that_somebody_else_has_is_passed_over(place: Place) -> None:
    place.write(fake("chat"))
    with stranger(sys.executable, str(FAKE_ENGINE), "--port", str(place.ports[0])) as holder:
        until(lambda: listens(place.ports[0]), "the stranger listens")

        place.apply()

        assert place.homes()["lab/chat"] == place.ports[1]
        place.sage("down", str(place.manifests), "-y")
        assert holder.poll() is None


def test_thief_who_shares_the_port_of_an_engine_is_seen(place: Place) -> None:
    """With SO_REUSEPORT the kernel gives either of two listeners a connection: such a port proves nothing."""
    place.write(fake("chat", "--reuse-port"))
    place.apply()
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        thief.bind(("127.0.0.1", place.ports[0]))
        thief.listen()

        row = place.engines()["lab/chat"]

        assert row["state"] == "unready"
        assert f"pid {os.getpid()}" in row["reason"]


def test_engines_that_ask_for_one_port_are_invalid(place: Place) -> None:
    place.write(fake("chat", port=place.spare[0]), fake("other", port=place.spare[0]))

    ran = place.apply(expect=3)

    assert "lab/chat" in ran.stderr and "lab/other" in ran.stderr
    assert place.pids() == {}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"use_gpu": True}, "no_device"),
        ({"command": ["./no-such-program", "--port", "{port}"]}, "program_missing"),
        ({"runtime": "llama.cpp", "command": None, "model": "./no-such-model.gguf"}, "model_missing"),
    ],
    ids=["GPU", "program", "model"],
)
def test_what_this_machine_lacks_is_told_before_anything_is_done(
    place: Place, fields: dict[str, Any], reason: str
) -> None:
    engine = {name: value for name, value in (fake("lacking") | fields).items() if value is not None}
    place.write(engine, fake("chat"))

    plan = place.plan(expect=4)
    place.apply(expect=4)

    assert [(one["engine"], one["reason"]) for one in plan["blocked"]] == [("lab/lacking", reason)]
    assert plan["blocked"][0]["why"]
    assert place.pids() == {}


def test_what_this_machine_has_is_started_all_the_same_where_that_was_asked_for(place: Place) -> None:
    place.write(fake("lacking", use_gpu=True), fake("chat"))

    place.apply("--on-failure", "continue", expect=4)

    assert list(place.pids()) == ["lab/chat"]


def test_what_was_refused_and_never_ran_is_not_missed(place: Place) -> None:
    """2026-11-25: a refused engine was remembered as applied: status missed it, and a plan said that it had crashed."""
    place.write(fake("lacking", use_gpu=True), fake("chat"))
    place.apply("--on-failure", "continue", expect=4)
    assert place.engines().keys() == {"lab/chat"}

    place.write(fake("lacking"), fake("chat"))

    plan = place.plan()
    assert ([step["reason"] for step in plan["steps"]], plan["drift"]) == (["new"], [])


def test_what_was_refused_and_ran_before_is_missed_once_it_does_not(place: Place) -> None:
    place.write(fake("chat"))
    place.apply()
    place.write(fake("chat", use_gpu=True))
    place.apply("--on-failure", "continue", expect=4)
    assert place.engines()["lab/chat"]["state"] == "ready"

    kill(place.pids()["lab/chat"])

    assert place.engines()["lab/chat"]["state"] == "missing"


def test_preset_of_the_control_plane_before_sage_is_valid_as_it_stands(place: Place) -> None:
    (place.manifests / "preset.yaml").write_text(SEED_PRESET, encoding="utf-8")

    place.sage("validate", str(place.manifests))
    plan = place.plan(expect=4)

    blocked = {one["engine"]: one["reason"] for one in plan["blocked"]}
    stack = "qwen-mini-with-embeddings"
    assert (blocked[f"{stack}/chat"], blocked[f"{stack}/embed-gpu"]) == ("no_device", "no_device")
    assert blocked.get(f"{stack}/embed", "program_missing") == "program_missing"


# --- whose engines ----------------------------------------------------------------------------------------------------


def test_project_from_another_directory_is_refused_until_it_is_taken_over(place: Place) -> None:
    place.write(fake("chat"))
    place.apply()
    pids = place.pids()
    other = place.root / "elsewhere"
    shutil.copytree(place.manifests, other)

    ran = place.sage("apply", str(other), "-y", expect=10)
    assert str(place.manifests) in ran.stderr
    assert place.pids() == pids

    place.sage("apply", str(other), "-y", "--take-over")
    assert place.pids() == pids
    assert_no_leaks(place.state, other, place.ports, place.said, again=False)
    place.apply(expect=10)
    assert place.pids() == pids


def test_engines_of_others_are_shown_once_and_never_touched(place: Place, tmp_path: Path) -> None:
    """A program, a module and a wrapper with its child; the program carries a part of a token that somebody forged."""
    ports = list(place.spare[:3])
    server = f"#!{sys.executable}\nimport runpy, sys\n" + (
        f"sys.path.insert(0, {str(FAKE_ENGINE.parent)!r})\n"
        f"sys.argv = ['fake', '--port', sys.argv[-1].rpartition('=')[2]]\nrunpy.run_path({str(FAKE_ENGINE)!r}, "
        "run_name='__main__')\n"
    )
    program, wrapper = tmp_path / "vllm", tmp_path / "wrapped" / "vllm"
    module = tmp_path / "lib" / "vllm" / "entrypoints" / "openai" / "api_server.py"
    for path in (program, wrapper, module):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(server, encoding="utf-8")
        path.chmod(0o755)
    wrapper.write_text(f'#!/bin/sh\n{program} "$@"\n', encoding="utf-8")
    forged = {"SAGE_ENGINE": "lab/chat", "SAGE_PROJECT": place.project}
    place.write(fake("chat"))
    models = [f"{name}-{place.project}" for name in ("program", "module", "wrapped")]

    with (
        stranger(str(program), "serve", models[0], f"--port={ports[0]}", **forged) as first,
        stranger(
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", models[1], f"--port={ports[1]}"),
            directory=tmp_path / "lib",
        ) as second,
        stranger(str(wrapper), "serve", models[2], f"--port={ports[2]}") as third,
    ):
        until(lambda: all(listens(port) for port in ports), "the strangers listen")
        (child,) = psutil.Process(third.pid).children()
        try:
            place.apply()
            place.write(fake("chat", "--tokens", "3"))
            place.apply()
            shown = [one for one in place.status()["foreign"] if one["model"] in models]
            place.sage("down", str(place.manifests), "-y")

            assert sorted((one["model"], one["pid"], one["port"]) for one in shown) == sorted(
                zip(models, [first.pid, second.pid, child.pid], ports, strict=True)
            )
            assert all(process.poll() is None for process in (first, second, third)) and alive(child.pid)
        finally:
            kill(child.pid)


def test_engine_gets_its_arguments_literally_and_nothing_of_its_callers_secrets(place: Place) -> None:
    odd = ["; rm -rf /nowhere", "$(touch made-by-a-shell)", "`id`", "two\nlines", 'it\'s "quoted"', "*", "{{port}}", ""]
    place.write(
        fake(
            "chat",
            args=[word for value in odd for word in ("--model", value)],
            env={"GREETING": "$(id)\n'hi'", "HF_HOME": "/nowhere"},
        )
    )

    place.sage(
        "apply",
        str(place.manifests),
        "-y",
        MY_SECRET_TOKEN="s3cret-of-the-caller",
        CUDA_VISIBLE_DEVICES="0,1",
        HF_HOME="/home/of/the/caller",
        HF_ENDPOINT="http://127.0.0.1:1",
    )

    (pid,) = place.pids().values()
    argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    assert argv[-2 * len(odd) - 1 : -1][1::2] == [value.replace("{{port}}", "{port}") for value in odd]
    variables = environ(pid)
    assert variables["CUDA_VISIBLE_DEVICES"] == ""
    assert (variables["CUDA_DEVICE_ORDER"], variables["SPT_NOENV"]) == ("PCI_BUS_ID", "1")
    assert (variables["GREETING"], variables["HF_HOME"]) == ("$(id)\n'hi'", "/nowhere")
    assert variables["HF_ENDPOINT"] == "http://127.0.0.1:1"
    allowed = {"PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "XDG_CACHE_HOME"}
    # The shell of the gate sets the last two.
    allowed |= {"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "SPT_NOENV", "GREETING", "PWD", "OLDPWD", "_", "SHLVL"}
    strange = {name for name in variables if name not in allowed and not re.match("SAGE_|LC_|HF_|SSL_CERT_", name)}
    assert strange == set()
    assert not (place.manifests / "made-by-a-shell").exists()
    everywhere = [path for path in place.state.rglob("*") if path.is_file()]
    assert not [path for path in everywhere if b"s3cret-of-the-caller" in path.read_bytes()]


def test_state_is_for_its_owner_only(place: Place) -> None:
    place.write(fake("chat"))
    place.apply()

    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [place.state, *place.state.rglob("*")]}

    assert {str(path.relative_to(place.root)): oct(mode) for path, mode in modes.items() if mode & 0o077} == {}
    assert modes[place.state] == 0o700
    assert modes[place.state / place.project / "logs" / "lab" / "chat.log"] == 0o600


def test_state_that_others_may_write_is_refused(place: Place) -> None:
    place.write(fake("chat"))
    place.state.mkdir()
    place.state.chmod(0o777)

    ran = place.apply(expect=12)

    assert str(place.state) in ran.stderr
    assert place.pids() == {}


# --- two at a time, and ends in the middle ----------------------------------------------------------------------------


def test_apply_may_wait_for_another(place: Place) -> None:
    place.write(fake("slow", "--ready-after", "1"))
    with place.started("apply", str(place.manifests), "-y") as first:
        until(place.pids, "the engine is started")

        place.apply("--lock-timeout", "20s")

        assert first.wait(5) == 0
    place.assert_at_rest()


def test_terminated_apply_stops_at_once_and_the_next_goes_on(place: Place) -> None:
    """test_motion.py p2 has the same with Ctrl-C."""
    place.write(fake("quick"), fake("slow", "--ready-after", "2.5"))
    with place.started("apply", str(place.manifests), "-y") as process:
        pids = until(lambda: place.pids() if len(place.pids()) == 2 else {}, "both engines are started")
        asked_at = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=10)

        assert process.returncode == 143
        assert time.monotonic() - asked_at < 2
        assert "Traceback" not in stderr
    assert place.pids() == pids
    last = place.journal()[-1]
    assert isinstance(last, PlanEnded) and last.outcome == "interrupted"

    place.apply()

    assert place.pids() == pids


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stop_that_was_cut_short_is_finished_by_the_next_command(place: Place, number: int) -> None:
    """The engine takes its time to end; sage ends while it waits."""
    place.write(fake("slow", "--term-delay", "1", update={"grace": "5s"}), fake("chat"))
    place.apply()
    pids = place.pids()
    with place.started("down", "lab/slow", "-p", place.project, "-y") as process:
        until(lambda: not listens(place.ports[1]) or not listens(place.ports[0]), "the engine stops listening")
        process.send_signal(number)
        process.wait()

    # What was asked for last is that both run.
    place.apply()

    after = place.pids()
    assert after["lab/chat"] == pids["lab/chat"]
    assert after["lab/slow"] != pids["lab/slow"]


def test_manifest_that_changes_while_it_is_applied_is_applied_as_it_was(place: Place) -> None:
    place.write(fake("slow", "--ready-after", "1"))
    with place.started("apply", str(place.manifests), "-y") as process:
        pids = until(place.pids, "the engine is started")
        place.write(fake("slow", "--ready-after", "1"), fake("later"))
        assert process.wait(20) == 0
    assert place.pids() == pids

    place.apply()

    assert set(place.pids()) == {"lab/slow", "lab/later"}


# --- the real thing ---------------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_real_llama_cpp_is_started_changed_healed_and_stopped(place: Place) -> None:
    pytest.importorskip("xllamacpp")
    write_tiny_gguf(place.manifests / "tiny.gguf")
    write_tiny_gguf(place.manifests / "vectors.gguf", embedding=True)
    fields = {"use_gpu": False, "max_model_len": 512, "update": {"grace": "5s"}}
    chat = {"name": "chat", "model": "./tiny.gguf", "served_name": "tiny", **fields}
    vectors = {"name": "vectors", "kind": "embedding", "model": "vectors.gguf", "runtime": "llama.cpp", **fields}
    place.write(chat, vectors)
    place.apply()
    rows, pids = place.engines(), place.pids()
    assert {name: (row["state"], row["runtime"], row["model"]) for name, row in rows.items()} == {
        "lab/chat": ("ready", "llama.cpp", "tiny"),
        "lab/vectors": ("ready", "llama.cpp", rows["lab/vectors"]["model"]),
    }

    place.write(chat | {"max_model_len": 1024}, vectors)
    place.apply()
    kill(place.pids()["lab/chat"])
    place.apply()

    after = place.engines()
    assert {name: row["port"] for name, row in after.items()} == {name: row["port"] for name, row in rows.items()}
    assert place.pids()["lab/vectors"] == pids["lab/vectors"]
    place.assert_at_rest()
    place.sage("down", str(place.manifests), "-y")
    place.assert_nothing_left()


@pytest.mark.e2e
def test_weights_that_llama_cpp_cannot_read_are_told_in_its_own_words(place: Place) -> None:
    pytest.importorskip("xllamacpp")
    (place.manifests / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    place.write({"name": "chat", "model": "./broken.gguf", "use_gpu": False})

    ran = place.apply(expect=5)

    assert "broken.gguf" in ran.stderr and "lab/chat" in ran.stderr
    assert place.pids() == {}
    place.assert_nothing_left()


# --- the oracle itself ------------------------------------------------------------------------------------------------


def test_oracle_sees_what_nobody_wants(place: Place) -> None:
    """An oracle that is never seen to fail proves nothing."""
    port = place.ports[3]
    label = {"SAGE_ENGINE": "lab/ghost", "SAGE_SOURCE": str(place.manifests)}
    (place.state / "x").mkdir(parents=True)
    (place.state / "x" / "journal.jsonl").write_text('{"entry": "act_', encoding="utf-8")
    (place.state / "x" / "ghost.log").write_text("Traceback (most recent call last):\n", encoding="utf-8")
    with (
        stranger("/bin/sleep", "60", **label) as ghost,
        stranger(sys.executable, str(FAKE_ENGINE), "--port", str(port)) as listener,
    ):
        until(lambda: listens(port), "the stranger listens")
        found = leaks(place.state, None, place.ports, ["Traceback (most recent call last):\n  boom"])

    shutil.rmtree(place.state)
    assert [sentence.partition(":")[0] for sentence in found] == [
        f"pid {ghost.pid} carries the token of lab/ghost, which nobody wants",
        f"port {port} is listened on by pid {listener.pid}, which is of no engine",
        "a traceback was shown",
        "there is a traceback in x/ghost.log",
        "x/journal.jsonl",
    ]


def test_oracle_sees_memory_that_nobody_should_hold(place: Place) -> None:
    machine = (Gpu(index=0), Gpu(index=1), Used(gpu=1, mib=50))
    place.gpus(*machine)
    label = {"SAGE_ENGINE": "lab/ghost", "SAGE_SOURCE": str(place.manifests)}
    with (
        place.foreign_on(0, 300),
        # An engine that runs, what is left of one without its label, and one that has died.
        stranger("/bin/sleep", "60", **label) as engine,
        stranger("/bin/sleep", "60", **{STRANGER: "0"}) as lost,
        stranger("/bin/sleep", "60") as dead,
    ):
        claim(place.nvml, gpu_uuid(0), engine.pid, 1000)
        assert place.held_mib() == {"lab/ghost": {gpu_uuid(0): 1000}}
        claim(place.nvml, gpu_uuid(0), lost.pid, 200)
        claim(place.nvml, gpu_uuid(1), dead.pid, 70, linger_seconds=60)
        kill(dead.pid)

        _, *found = leaks(place.state, None, place.ports, memory_seconds=0)
        assert found == [
            f"pid {lost.pid} holds 200 MiB of {gpu_uuid(0)} and is of no engine",
            f"120 MiB of {gpu_uuid(1)} are used, and the living hold 50 MiB",
        ]
        assert place.used_mib(0) == 1500

    place.gpus(*machine, ahead_seconds=70)
    place.assert_nothing_left()


# --- the place itself -------------------------------------------------------------------------------------------------


def test_place_shows_its_gpus_to_every_command(place: Place) -> None:
    place.gpus(Gpu(index=0), Gpu(index=1))
    words = ("gpu", "-o", "json")
    with place.foreign_on(1, 300) as process, place.started(*words) as begun, forks(place.root) as commands:
        answers = [place.sage(*words).stdout, begun.communicate()[0], commands.run(place.state, *words).stdout]

    seen = [[device["processes"] for device in json.loads(answer)["devices"]] for answer in answers]
    assert [[[holder["pid"] for holder in holders] for holders in one] for one in seen] == [[[], [process.pid]]] * 3


def test_engine_of_a_place_takes_what_its_manifest_says(place: Place) -> None:
    """As sage will start it: from the words of the manifest, with its label and the GPUs that it was given."""
    place.gpus(Gpu(index=0), Gpu(index=1))
    chat = place.gpu_fake("chat", mib=2000)
    assert (chat["use_gpu"], chat["gpu_memory"]) == (True, "2000MiB")
    port = place.spare[0]
    words = [word.format(port=port, host="127.0.0.1", model="chat") for word in chat["command"]]
    label = {"SAGE_ENGINE": "lab/chat", "SAGE_SOURCE": str(place.manifests)}
    with stranger(*words, CUDA_VISIBLE_DEVICES=gpu_uuid(1), **label):
        until(lambda: place.used_mib(1) == 2000, "the engine has its memory")
        assert place.held_mib() == {"lab/chat": {gpu_uuid(1): 2000}}
