"""Requests to a hub, each within what is left of the time and the bytes that one model may take."""

import http.client
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from email.message import Message
from typing import IO, Any

from sage_reconcile import __version__
from sage_reconcile.world.header_files import BadFile

_PUBLIC_HUB = "https://huggingface.co"

# How long one request may be silent.
_SILENT_SECONDS = 5.0
_PIECE_BYTES = 64 * 1024


class CannotBeReached(BadFile):
    """No answer of the hub."""


class Allowance:
    """The time and the bytes that are left for one model. What it ends is ended at its next piece of an answer."""

    def __init__(self, seconds: float, size_bytes: int, *, late: str) -> None:
        """`late` is what is said when the time is over."""
        self._ends_at, self._left_bytes, self._late = time.monotonic() + seconds, size_bytes, late
        self._lock = threading.Lock()

    def take(self, size_bytes: int) -> None:
        """Raises BadFile when that is not left."""
        with self._lock:
            self._left_bytes -= size_bytes
            if self._left_bytes < 0:
                raise BadFile("the headers of its weights take more memory than those of any model")
        if time.monotonic() > self._ends_at:
            raise CannotBeReached(self._late)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Large files lie on other machines, which must not see the token; and nobody is led away from https."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        # What is closed has no more to read: urllib would read all of it.
        fp.close()
        old, new = (urllib.parse.urlsplit(url) for url in (req.full_url, newurl))
        if new.scheme not in ("https", old.scheme):
            raise urllib.error.URLError(f"it leads from {old.scheme} to {new.scheme}")
        following = super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]
        if following is not None:
            # A proxy's handler adds it anew where one is asked.
            following.remove_header("Proxy-authorization")
            if (old.scheme, old.netloc) != (new.scheme, new.netloc):
                following.remove_header("Authorization")
        return following


def address(environment: Mapping[str, str]) -> str:
    """The address of the hub that an environment names."""
    return (environment.get("HF_ENDPOINT") or _PUBLIC_HUB).rstrip("/")


class Requests:
    """Asks one hub. Raises BadFile when its address is none."""

    def __init__(self, url: str, token: str) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
            self.name = parts.netloc
        except ValueError:
            sound = False
        if not sound or not url.isascii() or not url.isprintable() or " " in url:
            raise BadFile("HF_ENDPOINT is not the http(s) address of a hub")
        self._url = url
        self._headers = {"User-Agent": f"sage/{__version__}"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            _Redirects(),
        ):
            self._opener.add_handler(handler)

    def get(
        self, path: str, label: str, allowance: Allowance, *, first: int = 0, length: int, ranged: bool = True
    ) -> tuple[bytes, int]:
        """Up to `length` bytes of a file from `first` on, and the bytes that it has. Raises BadFile."""
        allowance.take(0)
        try:
            request = urllib.request.Request(self._url + urllib.parse.quote(path), headers=self._headers)
            if ranged:
                request.add_header("Range", f"bytes={first}-{first + length - 1}")
            with self._opener.open(request, timeout=_SILENT_SECONDS) as answer:
                size = _size_of(answer, first)
                if size is None:
                    raise BadFile(f"{label}: {self.name} sent another part than it was asked for")
                # One more, to see that a file without a length is longer.
                content = _read(answer, length + 1 if size < 0 else min(length, size - first), allowance)
        except urllib.error.HTTPError as error:
            error.close()
            raise BadFile(self._why(error.code, label)) from error
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            raise CannotBeReached(f"{self.name} cannot be reached: {reason}") from error
        return content, size if size >= 0 else len(content)

    def _why(self, code: int, label: str) -> str:
        if code in (401, 403):
            # The hub says the same of what is not there.
            return f"{self.name} does not show {label}: there is none, or HF_TOKEN is needed"
        return f"{self.name} has no {label}" if code == 404 else f"{self.name} answered {code} for {label}"


def _read(answer: Any, length: int, allowance: Allowance) -> bytes:
    """As much of an answer as comes, up to a length."""
    pieces, missing = [], length
    while missing and (piece := answer.read1(min(missing, _PIECE_BYTES))):
        allowance.take(len(piece))
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def _size_of(answer: Any, first: int) -> int | None:
    """The bytes of the whole file that an answer is of; -1: not told; None: it is not what was asked for."""
    told = answer.headers.get("Content-Range" if answer.status == 206 else "Content-Length", "")
    if answer.status == 206:
        parts = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", told, re.ASCII)
        return int(parts[3]) if parts and int(parts[1]) == first and int(parts[2]) < int(parts[3]) else None
    if answer.status != 200 or first:
        return None
    return int(told) if re.fullmatch(r"\d{1,18}", told, re.ASCII) else -1
