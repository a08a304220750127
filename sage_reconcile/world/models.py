"""The shapes of models that lie on this machine: a directory, a GGUF file, or the cache of the Hugging Face hub.

Only headers are read. Whatever a file holds, the answer is a shape or a sentence.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sage_reconcile.core.facts import ModelFact
from sage_reconcile.core.gguf_shape import GgufHeader, shape_of_gguf
from sage_reconcile.core.lookup import ModelQuestion
from sage_reconcile.core.shape import ModelShape, UnknownShape
from sage_reconcile.core.spec import is_path
from sage_reconcile.world.gguf_headers import gguf_header
from sage_reconcile.world.header_files import BadFile, HeaderFile
from sage_reconcile.world.hub_places import home_path, hub_cache, is_hub_id
from sage_reconcile.world.model_files import CONFIG, MOST_FILES, shape_of_files
from sage_reconcile.world.processes import inherited

if TYPE_CHECKING:
    from sage_reconcile.world.hub import Hub

_LARGEST_REFERENCE_BYTES = 256
_MOST_ENTRIES = 20_000

_SNAPSHOT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_SPLIT_GGUF = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII | re.DOTALL)


class Models:
    """What was found of each model. Its files are read once: a look comes ten times a second."""

    def __init__(self) -> None:
        self._found: dict[ModelQuestion, ModelFact] = {}
        self._hub: Hub | None = None

    def fact(self, question: ModelQuestion) -> ModelFact:
        """What is found of a model for an engine that inherits this process's environment."""
        if question not in self._found:
            self._found[question] = model_fact(
                question.model,
                environment=inherited(os.environ) | dict(question.env),
                shape=question.shape,
                hub=self._the_hub() if question.hub else None,
            )
        return self._found[question]

    def _the_hub(self) -> "Hub":
        # Imported here: it takes 0.05 s, and hardly anybody needs it.
        from sage_reconcile.world.hub import Hub

        self._hub = self._hub or Hub(inherited(os.environ))
        return self._hub


def model_fact(model: str, *, environment: Mapping[str, str], shape: bool, hub: "Hub | None" = None) -> ModelFact:
    """Whether a model can be read, where it is a path; and its shape, where that was asked for.

    A path is absolute. A model on the hub that is not in its cache is none that is missing: the engine may fetch it.
    Of such a one the hub is asked, when one is given.
    """
    why = _why_unusable(Path(model)) if is_path(model) else ""
    if why or not shape:
        return ModelFact(model=model, why=why)
    found = model_shape(model, directory="/", environment=environment)
    if isinstance(found, UnknownShape) and not is_path(model) and is_hub_id(model):
        here = found.why
        found = hub.shape(model, environment) if hub else UnknownShape(why="sage.yaml does not say ask_hub: true")
        found = UnknownShape(why=f"{here}, and {found.why}") if isinstance(found, UnknownShape) else found
    if isinstance(found, UnknownShape):
        return ModelFact(model=model, shape_why=found.why)
    return ModelFact(model=model, shape=found)


def _why_unusable(path: Path) -> str:
    try:
        path.stat()
    except OSError as error:
        return f"there is no {path}" if isinstance(error, FileNotFoundError) else f"{path}: {error.strerror}"
    if not os.access(path, os.R_OK):
        return f"{path} cannot be read"
    if path.is_file() and path.stat().st_size == 0:
        return f"{path} is empty"
    return ""


def model_shape(model: str, *, directory: str, environment: Mapping[str, str]) -> ModelShape | UnknownShape:
    """The shape of a model as a manifest names it: a hub id, or a path relative to `directory`.

    environment: the engine's, which says where the hub's cache is (HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME, HOME).
    """
    try:
        if is_path(model):
            path = os.path.join(directory, home_path(model, environment))
            return _gguf_shape(path) if path.endswith(".gguf") else _directory_shape(path)
        return _directory_shape(_snapshot(model, environment))
    except BadFile as bad:
        return UnknownShape(why=str(bad))


def _snapshot(model: str, environment: Mapping[str, str]) -> str:
    """The directory of a model in the hub's cache: the revision called main, or the only one there is."""
    if not is_hub_id(model):
        raise BadFile(f"{model[:200]!r} is neither a path nor the id of a model on the hub")
    folder = os.path.join(hub_cache(environment), "models--" + model.replace("/", "--"))
    if not os.path.isdir(folder):
        raise BadFile(f"{model} is not in the hub's cache ({hub_cache(environment)})")
    snapshots = os.path.join(folder, "snapshots")
    reference = os.path.join(folder, "refs", "main")
    if os.path.lexists(reference):
        with HeaderFile(reference) as file:
            length = min(file.size_bytes, _LARGEST_REFERENCE_BYTES)
            revision = file.read(length, offset=0).decode("ascii", "replace").strip()
        if not _SNAPSHOT.fullmatch(revision):
            raise BadFile(f"{reference} does not name a revision")
        return os.path.join(snapshots, revision)
    found = _names(snapshots)
    if len(found) != 1:
        raise BadFile(f"{folder} has {len(found)} revisions and none is called main")
    return os.path.join(snapshots, found[0])


def _names(directory: str) -> tuple[str, ...]:
    """The names in a directory, sorted."""
    try:
        names = os.listdir(directory)
    except OSError as error:
        raise BadFile(f"{directory}: {error.strerror}") from error
    if len(names) > _MOST_ENTRIES:
        raise BadFile(f"{directory} holds {len(names):,} files, which is no model")
    return tuple(sorted(names))


def _directory_shape(directory: str) -> ModelShape | UnknownShape:
    files = _Directory(directory)
    if CONFIG not in files.names:
        ggufs = [name for name in files.names if name.endswith(".gguf") and not name.startswith("mmproj")]
        if len(ggufs) == 1 or (ggufs and _SPLIT_GGUF.fullmatch(ggufs[0]) is not None):
            return _gguf_shape(os.path.join(directory, ggufs[0]))
        raise BadFile(f"{directory} has no {CONFIG}")
    return shape_of_files(files)


class _Directory:
    """A directory of this machine as ModelFiles. Raises BadFile when it cannot be listed."""

    def __init__(self, path: str) -> None:
        self.place, self.names = path, _names(path)

    def has(self, name: str) -> bool:
        return os.path.exists(os.path.join(self.place, name))

    def open(self, name: str) -> HeaderFile:
        return HeaderFile(os.path.join(self.place, name))


def _gguf_shape(path: str) -> ModelShape | UnknownShape:
    first = gguf_header(path)
    split = _SPLIT_GGUF.fullmatch(path)
    if split is None or int(split["count"]) <= 1:
        return _named(shape_of_gguf(first), path)
    count = int(split["count"])
    if count > MOST_FILES or split["number"] != "00001":
        raise BadFile(f"{path} is not the first file of its model")
    headers = [first] + [
        gguf_header(f"{split['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(2, count + 1)
    ]
    tensors = tuple(tensor for header in headers for tensor in header.tensors)
    return _named(shape_of_gguf(GgufHeader(values=first.values, lengths=first.lengths, tensors=tensors)), path)


def _named(shape: ModelShape | UnknownShape, path: str) -> ModelShape | UnknownShape:
    """The path goes with the sentence that says why there is no shape."""
    return UnknownShape(why=f"{path}: {shape.why}") if isinstance(shape, UnknownShape) else shape
