"""Models on the Hugging Face hub, over HTTP: the list of files, config.json and the headers of the weights.

Never the weights, and nothing is kept: a model that runs here is soon in the hub's cache. The addresses are those of
huggingface_hub (https://huggingface.co/docs/hub/api): /api/models/ID tells the files and the revision, which
/ID/resolve/REVISION/FILE gives, by ranges where that is asked.
"""

import http.client
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from email.message import Message
from typing import IO, Any

from sage_reconcile import __version__
from sage_reconcile.core.shape import ModelShape, UnknownShape
from sage_reconcile.world.header_files import BadFile, json_object
from sage_reconcile.world.hub_places import hub_token, is_hub_id, why_offline
from sage_reconcile.world.model_files import (
    CONFIG,
    INDEX,
    LARGEST_CONFIG_BYTES,
    LARGEST_INDEX_BYTES,
    shape_of_files,
    weight_files,
)
from sage_reconcile.world.pending import Pending
from sage_reconcile.world.safetensors_headers import header_bytes

_PUBLIC_HUB = "https://huggingface.co"

# For one model, all requests together; and how long one request may be silent.
_DEADLINE_SECONDS = 20.0
_SILENT_SECONDS = 5.0
_MOST_AT_ONCE = 8

_LARGEST_LIST_BYTES = 32 * 1024 * 1024
# Most headers of weights fit: they are read with one request.
_FIRST_BYTES = 128 * 1024

_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_WHOLE = {CONFIG: LARGEST_CONFIG_BYTES, INDEX: LARGEST_INDEX_BYTES}


class Hub:
    """Asks hubs; one that cannot be reached is not asked again."""

    def __init__(self, deadline_seconds: float = _DEADLINE_SECONDS) -> None:
        self._deadline_seconds = deadline_seconds
        # By address, why it is not asked again.
        self._unreachable: dict[str, str] = {}

    def shape(self, model: str, environment: Mapping[str, str]) -> ModelShape | UnknownShape:
        """The shape of a model on the hub that the engine's environment names (HF_ENDPOINT), or why it is unknown."""
        offline = why_offline(environment)
        if offline:
            return UnknownShape(why=f"{offline} is set, so the hub is not asked")
        try:
            hub = _Address(environment)
            if hub.url in self._unreachable:
                return UnknownShape(why=self._unreachable[hub.url])
            # In a thread: a name that is looked up in vain takes longer than any timeout that is asked for.
            found = Pending(lambda: _shape(hub, model)).answer(wait_seconds=self._deadline_seconds)
        except BadFile as bad:
            return UnknownShape(why=str(bad))
        if found is None:
            found = _Unreachable(why=f"{hub.name} did not answer in {self._deadline_seconds:g} s")
        if isinstance(found, _Unreachable):
            self._unreachable[hub.url] = found.why
            return UnknownShape(why=found.why)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unreachable:
    why: str


class _CannotBeReached(BadFile):
    """No answer of the hub at all."""


def _shape(hub: "_Address", model: str) -> ModelShape | UnknownShape | _Unreachable:
    try:
        files = _Repository(hub, model)
        if CONFIG not in files.names:
            raise BadFile(f"{files.place} has no {CONFIG}")
        files.fetch(weight_files(files)[0])
        return shape_of_files(files)
    except _CannotBeReached as bad:
        return _Unreachable(why=str(bad))
    except BadFile as bad:
        return UnknownShape(why=str(bad))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Large files lie on other machines, which must not see the token; and nobody is led away from https."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        old, new = (urllib.parse.urlsplit(url) for url in (req.full_url, newurl))
        if new.scheme not in ("https", old.scheme):
            raise urllib.error.URLError(f"it leads from {old.scheme} to {new.scheme}")
        following = super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]
        if following is not None and (old.scheme, old.netloc) != (new.scheme, new.netloc):
            following.remove_header("Authorization")
        return following


class _Address:
    """A hub's address, and how it is asked. Raises BadFile when HF_ENDPOINT is none."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.url = (environment.get("HF_ENDPOINT") or _PUBLIC_HUB).rstrip("/")
        try:
            parts = urllib.parse.urlsplit(self.url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
            self.name = parts.netloc
        except ValueError:
            sound = False
        if not sound or not self.url.isascii() or not self.url.isprintable() or " " in self.url:
            raise BadFile("HF_ENDPOINT is not the http(s) address of a hub")
        token = hub_token(environment)
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

    def get(self, path: str, label: str, *, first: int = 0, length: int, ranged: bool = True) -> tuple[bytes, int]:
        """Up to `length` bytes of a file from `first` on, and the bytes that it has. Raises BadFile."""
        request = urllib.request.Request(self.url + urllib.parse.quote(path), headers=self._headers)
        if ranged:
            request.add_header("Range", f"bytes={first}-{first + length - 1}")
        try:
            with self._opener.open(request, timeout=_SILENT_SECONDS) as answer:
                size = _size_of(answer, first, length)
                if size is None:
                    raise BadFile(f"{label}: {self.name} sent another part than it was asked for")
                # One more, to see that a file without a length is longer.
                content = answer.read(length + 1 if size < 0 else min(length, size - first))
        except urllib.error.HTTPError as error:
            with error:
                raise BadFile(self._why(error.code, label)) from error
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            raise _CannotBeReached(f"{self.name} cannot be reached: {reason}") from error
        return content, size if size >= 0 else len(content)

    def _why(self, code: int, label: str) -> str:
        if code in (401, 403):
            # The hub says the same of what is not there.
            return f"{self.name} does not show {label}: there is none, or HF_TOKEN is needed"
        return f"{self.name} has no {label}" if code == 404 else f"{self.name} answered {code} for {label}"


def _size_of(answer: Any, first: int, length: int) -> int | None:
    """The bytes of the whole file that an answer is of; -1: not told; None: it is not what was asked for."""
    told = answer.headers.get("Content-Range" if answer.status == 206 else "Content-Length", "")
    if answer.status == 206:
        parts = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", told, re.ASCII)
        return int(parts[3]) if parts and int(parts[1]) == first and int(parts[2]) < int(parts[3]) else None
    if answer.status != 200 or first:
        return None
    return int(told) if re.fullmatch(r"\d{1,18}", told, re.ASCII) else -1


class _Remote:
    """The beginning of a file on a hub, as Readable."""

    def __init__(self, path: str, size_bytes: int, beginning: bytes) -> None:
        self.path, self.size_bytes, self._beginning = path, size_bytes, beginning

    def read(self, length: int, *, offset: int) -> bytes:
        content = self._beginning[offset : offset + length]
        if len(content) != length:
            raise BadFile(f"{self.path} is cut short: {len(self._beginning):,} bytes of it came")
        return content


class _Repository:
    """A model on a hub as ModelFiles. Raises BadFile when there is none."""

    def __init__(self, hub: _Address, model: str) -> None:
        if not is_hub_id(model):
            raise BadFile(f"{model[:200]!r} is neither a path nor the id of a model on the hub")
        self._hub, self._model, self.place = hub, model, f"{model} on {hub.name}"
        content, size = hub.get(f"/api/models/{model}", model, length=_LARGEST_LIST_BYTES, ranged=False)
        if max(size, len(content)) > _LARGEST_LIST_BYTES:
            raise BadFile(f"{self.place} holds more files than any model has")
        told = json_object(content, f"what {hub.name} tells of {model}")
        revision, files = told.get("sha"), told.get("siblings")
        if not isinstance(revision, str) or not _REVISION.fullmatch(revision) or not isinstance(files, list):
            raise BadFile(f"what {hub.name} tells of {model} names no revision, or no files")
        self._revision = revision
        names = (file.get("rfilename") for file in files if isinstance(file, dict))
        self.names = tuple(sorted({name for name in names if isinstance(name, str)}))
        self._read: dict[str, _Remote] = {}

    def has(self, name: str) -> bool:
        return name in self.names

    def open(self, name: str) -> nullcontext[_Remote]:
        if name not in self._read:
            self._read[name] = self._get(name)
        return nullcontext(self._read[name])

    def fetch(self, names: tuple[str, ...]) -> None:
        """Read the headers of these files, some at a time, so that `open` finds them."""
        todo = [name for name in names if self.has(name)]
        while todo:
            batch, todo = todo[:_MOST_AT_ONCE], todo[_MOST_AT_ONCE:]
            asked = [(name, Pending(lambda name=name: _tried(self, name))) for name in batch]  # type: ignore[misc]
            for name, pending in asked:
                found = pending.answer(wait_seconds=_DEADLINE_SECONDS)
                if not isinstance(found, _Remote):
                    raise found or _CannotBeReached(f"{self._hub.name} sends {name} of {self._model} too slowly")
                self._read[name] = found

    def _get(self, name: str) -> _Remote:
        label = f"{self._model}/{name}"
        path = f"/{self._model}/resolve/{self._revision}/{name}"
        first = _WHOLE.get(name, _FIRST_BYTES)
        beginning, size = self._hub.get(path, label, length=first, ranged=name not in _WHOLE)
        file = _Remote(f"{label} on {self._hub.name}", size, beginning)
        if name.endswith(".safetensors"):
            whole = 8 + header_bytes(file)
            if whole > len(beginning) and whole <= size:
                rest, _ = self._hub.get(path, label, first=len(beginning), length=whole - len(beginning))
                file = _Remote(file.path, size, beginning + rest)
        return file


def _tried(repository: _Repository, name: str) -> _Remote | BadFile:
    try:
        return repository._get(name)
    except BadFile as bad:
        return bad
