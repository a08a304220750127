"""The shapes of models that lie on this machine: a directory, a GGUF file, or the cache of the Hugging Face hub.

Only headers are read, and never the network. Whatever a file holds, the answer is a shape or a sentence.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from sage_reconcile.core.facts import ModelFact
from sage_reconcile.core.gguf_shape import GgufHeader, shape_of_gguf
from sage_reconcile.core.model_shape import shape_of_config
from sage_reconcile.core.shape import ModelShape, UnknownShape
from sage_reconcile.core.spec import is_path
from sage_reconcile.core.tensor_roles import Tensor
from sage_reconcile.world.gguf_headers import gguf_header
from sage_reconcile.world.header_files import BadFile, HeaderFile, read_json
from sage_reconcile.world.safetensors_headers import tensors_of

# The largest config.json are some 100 KB, the largest index of tensors 15 MB (a trillion parameters in experts).
_LARGEST_CONFIG_BYTES = 8 * 1024 * 1024
_LARGEST_INDEX_BYTES = 64 * 1024 * 1024
_LARGEST_REFERENCE_BYTES = 256
# The largest models have some 200 files.
_MOST_FILES = 2000
_MOST_ENTRIES = 20_000
# Tensors of all files together: twenty times those of the largest model.
_MOST_TENSORS = 4_000_000

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?", re.ASCII)
_SNAPSHOT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_SPLIT_GGUF = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII | re.DOTALL)


def model_fact(model: str, *, environment: Mapping[str, str], shape: bool) -> ModelFact:
    """Whether a model can be read, where it is a path; and its shape, where that was asked for.

    A path is absolute. A model on the hub that is not in its cache is none that is missing: the engine may fetch it.
    """
    why = _why_unusable(Path(model)) if is_path(model) else ""
    if why or not shape:
        return ModelFact(model=model, why=why)
    found = model_shape(model, directory="/", environment=environment)
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
            path = os.path.join(directory, _home_path(model, environment))
            return _gguf_shape(path) if path.endswith(".gguf") else _directory_shape(path)
        return _directory_shape(_snapshot(model, environment))
    except BadFile as bad:
        return UnknownShape(why=str(bad))


def _home_path(path: str, environment: Mapping[str, str]) -> str:
    return os.path.join(environment.get("HOME", "/"), path[2:]) if path.startswith("~/") else path


def hub_cache(environment: Mapping[str, str]) -> str:
    """The directory of the hub's cache, as huggingface_hub finds it."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(name):
            return _home_path(environment[name], environment)
    if environment.get("HF_HOME"):
        return os.path.join(_home_path(environment["HF_HOME"], environment), "hub")
    caches = environment.get("XDG_CACHE_HOME") or os.path.join(environment.get("HOME", "/"), ".cache")
    return os.path.join(caches, "huggingface", "hub")


def _snapshot(model: str, environment: Mapping[str, str]) -> str:
    """The directory of a model in the hub's cache: the revision called main, or the only one there is."""
    if not _HUB_ID.fullmatch(model) or ".." in model:
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
    names = _names(directory)
    if "config.json" not in names:
        ggufs = [name for name in names if name.endswith(".gguf") and not name.startswith("mmproj")]
        if len(ggufs) == 1 or (ggufs and _SPLIT_GGUF.fullmatch(ggufs[0]) is not None):
            return _gguf_shape(os.path.join(directory, ggufs[0]))
        raise BadFile(f"{directory} has no config.json")
    config = read_json(os.path.join(directory, "config.json"), largest_bytes=_LARGEST_CONFIG_BYTES)
    files, total_bytes = _weight_files(directory, names)
    missing = [name for name in files if not os.path.exists(os.path.join(directory, name))]
    if not files or missing:
        # The weights are not here, or not all of them yet.
        return shape_of_config(config, total_bytes=total_bytes or _other_weights_bytes(directory, names))
    tensors: list[Tensor] = []
    for name in files:
        tensors += tensors_of(os.path.join(directory, name))
        if len(tensors) > _MOST_TENSORS:
            raise BadFile(f"{directory} holds more tensors than any model has")
    return shape_of_config(config, tensors=tuple(tensors))


def _weight_files(directory: str, names: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    """The files that an engine loads, and the bytes that all of them say to have together; 0: not said.

    Some repositories hold the weights twice, once in Mistral's own format (consolidated*): the index tells which count.
    """
    index = "model.safetensors.index.json"
    if index in names:
        found = read_json(os.path.join(directory, index), largest_bytes=_LARGEST_INDEX_BYTES)
        places, facts = found.get("weight_map"), found.get("metadata")
        files = sorted({name for name in places.values() if isinstance(name, str)}) if isinstance(places, dict) else []
        if not files or len(files) > _MOST_FILES or any(not _is_weight_name(name) for name in files):
            raise BadFile(f"{os.path.join(directory, index)} does not say which files hold the weights")
        total = facts.get("total_size") if isinstance(facts, dict) else 0
        return tuple(files), total if type(total) is int and 0 < total < 1 << 50 else 0
    if "model.safetensors" in names:
        return ("model.safetensors",), 0
    every = [name for name in names if _is_weight_name(name)]
    if len(every) > _MOST_FILES:
        raise BadFile(f"{directory} holds {len(every):,} files of weights, which is no model")
    usual = [name for name in every if not name.startswith("consolidated")]
    return tuple(usual or every), 0


def _is_weight_name(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name and "\0" not in name


def _other_weights_bytes(directory: str, names: tuple[str, ...]) -> int:
    """The bytes of weights in PyTorch's older format, which is not looked into; 0: there are none."""
    total = 0
    for name in names:
        if name.startswith("pytorch_model") and name.endswith(".bin"):
            with HeaderFile(os.path.join(directory, name)) as file:
                total += file.size_bytes
    return total


def _gguf_shape(path: str) -> ModelShape | UnknownShape:
    first = gguf_header(path)
    split = _SPLIT_GGUF.fullmatch(path)
    if split is None or int(split["count"]) <= 1:
        return _named(shape_of_gguf(first), path)
    count = int(split["count"])
    if count > _MOST_FILES or split["number"] != "00001":
        raise BadFile(f"{path} is not the first file of its model")
    headers = [first] + [
        gguf_header(f"{split['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(2, count + 1)
    ]
    tensors = tuple(tensor for header in headers for tensor in header.tensors)
    return _named(shape_of_gguf(GgufHeader(values=first.values, lengths=first.lengths, tensors=tensors)), path)


def _named(shape: ModelShape | UnknownShape, path: str) -> ModelShape | UnknownShape:
    """The path goes with the sentence that says why there is no shape."""
    return UnknownShape(why=f"{path}: {shape.why}") if isinstance(shape, UnknownShape) else shape
