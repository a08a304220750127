"""The shape of a model that is a directory of files, wherever that lies: config.json and the headers of its weights."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from sage_reconcile.core.model_shape import shape_of_config
from sage_reconcile.core.shape import ModelShape, UnknownShape
from sage_reconcile.core.tensor_roles import Tensor
from sage_reconcile.world.header_files import BadFile, Readable, read_json
from sage_reconcile.world.safetensors_headers import tensors_of

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"

# The largest config.json are some 100 KB, the largest index of tensors 15 MB (a trillion parameters in experts).
LARGEST_CONFIG_BYTES = 8 * 1024 * 1024
LARGEST_INDEX_BYTES = 64 * 1024 * 1024
# The largest models have some 200 files.
MOST_FILES = 2000
# Tensors of all files together: twenty times those of the largest model.
_MOST_TENSORS = 4_000_000


class ModelFiles(Protocol):
    """A directory of files."""

    @property
    def place(self) -> str:
        """What messages call it."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """What is in it, sorted."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is such a file; what is linked to may be missing."""
        ...

    def open(self, name: str) -> AbstractContextManager[Readable]:
        """Raises BadFile."""
        ...


def shape_of_files(files: ModelFiles) -> ModelShape | UnknownShape:
    """The shape that a model's config.json and its weights tell, or why they tell none. Raises BadFile."""
    with files.open(CONFIG) as file:
        config = read_json(file, largest_bytes=LARGEST_CONFIG_BYTES)
    weights, total_bytes = weight_files(files)
    if not weights or not all(map(files.has, weights)):
        # The weights are not there, or not all of them yet.
        return shape_of_config(config, total_bytes=total_bytes or _other_weights_bytes(files))
    tensors: list[Tensor] = []
    for name in weights:
        with files.open(name) as file:
            tensors += tensors_of(file)
        if len(tensors) > _MOST_TENSORS:
            raise BadFile(f"{files.place} holds more tensors than any model has")
    return shape_of_config(config, tensors=tuple(tensors))


def weight_files(files: ModelFiles) -> tuple[tuple[str, ...], int]:
    """The files that an engine loads, and the bytes that all of them say to have together; 0: not said.

    Some repositories hold the weights twice, once in Mistral's own format (consolidated*): the index tells which count.
    Raises BadFile.
    """
    if INDEX in files.names:
        with files.open(INDEX) as file:
            found = read_json(file, largest_bytes=LARGEST_INDEX_BYTES)
            path = file.path
        places, facts = found.get("weight_map"), found.get("metadata")
        named = sorted({name for name in places.values() if isinstance(name, str)}) if isinstance(places, dict) else []
        if not named or len(named) > MOST_FILES or not all(map(_is_weight_name, named)):
            raise BadFile(f"{path} does not say which files hold the weights")
        total = facts.get("total_size") if isinstance(facts, dict) else 0
        return tuple(named), total if type(total) is int and 0 < total < 1 << 50 else 0
    if "model.safetensors" in files.names:
        return ("model.safetensors",), 0
    every = _named(files, _is_weight_name)
    if len(every) > MOST_FILES:
        raise BadFile(f"{files.place} holds {len(every):,} files of weights, which is no model")
    usual = tuple(name for name in every if not name.startswith("consolidated"))
    return usual or every, 0


def _is_weight_name(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name and "\0" not in name


def _is_older_weight_name(name: str) -> bool:
    return name.startswith("pytorch_model") and name.endswith(".bin") and "/" not in name


def _other_weights_bytes(files: ModelFiles) -> int:
    """The bytes of weights in PyTorch's older format, which is not looked into; 0: there are none."""
    total = 0
    for name in _named(files, _is_older_weight_name):
        with files.open(name) as file:
            total += file.size_bytes
    return total


def _named(files: ModelFiles, wanted: Callable[[str], bool]) -> tuple[str, ...]:
    return tuple(name for name in files.names if wanted(name))
