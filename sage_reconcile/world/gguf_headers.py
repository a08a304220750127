"""The headers of GGUF files: metadata and tensors, without reading weights.

The format: "GGUF", a version, how many tensors and how many values; the values; the tensors (ggml/docs/gguf.md). Every
count and length in it is limited, because the file may lie: a lie is a BadFile, never gigabytes of memory.
"""

import struct

from sage_reconcile.core.gguf_shape import GgufHeader
from sage_reconcile.core.tensor_roles import Tensor
from sage_reconcile.world.header_files import BadFile, HeaderFile

# The largest models have some 2,000 tensors and 60 values.
_MOST_TENSORS = 100_000
_MOST_VALUES = 10_000
# ggml allows 64 bytes for the name of a tensor, gguf.md 65,535 for a key.
_LONGEST_TENSOR_NAME = 256
_LONGEST_KEY = 65_535
# The longest texts are chat templates; longer ones are skipped over and not kept.
_LONGEST_KEPT_TEXT = 4096
_LONGEST_TEXT = 64 * 1024 * 1024
# Vocabularies and their merges, over all lists; other lists have an entry for each layer.
_MOST_TEXTS = 4_000_000
_LONGEST_KEPT_LIST = 2000
_MOST_DIMENSIONS = 8

# struct's code for each type of value (gguf_metadata_value_type).
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9

# The types of tensors: name, numbers in a block, bytes of a block (ggml.h's ggml_type, ggml-common.h's block_*).
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}  # fmt: skip


def gguf_header(path: str) -> GgufHeader:
    """The header of one file.

    Raises BadFile with a sentence.
    """
    with HeaderFile(path) as file:
        return _Reader(file).header()


class _Reader:
    """Reads forward through a file, a window at a time."""

    # A header of an 8B model is 8 MiB, most of it the vocabulary.
    _WINDOW_BYTES = 1 << 20

    def __init__(self, file: HeaderFile) -> None:
        self._file = file
        self._at = 0
        self._window = b""
        self._window_at = 0
        self._texts_left = _MOST_TEXTS

    def header(self) -> GgufHeader:
        """Everything before the weights."""
        if self._take(4) != b"GGUF":
            raise BadFile(f"{self._file.path} is not a GGUF file")
        (version,) = self._numbers("I", 1)
        if version not in (2, 3):
            raise BadFile(f"{self._file.path} has version {version} of GGUF, and this reads 2 and 3, little-endian")
        tensors, values = self._numbers("Q", 2)
        if tensors > _MOST_TENSORS or values > _MOST_VALUES:
            raise BadFile(f"{self._file.path} is no model: it would have {tensors:,} tensors and {values:,} values")
        kept: dict[str, int | float | bool | str | tuple[int | float | bool, ...]] = {}
        lengths: dict[str, int] = {}
        for _ in range(values):
            key = self._text(_LONGEST_KEY)
            (kind,) = self._numbers("I", 1)
            if kind == _LIST:
                lengths[key], entries = self._list(key)
                if entries:
                    kept[key] = entries
            else:
                kept[key] = self._value(kind, key)
        found = [self._tensor() for _ in range(tensors)]
        alignment = kept.get("general.alignment", 32)
        whole = isinstance(alignment, int) and 1 <= alignment <= 1 << 20
        data_at = self._at + (-self._at % alignment if whole and isinstance(alignment, int) else 0)
        return GgufHeader(values=kept, lengths=lengths, tensors=self._within(found, data_at))

    def _within(self, found: list[tuple[str, str, int, int]], data_at: int) -> tuple[Tensor, ...]:
        """The tensors, if the file is long enough for all of them."""
        for name, _, size, offset in found:
            if data_at + offset + size > self._file.size_bytes:
                raise BadFile(f"{self._file.path} is cut short: the tensor {name[:80]} lies beyond its end")
        return tuple((name, storage, size) for name, storage, size, _ in found)

    def _tensor(self) -> tuple[str, str, int, int]:
        """Name, storage type, bytes, and the offset behind the header."""
        name = self._text(_LONGEST_TENSOR_NAME)
        (count,) = self._numbers("I", 1)
        if count > _MOST_DIMENSIONS:
            raise BadFile(f"{self._file.path}: the tensor {name[:80]} would have {count:,} dimensions")
        numbers = 1
        for dimension in self._numbers("Q", count):
            numbers *= dimension
        (kind,) = self._numbers("I", 1)
        (offset,) = self._numbers("Q", 1)
        if kind not in _TYPES:
            raise BadFile(f"{self._file.path}: the tensor {name[:80]} is of type {kind}, which this sage does not know")
        storage, block, block_bytes = _TYPES[kind]
        return name, storage, -(-numbers // block) * block_bytes, offset

    def _value(self, kind: int, key: str) -> int | float | bool | str:
        if kind == _TEXT:
            length = self._length(_LONGEST_TEXT)
            if length > _LONGEST_KEPT_TEXT:
                self._skip(length)
                return ""
            return self._take(length).decode("utf-8", "replace")
        if kind not in _NUMBERS:
            raise BadFile(f"{self._file.path}: the value {key[:80]} is of type {kind}, which GGUF does not have")
        number: int | float | bool = self._numbers(_NUMBERS[kind], 1)[0]
        return number

    def _list(self, key: str) -> tuple[int, tuple[int | float | bool, ...]]:
        """How many entries a list has, and the entries if they are few numbers."""
        (kind,) = self._numbers("I", 1)
        (count,) = self._numbers("Q", 1)
        if kind == _TEXT:
            self._texts_left -= count
            if self._texts_left < 0:
                raise BadFile(f"{self._file.path} is no model: its lists would hold more than {_MOST_TEXTS:,} texts")
            for _ in range(count):
                self._skip(self._length(_LONGEST_TEXT))
            return count, ()
        if kind not in _NUMBERS:
            raise BadFile(f"{self._file.path}: the list {key[:80]} is of type {kind}, which this sage does not read")
        if count <= _LONGEST_KEPT_LIST:
            return count, self._numbers(_NUMBERS[kind], count)
        self._skip(count * struct.calcsize(f"<{_NUMBERS[kind]}"))
        return count, ()

    def _length(self, most: int) -> int:
        length: int = self._numbers("Q", 1)[0]
        if length > most:
            raise BadFile(f"{self._file.path} is no model: it would hold a text of {length:,} bytes")
        return length

    def _text(self, longest: int) -> str:
        return self._take(self._length(longest)).decode("utf-8", "replace")

    def _numbers(self, code: str, count: int) -> tuple[int, ...]:
        form = f"<{count}{code}"
        return struct.unpack(form, self._take(struct.calcsize(form)))

    def _skip(self, length: int) -> None:
        if self._at + length > self._file.size_bytes:
            raise BadFile(f"{self._file.path} is cut short: it ends at byte {self._file.size_bytes:,}")
        self._at += length

    def _take(self, length: int) -> bytes:
        start = self._at - self._window_at
        if start < 0 or start + length > len(self._window):
            # At least what is asked for, which read refuses when the file ends before.
            reach = max(length, min(self._WINDOW_BYTES, self._file.size_bytes - self._at))
            self._window = self._file.read(reach, offset=self._at)
            self._window_at, start = self._at, 0
        self._at += length
        return self._window[start : start + length]
