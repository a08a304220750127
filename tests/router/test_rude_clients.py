"""Requests that are wrong, hostile or slow: each gets one short answer or a close, and no engine sees any of it."""

import gzip
import logging
import socket
import threading
import time

import pytest

from sage_reconcile.router.limits import Limits
from tests.router.street import CHAT, answers, ask, backend, post_bytes, raw, router, scripted, wait_until

H = b"Host: localhost\r\n"
J = b"Content-Type: application/json\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\n"

MALFORMED = {
    "length and chunked": POST + H + J + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": POST + H + J + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
    "two equal lengths": POST + H + J + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    "signed length": POST + H + J + b"Content-Length: +2\r\n\r\n{}",
    "negative length": POST + H + J + b"Content-Length: -2\r\n\r\n{}",
    "hex length": POST + H + J + b"Content-Length: 0x2\r\n\r\n{}",
    "unknown coding": POST + H + J + b"Transfer-Encoding: cow\r\n\r\n{}",
    "chunked twice": POST + H + J + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "bad chunk size": POST + H + J + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "chunk longer than said": POST + H + J + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{}\r\n0\r\n\r\n",
    "bare LF": POST.replace(b"\r\n", b"\n")
    + b"Host: localhost\nContent-Type: application/json\nContent-Length: 2\n\n{}",
    "space before colon": POST + H + b"Content-Type : application/json\r\nContent-Length: 2\r\n\r\n{}",
    "folded header": POST + H + J + b"X: a\r\n b\r\nContent-Length: 2\r\n\r\n{}",
    "NUL in a header": POST + H + J + b"X: a\0b\r\nContent-Length: 2\r\n\r\n{}",
    "NUL in the path": b"POST /v1/chat/\0completions HTTP/1.1\r\n" + H + J + b"Content-Length: 2\r\n\r\n{}",
    "no host": POST + J + b"Content-Length: 2\r\n\r\n{}",
    "two hosts": POST + H + H + J + b"Content-Length: 2\r\n\r\n{}",
    "empty host": POST + b"Host: \r\n" + J + b"Content-Length: 2\r\n\r\n{}",
    "no host, HTTP/1.0": POST.replace(b"1.1", b"1.0") + J + b"Content-Length: 2\r\n\r\n{}",
    "connect": b"CONNECT 127.0.0.1:22 HTTP/1.1\r\n" + H + b"\r\n",
    "absolute form": b"POST http://localhost/v1/chat/completions HTTP/1.1\r\n" + H + J + b"Content-Length: 2\r\n\r\n{}",
    "absolute form, other host": b"GET http://169.254.169.254/ HTTP/1.1\r\n" + H + b"\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\n" + H + b"\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9": POST.replace(b"1.1", b"9.9") + H + J + b"Content-Length: 2\r\n\r\n{}",
    "HTTP/0.9": b"GET /v1/models\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    "garbage": bytes(range(255, 0, -1)) * 8 + b"\r\n\r\n",
    "a long line": b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n" + H + b"\r\n",
    "a long header": POST + H + b"X: " + b"a" * 20_000 + b"\r\n\r\n",
    "many headers": POST + H + b"".join(b"X%d: 1\r\n" % n for n in range(1000)) + b"\r\n",
    "script in the path": b"GET /<script>alert(1)</script>\x7f HTTP/1.1\r\n" + H + b"\r\n",
    "bad upgrade": b"GET /v1/models HTTP/1.1\r\n"
    + b"Host: evil\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n\0\0\0",
}


@pytest.mark.parametrize("request_bytes", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_request_gets_one_short_answer_and_reaches_no_engine(
    request_bytes: bytes, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with scripted(answers) as engine, router(backend(engine.port)) as front:
        received = raw(front.port, request_bytes, seconds=0.3)

    assert received == b"" or int(received[9:12]) in (400, 404, 405, 421), received
    assert received.count(b"HTTP/1.") <= 1
    assert b"<script>" not in received and b"Traceback" not in received
    assert received == b"" or b'{"error": {"message": ' in received
    assert engine.connections == 0
    assert caplog.records == [] and capfd.readouterr().err == ""


PATHS = [
    "/v1/chat/%63ompletions",
    "/v1/chat/completions/",
    "/v1//chat/completions",
    "//v1/chat/completions",
    "/v1/../v1/chat/completions",
    "/v1/x/../chat/completions",
    "/v1/%2e%2e/v1/chat/completions",
    "/v1/chat%2Fcompletions",
    "/v1/chat/completions%00",
    "/v1/chat/completions;x=1",
    "/v1/chat/completions#x",
    "/V1/chat/completions",
    "/v1/chat/completions%3Fx",
    "/v1/chat/complet\u0456ons",
    "/v1/%63%68at/completions",
    "/v1/pause",
    "/v1/management/engines",
    "/",
    "/metrics",
    "/%2e%2e/%2e%2e/manage",
    "/\\v1\\chat\\completions",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_is_not_exactly_in_the_table_is_a_404(path: str) -> None:
    content = post_bytes("PATH", {}, "Connection: close\r\n").replace(b"PATH", path.encode())
    with scripted(answers) as engine, router(backend(engine.port)) as front:
        received = raw(front.port, content)

    # A byte beyond ASCII ends in aiohttp's parser, everything else in the table.
    assert received[9:12] == (b"404" if path.isascii() else b"400"), received
    assert engine.connections == 0


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", CHAT, "POST"), ("PUT", CHAT, "POST"), ("OPTIONS", CHAT, "POST"), ("POST", "/v1/models", "GET")],
)
def test_a_wrong_method_is_told_the_right_one(method: str, path: str, allowed: str) -> None:
    with router() as front:
        refused = ask(front.port, method, path)

    assert (refused.status, refused.code(), refused.headers["allow"]) == (405, "method_not_allowed", allowed)
    assert not any(name.startswith("access-control") for name in refused.headers)


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil", "[::2]", "localhost:x", "10.0.0.1"]
)
def test_a_name_that_was_rebound_to_this_machine_is_refused(host: str) -> None:
    with scripted(answers) as engine, router(backend(engine.port)) as front:
        refused = ask(front.port, "POST", CHAT, {}, {"Host": host})

    assert (refused.status, engine.connections) == (421, 0)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8000", "[::1]"])
def test_this_machine_is_served_by_each_of_its_names(host: str) -> None:
    with router() as front:
        assert ask(front.port, "GET", "/health", None, {"Host": host}).status == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://evil.example", 403),
        ("null", 403),
        ("http://localhost:9", 403),
        ("https://localhost:1", 403),
        ("http://localhost:1", 200),
    ],
)
def test_a_web_page_of_another_origin_is_refused(origin: str, status: int) -> None:
    with router() as front:
        answer = ask(front.port, "GET", "/health", None, {"Host": "localhost:1", "Origin": origin})

    assert answer.status == status
    assert not any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/jsonp"},
        {"Content-Encoding": "gzip"},
        {"Content-Encoding": "br"},
    ],
)
def test_a_body_that_is_not_plain_json_is_a_415(headers: dict[str, str]) -> None:
    with scripted(answers) as engine, router(backend(engine.port)) as front:
        refused = ask(front.port, "POST", CHAT, gzip.compress(b"x" * 100_000), headers)

    assert (refused.status, refused.code(), engine.connections) == (415, "unsupported_content", 0)


@pytest.mark.parametrize(
    "body", [b"", b"no", b"[]", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"model": "\xff"}']
)
def test_a_body_that_is_not_an_object_is_a_400_and_the_router_goes_on(body: bytes) -> None:
    with scripted(answers) as engine, router(backend(engine.port)) as front:
        refused = ask(front.port, "POST", CHAT, body)
        answered = ask(front.port, "POST", CHAT, {})

    assert (refused.status, refused.code()) == (400, "invalid_json")
    assert (answered.status, engine.connections) == (200, 1)


def closed_after(sock: socket.socket, drip: bytes = b"") -> float:
    """How long the router kept the connection, in seconds, while a byte dripped in now and then."""
    started = time.monotonic()
    sock.settimeout(0.05)
    while time.monotonic() - started < 5:
        try:
            if drip:
                sock.sendall(drip)
            if not sock.recv(65536):
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    return time.monotonic() - started


@pytest.mark.parametrize("start", [b"", b"GET /health HTTP/1.1\r\nHost: loc", POST + H])
def test_a_header_that_drips_in_is_not_waited_for(start: bytes) -> None:
    with router(limits=Limits(header_seconds=0.4)) as front:
        slow = [socket.create_connection(("127.0.0.1", front.port)) for _ in range(20)]
        for sock in slow:
            sock.sendall(start)
        took = closed_after(slow[0], drip=b"x" if start else b"")
        served = ask(front.port, "GET", "/health").status
        for sock in slow:
            closed_after(sock)
            sock.close()

    assert 0.3 < took < 1.5
    assert served == 200


def test_a_second_header_that_drips_in_is_not_waited_for_either() -> None:
    with (
        router(limits=Limits(header_seconds=0.4)) as front,
        socket.create_connection(("127.0.0.1", front.port)) as sock,
    ):
        sock.sendall(b"GET /health HTTP/1.1\r\n" + H + b"\r\n")
        sock.recv(65536)
        sock.sendall(b"GET /health HTTP/1.1\r\nX: ")
        took = closed_after(sock, drip=b"x")

    assert 0.3 < took < 1.5


@pytest.mark.parametrize(
    "limits", [Limits(body_progress_seconds=0.3), Limits(body_seconds=0.3)], ids=["no progress", "dripping"]
)
def test_a_body_that_does_not_come_is_a_408(limits: Limits) -> None:
    with (
        scripted(answers) as engine,
        router(backend(engine.port), limits=limits) as front,
        socket.create_connection(("127.0.0.1", front.port), timeout=5) as sock,
    ):
        sock.sendall(POST + H + J + b"Content-Length: 1000\r\n\r\n{")
        dripping = threading.Event()

        def drip() -> None:
            while not dripping.wait(0.05):
                try:
                    sock.sendall(b" ")
                except OSError:
                    return

        dripper = threading.Thread(target=drip)
        if limits.body_seconds < 1:
            dripper.start()
        received = sock.recv(65536)
        dripping.set()
        if dripper.ident:
            dripper.join(5)

    assert received.startswith(b"HTTP/1.1 408 ")
    assert b'"code": "request_timeout"' in received
    assert engine.connections == 0


def test_bodies_that_fill_the_routers_memory_are_refused_until_there_is_room() -> None:
    limits = Limits(bodies_bytes=1000, fresh_table_seconds=0.1, drain_seconds=0.1)
    with scripted(answers) as engine, router(backend(engine.port), limits=limits) as front:
        refused = ask(front.port, "POST", CHAT, {"text": "x" * 2000})
        answered = [ask(front.port, "POST", CHAT, {"text": "x" * 900}).status for _ in range(3)]

    assert (refused.status, refused.code()) == (503, "overloaded")
    assert answered == [200, 200, 200]


def test_a_client_that_waits_to_be_told_to_go_on_is_told() -> None:
    head = POST + H + J + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n"
    with scripted(answers) as engine, router(backend(engine.port)) as front:
        with socket.create_connection(("127.0.0.1", front.port), timeout=5) as sock:
            sock.sendall(head)
            told = sock.recv(65536)
            sock.sendall(b"{}")
            answered = sock.recv(65536)
        unwanted = raw(front.port, head.replace(b"localhost", b"evil"))

    assert told == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert answered.startswith(b"HTTP/1.1 200 OK\r\n")
    assert unwanted.startswith(b"HTTP/1.1 421 ")


def test_a_mistake_of_the_routers_own_is_one_line_and_no_traceback(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with router() as front:

        def fails(*_: object) -> None:
            raise ZeroDivisionError("a secret")

        front.traffic.take = fails  # type: ignore[method-assign, assignment]
        refused = ask(front.port, "POST", CHAT, {})

    assert (refused.status, refused.code()) == (500, "internal_error")
    assert b"secret" not in refused.body and b"ZeroDivision" not in refused.body
    assert [record.getMessage() for record in caplog.records] == ["internal error in a request: ZeroDivisionError"]
    assert all(record.exc_info is None for record in caplog.records if record.levelno >= logging.WARNING)
    assert "Traceback" not in capfd.readouterr().err


def test_many_requests_on_one_connection_are_answered_in_order() -> None:
    with scripted(answers) as engine, router(backend(engine.port)) as front:
        content = b"GET /health HTTP/1.1\r\n" + H + b"\r\n"
        with socket.create_connection(("127.0.0.1", front.port), timeout=5) as sock:
            sock.sendall(content * 100)
            received = b""

            def all_came() -> bool:
                nonlocal received
                received += sock.recv(65536)
                return received.count(b"HTTP/1.1 200 OK") == 100

            wait_until(all_came)
    assert engine.connections == 0
