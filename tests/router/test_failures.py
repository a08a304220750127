"""What a client sees when an engine fails, and what an engine sees when a client does."""

import contextlib
import gc
import http.client
import json
import os
import signal
import socket
import struct
import threading

import aiohttp
import pytest

from sage_reconcile.router.connection import Connection
from sage_reconcile.router.limits import Limits
from sage_reconcile.router.traffic import Traffic
from tests.builders import identity
from tests.router.street import (
    CHAT,
    EVENTS,
    Line,
    Script,
    answers,
    ask,
    backend,
    fake_engine,
    fake_state,
    free_port,
    post_bytes,
    raw,
    router,
    scripted,
    table,
    wait_until,
)

EMBEDDINGS = "/v1/embeddings"


def closes(line: Line) -> None:
    """Takes the request and says nothing."""


def resets(line: Line) -> None:
    line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def waits(line: Line) -> None:
    line.wait_for_client_to_leave()


def test_a_refused_connection_is_tried_once_elsewhere_and_the_engine_gets_nothing_more() -> None:
    with scripted(answers) as engine:
        dead, alive = backend(free_port(), pid=1), backend(engine.port, "lab/chat#1", pid=2)
        with router(dead, alive) as front:
            answered = [ask(front.port, "POST", CHAT, {"model": "chat-model"}).status for _ in range(3)]
            states = [found.state for found in front.traffic.table().backends]
            front.traffic.use(table(dead, alive, taken_at=2.0))
            states_later = [found.state for found in front.traffic.table().backends]

    assert answered == [200, 200, 200]
    assert (states, states_later) == (["unready", "ready"], ["ready", "ready"])


def test_a_request_is_never_sent_a_third_time() -> None:
    with scripted(answers) as engine:
        dead = [backend(free_port(), f"lab/chat#{pid}" if pid > 1 else "lab/chat", pid=pid) for pid in (1, 2)]
        with router(*dead, backend(engine.port, "lab/chat#9", pid=9)) as front:
            refused = ask(front.port, "POST", CHAT, {"model": "chat-model"})

    assert (refused.status, refused.code()) == (502, "upstream_error")
    assert engine.connections == 0


def test_the_only_engine_is_ejected_only_until_a_newer_observation() -> None:
    port = free_port()
    with router(backend(port)) as front:
        first = ask(front.port, "POST", CHAT, {})
        second = ask(front.port, "POST", CHAT, {})
        front.traffic.use(table(backend(port), taken_at=1.0))
        same_observation = front.traffic.table().backends[0].state
        front.traffic.use(table(backend(port), taken_at=1.5))
        newer = front.traffic.table().backends[0].state

    assert (first.status, first.code(), first.headers["retry-after"]) == (503, "not_ready", "5")
    assert (second.status, second.code(), second.headers["retry-after"]) == (503, "not_ready", "5")
    assert (same_observation, newer) == ("unready", "ready")


@pytest.mark.parametrize("breaks", [closes, resets])
def test_a_chat_that_may_still_be_worked_on_is_not_repeated(breaks: Script) -> None:
    with (
        scripted(breaks) as broken,
        scripted(answers) as engine,
        router(backend(broken.port, pid=1), backend(engine.port, "lab/chat#1", pid=2)) as front,
    ):
        refused = ask(front.port, "POST", CHAT, {"model": "chat-model"})

    assert (refused.status, refused.code()) == (502, "upstream_error")
    assert (len(broken.lines), len(engine.lines)) == (1, 0)


@pytest.mark.parametrize("breaks", [closes, resets])
def test_a_chat_is_repeated_once_the_table_says_that_its_engine_is_gone(breaks: Script) -> None:
    with scripted(breaks) as broken, scripted(answers) as engine:
        dead, alive = backend(broken.port, pid=1), backend(engine.port, "lab/chat#1", pid=2)
        with router(dead, alive, limits=Limits(fresh_table_seconds=5)) as front:
            statuses: list[int] = []

            def client() -> None:
                statuses.append(ask(front.port, "POST", CHAT, {"model": "chat-model"}).status)

            asking = threading.Thread(target=client)
            asking.start()
            wait_until(lambda: front.traffic.table().backends[0].state == "unready")
            front.traffic.use(table(alive, taken_at=2.0))
            asking.join(5)

    assert statuses == [200]
    assert (len(broken.lines), len(engine.lines)) == (1, 1)


@pytest.mark.parametrize("breaks", [closes, resets])
def test_an_embedding_is_repeated_because_that_is_harmless(breaks: Script) -> None:
    with scripted(breaks) as broken, scripted(answers) as engine:
        first = backend(broken.port, pid=1, kind="embedding")
        second = backend(engine.port, "lab/chat#1", pid=2, kind="embedding")
        with router(first, second) as front:
            answer = ask(front.port, "POST", EMBEDDINGS, {"model": "chat-model", "input": "x"})

    assert (answer.status, answer.headers["x-sage-engine"]) == (200, "lab/chat#1")


ODD = {
    "not HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Ty",
    "a redirect": b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n",
    "an upgrade": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "gzip": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello",
    "huge head": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("said", ODD.values(), ids=ODD.keys())
def test_what_is_no_answer_is_not_passed_on(said: bytes) -> None:
    with scripted(lambda line: line.say(said)) as engine, router(backend(engine.port)) as front:
        refused = ask(front.port, "POST", CHAT, {})

    assert (refused.status, refused.code()) == (502, "upstream_error")
    assert len(engine.lines) == 1


def test_a_second_response_on_a_connection_is_never_given_to_anybody() -> None:
    def says_more(line: Line) -> None:
        line.say_json({"answer": "mine"})
        line.say_json({"answer": "smuggled"})

    with scripted(says_more) as engine, router(backend(engine.port)) as front:
        answered = [ask(front.port, "POST", CHAT, {}).json() for _ in range(3)]

    assert answered == [{"answer": "mine"}] * 3
    assert engine.connections == 3


def test_an_engine_that_does_not_begin_to_answer_is_a_504() -> None:
    with scripted(waits) as engine, router(backend(engine.port), limits=Limits(response_head_seconds=0.2)) as front:
        refused = ask(front.port, "POST", CHAT, {})
        wait_until(lambda: engine.lines[0].client_left.is_set())

    assert (refused.status, refused.code()) == (504, "upstream_timeout")


def breaks_off(line: Line) -> None:
    line.say(EVENTS)
    line.say_event('{"choices":[]}')


def breaks_off_inside_an_event(line: Line) -> None:
    line.say(EVENTS)
    line.say(b'100\r\ndata: {"cho')


def ends_early_and_properly(line: Line) -> None:
    breaks_off(line)
    line.say(b"0\r\n\r\n")


def speaks_of_done_only(line: Line) -> None:
    line.say(EVENTS)
    line.say_event('{"content":"data: [DONE]"}')
    line.say(b"0\r\n\r\n")


def ends_with_the_connection(line: Line) -> None:
    line.say(b'HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: {"choices":[]}\n\n')


def sends_a_bad_chunk(line: Line) -> None:
    breaks_off(line)
    line.wait_for_test()
    line.say(b"zz\r\nnonsense\r\n")


def goes_silent(line: Line) -> None:
    breaks_off(line)
    line.wait_for_client_to_leave()


@pytest.mark.parametrize(
    "script",
    [
        breaks_off,
        breaks_off_inside_an_event,
        ends_early_and_properly,
        speaks_of_done_only,
        ends_with_the_connection,
        goes_silent,
    ],
)
def test_a_stream_that_is_not_complete_ends_with_an_error_and_without_an_end(script: Script) -> None:
    with scripted(script) as engine, router(backend(engine.port), limits=Limits(idle_seconds=0.3)) as front:
        received = raw(front.port, post_bytes(CHAT, {"stream": True}), seconds=5)
        wait_until(lambda: front.traffic.in_flight() == ())

    last_event = received.split(b"\n\n")[-2].split(b"\r\n")[-1].strip()
    error = json.loads(last_event.removeprefix(b"data: "))["error"]
    assert (error["type"], error["code"], error["param"]) == ("upstream_error", "engine_died", None)
    assert b"\ndata: [DONE]" not in received
    assert not received.endswith(b"0\r\n\r\n")


def test_a_stream_that_stops_being_http_ends_in_the_same_way() -> None:
    """Not before the client has the start: a head and nonsense in one packet are a 502."""
    with (
        scripted(sends_a_bad_chunk) as engine,
        router(backend(engine.port)) as front,
        socket.create_connection(("127.0.0.1", front.port), timeout=5) as client,
    ):
        client.sendall(post_bytes(CHAT, {"stream": True}))
        received = b""
        while b"choices" not in received:
            received += client.recv(65536)
        engine.let_go.release()
        while more := client.recv(65536):
            received += more

    assert b"engine_died" in received
    assert not received.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_end_of_a_stream_is_seen_wherever_it_is_cut(size: int) -> None:
    whole = b'data: {"choices":[]}\n\ndata: [DONE]\n\n'

    def in_pieces(line: Line) -> None:
        line.say(EVENTS)
        for start in range(0, len(whole), size):
            piece = whole[start : start + size]
            line.say(b"%x\r\n%s\r\n" % (len(piece), piece))
        line.say(b"0\r\n\r\n")

    with scripted(in_pieces) as engine, router(backend(engine.port)) as front:
        assert ask(front.port, "POST", CHAT, {"stream": True}).body == whole


@pytest.mark.parametrize(
    "head",
    [b"Content-Length: 100\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n64\r\n"],
    ids=["length", "chunked"],
)
def test_an_answer_that_breaks_midway_is_seen_to_be_incomplete(head: bytes) -> None:
    start = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    with (
        scripted(lambda line: line.say(start + head + b'{"cho')) as engine,
        router(backend(engine.port)) as front,
        pytest.raises((http.client.IncompleteRead, ConnectionError)),
    ):
        ask(front.port, "POST", CHAT, {})


def test_a_killed_engine_ends_its_own_streams_only() -> None:
    """SIGKILL of a process with streams open, as the kernel would do when memory runs out."""
    with (
        fake_engine("--token-delay", "0.05", "--tokens", "1000") as (port, process),
        fake_engine("--token-delay", "0.05", "--tokens", "20") as (other_port, _),
        router(backend(port, model="a"), backend(other_port, "lab/other", pid=2, model="b")) as front,
    ):
        received: dict[str, bytes] = {}

        def client(model: str) -> None:
            received[model] = raw(
                front.port, post_bytes(CHAT, {"model": model, "stream": True}, "Connection: close\r\n"), seconds=5
            )

        clients = [threading.Thread(target=client, args=(model,)) for model in ("a", "b")]
        for thread in clients:
            thread.start()
        wait_until(lambda: fake_state(port)["bytes_sent"] > 0)
        os.kill(process.pid, signal.SIGKILL)
        for thread in clients:
            thread.join(10)

    assert b"engine_died" in received["a"] and b"[DONE]" not in received["a"]
    assert b"engine_died" not in received["b"] and b"data: [DONE]" in received["b"]


def streams_for_ever(line: Line) -> None:
    line.say(EVENTS)
    while True:
        line.say_event("x" * 1000)


def streams_once_and_waits(line: Line) -> None:
    breaks_off(line)
    line.wait_for_client_to_leave()


@pytest.mark.parametrize("script", [waits, streams_once_and_waits, streams_for_ever])
@pytest.mark.parametrize("leaves", ["closes", "resets"])
def test_a_client_that_leaves_frees_the_engine_within_a_second(script: Script, leaves: str) -> None:
    with scripted(script) as engine, router(backend(engine.port)) as front:
        client = socket.create_connection(("127.0.0.1", front.port))
        client.sendall(post_bytes(CHAT, {"stream": True}))
        wait_until(lambda: engine.lines and front.traffic.in_flight())
        if script is not waits:
            client.recv(1000)

        if leaves == "resets":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()

        took = wait_until(lambda: engine.lines[0].client_left.is_set() and not front.traffic.in_flight())
        print(f"cancelled after {took * 1000:.1f} ms")
        assert took < 1.0


def held_bytes() -> int:
    """What aiohttp and asyncio hold for all connections of this process, on their way to clients."""
    found = gc.get_objects()
    waiting = sum(
        item.transport.get_write_buffer_size() for item in found if type(item) is Connection and item.transport
    )
    return waiting + sum(item._size for item in found if type(item) is aiohttp.StreamReader)


def test_a_client_that_does_not_read_stops_the_engine_and_not_the_others() -> None:
    with (
        scripted(streams_for_ever, send_buffer_bytes=32768) as engine,
        router(backend(engine.port)) as front,
        socket.socket() as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        client.connect(("127.0.0.1", front.port))
        client.sendall(post_bytes(CHAT, {"stream": True}))
        wait_until(lambda: engine.lines)

        sent = [-1] * 25
        most_held = 0

        def stalled() -> bool:
            nonlocal most_held
            sent.append(engine.lines[0].sent_bytes)
            most_held = max(most_held, held_bytes())
            return sent[-1] == sent[-25]

        wait_until(stalled, 20)
        others = [wait_until(lambda: ask(front.port, "GET", "/health").status == 200) for _ in range(20)]
        print(f"sent {sent[-1]} bytes, held at most {most_held}, others waited at most {max(others):.4f} s")
        assert 0 < sent[-1] < 1024 * 1024
        assert 0 < most_held <= 256 * 1024

        stalled_at = sent[-1]
        while engine.lines[0].sent_bytes == stalled_at:
            assert client.recv(65536)


def test_a_port_that_another_engine_has_now_is_reached_by_a_new_connection_only() -> None:
    with scripted(lambda line: line.say_json({"said_by": "old"})) as old, router(backend(old.port)) as front:
        first = ask(front.port, "POST", CHAT, {})
        connections = old.connections
        front.traffic.use(table(backend(old.port, pid=2), taken_at=2.0))
        second = ask(front.port, "POST", CHAT, {})

    assert (first.status, second.status) == (200, 200)
    assert (connections, old.connections) == (1, 2)


def test_an_answer_from_a_port_that_changed_hands_meanwhile_is_not_passed_on() -> None:
    def slow(line: Line) -> None:
        line.wait_for_test()
        answers(line)

    with scripted(slow) as engine, router(backend(engine.port)) as front:
        statuses: list[int] = []
        client = threading.Thread(target=lambda: statuses.append(ask(front.port, "POST", CHAT, {}).status))
        client.start()
        wait_until(lambda: engine.lines)
        front.traffic.use(table(backend(engine.port, pid=2, model="another"), taken_at=2.0))
        engine.let_go.release()
        client.join(5)

    assert statuses == [502]


def says_nonsense(line: Line) -> None:
    line.say(b"nonsense\r\n")


def test_no_request_is_counted_for_ever() -> None:
    """Every way to end, at once, against engines that fail at random places."""
    scripts: list[Script] = [answers, closes, resets, breaks_off, says_nonsense, streams_once_and_waits]
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(scripted(script)) for script in scripts]
        backends = [backend(engine.port, f"lab/e{n}", pid=n + 1) for n, engine in enumerate(engines)]
        front = stack.enter_context(router(*backends, limits=Limits(idle_seconds=0.5, fresh_table_seconds=0.05)))
        body = post_bytes(CHAT, {"model": "chat-model", "stream": True})
        clients = [threading.Thread(target=raw, args=(front.port, body, 0.1 + n / 50)) for n in range(40)]
        for n, client in enumerate(clients):
            client.start()
            front.traffic.use(table(*backends, taken_at=2.0 + n))
        for client in clients:
            client.join(10)
        wait_until(lambda: front.traffic.in_flight() == ())


def test_traffic_counts_what_was_taken_by_the_process_that_took_it() -> None:
    traffic = Traffic()
    traffic.use(table(backend(1, pid=1)))
    traffic.take("llm", None)
    traffic.use(table(backend(1, pid=2), taken_at=2.0))

    assert traffic.in_flight() == ((identity(1), 1),)
    traffic.give_back(identity(1))
    assert traffic.in_flight() == ()
