"""down, up, wait, snapshot, gpu, apply --dry-run and --no-wait: what scripts and people see of them. Real processes."""

import fcntl
import http.client
import json
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from sage_reconcile.core.observed import parse_observed
from tests.e2e import Place, fake, kill, until
from tests.long_lived import assert_serves_what_is_ready
from tests.oracle import alive

# --- down -------------------------------------------------------------------------------------------------------------


def test_down_that_is_interrupted_shows_no_further_project_and_names_itself(place: Place) -> None:
    """2026-11-28: it said that sage apply would go on from there, which would have started what it had stopped."""
    slow = fake("chat", "--ignore-term", update={"grace": "20s", "drain": "1s"})
    other = place.root / "other"
    other.mkdir()
    settings = {"project": f"{place.project}-z", "ports": {"llm": f"{place.spare[4]}-{place.spare[6]}"}}
    (other / "sage.yaml").write_text(json.dumps(settings))
    place.write(slow)
    place.write(fake("next"), stack="far", directory=other)
    place.apply()
    place.sage("apply", str(other), "-y")
    try:
        with place.started("down", str(place.manifests), str(other), "-y") as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            until(lambda: place.engines()["lab/chat"]["state"] == "stopping", "the stop has begun")
            process.send_signal(signal.SIGINT)
            rest, told = process.communicate(timeout=10)

        assert process.returncode == 130
        assert f"project {place.project} " in first and f"{place.project}-z" not in rest
        assert "sage down goes on from there" in told
        assert "far/next" in place.pids()
        kill(place.pids()["lab/chat"])
    finally:
        place.sage("down", "-p", f"{place.project}-z", "-y")


@pytest.mark.parametrize("command", ["down", "up"])
def test_down_and_up_can_be_told_to_wait_for_another_sage(place: Place, command: str) -> None:
    """2026-11-28: they said that --lock-timeout would help, and had no such option."""
    place.write(fake("chat"))
    place.apply()
    tries = place.root / "tries"
    traced = {"SAGE_TEST": "1", "SAGE_FAILPOINT_TRACE": str(tries)}
    with (place.root / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "--lock-timeout" in place.sage(command, str(place.manifests), "-y", expect=8).stderr
        with place.started(command, str(place.manifests), "-y", "--lock-timeout", "60s", **traced) as process:
            until(lambda: tries.exists() and len(tries.read_text().split()) > 2, "it has tried a few times")
            fcntl.flock(lock, fcntl.LOCK_UN)
            if command == "up":
                serving(process)
                process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0
    assert place.pids() == {}


def test_all_beside_names_is_a_mistake_and_stops_nothing(place: Place) -> None:
    """Without -y: a sage that takes --all by its word would ask first."""
    place.write(fake("chat"))
    place.apply()
    for named in (str(place.manifests), f"{place.project}:lab/chat"):
        assert "--all" in place.sage("down", "--all", named, expect=64).stderr
    assert place.pids().keys() == {"lab/chat"}


# --- up ---------------------------------------------------------------------------------------------------------------


def serving(process: "subprocess.Popen[str]") -> list[str]:
    """What `sage up` says until it serves."""
    assert process.stderr is not None
    lines = []
    while not lines or not lines[-1].startswith("serving "):
        line = process.stderr.readline()
        assert line, lines
        lines.append(line)
    return lines


def asked(port: int, model: str, path: str = "/v1/chat/completions") -> int:
    """The status of one request through the router."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}]})
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_applies_serves_and_stops_what_it_applied_when_a_signal_comes(place: Place, number: int) -> None:
    place.write(fake("chat", model=place.project), fake("app", depends_on=["chat"]))
    port = place.spare[0]
    with place.started("up", str(place.manifests), "-y", "--port", str(port)) as process:
        said = serving(process)

        assert said[-1].startswith(f"serving http://127.0.0.1:{port}/v1 ")
        assert set(place.pids()) == {"lab/chat", "lab/app"}
        assert asked(port, place.project) == 200
        assert_serves_what_is_ready(place, port)
        process.send_signal(number)
        stdout, _ = process.communicate(timeout=15)

    assert process.returncode == 0
    assert "Applied: 2 started." in stdout and "Applied: 2 stopped." in stdout
    assert place.pids() == {}
    place.assert_nothing_left()


def test_up_takes_the_port_of_sage_yaml_and_tells_what_becomes_of_engines(place: Place) -> None:
    place.write(fake("chat", model=place.project))
    port = place.spare[-1]  # The place's settings say so.
    with place.started("up", str(place.manifests), "-y") as process:
        serving(process)
        assert asked(port, place.project) == 200

        kill(place.pids()["lab/chat"])

        assert process.stderr is not None
        assert process.stderr.readline() == "note: lab/chat is gone: was ended by signal 9\n"
        until(lambda: asked(port, place.project) in (404, 503), "the router knows that it is gone")
        assert_serves_what_is_ready(place, port)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=15)
    assert process.returncode == 0


def test_engines_outlive_an_up_that_was_killed_and_the_next_one_takes_them_as_they_are(place: Place) -> None:
    place.write(fake("chat", model=place.project))
    words = ("up", str(place.manifests), "-y", "--port", str(place.spare[0]))
    with place.started(*words) as process:
        serving(process)
        pids = place.pids()
    assert process.returncode == -signal.SIGKILL
    assert place.pids() == pids

    with place.started(*words) as process:
        serving(process)

        assert asked(place.spare[0], place.project) == 200
        assert place.pids() == pids
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=15)
    assert place.pids() == {}


def test_up_starts_nothing_where_its_port_is_somebody_else_s(place: Place) -> None:
    place.write(fake("chat", model=place.project))
    with socket.create_server(("127.0.0.1", place.spare[0])):
        ran = place.sage("up", str(place.manifests), "-y", "--port", str(place.spare[0]), expect=12)

    assert "another program listens there" in ran.stderr
    assert place.pids() == {}


def test_up_that_cannot_apply_ends_as_apply_does(place: Place) -> None:
    place.write(fake("bad", "--exit-code", "3"))
    place.sage("up", str(place.manifests), "-y", expect=5)
    place.write(fake("bad", use_gpu=True))
    place.sage("up", str(place.manifests), "-y", expect=4)
    place.sage("up", str(place.manifests), expect=4)
    place.write(fake("chat", model=place.project))
    place.sage("up", str(place.manifests), expect=10)
    assert place.pids() == {}


def test_up_gives_an_engine_as_long_as_its_timeout_to_be_ready(place: Place) -> None:
    place.write(fake("never", "--never-ready", ready={"timeout": "8s"}))

    ran = place.sage("up", str(place.manifests), "-y", "--timeout", "1s", expect=5)

    assert "lab/never not ready after 1 s" in ran.stderr
    assert place.pids() == {}


def test_up_lets_a_running_request_finish_before_engines_are_stopped(place: Place) -> None:
    place.write(fake("chat", "--token-delay", "0.2", "--tokens", "5", model=place.project))
    with place.started("up", str(place.manifests), "-y", "--port", str(place.spare[0])) as process:
        serving(process)
        connection = http.client.HTTPConnection("127.0.0.1", place.spare[0], timeout=15)
        body = json.dumps({"model": place.project, "stream": True, "messages": [{"role": "user", "content": "hi"}]})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.readline()

        process.send_signal(signal.SIGINT)

        assert response.read().endswith(b"data: [DONE]\n\n")
        connection.close()
        process.communicate(timeout=15)
    assert process.returncode == 0
    assert place.pids() == {}


# --- wait -------------------------------------------------------------------------------------------------------------


def test_apply_without_waiting_ends_while_engines_load_and_wait_waits_for_them(place: Place) -> None:
    place.write(fake("slow", "--ready-after", "1.5"))

    ran = place.apply("--no-wait")
    assert "started  lab/slow" in ran.stderr
    assert place.engines()["lab/slow"]["state"] == "starting"

    place.sage("wait", "lab/slow", "-p", place.project, "--timeout", "20s")
    assert place.engines()["lab/slow"]["state"] == "ready"
    place.assert_at_rest(again=True)


def test_wait_ends_with_9_when_the_time_is_up_and_says_what_is_missing(place: Place) -> None:
    place.write(fake("never", "--never-ready"))
    place.apply("--no-wait")

    ran = place.sage("wait", "lab/never", "-p", place.project, "--timeout", "0.5s", expect=9)
    assert "lab/never is starting: GET /health answers 503" in ran.stderr
    ran = place.sage("wait", "lab/never", "-p", place.project, "--for", "stopped", "--timeout", "0s", expect=9)
    assert "lab/never is starting" in ran.stderr


def test_wait_waits_for_each_of_several_engines_in_whatever_order_they_are_named(place: Place) -> None:
    place.write(fake("never", "--never-ready"), fake("chat"), fake("zealous"))
    place.apply("--no-wait")
    place.sage("wait", "lab/chat", "lab/zealous", "-p", place.project, "--timeout", "20s")

    for ids in (("lab/chat", "lab/never"), ("lab/never", "lab/zealous"), ("lab/zealous", "lab/never", "lab/chat")):
        ran = place.sage("wait", *ids, "-p", place.project, "--timeout", "0.5s", expect=9)

        assert "lab/never is starting" in ran.stderr
        assert "lab/chat" not in ran.stderr and "lab/zealous" not in ran.stderr


def test_wait_for_stopped_ends_once_nothing_of_it_runs(place: Place) -> None:
    place.write(fake("chat", "--term-delay", "0.5", replicas=2))
    place.apply()
    pids = place.pids()
    with place.started("wait", "lab/chat", "-p", place.project, "--for", "stopped", "--timeout", "20s") as waiting:
        place.sage("down", "lab/chat", "-p", place.project, "-y")

        assert waiting.wait(10) == 0
        assert not any(alive(pid) for pid in pids.values())
    # It has run once, so the name is known: it is stopped, and not misspelt.
    place.sage("wait", "lab/chat", "-p", place.project, "--for", "stopped")
    place.sage("wait", "lab/cat", "-p", place.project, "--for", "stopped", expect=64)
    place.sage("wait", "lab/chat", "--for", "lunch", expect=64)


# --- dry run, snapshot, gpu -------------------------------------------------------------------------------------------


def test_dry_run_shows_the_plan_asks_nobody_and_does_nothing(place: Place) -> None:
    place.write(fake("chat"))

    ran = place.sage("apply", str(place.manifests), "--dry-run")

    assert "+   lab/chat" in ran.stdout and "dry run: nothing was done" in ran.stderr
    assert place.pids() == {}
    assert not place.state.exists()
    place.write(fake("chat", use_gpu=True))
    place.sage("apply", str(place.manifests), "--dry-run", expect=4)


def test_snapshot_is_a_world_that_a_test_can_use_as_it_is(place: Place) -> None:
    place.write(fake("chat"), {"name": "real", "model": "./missing.gguf", "use_gpu": False}, stack="lab")
    place.apply("--on-failure", "continue", expect=4)
    out = place.root / "world.json"

    place.sage("snapshot", str(place.manifests), "--out", str(out))

    seen = parse_observed(out.read_bytes())
    (chat,) = [engine for engine in seen.engines if engine.id.project == place.project]
    assert (str(chat.id), chat.state, chat.leader.pid) == ("lab/chat", "ready", place.pids()["lab/chat"])
    assert [Path(model.model).name for model in seen.models if model.why] == ["missing.gguf"]
    printed = place.sage("snapshot").stdout
    # Other engines of this user come and go meanwhile.
    assert chat.leader in {engine.leader for engine in parse_observed(printed).engines}
    place.sage("snapshot", "--out", "/no/such/directory/x", expect=12)


def test_status_of_a_project_that_runs_nothing_does_not_say_that_nothing_runs(place: Place) -> None:
    place.write(fake("chat"))
    place.apply()

    told = place.sage("status", "-p", f"{place.project}-b").stdout

    assert told.splitlines()[0] == "no engine of that project runs here"


def test_gpu_says_that_there_is_none(place: Place) -> None:
    assert place.sage("gpu", SAGE_DISABLE_NVML="1").stdout.startswith("no GPU is observed on ")
    answer = json.loads(place.sage("gpu", "-o", "json", SAGE_DISABLE_NVML="1").stdout)
    assert (answer["format_version"], answer["devices"], answer["gaps"]) == ("1.0", [], [])


def test_failpoints_are_refused_outside_tests(place: Place) -> None:
    ran = place.sage("status", expect=10, SAGE_FAILPOINTS="record.begin=kill")
    assert "SAGE_FAILPOINTS is set" in ran.stderr
