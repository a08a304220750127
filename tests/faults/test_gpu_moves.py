"""GPUs while engines come and go: memory that stays, numbers that change, neighbours that grow. Catalogue G7 to G13.

Real processes over the fake NVML. What a test waits for is an event: a number of looks that sage has taken, a process,
a line of the journal.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sage_reconcile.core.journal import ActBegun, ActDone, PlanBegun, RestoreBegun
from tests import fakenvml
from tests.e2e import DEADLINE_SECONDS, FAKE_ENGINE, Place, fake, kill, until
from tests.fakenvml import Delay, Entry, Fault, Gpu, Mig, Process, Used, gpu_uuid, mig_uuid
from tests.faults.test_processes import child_of
from tests.oracle import Ran, alive, environ, environment, labelled, stat_fields
from tests.tiny_gguf import write_tiny_gguf

CHAOS = os.environ.get("CHAOS") == "1"

# Never struck by it, but counted: every look at the devices asks this once.
_COUNTED = Delay(call="nvmlDeviceGetCount", milliseconds=0, after=10**9)
# As many looks as show that sage waits, and would go on if it did not: a start needs three.
_SOME_LOOKS = 8
# Memory of the dead comes back only when a test lets time pass for the driver.
_LINGER_SECONDS = 600
_LATER = 1000

_PATIENCE_SECONDS = 4 * DEADLINE_SECONDS


def card(index: int = 0, **fields: Any) -> Gpu:
    return Gpu(index=index, **{"name": "NVIDIA L4", "total_mib": 24000, "reserved_mib": 400, **fields})


def machine(place: Place, *entries: Entry, ahead_seconds: int = 0) -> None:
    """These devices, on which looks are counted."""
    place.gpus(*entries, _COUNTED, ahead_seconds=ahead_seconds)


def looks(place: Place) -> int:
    """How often anybody has looked at the devices so far."""
    return sum(path.stat().st_size for path in place.root.glob("nvml.calls.*"))


def until_looked_again(place: Place, times: int = _SOME_LOOKS) -> None:
    enough = looks(place) + times
    until(lambda: looks(place) >= enough, f"sage looks {times} times more", _PATIENCE_SECONDS)


def lingering(place: Place, engine: str = "lab/chat") -> None:
    """From now on what the engine holds stays a while when its processes are gone."""
    pids = {process.pid for process in labelled(place.root) if process.engine == engine}
    for entry in fakenvml.entries(place.nvml):
        if isinstance(entry, Process) and entry.pid in pids:
            fakenvml.claim(place.nvml, entry.gpu, entry.pid, entry.mib, linger_seconds=_LINGER_SECONDS)


# The real command line, for which half a minute is a second.
_HURRIED = """
import sys, time
from sage_reconcile.app.host import LocalHost
from sage_reconcile.cli.main import main
LocalHost.now = lambda host: 30 * time.monotonic()
main(sys.argv[1:])
"""


def hurried(place: Place, *words: str, expect: int) -> Ran:
    """A command that does not wait as long as it should."""
    done = subprocess.run(
        [sys.executable, "-c", _HURRIED, *words],
        cwd=place.root,
        env=environment(place.state),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_PATIENCE_SECONDS,
        check=False,
    )
    place.said.append(done.stderr)
    assert done.returncode == expect, f"sage {' '.join(words)} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return Ran(code=done.returncode, stdout=done.stdout, stderr=done.stderr, seconds=0.0)


def planned(place: Place, *options: str, expect: int) -> str:
    return place.sage("plan", str(place.manifests), *options, expect=expect).stdout


@contextmanager
def applying(place: Place, *options: str, **more: str) -> Iterator["subprocess.Popen[str]"]:
    with place.started("apply", str(place.manifests), "-y", *options, **more) as process:
        yield process


def ended(process: "subprocess.Popen[str]", expect: int) -> Ran:
    stdout, stderr = process.communicate(timeout=_PATIENCE_SECONDS)
    assert process.returncode == expect, f"it ended with {process.returncode}: {stdout}{stderr}"
    return Ran(code=process.returncode, stdout=stdout, stderr=stderr, seconds=0.0)


# --- G7: memory that does not come back -------------------------------------------------------------------------------


def test_g7_memory_of_an_engine_that_was_just_killed_is_not_given_up_yet(place: Place) -> None:
    """2026-11-25: right after a crash status said that it did not come back, and seconds later it was."""
    machine(place, card())
    place.write(place.gpu_fake("chat", mib=10240))
    place.apply()
    lingering(place)
    pid = place.pids()["lab/chat"]

    kill(pid)

    row = place.engines()["lab/chat"]
    assert row["state"] == "missing"
    assert row["reason"] == f"pid {pid} is gone, and 10.0 GiB of gpu0 are not given back yet"
    machine(place, card(), ahead_seconds=_LATER)
    assert place.engines()["lab/chat"]["reason"] == f"pid {pid} is gone"


@pytest.mark.parametrize(
    "state_is_lost", [False, pytest.param(True, marks=pytest.mark.chaos)], ids=["with state", "state was deleted"]
)
def test_g7_memory_that_is_not_back_after_a_stop_closes_its_gpu_until_it_is(place: Place, state_is_lost: bool) -> None:
    machine(place, card())
    place.write(place.gpu_fake("chat", mib=10240))
    place.apply()
    lingering(place)
    pid = place.pids()["lab/chat"]
    if state_is_lost:
        shutil.rmtree(place.state)

    down = hurried(place, "down", str(place.manifests), "-y", expect=6)

    assert "lab/chat stuck: it ended, and 10.0 GiB of gpu0 did not come back" in down.stderr
    closed = f"lab/chat (pid {pid}) ended, and 10.0 GiB did not come back"
    (device,) = json.loads(place.sage("gpu", "-o", "json").stdout)["devices"]
    assert device["closed"] == closed and f"closed: {closed}" in place.sage("gpu").stdout
    row = place.engines()["lab/chat"]
    assert (row["state"], row["declared"]) == ("stuck", False) and "10.0 GiB of gpu0 did not come back" in row["reason"]

    place.write(place.gpu_fake("other", mib=1024))  # there would be room
    assert f"closed: {closed}" in " ".join(planned(place, expect=4).split())
    place.apply(expect=4)
    assert place.pids() == {}

    machine(place, card(), ahead_seconds=_LATER)
    place.apply()
    assert list(place.pids()) == ["lab/other"]
    place.assert_at_rest(again=True)


def test_g7_engine_that_cannot_come_back_to_its_gpu_is_stuck_and_said_so(place: Place) -> None:
    machine(place, card())
    place.write(place.gpu_fake("chat", mib=10240))
    place.apply()
    lingering(place)
    place.write(place.gpu_fake("chat", mib=8192))

    ran = hurried(place, "apply", str(place.manifests), "-y", expect=6)

    assert "lab/chat stuck: it ended, and 10.0 GiB of gpu0 did not come back" in ran.stderr
    assert place.pids() == {}
    assert place.engines()["lab/chat"]["state"] == "stuck"
    assert "closed" in planned(place, expect=4)
    machine(place, card(), ahead_seconds=_LATER)
    place.apply()
    assert place.held_mib() == {"lab/chat": {gpu_uuid(0): 8192}}
    place.assert_at_rest(again=True)


@pytest.mark.chaos
def test_g7_closed_gpu_stays_closed_when_its_engine_runs_elsewhere(place: Place) -> None:
    machine(place, card(0), card(1))
    place.write(place.gpu_fake("chat", mib=10240))
    place.apply()
    lingering(place)
    (home,) = place.held_mib()["lab/chat"]
    hurried(place, "down", str(place.manifests), "-y", expect=6)

    place.apply()

    (away,) = place.held_mib()["lab/chat"]
    assert away != home
    engines = (place.gpu_fake("chat", mib=10240), place.gpu_fake("other", mib=1024, devices=[home]))
    place.write(*engines)
    text = planned(place, expect=4)
    assert "cannot place lab/other" in text and "closed:" in text
    machine(place, card(0), card(1), ahead_seconds=_LATER)
    place.apply()
    assert set(place.held_mib()["lab/other"]) == {home}
    place.assert_at_rest(again=True)


def test_g7_nothing_is_started_behind_a_stop_whose_memory_did_not_come_back(place: Place) -> None:
    """Not even where the apply goes on after failures, and there is room."""
    machine(place, card())
    place.write(place.gpu_fake("chat", mib=10240))
    place.apply()
    lingering(place)
    place.write(place.gpu_fake("other", mib=1024))

    ran = hurried(place, "apply", str(place.manifests), "-y", "--on-failure", "continue", expect=6)

    assert place.pids() == {}, ran.stderr
    assert not (place.state / place.project / "logs" / "lab" / "other.log").exists()
    machine(place, card(), ahead_seconds=_LATER)
    place.apply()
    place.assert_at_rest(again=True)


@pytest.mark.chaos
def test_g7_memory_of_a_crash_that_never_comes_back_closes_the_gpu_too(place: Place) -> None:
    machine(place, card())
    place.write(place.gpu_fake("chat", mib=10240))
    place.apply()
    lingering(place)
    kill(place.pids()["lab/chat"])

    ran = hurried(place, "apply", str(place.manifests), "-y", expect=5)

    assert "10.0 GiB" in ran.stderr and "did not come back" in ran.stderr
    assert "closed" in planned(place, expect=4)
    assert place.pids() == {}
    machine(place, card(), ahead_seconds=_LATER)
    place.apply()
    place.assert_at_rest(again=True)


# --- acceptance 9: a killed engine whose memory comes back late -------------------------------------------------------


@pytest.mark.parametrize("a_worker_lives_on", [True, False], ids=["worker lives on", "all are dead"])
def test_p10_and_g7_restart_after_a_crash_waits_on_its_own_gpu_until_the_memory_is_back(
    place: Place, a_worker_lives_on: bool
) -> None:
    """There is room beside it, and another GPU is empty: it waits all the same, and comes back to where it was."""
    cards = (card(0), card(1))
    machine(place, *cards)
    worker = ("--fork-child", "--child-ignore-term", "--child-holds-memory") if a_worker_lives_on else ()
    place.write(place.gpu_fake("chat", *worker, mib=10240, update={"grace": "0.4s"}))
    place.apply()
    leader, (home,) = place.pids()["lab/chat"], place.held_mib()["lab/chat"]
    child = child_of(place) if a_worker_lives_on else leader
    lingering(place)
    kill(leader)
    what = f"pid {child} of its last process holds" if a_worker_lives_on else f"its last process (pid {leader})"
    why = f"waits for 10.0 GiB of gpu{_index(home)} that {what}"
    assert why in " ".join(planned(place, expect=0).split())

    with applying(place) as apply:
        if a_worker_lives_on:
            until(lambda: not alive(child), "the worker is ended", _PATIENCE_SECONDS)
        else:
            until(lambda: _acts_begun(place, "start") == 2, "the start is begun", _PATIENCE_SECONDS)
        until_looked_again(place)
        assert place.pids() == {}
        # Meanwhile nobody else is placed on it.
        other = place.root / "other" / "manifests"
        other.mkdir(parents=True)
        (other / "sage.yaml").write_text(f'{{"project": "{place.project}-b"}}', encoding="utf-8")
        place.write(place.gpu_fake("big", mib=20000, devices=[home]), directory=other)
        refused = place.sage("plan", str(other), expect=4)
        assert "short 6.5" in refused.stdout and f"lab/chat, which ended as pid {leader} (10.0)" in refused.stdout, (
            refused.stdout
        )
        machine(place, *cards, ahead_seconds=_LATER)
        said = ended(apply, 0)

    assert place.held_mib() == {"lab/chat": {home: 10240}}
    assert why in " ".join(said.stdout.split())
    place.assert_at_rest(again=True)


def _index(uuid: str) -> int:
    return next(index for index in range(8) if gpu_uuid(index) == uuid)


def _acts_begun(place: Place, word: str) -> int:
    """How many acts of a sort have begun in all plans so far."""
    acts: tuple[str, ...] = ()
    begun = 0
    for entry in place.journal():
        if isinstance(entry, PlanBegun | RestoreBegun):
            acts = entry.acts
        elif isinstance(entry, ActBegun):
            begun += acts[entry.act].startswith(f"{word} ")
    return begun


# --- G8: numbers of devices -------------------------------------------------------------------------------------------


_FAKE_PROGRAM = """#!{python}
# An engine's command line, in the words of the fake one.
import os, sys
words = sys.argv[1:]
value = lambda *names: next(words[words.index(name) + 1] for name in names if name in words)
if {numbers} and not os.environ["CUDA_VISIBLE_DEVICES"].replace(",", "").isdigit():
    sys.exit("invalid literal for int() with base 10")
os.execv(sys.executable, [sys.executable, {engine!r}, "--host", value("--host"), "--port", value("--port"), "--model",
    value("--served-model-name", "--alias"), "--kind", {kind!r}, "--fake-nvml", {nvml!r}, "--gpu-memory", "2048"])
"""


def with_programs(place: Place) -> str:
    """A PATH on which vllm, infinity_emb and llama-server are fakes, each of which takes 2 GiB of each GPU."""
    directory = place.root / "bin"
    directory.mkdir()
    for name, kind in (("vllm", "llm"), ("infinity_emb", "embedding"), ("llama-server", "llm")):
        text = _FAKE_PROGRAM.format(
            python=sys.executable, numbers=name == "vllm", engine=str(FAKE_ENGINE), kind=kind, nvml=str(place.nvml)
        )
        (directory / name).write_text(text, encoding="utf-8")
        (directory / name).chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


def vllm(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "model": "lab/tiny-1b", "runtime": "vllm", "gpu_memory": "3GiB", **fields}


# NVML counts these in another order than that of the PCI bus, by which CUDA is told to count.
_CROSSED = (card(0, bus="0000:90:00.0"), card(1, bus="0000:10:00.0"))


def test_g8_engines_of_every_runtime_sit_on_their_planned_gpu_whatever_its_number_is(place: Place) -> None:
    machine(place, *_CROSSED)
    path = with_programs(place)
    write_tiny_gguf(place.manifests / "tiny.gguf")
    place.write(
        vllm("numbers", devices=[gpu_uuid(0)]),
        {"name": "texts", "kind": "embedding", "model": "lab/bge", "use_gpu": True, "gpu_memory": "3GiB"},
        {"name": "file", "model": "./tiny.gguf", "use_gpu": True, "gpu_memory": "3GiB", "devices": [gpu_uuid(1)]},
        place.gpu_fake("own", mib=1024, devices=[gpu_uuid(0)]),
    )

    place.apply(PATH=path)

    seen = {name: environ(pid) for name, pid in place.pids().items()}
    assert {variables["CUDA_DEVICE_ORDER"] for variables in seen.values()} == {"PCI_BUS_ID"}
    names = {name: variables["CUDA_VISIBLE_DEVICES"] for name, variables in seen.items()}
    (texts,) = place.held_mib()["lab/texts"]
    assert names == {
        "lab/numbers": "1",
        "lab/texts": texts,
        "lab/file": gpu_uuid(1),
        "lab/own": gpu_uuid(0),
    }
    assert place.held_mib() == {
        "lab/numbers": {gpu_uuid(0): 2048},
        "lab/texts": {texts: 2048},
        "lab/file": {gpu_uuid(1): 2048},
        "lab/own": {gpu_uuid(0): 1024},
    }
    assert "No changes" in place.sage("plan", str(place.manifests), PATH=path).stdout


def renumbered(*cards: Gpu) -> tuple[Gpu, ...]:
    """The same GPUs, counted the other way round, as after one was taken out and put back."""
    last = len(cards) - 1
    return tuple(replace(one, index=last - one.index, bus=cards[last - one.index].bus) for one in cards)


def test_g8_engines_stay_and_come_back_on_their_gpu_when_it_has_another_number(place: Place) -> None:
    cards = (card(0), card(1))
    machine(place, *cards)
    path = with_programs(place)
    engines = (vllm("numbers", devices=[gpu_uuid(0)]), place.gpu_fake("own", mib=1024, devices=[gpu_uuid(1)]))
    place.write(*engines)
    place.apply(PATH=path)
    before = place.pids()
    machine(place, *renumbered(*cards))

    assert "No changes" in place.sage("plan", str(place.manifests), PATH=path).stdout
    kill(before["lab/numbers"])
    place.apply(PATH=path)

    assert place.held_mib() == {"lab/numbers": {gpu_uuid(0): 2048}, "lab/own": {gpu_uuid(1): 1024}}
    assert environ(place.pids()["lab/numbers"])["CUDA_VISIBLE_DEVICES"] == "1"
    assert place.pids()["lab/own"] == before["lab/own"]


def test_g8_engine_is_put_back_on_its_gpu_when_it_has_another_number(place: Place) -> None:
    cards = (card(0), card(1))
    machine(place, *cards)
    path = with_programs(place)
    place.write(vllm("numbers", devices=[gpu_uuid(0)]))
    place.apply(PATH=path)
    machine(place, *renumbered(*cards))
    place.write(
        vllm("numbers", devices=[gpu_uuid(0)], max_model_len=512),
        fake("bad", "--exit-code", "1", depends_on=["numbers"]),
    )

    place.apply(PATH=path, expect=5)

    assert place.held_mib() == {"lab/numbers": {gpu_uuid(0): 2048}}
    place.write(vllm("numbers", devices=[gpu_uuid(0)]))
    assert "No changes" in place.sage("plan", str(place.manifests), PATH=path).stdout


@pytest.mark.parametrize("names", ["numbers", "uuids"])
def test_g8_gpu_that_gets_another_number_before_the_start_is_not_mistaken(place: Place, names: str) -> None:
    cards = (card(0), card(1))
    machine(place, *cards)
    path = with_programs(place)
    by_number = names == "numbers"
    place.write(vllm("chat", devices=[gpu_uuid(0)]) if by_number else place.gpu_fake("chat", mib=2048, devices=[0]))

    with stopped_at_the_gate(place, PATH=path) as go_on:
        machine(place, *renumbered(*cards))
        said = go_on(5 if by_number else 0)

    if by_number:
        assert "its runtime knows devices by their numbers" in said.stderr
        assert place.pids() == {} and place.log("lab/chat") == ""
    else:
        assert place.held_mib() == {"lab/chat": {gpu_uuid(0): 2048}}


@contextmanager
def stopped_at_the_gate(place: Place, **more: str) -> Iterator[Callable[[int], Ran]]:
    """An apply that has written an engine down and not let it run. What is yielded lets it go on, to this exit code."""
    failing = place.failing("gate.recorded=stop")
    with applying(place, **failing, **more) as apply:
        until(lambda: stat_fields(apply.pid)[:1] == ["T"], "it stops at the gate", _PATIENCE_SECONDS)

        def go_on(expect: int) -> Ran:
            apply.send_signal(signal.SIGCONT)
            return ended(apply, expect)

        yield go_on


def test_g8_engine_that_takes_memory_elsewhere_fails_and_what_ran_is_put_back(place: Place) -> None:
    machine(place, card(0), card(1))
    place.write(place.gpu_fake("chat", mib=2048, devices=[0]))
    place.apply()
    place.write(place.gpu_fake("chat", "--claims-on", "1", mib=2048, devices=[0]), place.gpu_fake("side", mib=1024))

    ran = place.apply(expect=5)

    assert "lab/chat uses 2.0 GiB of gpu1, and was placed on gpu0" in ran.stderr
    assert place.held_mib() == {"lab/chat": {gpu_uuid(0): 2048}}
    assert place.used_mib(1) == 0
    place.write(place.gpu_fake("chat", mib=2048, devices=[0]))
    place.assert_at_rest(again=True)


def test_g8_engine_on_the_cpu_that_takes_memory_of_a_gpu_fails_and_is_ended(place: Place) -> None:
    machine(place, card(0))
    claims = ("--fake-nvml", str(place.nvml), "--gpu-memory", "2048", "--claims-on", "0")
    place.write(fake("chat", *claims))

    ran = place.apply("--timeout", "3s", expect=5)

    assert "lab/chat uses 2.0 GiB of gpu0, and was placed on no GPU" in ran.stderr
    assert place.pids() == {}
    assert place.used_mib(0) == 0


def test_g8_engine_that_takes_no_memory_is_noted_and_left_alone(place: Place) -> None:
    machine(place, card(0))
    place.write(fake("chat", use_gpu=True, gpu_memory="2GiB"))

    place.apply()

    assert "note: lab/chat holds no memory of gpu0: nothing proves that it runs there" in planned(place, expect=0)
    assert place.engines()["lab/chat"]["state"] == "ready"
    place.assert_at_rest(again=True)


# --- G9: one after the other on a device ------------------------------------------------------------------------------


# What an engine's very first act is: to note what is used of a GPU, when, and who runs.
_WITNESS = """
import json, os, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import fakenvml
name, gpu, engine = sys.argv[1], sys.argv[2], sys.argv[3:]
line = json.dumps({{"name": name, "used_mib": fakenvml.memory(Path({nvml!r}), gpu).used_mib}})
with open({file!r}, "a") as file:
    file.write(line + "\\n")
os.execv(engine[0], engine)
"""


def witnessed(place: Place, engine: dict[str, Any], gpu: str) -> dict[str, Any]:
    """The engine, which begins by noting what is used of a GPU."""
    program = place.root / "witness.py"
    tests = str(Path(fakenvml.__file__).parent.parent)
    text = _WITNESS.format(tests=tests, nvml=str(place.nvml), file=str(place.root / "witnessed"))
    program.write_text(text, encoding="utf-8")
    return engine | {"command": [sys.executable, str(program), engine["name"], gpu, *engine["command"]]}


def what_they_saw(place: Place) -> list[tuple[str, int]]:
    """Who began, in this order, and how much was used by then."""
    file = place.root / "witnessed"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [(line["name"], line["used_mib"]) for line in map(json.loads, lines)]


def test_g9_engines_on_one_gpu_start_one_after_the_other_and_on_two_side_by_side(place: Place) -> None:
    """Each takes its memory in steps, and some more once it is ready: the next one begins when all of that is over."""
    machine(place, card(0), card(1))
    slowly = ("--ready-after", "0.6", "--memory-in-steps", "4", "--memory-grows-to", "2000")
    engines = [place.gpu_fake(name, *slowly, mib=1000, gpu_memory="2000MiB", devices=[0]) for name in "ab"]
    alone = place.gpu_fake("c", "--ready-after", "5", mib=1000, devices=[1])
    place.write(*(witnessed(place, engine, gpu_uuid(0)) for engine in (*engines, alone)))

    place.apply()

    saw = dict(what_they_saw(place))
    assert (saw["a"], saw["b"]) == (0, 2000)
    ends = [entry for entry in place.journal() if isinstance(entry, ActBegun | ActDone)]
    acts = next(entry.acts for entry in place.journal() if isinstance(entry, PlanBegun))
    told = [(acts[entry.act].split()[1], type(entry).__name__) for entry in ends]
    assert told.index(("lab/c", "ActBegun")) < told.index(("lab/a", "ActDone"))
    assert told.index(("lab/b", "ActBegun")) < told.index(("lab/c", "ActDone"))
    place.assert_at_rest(again=True)


def test_g9_start_waits_for_the_stop_of_another_engine_on_its_gpu_until_the_memory_is_back(place: Place) -> None:
    machine(place, card(0))
    place.write(place.gpu_fake("old", mib=10240))
    place.apply()
    lingering(place, "lab/old")
    # Both fit at once.
    place.write(witnessed(place, place.gpu_fake("new", mib=8192), gpu_uuid(0)))

    with applying(place) as apply:
        until(lambda: "lab/old" not in place.pids(), "the old one has ended", _PATIENCE_SECONDS)
        until_looked_again(place)
        assert what_they_saw(place) == []
        machine(place, card(0), ahead_seconds=_LATER)
        ended(apply, 0)

    assert what_they_saw(place) == [("new", 0)]
    place.assert_at_rest(again=True)


# --- G10: others grow between the plan and the start ------------------------------------------------------------------


def test_g10_memory_that_somebody_takes_before_the_program_runs_is_seen_and_it_never_runs(place: Place) -> None:
    machine(place, card(0))
    place.write(witnessed(place, place.gpu_fake("chat", mib=10240), gpu_uuid(0)))

    with stopped_at_the_gate(place) as go_on, place.foreign_on(gpu_uuid(0), 20000) as other:
        ran = go_on(5)

        assert f"gpu0 has 3.5 GiB free, and it needs 10.0: held by foreign pid {other.pid} sleep (19.5)" in ran.stderr
        assert what_they_saw(place) == [] and place.log("lab/chat") == ""
        assert labelled(place.root) == () and place.used_mib(0) == 20000
        assert other.poll() is None
    place.apply()
    place.assert_at_rest(again=True)


def test_g10_what_ran_is_put_back_when_its_successor_finds_no_room_any_more(place: Place) -> None:
    machine(place, card(0))
    place.write(place.gpu_fake("chat", mib=2048))
    place.apply()
    place.write(place.gpu_fake("chat", mib=10240))

    with stopped_at_the_gate(place) as go_on, place.foreign_on(gpu_uuid(0), 16000):
        go_on(5)

        assert place.held_mib() == {"lab/chat": {gpu_uuid(0): 2048}}
    place.write(place.gpu_fake("chat", mib=2048))
    place.assert_at_rest(again=True)


# --- G11: slices ------------------------------------------------------------------------------------------------------


def _sliced() -> tuple[Entry, ...]:
    return (card(0, mig=True), Mig(gpu=0, index=0), Mig(gpu=0, index=1))


def test_g11_slice_is_filled_to_its_own_size_and_not_to_that_of_its_gpu(place: Place) -> None:
    machine(place, *_sliced())
    place.write(place.gpu_fake("big", mib=12000))
    text = planned(place, expect=4)
    assert (
        text.count("of 9.8 GiB") == 2
        and "cannot place lab/big: needs a GPU with 11.7 GiB (declared), none fits" in text
    )

    pinned = place.gpu_fake("pinned", mib=6000, devices=[mig_uuid(0, 1)])
    place.write(pinned, place.gpu_fake("any", mib=6000))
    place.apply()

    seen = {name: environ(pid)["CUDA_VISIBLE_DEVICES"] for name, pid in place.pids().items()}
    assert seen == {"lab/pinned": mig_uuid(0, 1), "lab/any": mig_uuid(0, 0)}
    assert place.held_mib() == {"lab/pinned": {mig_uuid(0, 1): 6000}, "lab/any": {mig_uuid(0, 0): 6000}}
    place.assert_at_rest(again=True)


def test_g11_slices_are_refused_to_those_who_cannot_use_them(place: Place) -> None:
    machine(place, *_sliced())
    path = with_programs(place)
    place.write(vllm("numbers"), place.gpu_fake("two", mib=1000, tensor_parallel=2))

    text = place.sage("plan", str(place.manifests), expect=4, PATH=path).stdout

    words = " ".join(text.split())
    assert words.count("a MIG slice, which its runtime cannot be given") == 2
    assert words.count("a MIG slice, which cannot be one of several") == 2
    machine(place, *_sliced(), card(1))
    place.write(vllm("numbers"))
    place.apply(PATH=path)
    assert environ(place.pids()["lab/numbers"])["CUDA_VISIBLE_DEVICES"] == "1"
    assert place.held_mib() == {"lab/numbers": {gpu_uuid(1): 2048}}


# --- G12: variables that are sage's alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES"])
def test_g12_manifest_that_chooses_devices_by_variables_is_refused_with_its_place(place: Place, name: str) -> None:
    text = f"version: 1\nname: lab\nengines:\n  - name: chat\n    model: lab/tiny\n    env:\n      {name}: '0'\n"
    (place.manifests / "lab.yaml").write_text(text, encoding="utf-8")

    ran = place.apply(expect=3)

    assert f"lab.yaml:7:7: error: {name} is set by sage alone" in ran.stderr


# --- G13: figures that make no sense, or change -----------------------------------------------------------------------


_NONSENSE = {
    "no memory": card(0, total_mib=0),
    "does not tell": card(0, total_mib=None),
    "negative": card(0, total_mib=-5),
    "huge": card(0, total_mib=2**43),
    "more is reserved than there is": card(0, reserved_mib=10**7),
}


# All of them only with CHAOS=1: each takes five commands, and the door to NVML judges them all in one place.
_SAMPLE = (*(_NONSENSE if CHAOS else ["negative"]), "more is used than there is")


@pytest.mark.parametrize("what", _SAMPLE)
def test_g13_device_whose_figures_make_no_sense_is_not_used_and_what_runs_there_is_left_alone(
    place: Place, what: str
) -> None:
    machine(place, card(0))
    chat = place.gpu_fake("chat", mib=2048)
    place.write(chat)
    place.apply()
    before = place.pids()
    machine(place, _NONSENSE.get(what, card(0)), *([] if what in _NONSENSE else [Used(gpu=0, mib=10**7)]))

    assert "No changes" in planned(place, expect=0)
    assert place.engines()["lab/chat"]["state"] == "ready"
    place.write(chat, place.gpu_fake("more", mib=1024))
    text = planned(place, expect=11)

    assert "gpu0 cannot be seen: " in text, text
    assert place.pids() == before
    machine(place, card(0))


@pytest.mark.parametrize("total_mib", [3000, 200000])
def test_g13_gpu_that_has_another_size_at_the_start_than_in_the_plan_is_not_started_on(
    place: Place, total_mib: int
) -> None:
    """Of more, vLLM would be told the same share: more than what was planned."""
    machine(place, card(0))
    path = with_programs(place)
    place.write(vllm("chat"))

    with stopped_at_the_gate(place, PATH=path) as go_on:
        machine(place, card(0, total_mib=total_mib))
        ran = go_on(5)

    assert "gpu0 has" in ran.stderr and place.pids() == {} and place.log("lab/chat") == ""


def test_g13_gpu_that_is_gone_at_the_start_is_not_started_on(place: Place) -> None:
    machine(place, card(0))
    place.write(place.gpu_fake("chat", mib=2048))

    with stopped_at_the_gate(place) as go_on:
        machine(place, card(0), Fault(gpu=0, code="NVML_ERROR_GPU_IS_LOST"))
        ran = go_on(11)

    assert "gpu0 is out of sight" in ran.stderr and place.pids() == {} and place.log("lab/chat") == ""
