"""What each layer of a model is, from its config: kinds of attention, kinds of feed-forward, and what they keep.

Each family says it with keys of its own; the keys here are those of the configs of llama, Qwen, Mistral, Gemma, Phi,
gpt-oss, DeepSeek, GLM, Kimi, MiniMax and Nemotron as transformers 5 has them.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from sage_reconcile.core.config_keys import Keys
from sage_reconcile.core.shape import Cache, HeadCache, LatentCache, LayerGroup, StateCache

Attention = Literal["full", "window", "chunk", "linear", "mamba", "none"]
Feed = Literal["dense", "moe", "both", "none"]

# Every n-th layer sees everything and the others a window, where the config does not list its layers (transformers'
# classes: Gemma2Config, Gemma3TextConfig, Cohere2Config, GptOssConfig).
_PATTERNS = {"gemma2": 2, "gemma3_text": 6, "gemma3n_text": 5, "gemma4_text": 6, "cohere2": 4, "gpt_oss": 2}
# Families whose sliding_window, when it is set, holds for every layer.
_ALL_WINDOWS = frozenset({"mistral", "mixtral", "phi3", "starcoder2", "ministral"})
_LINEAR = frozenset({"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"})
_BLOCKS: dict[str, tuple[Attention, Feed]] = {
    "M": ("mamba", "none"), "*": ("full", "none"), "-": ("none", "dense"), "E": ("none", "moe"),
    "mamba": ("mamba", "none"), "attention": ("full", "none"), "mlp": ("none", "dense"), "moe": ("none", "moe"),
}  # fmt: skip
_ATTENTIONS: dict[str, Attention] = {
    "sliding_attention": "window",
    "chunked_attention": "chunk",
    "linear_attention": "linear",
    "mamba": "mamba",
}

# What the indexer of DeepSeek's sparse attention keeps per token and layer: 128 numbers in fp8 and a scale of 4 bytes
# (vLLM's DeepseekV32IndexerCache; without it GLM-5 comes out 10.3% low).
_INDEXER_BYTES = 132


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer."""

    attention: Attention
    feed: Feed
    kv_heads: int = 0
    intermediate: int = 0
    tokens_per_entry: int = 1


def layers_of(keys: Keys) -> tuple[Layer, ...]:
    """Every layer, first to last."""
    if keys.entries("block_configs"):
        return tuple(_searched(keys, Keys(values=block)) for block in keys.entries("block_configs") if _maps(block))
    blocks = tuple(keys.text("hybrid_override_pattern")) or keys.entries("layers_block_type")
    if blocks:
        known = [_BLOCKS[block] for block in blocks if isinstance(block, str) and block in _BLOCKS]
        return tuple(_plain(keys, attention, feed) for attention, feed in known)
    ratios = keys.entries("compress_ratios")
    return tuple(
        _plain(keys, _attention(keys, index), _feed(keys, index), tokens=_ratio(ratios, index))
        for index in range(keys.layers)
    )


def _maps(block: Any) -> bool:
    return isinstance(block, dict)


def _plain(keys: Keys, attention: Attention, feed: Feed, *, tokens: int = 1) -> Layer:
    kv_heads = keys.whole("num_key_value_heads", "num_kv_heads", "multi_query_group_num", default=keys.heads)
    if attention == "full" and keys.whole("num_global_key_value_heads"):
        kv_heads = keys.whole("num_global_key_value_heads")
    dense = keys.whole("intermediate_size_mlp") or keys.intermediate
    return Layer(attention=attention, feed=feed, kv_heads=kv_heads, intermediate=dense, tokens_per_entry=max(1, tokens))


def _searched(keys: Keys, block: Keys) -> Layer:
    """A layer of NVIDIA's architecture search: each has heads and a width of its own (nemotron-nas, block_configs)."""
    attention, feed = block.below("attention"), block.below("ffn")
    group = attention.whole("n_heads_in_group")
    # DeciLM: two thirds of the factor times the width, rounded up to a multiple of 256.
    width = int(2 * feed.fraction("ffn_mult", 0.0) * keys.hidden / 3)
    return Layer(
        attention="full" if group and not attention.flag("no_op") else "none",
        feed="none" if feed.flag("no_op") else "dense",
        kv_heads=keys.heads // group if group else 0,
        intermediate=feed.whole("intermediate_size") or -(-width // 256) * 256,
    )


def _ratio(ratios: tuple[Any, ...], index: int) -> int:
    ratio = ratios[index] if index < len(ratios) else 1
    return ratio if isinstance(ratio, int) and 0 < ratio <= 4096 else 1


def _attention(keys: Keys, index: int) -> Attention:
    listed = keys.entries("layer_types")
    if index < len(listed):
        kind = _ATTENTIONS.get(str(listed[index]), "full")
        return "full" if kind == "window" and not _window(keys) else kind
    if keys.family in _LINEAR:
        every = keys.whole("full_attention_interval", default=4)
        return "full" if every and (index + 1) % every == 0 else "linear"
    if not _window(keys):
        return "full"
    every = keys.whole("sliding_window_pattern", "_sliding_window_pattern", default=_PATTERNS.get(keys.family, 0))
    if every:
        return "full" if (index + 1) % every == 0 else "window"
    return "window" if keys.family in _ALL_WINDOWS else "full"


def _window(keys: Keys) -> int:
    """0: no window, or one that the whole context fits into."""
    window = keys.whole("sliding_window", "sliding_window_size")
    used = keys.flag("use_sliding_window", default=True) and window < (keys.max_positions or window + 1)
    return window if used else 0


def _feed(keys: Keys, index: int) -> Feed:
    if not keys.experts:
        return "dense"
    if keys.flag("enable_moe_block"):
        return "both"
    listed = keys.entries("mlp_layer_types")
    if index < len(listed):
        return "dense" if listed[index] == "dense" else "moe"
    frequency = keys.entries("moe_layer_freq")
    if index < len(frequency):
        return "moe" if frequency[index] else "dense"
    chosen = keys.entries("moe_layers")
    every = keys.whole("decoder_sparse_step", "interleave_moe_layer_step", default=1)
    dense = (
        index < keys.whole("first_k_dense_replace")
        or index in keys.entries("mlp_only_layers")
        or (bool(chosen) and index not in chosen)
        or (every > 1 and (index + 1) % every != 0)
    )
    return "dense" if dense else "moe"


def head_sizes(keys: Keys, attention: Attention) -> tuple[int, int]:
    """Numbers per head in a key and in a value."""
    own = keys.whole("global_head_dim") if attention == "full" else 0
    size = own or keys.whole("head_dim", "attention_head_dim", "kv_channels")
    size = size or (keys.hidden // keys.heads if keys.heads else 0)
    return size, keys.whole("v_head_dim", default=size) if not keys.whole("kv_lora_rank") else size


def groups_of(keys: Keys, layers: tuple[Layer, ...], *, encoder: bool) -> tuple[LayerGroup, ...]:
    """What the layers keep, those that keep the same together.

    encoder: the model reads a whole text at once and keeps nothing.
    """
    caches = [None if encoder else _cache(keys, layer) for layer in layers]
    shared = keys.whole("num_kv_shared_layers")
    if shared:
        caches[max(0, len(caches) - shared) :] = [None] * min(shared, len(caches))
    order = sorted(caches, key=repr)
    return tuple(LayerGroup(count=len(list(same)), cache=cache) for cache, same in groupby(order))


def _cache(keys: Keys, layer: Layer) -> Cache | None:
    if layer.attention == "none":
        return None
    if layer.attention in ("linear", "mamba"):
        return _state(keys, layer.attention)
    rank = keys.whole("kv_lora_rank")
    if rank:
        indexer = _INDEXER_BYTES if keys.whole("index_topk") and keys.whole("index_n_heads") else 0
        return LatentCache(rank=rank, rope_size=keys.whole("qk_rope_head_dim"), indexer_bytes=indexer)
    key, value = head_sizes(keys, layer.attention)
    if keys.family == "deepseek_v4":
        # One vector per entry is key and value at once.
        value = 0
    window = {"window": _window(keys), "chunk": keys.whole("attention_chunk_size", default=8192)}.get(layer.attention)
    return HeadCache(
        kv_heads=layer.kv_heads,
        key_size=key,
        value_size=value,
        window=window,
        tokens_per_entry=layer.tokens_per_entry,
    )


def _state(keys: Keys, attention: Attention) -> StateCache:
    number_bytes = 4 if keys.text("mamba_ssm_dtype", "mamba_ssm_cache_dtype") == "float32" else 2
    if attention == "linear":
        key_heads, value_heads = keys.whole("linear_num_key_heads"), keys.whole("linear_num_value_heads")
        key, value = keys.whole("linear_key_head_dim"), keys.whole("linear_value_head_dim")
        kept = keys.whole("linear_conv_kernel_dim", default=4) - 1
        return StateCache(
            convolution_numbers=(2 * key_heads * key + value_heads * value) * max(0, kept),
            state_numbers=value_heads * key * value,
            state_number_bytes=number_bytes,
        )
    heads, size = keys.whole("mamba_num_heads", "mamba_n_heads"), keys.whole("mamba_head_dim", "mamba_d_head")
    state, in_groups = keys.whole("ssm_state_size", "mamba_d_state"), keys.whole("n_groups", "mamba_n_groups")
    kept = keys.whole("conv_kernel", "mamba_d_conv", default=4) - 1
    return StateCache(
        convolution_numbers=(heads * size + 2 * in_groups * state) * max(0, kept),
        state_numbers=heads * size * state,
        state_number_bytes=number_bytes,
    )
