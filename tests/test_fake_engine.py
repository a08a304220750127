"""The modes of fake_engine.py that other tests take for granted."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fakenvml import Gpu, Mig, Used, gpu_uuid, memory, mig_uuid, write_state

_FAKE = Path(__file__).parent / "fake_engine.py"
_DEADLINE_SECONDS = 20.0


def test_llm_answers_chat_with_its_name_and_counts_it() -> None:
    with engine("--model", "parrot", "--tokens", 3) as (process, port):
        response, answer = ask(port, "/v1/chat/completions", {"messages": [], "max_tokens": 2})

        assert answer["choices"][0]["message"]["content"] == "parrot-0 parrot-1 "
        assert answer["usage"]["completion_tokens"] == 2
        assert response.headers["X-Fake-Pid"] == str(process.pid)
        wait_for_state(port, active=0, finished=1, cancelled=0, requests=1)


def test_stream_arrives_token_by_token_and_ends_with_done() -> None:
    with engine("--model", "parrot", "--tokens", 2, "--token-bytes", 100) as (_, port):
        response = post(port, "/v1/chat/completions", {"stream": True, "stream_options": {"include_usage": True}})
        events = [line.removeprefix("data: ") for line in response.read().decode().split("\n\n") if line]

    tokens = [json.loads(event) for event in events[:-1]]
    assert [len(token["choices"][0]["delta"]["content"]) for token in tokens] == [100, 100, 0]
    assert tokens[-1]["usage"]["completion_tokens"] == 2
    assert events[-1] == "[DONE]"


def test_chunked_request_body_is_read() -> None:
    with engine("--kind", "embedding", "--dim", 3) as (_, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_DEADLINE_SECONDS)
        connection.request("POST", "/v1/embeddings", iter([b'{"input": ["a",', b' "b", "a"]}']), encode_chunked=True)
        rows = json.loads(connection.getresponse().read())["data"]

    first, second, third = (row["embedding"] for row in rows)
    assert len(first) == 3
    assert first == third != second


def test_wrong_kind_serves_what_it_should_not() -> None:
    with engine("--wrong-kind") as (_, port):
        assert ask(port, "/v1/chat/completions", {})[0].status == 404
        assert ask(port, "/v1/embeddings", {"input": "a"})[0].status == 200


def test_never_ready_binds_and_answers_503() -> None:
    with engine("--never-ready") as (_, port):
        assert ask(port, "/health")[0].status == 503
        assert ask(port, "/v1/chat/completions", {})[0].status == 503


def test_ready_after_turns_503_into_200() -> None:
    with engine("--ready-after", 0.3) as (_, port):
        statuses = [ask(port, "/health")[0].status]
        wait_until(lambda: ask(port, "/health")[0].status == 200)

    assert statuses == [503]


def test_client_that_leaves_a_stream_is_counted_as_cancelled() -> None:
    with engine("--tokens", 1000, "--token-delay", 0.01) as (_, port):
        response = post(port, "/v1/chat/completions", {"stream": True})
        response.readline()
        wait_for_state(port, active=1)

        response.close()

        wait_for_state(port, active=0, cancelled=1, finished=0)


@pytest.mark.parametrize("mode", ["--mute", "--stall-mid-stream=2"])
def test_silent_engine_is_healthy_and_notices_that_the_client_left(mode: str) -> None:
    with engine(mode) as (_, port):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/v1/chat/completions", '{"stream": true}')
        wait_for_state(port, active=1)
        assert ask(port, "/health")[0].status == 200

        connection.close()

        wait_for_state(port, active=0, cancelled=1)


def test_die_mid_stream_breaks_the_stream_after_so_many_tokens() -> None:
    with engine("--die-mid-stream", 2) as (process, port):
        response = post(port, "/v1/chat/completions", {"stream": True})
        with pytest.raises(http.client.IncompleteRead) as broken:
            response.read()

        assert broken.value.partial.count(b"data: ") == 2
        assert process.wait(timeout=5) == -signal.SIGKILL


def test_busy_health_waits_for_the_work_to_end() -> None:
    with engine("--busy-health", "--tokens", 3, "--token-delay", 0.1) as (_, port):
        response = post(port, "/v1/chat/completions", {"stream": True})

        assert ask(port, "/health")[0].status == 200

        assert ask(port, "/fake/state")[1]["active"] == 0
        assert response.read().endswith(b"[DONE]\n\n")


def test_swallowed_terms_are_followed_by_one_that_counts() -> None:
    with engine("--swallow-terms", 1) as (process, port):
        process.terminate()
        assert stays_alive(process)
        assert ask(port, "/health")[0].status == 200

        process.terminate()

        assert process.wait(timeout=5) == 0


def test_ignored_term_leaves_it_serving() -> None:
    with engine("--ignore-term") as (process, port):
        for _ in range(3):
            process.terminate()
            assert stays_alive(process)

        assert ask(port, "/health")[0].status == 200


def test_term_delay_closes_the_port_and_finishes_the_stream() -> None:
    with engine("--term-delay", 0.1, "--tokens", 5, "--token-delay", 0.1) as (process, port):
        response = post(port, "/v1/chat/completions", {"stream": True})
        response.readline()

        process.terminate()

        wait_until(lambda: not listens(port))
        assert response.read().endswith(b"[DONE]\n\n")
        assert process.wait(timeout=5) == 0


@pytest.mark.parametrize("flags", [(), ("--child-setsid", "--child-ignore-term", "--child-wipe-environ")])
def test_child_outlives_the_engine(flags: tuple[str, ...]) -> None:
    with launched("--fork-child", *flags) as (process, port):
        wait_until(lambda: listens(port))
        assert process.stdout is not None
        child = child_pid(process.stdout.readline, process.stdout.readline)
        try:
            process.kill()
            process.wait(timeout=5)
            assert is_alive(child)
            assert (os.getsid(child) == child) is bool(flags)
            assert bool(Path(f"/proc/{child}/environ").read_bytes()) is not bool(flags)

            os.kill(child, signal.SIGTERM)

            if flags:
                with pytest.raises(psutil.TimeoutExpired):
                    psutil.Process(child).wait(timeout=0.2)
            else:
                wait_until(lambda: not is_alive(child))
        finally:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            wait_until(lambda: not is_alive(child))


@pytest.mark.parametrize("flags", [(), ("--child-setsid",)])
def test_double_fork_leaves_a_child_of_nobody_here(flags: tuple[str, ...]) -> None:
    with launched("--fork-child", "--child-double-fork", *flags) as (process, _):
        assert process.stdout is not None
        child = child_pid(process.stdout.readline, process.stdout.readline)
        try:
            assert is_alive(child)
            assert psutil.Process(child).ppid() != process.pid
            assert (os.getsid(child) == os.getsid(process.pid)) is not bool(flags)
        finally:
            os.kill(child, signal.SIGKILL)
            wait_until(lambda: not is_alive(child))


def test_first_thread_ends_while_the_engine_serves() -> None:
    with engine("--first-thread-ends") as (process, port):
        assert ask(port, "/health")[0].status == 200

        process.send_signal(signal.SIGUSR1)

        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
        assert ask(port, "/health")[0].status == 200
        process.kill()
        wait_until(lambda: not listens(port))


def test_flood_of_log_has_its_size_and_an_end() -> None:
    with engine("--log-flood", 3 * 1024 * 1024 + 1024) as (process, port):
        assert process.stdout is not None
        lines = []
        while "end of the flood" not in lines:
            lines.append(process.stdout.readline().decode().strip())

        assert [len(line) for line in lines[1:-1]] == [1023] * 3073
        assert ask(port, "/health")[0].status == 200


def test_exit_code_is_told_without_binding() -> None:
    with launched("--exit-code", 7) as (process, _):
        assert process.stdout is not None
        assert process.wait(timeout=5) == 7
        assert process.stdout.read().splitlines()[-1] == b"error: told to exit with 7"


def test_crash_after_ready_exits_with_1() -> None:
    with engine("--crash-after-ready", 0.2) as (process, port):
        assert ask(port, "/health")[0].status == 200
        assert process.wait(timeout=5) == 1


def test_closed_output_reads_as_its_end_while_it_serves() -> None:
    with engine("--close-output", "--log-bytes", 1000) as (process, port):
        assert process.stdout is not None
        log = process.stdout.read()

        assert len(log.splitlines()[1]) == 999
        assert ask(port, "/health")[0].status == 200


def test_listen_port_overrides_the_port() -> None:
    elsewhere = free_port()
    with launched("--listen-port", elsewhere) as (_, port):
        wait_until(lambda: listens(elsewhere))

        assert not listens(port)


def test_reuse_port_lets_two_engines_share_one() -> None:
    with engine("--reuse-port") as (_, port), launched("--reuse-port", "--listen-port", port) as (second, _):
        pids = set()

        def both_answer() -> bool:
            pids.add(ask(port, "/fake/state")[1]["pid"])
            return second.pid in pids and len(pids) == 2

        wait_until(both_answer)


def test_workers_share_the_port_and_the_session_and_outlive_the_first() -> None:
    with engine("--workers", 3) as (process, port):
        pids = set()

        def all_answer() -> bool:
            pids.add(ask(port, "/fake/state")[1]["pid"])
            return len(pids) == 3

        wait_until(all_answer)
        workers = pids - {process.pid}
        try:
            assert {os.getsid(worker) for worker in workers} == {os.getsid(process.pid)}
            process.kill()
            process.wait(timeout=5)

            assert ask(port, "/fake/state")[1]["pid"] in workers
        finally:
            end(*workers)


def test_second_host_is_served_on_the_same_port() -> None:
    with engine("--also-listen-host", "127.0.0.2") as (process, port):
        connection = http.client.HTTPConnection("127.0.0.2", port, timeout=_DEADLINE_SECONDS)
        connection.request("GET", "/health")

        assert connection.getresponse().headers["X-Fake-Pid"] == str(process.pid)
        assert ask(port, "/health")[0].status == 200


def test_listen_host_may_be_of_the_other_family() -> None:
    with launched("--listen-host", "::1") as (_, port):
        wait_until(lambda: listens(port, "::1"))

        assert not listens(port)


@pytest.mark.parametrize("modes", [[], ["--child-setsid", "--child-wipe-environ"]], ids=["plain", "lost"])
def test_child_holds_the_port_after_the_death_of_the_engine(modes: list[str]) -> None:
    with engine("--fork-child", "--child-holds-port", *modes) as (process, port):
        assert process.stdout is not None
        child = child_pid(process.stdout.readline, process.stdout.readline)
        try:
            process.kill()
            process.wait(timeout=5)

            assert listens(port)
        finally:
            end(child)
        assert not listens(port)


def test_requests_are_recorded_in_order(tmp_path: Path) -> None:
    record = tmp_path / "requests.jsonl"
    with engine("--record", record) as (_, port):
        ask(port, "/v1/models")
        ask(port, "/v1/completions", {"prompt": "x" * 3000})

    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [(line["method"], line["path"]) for line in lines] == [("GET", "/v1/models"), ("POST", "/v1/completions")]
    assert lines[1]["body_length"] == len('{"prompt": ""}') + 3000
    assert len(lines[1]["body"]) == 2000


# --- on GPUs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "used"),
    [("2,1", [0, 500, 500, 0]), (f"{gpu_uuid(0)},{gpu_uuid(2)}", [500, 0, 500, 0]), (mig_uuid(3, 0), [0, 0, 0, 500])],
    ids=["numbers", "uuids", "slice"],
)
def test_memory_is_taken_of_each_gpu_that_it_sees_before_it_is_ready(nvml: Path, visible: str, used: list[int]) -> None:
    gpus = [Gpu(index=index) for index in range(3)]
    write_state(nvml, *gpus, Gpu(index=3, mig=True), Mig(gpu=3, index=0))
    with gpu_engine(nvml, 500, CUDA_VISIBLE_DEVICES=visible) as (process, port):
        wait_until_ready(port)

        assert used_mib(nvml, 0, 1, 2, 3) == used
        process.kill()
        process.wait(timeout=5)
        assert used_mib(nvml, 0, 1, 2, 3) == [0, 0, 0, 0]


def test_memory_grows_in_steps_until_the_engine_is_ready_and_may_grow_after(nvml: Path) -> None:
    steps = ("--memory-after", 0.2, "--ready-after", 0.8, "--memory-in-steps", 3, "--memory-grows-to", 900)
    with gpu_engine(nvml, 600, *steps) as (_, port):
        seen = [0]
        while seen[-1] < 900:
            is_ready = ask(port, "/health")[0].status == 200
            seen += [used for used in used_mib(nvml, 0) if used != seen[-1]]
            assert is_ready <= (seen[-1] >= 600)

    # A busy machine may miss some of them.
    assert seen == sorted(seen)
    assert {200, 400} & set(seen) and set(seen) <= {0, 200, 400, 600, 900}


def test_engine_that_takes_its_memory_late_is_ready_late(nvml: Path) -> None:
    with gpu_engine(nvml, 600, "--memory-after", 0.5) as (_, port):
        assert ask(port, "/health")[0].status == 503
        wait_until_ready(port)

        assert used_mib(nvml, 0) == [600]


@pytest.mark.parametrize("visible", ["", "GPU-no-such", "-1"])
def test_engine_that_sees_no_gpu_dies(nvml: Path, visible: str) -> None:
    with gpu_launched(nvml, 500, CUDA_VISIBLE_DEVICES=visible) as (process, _):
        assert process.wait(timeout=5) == 1
        assert process.stdout is not None
        assert process.stdout.read().splitlines()[-1] == b"RuntimeError: No CUDA GPUs are available"


def test_engine_that_finds_too_little_memory_dies_and_holds_none(nvml: Path) -> None:
    write_state(nvml, Gpu(index=0), Gpu(index=1, total_mib=1000, reserved_mib=300), Used(gpu=1, mib=400))
    with gpu_launched(nvml, 301, CUDA_VISIBLE_DEVICES="0,1") as (process, _):
        assert process.wait(timeout=5) == 1
        assert process.stdout is not None
        last = process.stdout.read().decode().splitlines()[-1]

    assert last == (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 301 MiB. "
        "GPU 1 has a total capacity of 1000 MiB of which 300 MiB is free."
    )
    assert used_mib(nvml, 0, 1) == [0, 400]


def test_child_that_holds_the_memory_holds_it_after_the_death_of_the_engine(nvml: Path) -> None:
    with gpu_engine(nvml, 500, "--fork-child", "--child-holds-memory") as (process, port):
        assert process.stdout is not None
        child = child_pid(process.stdout.readline, process.stdout.readline)
        try:
            wait_until_ready(port)
            process.kill()
            process.wait(timeout=5)

            assert used_mib(nvml, 0) == [500]
        finally:
            end(child)
        assert used_mib(nvml, 0) == [0]


def test_memory_lingers_after_the_death_of_the_engine(nvml: Path) -> None:
    with gpu_launched(nvml, 500, "--memory-lingers", 60, "--exit-code", 3) as (process, _):
        assert process.wait(timeout=5) == 3
        assert used_mib(nvml, 0) == [500]

    write_state(nvml, Gpu(index=0), ahead_seconds=70)
    assert used_mib(nvml, 0) == [0]


def test_engine_may_take_memory_where_it_was_not_told_to(nvml: Path) -> None:
    write_state(nvml, Gpu(index=0), Gpu(index=1))
    with gpu_engine(nvml, 500, "--claims-on", 1, CUDA_VISIBLE_DEVICES="0") as (_, port):
        wait_until_ready(port)

        assert used_mib(nvml, 0, 1) == [0, 500]


@pytest.fixture
def nvml(tmp_path: Path) -> Path:
    """A machine with one GPU, unless a test says otherwise."""
    write_state(tmp_path / "nvml", Gpu(index=0))
    return tmp_path / "nvml"


@contextmanager
def gpu_engine(nvml: Path, mib: int, *flags: object, **variables: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    with gpu_launched(nvml, mib, *flags, **variables) as (process, port):
        wait_until(lambda: listens(port))
        yield process, port


@contextmanager
def gpu_launched(
    nvml: Path, mib: int, *flags: object, **variables: str
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """As sage would start it: with the numbers of PCI, and in another directory than the tests'."""
    told = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "0", **variables}
    with launched("--fake-nvml", nvml, "--gpu-memory", mib, *flags, directory=nvml.parent, **told) as engine:
        yield engine


def used_mib(nvml: Path, *gpus: int) -> list[int]:
    return [memory(nvml, gpu).used_mib for gpu in gpus]


def wait_until_ready(port: int) -> None:
    wait_until(lambda: ask(port, "/health")[0].status == 200)


@contextmanager
def engine(*flags: object) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A bound engine and its port."""
    with launched(*flags) as (process, port):
        wait_until(lambda: listens(port))
        yield process, port


@contextmanager
def launched(
    *flags: object, directory: Path | None = None, **variables: str
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A started engine and its port; ended, and seen to be gone, whatever happens inside."""
    port = free_port()
    words = [sys.executable, str(_FAKE), "--port", str(port), *map(str, flags)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, cwd=directory, env=os.environ | variables)
    try:
        yield process, port
    finally:
        process.kill()
        process.wait(timeout=5)
        assert not is_alive(process.pid)


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port: int = chosen.getsockname()[1]
        return port


def listens(port: int, host: str = "127.0.0.1") -> bool:
    try:
        socket.create_connection((host, port), timeout=_DEADLINE_SECONDS).close()
    except OSError:
        return False
    return True


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(*pids: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: not is_alive(pid))  # type: ignore[misc]


def stays_alive(process: subprocess.Popen[bytes]) -> bool:
    """Longer than the 0.05 s in which the engine notices a signal."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=0.2)
    return process.returncode is None


def child_pid(*read_lines: Callable[[], bytes]) -> int:
    lines = [read_line().decode() for read_line in read_lines]
    return int(lines[-1].removeprefix("child pid "))


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_state(port: int, **expected: int) -> None:
    """A request is counted as over a moment after its last byte."""

    def is_so() -> bool:
        state = ask(port, "/fake/state")[1]
        return {name: state[name] for name in expected} == expected

    wait_until(is_so)


def post(port: int, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_DEADLINE_SECONDS)
    connection.request("POST", path, json.dumps(body), {"Connection": "close"})
    return connection.getresponse()


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> tuple[http.client.HTTPResponse, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_DEADLINE_SECONDS)
    if body is None:
        connection.request("GET", path)
        response = connection.getresponse()
    else:
        response = post(port, path, body)
    answer = json.loads(response.read())
    connection.close()
    return response, answer
