"""The launcher as sage meets it: a process that takes llama-server's flags and serves the real llama.cpp."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_gguf import write_tiny_gguf

# The launcher itself says what is missing without it; here there is nothing to test then.
pytest.importorskip("xllamacpp")

# Ready takes 0.1 s on an idle machine; a busy one with two cores was seen to take fifty times that.
_DEADLINE_SECONDS = 60.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


def test_engine_answers_chat_under_each_of_its_aliases(tiny: Path) -> None:
    with launched("--model", tiny, "--alias", "chat,spare", "--ctx-size=512", "-np", "1", "--metrics") as (_, port):
        answer = ask(port, "/v1/chat/completions", chat("hello", max_tokens=4))
        model = ask(port, "/v1/models")["data"][0]

    assert answer["choices"][0]["message"]["content"].isascii()
    assert answer["usage"]["completion_tokens"] == 4
    assert (model["id"], model["aliases"]) == ("chat", ["chat", "spare"])
    assert model["meta"]["n_ctx"] == 512


def test_stream_arrives_as_events_and_ends_with_done(tiny: Path) -> None:
    with launched("--model", tiny, "--alias", "chat") as (_, port):
        connection = post(port, "/v1/chat/completions", chat("hello", max_tokens=4, stream=True))
        events = [line for line in connection.getresponse().read().decode().splitlines() if line]

    tokens = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events[:-1]]
    assert sum(bool(token.get("content")) for token in tokens) == 4
    assert events[-1] == "data: [DONE]"


def test_two_slots_share_the_context(tiny: Path) -> None:
    with launched("--model", tiny, "--parallel", "2", "-c", "1024") as (_, port):
        slots = ask(port, "/slots")

    assert [slot["n_ctx"] for slot in slots] == [512, 512]


def test_embedding_engine_answers_one_vector_per_input(tiny: Path) -> None:
    with launched("--model", tiny, "--alias", "vectors", "--embedding", "--pooling", "mean") as (_, port):
        answer = ask(port, "/v1/embeddings", {"model": "vectors", "input": ["one", "two", "one"]})

    first, second, third = (row["embedding"] for row in answer["data"])
    assert len(first) == 64
    assert first == pytest.approx(third)
    assert first != pytest.approx(second)


def test_weights_that_name_their_pooling_need_no_pooling_flag(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "vectors.gguf", embedding=True)

    with launched("--model", tmp_path / "vectors.gguf", "--embedding") as (_, port):
        answer = ask(port, "/v1/embeddings", {"input": "one"})

    assert len(answer["data"][0]["embedding"]) == 64


def test_flags_for_memory_and_speed_are_taken(tiny: Path) -> None:
    flags = "-ts 3,1 -sm row -mg 0 -ngl all -ctk q8_0 -ctv q8_0 -fa on --no-mmap --seed=7 -n 3 -b 128 -ub 64 --no-webui"

    with launched("--model", tiny, "--jinja", "--chat-template", "chatml", *flags.split()) as (_, port):
        answers = [ask(port, "/v1/chat/completions", chat("hello")) for _ in range(2)]

    assert answers[0]["usage"]["completion_tokens"] == 3
    assert answers[0]["choices"] == answers[1]["choices"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0_while_a_stream_runs(tiny: Path, number: signal.Signals) -> None:
    with launched("--model", tiny) as (process, port):
        response = post(port, "/v1/chat/completions", chat("hello", stream=True)).getresponse()
        assert response.readline().startswith(b"data: ")

        process.send_signal(number)

        assert process.wait(timeout=5) == 0


def test_sigterm_ends_it_at_once_while_the_model_loads(tiny: Path) -> None:
    # The tiny model loads in milliseconds: each round strikes a little later, so that some strike while it loads.
    outcomes = set()
    for round_number in range(8):
        port = free_port()
        process = launch("--model", tiny, "--port", port)
        try:
            wait_for_port(process, port)
            wait_seconds(round_number * 0.002)
            process.send_signal(signal.SIGTERM)
            outcomes.add(process.wait(timeout=5))
        finally:
            end(process)

    # The signal itself while it loads, 0 once it serves.
    assert outcomes <= {0, -signal.SIGTERM}


def test_unknown_flag_fails_at_once_and_names_it(tiny: Path) -> None:
    assert outcome("--model", tiny, "--frobnicate", "4") == (1, ["error: invalid argument: --frobnicate"])


def test_abbreviated_flag_is_unknown(tiny: Path) -> None:
    assert outcome("--mod", tiny, "--model", tiny) == (1, ["error: invalid argument: --mod"])


def test_missing_model_fails_at_once_and_names_it(tmp_path: Path) -> None:
    missing = tmp_path / "missing.gguf"

    assert outcome("--model", missing) == (1, [f"error: cannot load model {missing}: no such file"])


def test_port_in_use_fails_at_once_and_names_it(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        got = outcome("--model", tiny, "--port", port)

    assert got == (1, [f"error: cannot listen on 127.0.0.1:{port}: Address already in use"])


def test_file_that_is_no_model_fails_without_a_traceback(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"not a model" * 100)
    port = free_port()

    code, lines = outcome("--model", garbage, "--port", port)

    assert code == 1
    # llama.cpp writes its log from a thread of its own: on a busy machine its words may stand around ours.
    assert f"error: cannot serve {garbage} on 127.0.0.1:{port}: llama.cpp says why in its own lines" in "\n".join(lines)
    assert not any("Traceback" in line for line in lines)


def test_same_seed_writes_the_same_weights(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_tiny_gguf(tmp_path / name, seed=seed)

    first, same, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == same
    assert first != other


@contextmanager
def launched(*flags: object) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A ready engine and its port; ended, and seen to be gone, whatever happens inside."""
    port = free_port()
    # One thread: llama.cpp's threads spin while they wait for each other, 100 times slower on a machine that is busy.
    process = launch("--port", port, "--threads", 1, *flags)
    try:
        wait_for_health(process, port)
        yield process, port
    finally:
        end(process)


def launch(*flags: object) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "sage_reconcile.launchers.llama_cpp", "--host", "127.0.0.1", *map(str, flags)]
    return subprocess.Popen(words)


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(timeout=10)
    assert process.returncode is not None


def outcome(*flags: object) -> tuple[int, list[str]]:
    words = [sys.executable, "-m", "sage_reconcile.launchers.llama_cpp", *map(str, flags)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=_DEADLINE_SECONDS, check=False)
    assert run.stdout == ""
    return run.returncode, run.stderr.splitlines()


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port: int = chosen.getsockname()[1]
        return port


def wait_for_health(process: subprocess.Popen[bytes], port: int) -> None:
    """While loading it refuses the connection or says 503; anything else is a bug."""
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while (status := health(port)) != 200:
        assert status in (None, 503)
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_port(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while health(port) is None:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)


def wait_seconds(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.001)


def health(port: int) -> int | None:
    """The status of GET /health; None where nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_DEADLINE_SECONDS)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    except ConnectionError:
        return None
    finally:
        connection.close()


def chat(text: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **options}


def post(port: int, path: str, body: dict[str, Any]) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_DEADLINE_SECONDS)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_DEADLINE_SECONDS)
    if body is None:
        connection.request("GET", path)
    else:
        connection = post(port, path, body)
    response = connection.getresponse()
    text = response.read().decode()
    assert response.status == 200, text
    return json.loads(text)
