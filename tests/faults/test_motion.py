"""Interrupts, locks, manifests that change or go while they are used, and putting back what ran.

Catalogue P2, P20 to P23.
"""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sage_reconcile.core.journal import ActBegun, PlanEnded
from tests.e2e import FAKE_ENGINE, Place, fake, kill, listens, place_in, until
from tests.namespaces import CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, ROOT, inside, mount, without
from tests.oracle import environment, labelled, run_sage, stat_fields

CHAOS = os.environ.get("CHAOS") == "1"

_QUICK = {"grace": "0.4s", "drain": "10s"}

# The catalogue's limit for an interrupt, and what a busy machine takes beyond it to end a Python program.
_AT_ONCE_SECONDS = 2.0

_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


# --- P2: interrupts ---------------------------------------------------------------------------------------------------


def test_p2_interrupt_while_a_slow_engine_stops_ends_at_once_and_the_next_apply_goes_on(place: Place) -> None:
    slow = {"grace": "20s", "drain": "10s"}
    place.write(fake("good"), fake("slow", "--ignore-term", update=slow))
    place.apply()
    before = place.pids()
    place.write(fake("good"), fake("slow", "--ignore-term", "--tokens", "3", update=_QUICK))
    with place.started("apply", str(place.manifests), "-y") as process:
        until(lambda: phase_of(place, "slow") == "stopping", "the stop has begun")

        assert_interrupted(place, process, signal.SIGTERM)

    assert place.pids() == before
    # The engine has its own grace; a person would wait for it, and this test does not.
    kill(before["lab/slow"])
    place.apply()
    assert place.pids()["lab/good"] == before["lab/good"]
    place.assert_at_rest()


def test_p2_interrupt_while_what_ran_is_put_back_ends_at_once_and_the_next_apply_goes_on(place: Place) -> None:
    place.write(fake("good"), fake("chat", "--ready-after", "1.5"))
    place.apply()
    before = place.pids()
    place.write(fake("good"), fake("chat", "--exit-code", "1"))
    with place.started("apply", str(place.manifests), "-y") as process:
        # The one that is put back loads for a while.
        until(lambda: is_put_back(place, "--ready-after", before["lab/chat"]), "the earlier engine is started again")

        assert_interrupted(place, process, signal.SIGINT)

    assert place.pids()["lab/good"] == before["lab/good"]
    place.write(fake("good"), fake("chat"))
    place.apply()
    assert place.pids()["lab/good"] == before["lab/good"]
    place.assert_at_rest()


def is_put_back(place: Place, word: str, earlier: int) -> bool:
    pid = place.pids().get("lab/chat", earlier)
    return pid != earlier and word in _argv(pid)


# Where sage is while an engine is replaced, and the moments that a signal may come.
_MOMENTS = (
    "record.written", "signal.begin", "signal.sent", "journal.synced@3", "log.kept", "port.held", "gate.begin",
    "gate.spawned", "gate.recorded", "gate.released", "proof.begin",
)  # fmt: skip


@pytest.mark.parametrize("moment", _MOMENTS if CHAOS else ("signal.begin", "gate.begin", "gate.recorded"))
@pytest.mark.parametrize("action", ["interrupt", "terminate"] if CHAOS else ["interrupt"])
def test_p2_interrupt_in_the_middle_of_an_act_lets_that_act_be_whole(place: Place, moment: str, action: str) -> None:
    place.write(fake("good"), fake("chat"))
    place.apply()
    before = place.pids()
    place.write(fake("good"), fake("chat", "--tokens", "3"))

    ran = place.apply(expect={"interrupt": 130, "terminate": 143}[action], **place.failing(f"{moment}={action}"))

    assert "interrupted" in ran.stderr
    assert_closed(place)
    assert place.pids()["lab/good"] == before["lab/good"]
    place.apply()
    assert place.pids()["lab/good"] == before["lab/good"]
    place.assert_at_rest()


@pytest.mark.parametrize("moment", ["lock.taken", "state.probed"])
def test_p2_interrupt_before_anything_was_begun_leaves_at_once_with_nothing_done(place: Place, moment: str) -> None:
    place.write(fake("chat"))

    place.apply(expect=130, **place.failing(f"{moment}=interrupt"))

    assert place.pids() == {}
    place.assert_nothing_left()


def test_p2_interrupt_that_leaves_at_once_is_told(place: Place) -> None:
    place.write(fake("chat"))

    ran = place.apply(expect=130, **place.failing("lock.taken=interrupt"))

    assert ran.stderr.startswith("interrupted")


def test_p2_second_signal_leaves_at_once_from_the_middle_of_an_act(place: Place) -> None:
    """Both come while sage is in the middle of a start. After the first alone that start would be seen through."""
    place.write(fake("good"))
    place.apply()
    good = place.pids()
    place.write(fake("good"), fake("new"))
    with place.started("apply", str(place.manifests), "-y", **place.failing("gate.recorded=stop")) as process:
        until(lambda: _letter(process.pid) == "T", "sage is in the middle of it")
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)

        assert process.wait(_AT_ONCE_SECONDS) in _CODES.values()

    assert_closed(place)
    assert place.pids() == good
    place.apply()
    assert place.pids().items() > good.items()
    place.assert_at_rest()


def _at_a_terminal(
    place: Place, *arguments: str, begins: Callable[[], None] = lambda: None
) -> tuple["subprocess.Popen[bytes]", int]:
    """A command at a terminal of its own, and the terminal's other end. `begins` runs before it becomes sage."""
    ours, theirs = pty.openpty()

    def before() -> None:
        _take_terminal()
        begins()

    process = subprocess.Popen(
        [sys.executable, "-m", "sage_reconcile", *arguments],
        cwd=place.root,
        env=environment(place.state) | {"TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=before,
    )
    os.close(theirs)
    return process, ours


@contextmanager
def typed(place: Place, *arguments: str) -> Iterator[tuple["subprocess.Popen[bytes]", int, list[bytes]]]:
    """A command at a terminal of its own: the process, the terminal's other end, and what it has shown."""
    process, ours = _at_a_terminal(place, *arguments)
    shown: list[bytes] = []

    def read() -> None:
        # The terminal reads as broken once its last program has left it.
        try:
            while part := os.read(ours, 4096):
                shown.append(part)
        except OSError:
            return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield process, ours, shown
    finally:
        process.kill()
        process.wait()
        reader.join(10)
        os.close(ours)
        place.said.append(b"".join(shown).decode(errors="replace"))


def _take_terminal() -> None:
    """The terminal at stdin becomes the session's, and what is typed there as Ctrl-C a SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.close(os.open(os.ttyname(0), os.O_RDWR))


def test_p2_ctrl_c_at_the_question_leaves_at_once_with_nothing_done(place: Place) -> None:
    place.write(fake("chat"))
    with typed(place, "apply", str(place.manifests)) as (process, terminal, shown):
        until(lambda: b"Only 'yes' will do: " in b"".join(shown), "sage asks")

        os.write(terminal, b"\x03")

        assert process.wait(_AT_ONCE_SECONDS) == 130
    assert place.pids() == {}
    assert not (place.state / place.project / "journal.jsonl").exists()


def test_p2_ctrl_c_at_a_terminal_reaches_no_engine(place: Place) -> None:
    """The terminal sends SIGINT to every process of its foreground group; engines end on SIGINT at once."""
    place.write(fake("quick"), fake("slow", "--ready-after", "1.5"))
    with typed(place, "apply", str(place.manifests), "-y") as (process, terminal, _):
        pids = until(lambda: place.pids() if len(place.pids()) == 2 else {}, "both engines are started")

        os.write(terminal, b"\x03")

        assert process.wait(_AT_ONCE_SECONDS) == 130
    assert_closed(place)
    assert place.pids() == pids
    place.apply()
    assert place.pids() == pids


def test_p2_terminal_that_is_closed_ends_an_apply_between_two_acts(place: Place) -> None:
    """2026-11-28: SIGHUP ended it wherever it was, without the end of its plan in the journal."""
    place.write(fake("quick"), fake("slow", "--ready-after", "2"))
    with at_a_terminal_to_close(place, "apply", str(place.manifests), "-y") as (process, close):
        pids = until(lambda: place.pids() if len(place.pids()) == 2 else {}, "both engines are started")

        close()

        assert process.wait(_AT_ONCE_SECONDS) == 143
    assert_closed(place)
    assert place.pids() == pids
    place.apply()
    assert place.pids() == pids
    place.assert_at_rest()


def test_p2_terminal_that_is_closed_ends_an_up_as_ctrl_c_does_and_stops_its_engines(place: Place) -> None:
    """2026-11-28: SIGHUP ended it, and its engines ran on without a router. A shell sends it too: it comes twice."""
    place.write(fake("chat", update=_QUICK))
    with at_a_terminal_to_close(place, "up", str(place.manifests), "-y") as (process, close):
        until(lambda: listens(place.spare[-1]), "it serves")

        close()
        process.send_signal(signal.SIGHUP)

        assert process.wait(10) == 0
    assert place.pids() == {}
    place.assert_nothing_left()


@pytest.mark.parametrize("command", ["apply", "serve"])
def test_p2_command_that_nohup_began_outlives_its_terminal(place: Place, command: str) -> None:
    place.write(fake("chat", "--ready-after", "0.5"))
    port = place.spare[0]
    words = {"apply": ("apply", str(place.manifests), "-y"), "serve": ("serve", "--port", str(port))}[command]
    with at_a_terminal_to_close(place, *words, begins=_ignore_hangup) as (process, close):
        until(place.pids if command == "apply" else lambda: listens(port), "it is at work")

        close()

        if command == "apply":
            assert process.wait(15) == 0
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            assert listens(port)
            process.terminate()
            assert process.wait(10) == 0


def _ignore_hangup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@contextmanager
def at_a_terminal_to_close(
    place: Place, *arguments: str, begins: Callable[[], None] = lambda: None
) -> Iterator[tuple["subprocess.Popen[bytes]", Callable[[], None]]]:
    """A command at a terminal of its own, and what closes that: as a window, or a connection that breaks."""
    process, ours = _at_a_terminal(place, *arguments, begins=begins)
    open_ends = [ours]
    try:
        yield process, lambda: os.close(open_ends.pop())
    finally:
        process.kill()
        process.wait()
        for end in open_ends:
            os.close(end)


def test_p2_apply_that_is_stopped_and_goes_on_ends_no_engine_that_became_ready_meanwhile(place: Place) -> None:
    """2026-11-28: the time for which Ctrl-Z stopped an apply counted, and its healthy engine was ended as not ready."""
    place.write(fake("chat", "--bind-after", "0.5"))
    with place.started("apply", str(place.manifests), "-y", "--timeout", "4s") as process:
        pids = until(place.pids, "the engine is started")
        process.send_signal(signal.SIGSTOP)
        stopped_at = time.monotonic()
        until(lambda: listens(place.ports[0]), "the engine listens")
        until(lambda: time.monotonic() - stopped_at > 4.5, "the engine's time is over")

        process.send_signal(signal.SIGCONT)

        assert process.wait(15) == 0, process.communicate()[1]
    assert place.pids() == pids
    place.assert_at_rest()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_p2_signal_while_another_sage_is_waited_for_leaves_at_once_with_nothing_done(
    place: Place, number: signal.Signals
) -> None:
    place.write(fake("chat"))
    with place.started("apply", str(place.manifests), "-y", **place.failing("lock.named=stop")) as holder:
        until(lambda: _letter(holder.pid) == "T", "another sage has the lock")
        tries = place.root / "tries"
        traced = {"SAGE_TEST": "1", "SAGE_FAILPOINT_TRACE": str(tries)}
        with place.started("apply", str(place.manifests), "-y", "--lock-timeout", "60s", **traced) as process:
            until(lambda: tries.exists() and len(tries.read_text().split()) > 2, "it has tried a few times")

            process.send_signal(number)

            assert process.wait(_AT_ONCE_SECONDS) == _CODES[number]
    assert place.pids() == {}
    assert not (place.state / place.project / "journal.jsonl").exists()


def assert_interrupted(place: Place, process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    """A first signal: it ends within the limit, with its code, and the journal is closed."""
    asked_at = time.monotonic()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=10)
    place.said.append(stderr)
    assert time.monotonic() - asked_at < _AT_ONCE_SECONDS
    assert process.returncode == _CODES[number]
    assert "interrupted: " in stderr
    assert_closed(place)


def assert_closed(place: Place) -> None:
    last = place.journal()[-1]
    assert isinstance(last, PlanEnded) and last.outcome == "interrupted"


def phase_of(place: Place, name: str) -> str:
    """How far the stop of an engine has come, as its record tells."""
    for path in (place.state / place.project / "engines").glob(f"lab@{name}@*.json"):
        try:
            phase = json.loads(path.read_text(encoding="utf-8"))["phase"]
        except FileNotFoundError:
            continue
        if phase:
            return str(phase)
    return ""


def _argv(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _letter(pid: int) -> str:
    """The letter of proc(5) for a process's state; empty when there is none."""
    fields = stat_fields(pid)
    return fields[0] if fields else ""


# --- P20: one at a time -----------------------------------------------------------------------------------------------


def test_p20_login_and_cron_exclude_each_other(tmp_path: Path) -> None:
    """With the locks that are used where nobody sets SAGE_LOCK_FILE; in a /tmp of its own, because they lie there."""
    inside(("pid", "mount"), lock_login_and_cron, str(tmp_path))


def lock_login_and_cron(directory: str) -> None:
    take_own_tmp(Path(directory))
    root = Path("/tmp/place")
    root.mkdir(mode=0o700)
    runtime = root / "run"
    runtime.mkdir(mode=0o700)
    login = {"SAGE_LOCK_FILE": "", "XDG_RUNTIME_DIR": str(runtime)}
    cron = {"SAGE_LOCK_FILE": "", "XDG_RUNTIME_DIR": ""}
    with place_in(root) as place:
        place.write(fake("chat"))
        # A login has two locks, and the last of them is the one that cron has too.
        for first, last_lock, second in ((login, 2, cron), (cron, 1, login), (login, 2, login)):
            failing = place.failing(f"lock.named@{last_lock}=stop")
            with place.started("apply", str(place.manifests), "-y", **first, **failing) as holder:
                until(lambda holder=holder: _letter(holder.pid) == "T", "the first has its locks")  # type: ignore[misc]

                ran = place.apply(expect=8, **second)

                assert f"pid {holder.pid}" in ran.stderr
        # Neither is locked out by what the other left.
        place.apply(**login)
        place.apply(**cron)


def take_own_tmp(empty: Path) -> None:
    """An empty /tmp, but for what these tests run on, should that lie there."""
    mount("-t", "tmpfs", "tmpfs", str(empty))
    for needed in map(Path, {str(ROOT), sys.prefix, sys.base_prefix}):
        if needed.is_relative_to("/tmp"):
            (empty / needed.relative_to("/tmp")).mkdir(parents=True, exist_ok=True)
            mount("--bind", str(needed), str(empty / needed.relative_to("/tmp")))
    mount("--rbind", str(empty), "/tmp")


def test_p20_two_projects_of_one_user_take_turns(place: Place) -> None:
    """Both would choose from the same ports and devices."""
    place.write(fake("chat"))
    other = place.root / "other"
    other.mkdir()
    settings = json.loads((place.manifests / "sage.yaml").read_text(encoding="utf-8"))
    settings["project"] = f"{place.project}-other"
    (other / "sage.yaml").write_text(json.dumps(settings), encoding="utf-8")
    place.write(fake("chat"), directory=other, stack="theirs")
    with place.started("apply", str(place.manifests), "-y", **place.failing("gate.released=stop")) as first:
        until(lambda: _letter(first.pid) == "T", "the first is at work")

        refused = place.sage("apply", str(other), "-y", expect=8)
        with place.started("apply", str(other), "-y", "--lock-timeout", "30s") as second:
            first.send_signal(signal.SIGCONT)
            assert (first.wait(15), second.wait(15)) == (0, 0)

    assert f"pid {first.pid}" in refused.stderr
    assert sorted(place.homes().values()) == list(place.ports[:2])
    place.sage("down", str(other), "-y")
    place.assert_at_rest()


def test_p20_lock_holds_when_the_state_directory_is_deleted_under_its_holder(place: Place) -> None:
    place.write(fake("chat"))
    with place.started("apply", str(place.manifests), "-y", **place.failing("gate.recorded=stop")) as holder:
        until(lambda: _letter(holder.pid) == "T", "the first is at work")
        shutil.rmtree(place.state)

        second = run_sage(place.state, "apply", str(place.manifests), "-y", "--timeout", "1s")

        place.said.append(second.stderr)
        holder.send_signal(signal.SIGCONT)
        holder.wait(15)
    place.apply()
    place.assert_at_rest()
    assert second.code == 8


def test_p20_engine_that_forks_and_forks_does_not_keep_the_lock_of_a_killed_sage(place: Place) -> None:
    words = fake("chat", "--ready-after", "2")["command"]
    forks = ["/bin/sh", "-c", '(while sleep 0.01; do :; done) & exec "$@"', "forks", *words]
    place.write(fake("chat", command=forks, update=_QUICK))
    with place.started("apply", str(place.manifests), "-y") as process:
        until(lambda: len(labelled(place.root)) > 2, "the engine forks")
        pids = place.pids()
        usual = place.sage("validate", str(place.manifests))
        second = place.apply(expect=8)
        process.kill()
        process.wait()

    place.apply()

    assert f"pid {process.pid}" in second.stderr
    # Under a second; on a busy machine, no more than a few times what it takes to read the manifests.
    assert second.seconds < max(1.0, 3 * usual.seconds)
    assert place.pids() == pids
    place.assert_at_rest()


# --- P21: manifests that move while they are read or applied ----------------------------------------------------------


def test_p21_file_that_vanishes_between_listing_and_reading_is_told_and_stops_nothing(place: Place) -> None:
    """A link that leads nowhere is what it looks like then: the listing tells the file, and there is none."""
    place.write(fake("chat"))
    place.apply()
    pids = place.pids()
    (place.manifests / "gone.yaml").symlink_to("nowhere")

    ran = place.apply(expect=3)

    assert "gone.yaml" in ran.stderr
    assert place.pids() == pids


def test_p21_file_that_comes_and_goes_is_applied_or_refused_and_never_half(place: Place) -> None:
    """A writer that removes and writes a stack again and again, in parts; its engine is there or nothing is done."""
    place.write(fake("chat"))
    path = place.write(fake("other"), stack="moves")
    text = path.read_text(encoding="utf-8")
    stopping = threading.Event()

    def write() -> None:
        while not stopping.is_set():
            path.unlink(missing_ok=True)
            with path.open("w", encoding="utf-8") as file:
                for begun in range(0, len(text), 100):
                    file.write(text[begun : begun + 100])
                    file.flush()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        plans = [run_sage(place.state, "plan", str(place.manifests), "-o", "json") for _ in range(40 if CHAOS else 5)]
    finally:
        stopping.set()
        writer.join()

    for plan in plans:
        place.said.append(plan.stderr)
        assert plan.code in (0, 3), plan.stderr
        if plan.code == 0:
            started = {step["engine"] for step in json.loads(plan.stdout)["steps"]}
            assert started in ({"lab/chat"}, {"lab/chat", "moves/other"})


@pytest.mark.parametrize("how", ["renamed", "removed"])
def test_p21_directory_that_goes_before_the_second_engine_starts_leaks_nothing(place: Place, how: str) -> None:
    place.write(fake("back"), fake("front", depends_on=["back"]))
    away = place.root / "away"
    with place.started("apply", str(place.manifests), "-y", **place.failing("gate.released=stop")) as process:
        until(lambda: _letter(process.pid) == "T", "the first engine is started")
        shutil.copytree(place.manifests, away) if how == "removed" else None
        shutil.rmtree(place.manifests) if how == "removed" else place.manifests.rename(away)
        process.send_signal(signal.SIGCONT)
        _, stderr = process.communicate(timeout=20)

    assert process.returncode in (0, 5), stderr
    running = place.pids()
    assert set(running) == ({"lab/back", "lab/front"} if process.returncode == 0 else set())
    away.rename(place.manifests)
    place.apply()
    place.assert_at_rest()


# --- P22: manifests that are not there --------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["directory", "stack", "settings"])
def test_p22_manifests_that_may_not_be_read_stop_nothing(place: Place, what: str) -> None:
    """Root reads everything, so sage is a root that may not; its engines are started by such a one too."""
    as_others = without(CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)
    stack = place.write(fake("chat"))
    closed = {"directory": place.manifests, "stack": stack, "settings": place.manifests / "sage.yaml"}[what]
    place.sage("apply", str(place.manifests), "-y", before=as_others)
    pids, mode = place.pids(), closed.stat().st_mode
    closed.chmod(0)
    try:
        ran = place.sage("apply", str(place.manifests), "-y", "--allow-empty", expect=3, before=as_others)
    finally:
        closed.chmod(mode)

    assert "Permission denied" in ran.stderr and str(closed) in ran.stderr
    assert place.pids() == pids


# --- P23: putting back ------------------------------------------------------------------------------------------------

_FIVE = ("one", "two", "three", "four", "five")


def five(version: str, **modes: str) -> list[dict[str, Any]]:
    """Five engines that start one after the other."""
    return [
        fake(
            name, "--tokens", version, *modes.get(name, "").split(), depends_on=list(_FIVE[:index][-1:]), update=_QUICK
        )
        for index, name in enumerate(_FIVE)
    ]


def test_p23_third_of_five_that_fails_leaves_all_five_as_they_were(place: Place) -> None:
    place.write(*five("1"))
    place.apply()
    before = {name: (_argv(pid), place.homes()[name]) for name, pid in place.pids().items()}
    place.write(*five("2", three="--exit-code 1"))

    ran = place.apply(expect=5)

    assert "lab/three exited with code 1" in ran.stderr
    assert {name: (_argv(pid), place.homes()[name]) for name, pid in place.pids().items()} == before
    place.write(*five("1"))
    place.assert_at_rest()


def test_p23_first_apply_that_fails_says_that_nothing_ran_before(place: Place) -> None:
    place.write(fake("one", update=_QUICK), fake("two", "--exit-code", "1", depends_on=["one"], update=_QUICK))

    ran = place.apply(expect=5)

    assert "  the apply failed: stopping what it started\n" in ran.stderr
    assert "error: the apply failed, and nothing runs, as before: lab/two exited with code 1" in ran.stderr
    assert place.pids() == {}


def test_p23_restore_that_fails_too_is_told_stays_as_it_is_and_does_not_loop(place: Place) -> None:
    """The program of the engine that was there is removed while it runs."""
    program = place.root / "program"
    program.write_text(f"#!{sys.executable}\n{FAKE_ENGINE.read_text(encoding='utf-8')}", encoding="utf-8")
    shutil.copy(FAKE_ENGINE.with_name("small_http.py"), program.parent)
    program.chmod(0o755)
    old = [str(program), "--port", "{port}", "--host", "{host}", "--model", "{model}"]
    place.write(fake("good"), fake("chat", command=old))
    place.apply()
    good = place.pids()["lab/good"]
    program.unlink()
    place.write(fake("good"), fake("chat", "--exit-code", "1"))

    ran = place.apply(expect=6)

    assert "sage status" in ran.stderr
    assert place.pids() == {"lab/good": good}
    begun = len([entry for entry in place.journal() if isinstance(entry, ActBegun)])
    rows = {row["id"]: row["state"] for row in place.status()["engines"]}
    assert rows == {"lab/good": "ready", "lab/chat": "missing"}
    place.write(fake("good"), fake("chat", command=old))
    (blocked,) = place.plan(expect=4)["blocked"]
    assert (blocked["engine"], blocked["reason"]) == ("lab/chat", "program_missing")
    place.apply(expect=4)
    assert place.pids() == {"lab/good": good}
    assert len([entry for entry in place.journal() if isinstance(entry, ActBegun)]) == begun
    place.write(fake("good"), fake("chat"))
    place.apply()
    place.assert_at_rest()
