"""Logs of engines that write too much, close them, or are followed while they are cut. Catalogue P28."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from sage_reconcile.world.logs import LONGEST_LOG_BYTES, cut_long_log, end_of, new_log, older_log, tail
from sage_reconcile.world.logs import followed as followed_log
from tests.e2e import Place, fake, kill, until
from tests.faults.test_serving import ask
from tests.namespaces import inside, mount

CHAOS = os.environ.get("CHAOS") == "1"

_MIB = 1024 * 1024
_FLOOD_BYTES = 1024 * _MIB if CHAOS else 96 * _MIB

_CHAT = {"messages": [{"role": "user", "content": "hello"}]}


def log_of(place: Place) -> Path:
    return place.state / place.project / "logs" / "lab" / "chat.log"


def taken_bytes(place: Place) -> int:
    """What all files of the chat engine's log take together."""
    return sum(path.stat().st_size for path in log_of(place).parent.glob("chat.log*"))


def test_p28_log_that_grows_without_end_takes_bounded_room_and_its_last_line_is_shown(place: Place) -> None:
    model = f"{place.project}-chat"
    place.write(fake("chat", "--log-flood", str(_FLOOD_BYTES), served_name=model))
    port = place.spare[1]
    with place.started("up", str(place.manifests), "-y", "--port", str(port)) as process:
        assert process.stderr is not None
        until(lambda: process.stderr.readline().startswith("serving "), "it serves")  # type: ignore[union-attr]
        most = 0

        def flooded() -> bool:
            nonlocal most
            most = max(most, taken_bytes(place))
            return tail(log_of(place), 1) == ("end of the flood",)

        until(flooded, "the flood has ended", seconds=100)
        last = place.sage("logs", "lab/chat", "-n", "1").stdout
        answer = ask(port, "/v1/chat/completions", {"model": model, **_CHAT})
        state = place.engines()["lab/chat"]["state"]

        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        place.said.append(process.stderr.read())

    assert most < 3 * LONGEST_LOG_BYTES
    assert last == "end of the flood\n"
    assert (answer.status, state) == (200, "ready")
    place.assert_nothing_left()


def test_p28_apply_that_has_nothing_to_do_keeps_logs_short_all_the_same(place: Place) -> None:
    """Where apply comes from a timer and nothing serves, no other sage looks."""
    place.write(fake("chat"))
    place.apply()
    with log_of(place).open("ab") as log:
        log.truncate(3 * LONGEST_LOG_BYTES)

    place.apply()

    assert taken_bytes(place) < 2 * LONGEST_LOG_BYTES
    place.assert_at_rest(again=True)


def test_p28_log_that_is_cut_while_it_is_written_loses_only_what_came_during_the_cut(tmp_path: Path) -> None:
    """Each line has a number. What is kept is whole lines in order, and the new log begins with a whole one."""
    directory = tmp_path / "logs"
    path = directory / "chat.log"
    writer = subprocess.Popen(
        ["/bin/sh", "-c", "n=1000000; while :; do echo line $n; n=$((n+1)); done"], stdout=(log := new_log(path))
    )
    os.close(log)
    cuts = 0
    try:
        while cuts < (200 if CHAOS else 20):
            if not cut_long_log(path, longest_bytes=64 * 1024):
                continue
            cuts += 1
            older = older_log(path).read_bytes()
            until(lambda: path.stat().st_size > 100, "it writes on")
            log_bytes = path.read_bytes()

            before, after = numbers(older, first_may_be_torn=True), numbers(log_bytes, first_may_be_torn=False)

            assert b"\0" not in older + log_bytes
            assert before == list(range(before[0], before[-1] + 1))
            assert after == list(range(after[0], after[-1] + 1))
            assert after[0] > before[-1]
    finally:
        writer.kill()
        writer.wait()


def numbers(text: bytes, *, first_may_be_torn: bool) -> list[int]:
    """The numbers of the lines; the last one may be half written, as the first one of a part may be."""
    lines = text.split(b"\n")[1 if first_may_be_torn else 0 : -1]
    assert all(line.startswith(b"line ") and len(line) == len(b"line 1000000") for line in lines)
    return [int(line[5:]) for line in lines]


def test_p28_full_disk_loses_the_older_part_and_the_log_is_cut_all_the_same(tmp_path: Path) -> None:
    inside(("mount",), cut_on_a_full_disk, str(tmp_path))


def cut_on_a_full_disk(directory: str) -> None:
    mount("-t", "tmpfs", "-o", "size=3m,mode=700", "tmpfs", directory)
    path = Path(directory) / "chat.log"
    log = new_log(path)
    try:
        os.write(log, b"x" * (2 * _MIB + 1024))
        (path.parent / "other").write_bytes(b"y" * (_MIB // 2))

        assert cut_long_log(path, longest_bytes=_MIB)

        assert path.stat().st_size == 0
        assert not older_log(path).exists()
        os.write(log, b"goes on\n")
        assert path.read_bytes() == b"goes on\n"
    finally:
        os.close(log)


def test_p28_disk_that_fills_up_in_the_middle_does_not_disturb_an_apply(place: Place) -> None:
    """By a failpoint, where the copy has just been made."""
    place.write(fake("chat", "--log-bytes", str(LONGEST_LOG_BYTES + 1)))

    place.apply(**place.failing("log.copied=ENOSPC"))

    assert "log.cut" in place.trace.read_text(encoding="ascii").split()
    assert log_of(place).stat().st_size < LONGEST_LOG_BYTES
    place.assert_at_rest()


def test_p28_engine_that_closes_its_output_is_ready_and_stays_so(place: Place) -> None:
    place.write(fake("chat", "--close-output"))

    place.apply()

    assert place.engines()["lab/chat"]["state"] == "ready"
    place.assert_at_rest(again=True)


@contextmanager
def followed(place: Place) -> Iterator[list[str]]:
    """`sage logs -f`: the lines that it has shown so far."""
    with place.started("logs", "lab/chat", "-f", "-n", "1") as process:
        lines: list[str] = []

        def read() -> None:
            assert process.stdout is not None
            lines.extend(line.rstrip("\n") for line in process.stdout)

        reader = threading.Thread(target=read)
        reader.start()
        yield lines
        process.kill()
        reader.join(10)


def test_p28_log_is_followed_across_a_cut_and_a_restart_and_the_process_before_is_kept(place: Place) -> None:
    place.write(fake("chat"))
    place.apply()
    first = place.pids()["lab/chat"]
    log = log_of(place)
    with followed(place) as lines:
        until(lambda: f"fake engine for chat-model, pid {first}" in lines, "the last line so far is shown")
        say(log, "before the cut")
        until(lambda: "before the cut" in lines, "what was said before the cut is shown")

        assert cut_long_log(log, longest_bytes=10)
        say(log, "after it")
        until(lambda: "after it" in lines, "what was said after the cut is shown")

        kill(first)
        place.apply()
        second = place.pids()["lab/chat"]
        until(lambda: f"fake engine for chat-model, pid {second}" in lines, "the new process is followed")

    assert len(lines) == len(set(lines)) == 4
    assert place.sage("logs", "lab/chat").stdout == f"fake engine for chat-model, pid {second}\n"
    assert place.sage("logs", "lab/chat", "--previous").stdout.splitlines()[-1] == "after it"


def test_p28_last_words_of_a_process_whose_log_was_just_cut_outlive_its_restart(place: Place) -> None:
    place.write(fake("chat"))
    place.apply()
    say(log_of(place), "error: out of memory")
    assert cut_long_log(log_of(place), longest_bytes=30)
    kill(place.pids()["lab/chat"])
    place.apply()

    previous = place.sage("logs", "lab/chat", "--previous").stdout

    assert "error: out of memory" in previous.splitlines()


def say(log: Path, line: str) -> None:
    """What an engine would write; the fake one is silent while it serves."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def test_p28_what_is_written_while_the_tail_is_shown_comes_after_it_once_and_whole(tmp_path: Path) -> None:
    log = tmp_path / "chat.log"
    log.write_text("one\ntwo\nthr")
    end = end_of(log)
    say(log, "ee")
    say(log, "four")
    shown = tail(log, 2, end=end)
    after = "".join(islice(followed_log(log, end, pause=lambda: None), 1))
    assert (shown, after) == (("one", "two"), "three\nfour\n")
