"""The headers of *.safetensors files: the name, storage type and bytes of every tensor, without reading one.

The format: eight bytes, little-endian, the length of a JSON object, which maps each tensor to its dtype, its shape and
where it lies behind the header (github.com/huggingface/safetensors, "Format").
"""

from collections.abc import Iterator
from typing import Any

from sage_reconcile.core.tensor_roles import Tensor
from sage_reconcile.world.header_files import BadFile, Readable, json_object

# The format's own limit.
_LARGEST_HEADER_BYTES = 100_000_000
_LONGEST_NAME = 1000
_DTYPE_LENGTHS = range(1, 17)


def header_bytes(file: Readable) -> int:
    """The length of a file's header behind its first eight bytes. Raises BadFile."""
    length = int.from_bytes(file.read(8, offset=0), "little")
    if length > _LARGEST_HEADER_BYTES:
        raise BadFile(f"{file.path} is not a safetensors file: its header would take {length:,} bytes")
    return length


def tensors_of(file: Readable) -> tuple[Tensor, ...]:
    """Every tensor of one file. Raises BadFile."""
    length = header_bytes(file)
    header = json_object(file.read(length, offset=8), file.path)
    return tuple(_tensors(header, file.path, data_bytes=file.size_bytes - 8 - length))


def _tensors(header: dict[str, Any], path: str, *, data_bytes: int) -> Iterator[Tensor]:
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, first, last = _entry(name, entry, path)
        if last > data_bytes:
            raise BadFile(f"{path} is cut short: the tensor {name[:80]} lies beyond its end")
        yield name, dtype, last - first


def _entry(name: str, entry: Any, path: str) -> tuple[str, int, int]:
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    whole = isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)
    if len(name) > _LONGEST_NAME or not isinstance(dtype, str) or len(dtype) not in _DTYPE_LENGTHS or not whole:
        raise BadFile(f"{path} is not a safetensors file: its entry {name[:80]} makes no sense")
    assert isinstance(offsets, list)
    first, last = offsets
    if not 0 <= first <= last:
        raise BadFile(f"{path} is not a safetensors file: its entry {name[:80]} ends before it begins")
    return dtype, first, last
