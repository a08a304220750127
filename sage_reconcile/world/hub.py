"""Models on the Hugging Face hub, over HTTP: the list of files, config.json and the headers of the weights.

Never the weights, and nothing is kept: a model that runs here is soon in the hub's cache. The addresses are those of
huggingface_hub (https://huggingface.co/docs/hub/api): /api/models/ID tells the files and the revision, which
/ID/resolve/REVISION/FILE gives, by ranges where that is asked.
"""

import re
from collections.abc import Mapping
from contextlib import nullcontext

from sage_reconcile.core.shape import ModelShape, UnknownShape
from sage_reconcile.core.words import shown
from sage_reconcile.world.header_files import BadFile, json_object
from sage_reconcile.world.hub_http import Allowance, CannotBeReached, Requests, address
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

# For one model, all requests together.
_DEADLINE_SECONDS = 20.0
_MOST_BYTES = 256 * 1024 * 1024
_MOST_AT_ONCE = 8

_LARGEST_LIST_BYTES = 32 * 1024 * 1024
# Most headers of weights fit: they are read with one request.
_FIRST_BYTES = 128 * 1024

_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_WHOLE = {CONFIG: LARGEST_CONFIG_BYTES, INDEX: LARGEST_INDEX_BYTES}
_LONGEST_WHY = 300


class Hub:
    """Asks hubs; one that never gave an answer is not asked again.

    own: sage's own environment. A token of its user goes to the hub that the user named, or to the public one, and not
    to an address that a manifest names.
    """

    def __init__(
        self, own: Mapping[str, str], *, deadline_seconds: float = _DEADLINE_SECONDS, most_bytes: int = _MOST_BYTES
    ) -> None:
        self._own, self._deadline_seconds, self._most_bytes = own, deadline_seconds, most_bytes
        # The addresses that ever answered; and why others are not asked again.
        self._answering: set[str] = set()
        self._silent: dict[str, str] = {}

    def shape(self, model: str, environment: Mapping[str, str]) -> ModelShape | UnknownShape:
        """The shape of a model on the hub that the engine's environment names (HF_ENDPOINT), or why it is unknown."""
        offline = why_offline(environment) or why_offline(self._own)
        if offline:
            return UnknownShape(why=f"{offline} is set, so the hub is not asked")
        url = address(environment)
        if url in self._silent:
            return UnknownShape(why=self._silent[url])
        try:
            hub = Requests(url, hub_token(self._own) if url == address(self._own) else "")
            late = f"{hub.name} did not tell of {shown(model, _LONGEST_WHY)} in {self._deadline_seconds:g} s"
            asking = _Asking(hub, model, Allowance(self._deadline_seconds, self._most_bytes, late=late))
            # In a thread: a name that is looked up in vain takes longer than any timeout that is asked for.
            found = Pending(asking.shape).answer(wait_seconds=self._deadline_seconds)
        except (BadFile, OSError) as error:
            return _unknown(error)
        if found is None:
            found = UnknownShape(why=late)
        if asking.was_answered:
            self._answering.add(url)
        elif isinstance(found, UnknownShape) and url not in self._answering:
            self._silent[url] = found.why
        return found


def _unknown(error: Exception) -> UnknownShape:
    # A server's words may be in it.
    return UnknownShape(why=shown(str(error), _LONGEST_WHY))


class _Asking:
    """A question to a hub under way."""

    def __init__(self, hub: Requests, model: str, allowance: Allowance) -> None:
        if not is_hub_id(model):
            raise BadFile(f"{model[:200]!r} is neither a path nor the id of a model on the hub")
        self._hub, self._model, self._allowance = hub, model, allowance
        self.was_answered = False

    def shape(self) -> ModelShape | UnknownShape:
        try:
            files = _Repository(self._hub, self._model, self._allowance)
            self.was_answered = True
            if CONFIG not in files.names:
                raise BadFile(f"{files.place} has no {CONFIG}")
            files.fetch(weight_files(files)[0])
            return shape_of_files(files)
        except (BadFile, OSError) as error:
            # That there is no such model is an answer.
            self.was_answered = self.was_answered or not isinstance(error, CannotBeReached)
            return _unknown(error)


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

    def __init__(self, hub: Requests, model: str, allowance: Allowance) -> None:
        self._hub, self._model, self._allowance, self.place = hub, model, allowance, f"{model} on {hub.name}"
        path = f"/api/models/{model}"
        content, size = hub.get(path, model, allowance, length=_LARGEST_LIST_BYTES, ranged=False)
        if max(size, len(content)) > _LARGEST_LIST_BYTES:
            raise BadFile(f"{self.place} holds more files than any model has")
        told = json_object(content, f"what {hub.name} tells of {model}")
        revision, files = told.get("sha"), told.get("siblings")
        if not isinstance(revision, str) or not _REVISION.fullmatch(revision) or not isinstance(files, list):
            raise BadFile(f"what {hub.name} tells of {model} names no revision, or no files")
        self._revision = revision
        names = (file.get("rfilename") for file in files if isinstance(file, dict))
        self.names = tuple(sorted({name for name in names if isinstance(name, str) and name.isprintable()}))
        self._read: dict[str, _Remote] = {}

    def has(self, name: str) -> bool:
        return name in self.names

    def open(self, name: str) -> nullcontext[_Remote]:
        if name not in self._read:
            self._read[name] = self._get(name)
        return nullcontext(self._read[name])

    def fetch(self, names: tuple[str, ...]) -> None:
        """Read the headers of these files, some at a time, so that `open` finds them. Raises BadFile, OSError."""
        todo = [name for name in names if self.has(name)]
        while todo:
            batch, todo = todo[:_MOST_AT_ONCE], todo[_MOST_AT_ONCE:]
            asked = [(name, Pending(lambda name=name: self._tried(name))) for name in batch]  # type: ignore[misc]
            for name, pending in asked:
                found = pending.answer(wait_seconds=_DEADLINE_SECONDS)
                if not isinstance(found, _Remote):
                    raise found or BadFile(f"{self._hub.name} sends {name} of {self._model} too slowly")
                self._read[name] = found

    def _tried(self, name: str) -> _Remote | BadFile:
        try:
            return self._get(name)
        except BadFile as bad:
            return bad

    def _get(self, name: str) -> _Remote:
        label = f"{self._model}/{name}"
        path = f"/{self._model}/resolve/{self._revision}/{name}"
        first = _WHOLE.get(name, _FIRST_BYTES)
        beginning, size = self._hub.get(path, label, self._allowance, length=first, ranged=name not in _WHOLE)
        file = _Remote(f"{label} on {self._hub.name}", size, beginning)
        if name.endswith(".safetensors"):
            whole = 8 + header_bytes(file)
            if len(beginning) < whole <= size:
                missing = whole - len(beginning)
                rest, _ = self._hub.get(path, label, self._allowance, first=len(beginning), length=missing)
                file = _Remote(file.path, size, beginning + rest)
        return file
