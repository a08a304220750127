"""As much of http.server as a fake engine needs. The whole takes longer to import than the engine takes to start."""

import socketserver

_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 503: "Service Unavailable"}
_LONGEST_LINE_BYTES = 65536


class Headers(dict[str, str]):
    """Names as they were sent."""

    def get(self, name: str, otherwise: str = "") -> str:  # type: ignore[override]
        """Whatever case the name was sent in."""
        return next((value for sent, value in self.items() if sent.lower() == name.lower()), otherwise)


class Exchange(socketserver.StreamRequestHandler):
    """The requests of one connection, one after the other: do_GET and do_POST answer them."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        self.close_connection = False
        while not self.close_connection and self._reads_a_request():
            do = {"GET": self.do_GET, "POST": self.do_POST}.get(self.command)
            if do is None:
                self.send_response(400)
                self.end_headers()
                return
            do()
            self.wfile.flush()

    def _reads_a_request(self) -> bool:
        words = self.rfile.readline(_LONGEST_LINE_BYTES).decode("latin-1").split()
        if len(words) != 3:
            return False
        self.command, self.path, version = words
        self.headers = Headers()
        while line := self.rfile.readline(_LONGEST_LINE_BYTES).decode("latin-1").strip():
            name, _, value = line.partition(":")
            self.headers[name.strip()] = value.strip()
        wish = self.headers.get("Connection").lower()
        self.close_connection = wish == "close" or (version == "HTTP/1.0" and wish != "keep-alive")
        if self.headers.get("Expect").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def send_response(self, status: int) -> None:
        self._head = [f"HTTP/1.1 {status} {_REASONS[status]}"]

    def send_header(self, name: str, value: str) -> None:
        self._head.append(f"{name}: {value}")

    def end_headers(self) -> None:
        self.wfile.write("\r\n".join([*self._head, "", ""]).encode("latin-1"))

    def do_GET(self) -> None:
        raise NotImplementedError

    def do_POST(self) -> None:
        raise NotImplementedError
