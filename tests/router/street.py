"""Both ends of the router: a router in a thread, engines that follow a script, and clients that may be rude."""

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sage_reconcile.core.routes import Absent, Backend, RouteTable
from sage_reconcile.router.limits import Limits
from sage_reconcile.router.server import bound_socket, serve
from sage_reconcile.router.traffic import Traffic
from tests.builders import identity, the_id

ROOT = Path(__file__).resolve().parents[2]
CHAT = "/v1/chat/completions"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def backend(port: int, name: str = "lab/chat", *, pid: int = 1, model: str = "chat-model", **fields: Any) -> Backend:
    engine = the_id(name)
    names = tuple(sorted({model, str(engine), *fields.pop("aliases", ())}))
    given = {"kind": "llm", "host": "127.0.0.1", "max_in_flight": 256, "state": "ready", **fields}
    return Backend(engine=engine, leader=identity(pid), model=model, names=names, port=port, **given)


def table(*backends: Backend, taken_at: float = 1.0, absent: tuple[Absent, ...] = ()) -> RouteTable:
    return RouteTable(taken_at=taken_at, backends=backends, absent=absent)


def wait_until(true: Callable[[], Any], seconds: float = 5.0) -> float:
    """Returns how long it took, in seconds."""
    started = time.monotonic()
    while not true():
        assert time.monotonic() - started < seconds, "it did not happen in time"
        time.sleep(0.005)
    return time.monotonic() - started


@dataclass
class Router:
    traffic: Traffic
    port: int


@contextmanager
def router(*backends: Backend, limits: Limits | None = None) -> Iterator[Router]:
    traffic = Traffic()
    traffic.use(table(*backends))
    urls: list[str] = []
    stopping = threading.Event()

    def run() -> None:
        kept = limits or Limits(fresh_table_seconds=0.2, drain_seconds=0.1, linger_seconds=0.2)
        serve(traffic, bound_socket("127.0.0.1", 0), ready=urls.append, stopping=stopping, limits=kept)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_until(lambda: urls)
        yield Router(traffic, int(urls[0].rsplit(":", 1)[1]))
    finally:
        stopping.set()
        thread.join(10)
        assert not thread.is_alive()


class Line:
    """One connection to a scripted engine: the request that came, and what to say to it."""

    def __init__(self, sock: socket.socket, let_go: threading.Semaphore) -> None:
        self.socket = sock
        self.head = b""
        self.body = b""
        self.sent_bytes = 0
        self.client_left = threading.Event()
        self._let_go = let_go

    def read(self) -> bool:
        """One request; False when none came."""
        received = b""
        while b"\r\n\r\n" not in received:
            more = self.socket.recv(65536)
            if not more:
                return False
            received += more
        self.head, _, self.body = received.partition(b"\r\n\r\n")
        while len(self.body) < int(self.headers().get("content-length", 0)):
            self.body += self.socket.recv(65536)
        return True

    def headers(self) -> dict[str, str]:
        lines = self.head.decode().split("\r\n")[1:]
        return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def say(self, raw: bytes) -> None:
        self.socket.sendall(raw)
        self.sent_bytes += len(raw)

    def say_event(self, text: str) -> None:
        event = f"data: {text}\n\n".encode()
        self.say(b"%x\r\n%s\r\n" % (len(event), event))

    def say_json(self, content: dict[str, Any], status: str = "200 OK", headers: str = "") -> None:
        body = json.dumps(content).encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        self.say(head.encode() + body)

    def wait_for_test(self) -> None:
        """Until the test releases `let_go` once."""
        assert self._let_go.acquire(timeout=10)

    def wait_for_client_to_leave(self) -> None:
        self.socket.settimeout(10)
        try:
            gone = not self.socket.recv(1)
        except ConnectionError:
            gone = True
        if gone:
            self.client_left.set()


Script = Callable[[Line], None]


@dataclass
class Engine:
    port: int
    # Every connection that sent a whole request, in order of arrival.
    lines: list[Line] = field(default_factory=list)
    connections: int = 0
    let_go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


@contextmanager
def scripted(script: Script, send_buffer_bytes: int = 0) -> Iterator[Engine]:
    """An engine that reads one request per connection, follows the script, and closes the connection."""
    listener = socket.socket()
    if send_buffer_bytes:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    engine = Engine(listener.getsockname()[1])
    open_sockets: list[socket.socket] = []

    def talk(sock: socket.socket) -> None:
        line = Line(sock, engine.let_go)
        try:
            if line.read():
                engine.lines.append(line)
                script(line)
        except OSError:
            line.client_left.set()
        finally:
            sock.close()

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            engine.connections += 1
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            open_sockets.append(sock)
            talkers.append(threading.Thread(target=talk, args=(sock,)))
            talkers[-1].start()

    talkers: list[threading.Thread] = []
    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield engine
    finally:
        # Wakes a thread that is blocked in it; close() alone would not.
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for sock in open_sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        for thread in [acceptor, *talkers]:
            thread.join(10)
            assert not thread.is_alive()


def answers(line: Line) -> None:
    line.say_json({"model": json.loads(line.body).get("model", ""), "choices": []})


@contextmanager
def fake_engine(*flags: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/fake_engine.py"), "--port", str(port), *flags], stdout=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: listens(port))
        yield port, process
    finally:
        process.kill()
        process.wait()


def fake_state(port: int) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/fake/state")
        return dict(json.loads(connection.getresponse().read()))
    finally:
        connection.close()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def code(self) -> str:
        """The code of an error in the shape of OpenAI's."""
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == ("invalid_request_error" if self.status < 500 else "server_error")
        return str(error["code"])


def ask(port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    """A request with a JSON body; bytes are sent as they are."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, sent, {**kind, **(headers or {})})
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def raw(port: int, content: bytes, seconds: float = 2.0) -> bytes:
    """All that comes back until the connection ends, or nothing more came for so long."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as sock:
        received = b""
        try:
            sock.sendall(content)
            while more := sock.recv(65536):
                received += more
        except (TimeoutError, ConnectionError):
            return received
        return received


def post_bytes(path: str, content: Any, headers: str = "") -> bytes:
    body = json.dumps(content).encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n{headers}\r\n"
    ).encode() + body
