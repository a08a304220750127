"""The shape of a model in a GGUF file: its metadata and tensors in, a ModelShape out.

The keys are those of llama.cpp's gguf-py/gguf/constants.py. Where each layer is of a kind of its own and the file does
not say so, llama.cpp has the pattern in its code (llama-model.cpp), and so does this.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from sage_reconcile.core.shape import Cache, HeadCache, LatentCache, LayerGroup, ModelShape, StateCache, UnknownShape
from sage_reconcile.core.tensor_roles import Tensor, parts_of

# Every n-th layer sees everything (llama.cpp's set_swa_pattern).
_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "cohere2": 4, "exaone4": 4, "olmo2": 4, "llama4": 4}
_ENCODERS = frozenset({"bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "modern-bert"})
_DELTA_NETS = frozenset({"qwen3next", "qwen35", "qwen35moe"})
_MOST_LAYERS = 2000
_LARGEST = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What stands before the weights in a GGUF file."""

    # Numbers, texts, and short lists of numbers.
    values: Mapping[str, int | float | bool | str | tuple[int | float | bool, ...]]
    # How many entries each list has, long ones too.
    lengths: Mapping[str, int]
    tensors: tuple[Tensor, ...]


def shape_of_gguf(header: GgufHeader) -> ModelShape | UnknownShape:
    """The shape that a GGUF header tells."""
    family = header.values.get("general.architecture")
    if not isinstance(family, str) or not family:
        return UnknownShape(why="the file does not name its architecture (general.architecture)")
    layers = min(_whole(header, "block_count"), _MOST_LAYERS) - _whole(header, "nextn_predict_layers")
    if layers <= 0 or not header.tensors:
        return UnknownShape(why="the file does not say how many layers the model has, or holds no tensors")
    parts = parts_of(header.tensors, layers=layers, quantisation=None)
    # The last layers may look into the cache of one before them (Gemma 3n).
    own = 0 if family in _ENCODERS else max(0, layers - _whole(header, "attention.shared_kv_layers"))
    caches = [_cache(header, family, index) if index < own else None for index in range(layers)]
    groups = groupby(sorted(caches, key=repr))
    embeddings = header.lengths.get("tokenizer.ggml.tokens", 0)
    return ModelShape(
        family=family,
        known=True,
        basis="tensors",
        parts=parts,
        groups=tuple(LayerGroup(count=len(list(same)), cache=cache) for cache, same in groups),
        layers=layers,
        attention_heads=max((_at(header, "attention.head_count", index) for index in range(layers)), default=0),
        hidden=_whole(header, "embedding_length"),
        intermediate=max((_at(header, "feed_forward_length", index) for index in range(layers)), default=0),
        vocabulary=_whole(header, "vocab_size") or embeddings,
        max_positions=_whole(header, "context_length"),
        tied=family not in _ENCODERS and all(part.role != "lm_head" for part in parts),
        experts=_whole(header, "expert_count"),
        experts_per_token=_whole(header, "expert_used_count"),
        moe_intermediate=_whole(header, "expert_feed_forward_length"),
        quantisation="gguf",
    )


def _at(header: GgufHeader, key: str, index: int) -> int:
    """The value for one layer of a key that holds one value, or one for each layer."""
    value = header.values.get(f"{header.values['general.architecture']}.{key}")
    if isinstance(value, tuple):
        value = value[index] if index < len(value) else 0
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST else 0


def _whole(header: GgufHeader, key: str) -> int:
    return _at(header, key, 0)


def _cache(header: GgufHeader, family: str, index: int) -> Cache | None:
    if _is_recurrent(header, family, index):
        return _state(header)
    kv_heads = _at(header, "attention.head_count_kv", index) if _says(header, "attention.head_count_kv") else None
    heads = _at(header, "attention.head_count", index)
    kv_heads = heads if kv_heads is None else kv_heads
    if not kv_heads:
        return None
    rank = _whole(header, "attention.kv_lora_rank")
    if rank and _whole(header, "attention.key_length_mla"):
        return LatentCache(rank=rank, rope_size=_whole(header, "rope.dimension_count"))
    size = _whole(header, "embedding_length") // heads if heads else 0
    narrow = "_swa" if _windowed(header, family, index) and _says(header, "attention.key_length_swa") else ""
    return HeadCache(
        kv_heads=kv_heads,
        key_size=_whole(header, f"attention.key_length{narrow}") or size,
        value_size=_whole(header, f"attention.value_length{narrow}") or size,
        window=_whole(header, "attention.sliding_window") if _windowed(header, family, index) else None,
    )


def _says(header: GgufHeader, key: str) -> bool:
    return f"{header.values['general.architecture']}.{key}" in header.values


def _windowed(header: GgufHeader, family: str, index: int) -> bool:
    if not _whole(header, "attention.sliding_window"):
        return False
    pattern = header.values.get(f"{family}.attention.sliding_window_pattern")
    if isinstance(pattern, tuple):
        return index < len(pattern) and bool(pattern[index])
    every = pattern if isinstance(pattern, int) and not isinstance(pattern, bool) else _PATTERNS.get(family, 0)
    return every > 0 and index % every < every - 1


def _is_recurrent(header: GgufHeader, family: str, index: int) -> bool:
    if not _whole(header, "ssm.conv_kernel"):
        return False
    if family in _DELTA_NETS:
        every = _whole(header, "full_attention_interval") or 4
        return (index + 1) % every != 0
    # Hybrids of Mamba and attention: a layer without heads, and without a feed-forward where layers have only one part.
    alone = isinstance(header.values.get(f"{family}.feed_forward_length"), tuple)
    without_heads = not _at(header, "attention.head_count_kv", index)
    return without_heads and not (alone and _at(header, "feed_forward_length", index))


def _state(header: GgufHeader) -> StateCache:
    """llama.cpp keeps both the convolution and the state in 32 bits (llama_hparams::n_embd_r and n_embd_s)."""
    inner, size = _whole(header, "ssm.inner_size"), _whole(header, "ssm.state_size")
    mixed = inner + 2 * _whole(header, "ssm.group_count") * size
    kept = max(0, _whole(header, "ssm.conv_kernel") - 1)
    # convolution_numbers are of 16 bits, and these are twice as long.
    return StateCache(convolution_numbers=2 * mixed * kept, state_numbers=inner * size)
