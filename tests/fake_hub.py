"""A real HTTP server that behaves as the Hugging Face hub does, or worse."""

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """The hub's two addresses over a dict of files, and the machine where large files lie."""

    files: dict[str, bytes]
    model: str = "lab/tiny"
    # Answers before the rest does: (status, headers, body), by path.
    odd: dict[str, tuple[int, Mapping[str, str], bytes]] = field(default_factory=dict)
    # Where files of weights are sent from; empty: from here.
    elsewhere: str = ""
    ignores_ranges: bool = False
    seen: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)
    sent_bytes: int = 0
    url: str = ""

    def answer(self, path: str, headers: Mapping[str, str]) -> tuple[int, Mapping[str, str], bytes]:
        # A proxy is sent whole addresses.
        path = re.sub("^http://[^/]+", "", path)
        self.seen.append((path, headers))
        if path in self.odd:
            return self.odd[path]
        if path == f"/api/models/{self.model}":
            siblings = [{"rfilename": name} for name in self.files]
            return 200, {}, json.dumps({"id": self.model, "sha": REVISION, "siblings": siblings}).encode()
        name = path.removeprefix(f"/{self.model}/resolve/{REVISION}/")
        if name not in self.files:
            return 401, {}, b'{"error": "Invalid username or password."}'
        if self.elsewhere and name.endswith(".safetensors"):
            return 302, {"Location": f"{self.elsewhere}{path}"}, b""
        content = self.files[name]
        if self.ignores_ranges or "Range" not in headers:
            return 200, {}, content
        first, last = map(int, headers["Range"].removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        return 206, {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(content)}"}, part


@contextmanager
def serving() -> Iterator[Callable[[FakeHub], FakeHub]]:
    """What begins to serve a hub, until the end."""
    servers: list[ThreadingHTTPServer] = []

    def begin(hub: FakeHub) -> FakeHub:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, headers, body = hub.answer(self.path, dict(self.headers))
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | dict(headers)).items():
                    self.send_header(name, value)
                self.end_headers()
                for begin in range(0, len(body), 65536):
                    hub.sent_bytes += len(body[begin : begin + 65536])
                    try:
                        self.wfile.write(body[begin : begin + 65536])
                    except OSError:
                        break

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        return hub

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()
