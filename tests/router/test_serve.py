"""The router as a process: where it listens, and how it stops."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sage_reconcile import errors
from sage_reconcile.router.server import bound_socket, serve
from sage_reconcile.router.traffic import Traffic
from tests.router.street import CHAT, EVENTS, ROOT, Line, free_port, listens, post_bytes, scripted, wait_until

PROGRAM = """
import sys, threading
from sage_reconcile.router.limits import Limits
from sage_reconcile.router.server import bound_socket, serve
from sage_reconcile.router.traffic import Traffic
from tests.router.street import backend, table
traffic = Traffic()
traffic.use(table(backend(int(sys.argv[1]))))
serve(traffic, bound_socket("127.0.0.1", 0), ready=lambda url: print(url, flush=True), stopping=threading.Event(),
      limits=Limits(drain_seconds=float(sys.argv[2])))
print("stopped")
"""


@contextmanager
def router_process(engine_port: int, drain_seconds: float) -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(engine_port), str(drain_seconds)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, int(process.stdout.readline().strip().rsplit(":", 1)[1])
    finally:
        process.kill()
        process.communicate()


def two_tokens(line: Line) -> None:
    line.say(EVENTS)
    for token in ("one", "two"):
        line.wait_for_test()
        line.say_event(token)
    line.say_event("[DONE]")
    line.say(b"0\r\n\r\n")


def streaming_client(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=10)
    client.sendall(post_bytes(CHAT, {"stream": True}))
    received = b""
    while b"data: one" not in received:
        received += client.recv(65536)
    return client


def rest(client: socket.socket) -> bytes:
    received = b""
    while more := client.recv(65536):
        received += more
    return received


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_streams_finish_and_takes_no_new_ones(number: int) -> None:
    with scripted(two_tokens) as engine, router_process(engine.port, 10) as (process, port):
        engine.let_go.release()
        client = streaming_client(port)
        idle = socket.create_connection(("127.0.0.1", port), timeout=5)

        process.send_signal(number)

        wait_until(lambda: not listens(port))
        assert idle.recv(1) == b""
        assert process.poll() is None
        engine.let_go.release()
        assert b"data: [DONE]" in rest(client)
        out, err = process.communicate(timeout=5)
        client.close()
        idle.close()

    assert (process.returncode, out, err) == (0, "stopped\n", "")


@pytest.mark.parametrize(("drain_seconds", "signals"), [(0.2, 1), (60, 2)], ids=["limit", "second signal"])
def test_a_stream_that_does_not_finish_is_cut_and_seen_to_be(drain_seconds: float, signals: int) -> None:
    with scripted(two_tokens) as engine, router_process(engine.port, drain_seconds) as (process, port):
        engine.let_go.release()
        client = streaming_client(port)

        process.send_signal(signal.SIGTERM)
        wait_until(lambda: not listens(port))
        if signals == 2:
            process.send_signal(signal.SIGTERM)

        cut = rest(client)
        client.close()
        engine.let_go.release()
        out, err = process.communicate(timeout=5)

    assert b"[DONE]" not in cut and not cut.endswith(b"0\r\n\r\n")
    assert (process.returncode, out, err) == (0, "stopped\n", "")


def test_a_port_that_is_taken_is_said_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(errors.Environment) as caught:
            serve(Traffic(), bound_socket("127.0.0.1", port), ready=print, stopping=threading.Event())

    assert caught.value.message == f"cannot serve on 127.0.0.1:{port}: another program listens there"
    assert caught.value.hint is not None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.com", ""])
def test_beyond_this_machine_nothing_is_served_without_keys(host: str) -> None:
    port = free_port()
    with pytest.raises(errors.Refused):
        serve(Traffic(), bound_socket(host, port), ready=print, stopping=threading.Event())

    assert not listens(port)


def test_localhost_is_told_as_the_address_it_means() -> None:
    stopping = threading.Event()
    urls: list[str] = []

    def ready(url: str) -> None:
        urls.append(url)
        stopping.set()

    port = free_port()
    serve(Traffic(), bound_socket("localhost", port), ready=ready, stopping=stopping)

    assert urls == [f"http://127.0.0.1:{port}"]
    assert not listens(port)
