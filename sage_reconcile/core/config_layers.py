"""What each layer of a model is, from its config: kinds of attention and kinds of feed-forward.

The keys here are those of the configs of llama, Qwen, Mistral, Gemma, Phi, gpt-oss, DeepSeek, GLM, Kimi, MiniMax and
Nemotron as transformers 5 has them; config_dialects translates those of others.
"""

from dataclasses import dataclass
from typing import Any, Literal

from sage_reconcile.core.config_keys import Keys

# "linear": a single matrix in place of attention (nemotron-nas).
Attention = Literal["full", "window", "chunk", "linear", "none"]
Feed = Literal["dense", "moe", "both", "none"]

# Every n-th layer sees everything and the others a window, where the config does not list its layers (transformers'
# classes: Gemma2Config, Gemma3TextConfig, Cohere2Config, GptOssConfig).
_PATTERNS = {"gemma2": 2, "gemma3_text": 6, "gemma3n_text": 5, "gemma4_text": 6, "cohere2": 4, "gpt_oss": 2}
# Families whose sliding_window, when it is set, holds for every layer.
_ALL_WINDOWS = frozenset({"mistral", "mixtral", "phi3", "starcoder2", "ministral"})
_LINEAR = frozenset({"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"})
# Attention, whether it is recurrent (or has a recurrent part beside), and the feed-forward.
_BLOCKS: dict[str, tuple[Attention, bool, Feed]] = {
    "M": ("none", True, "none"), "*": ("full", False, "none"), "-": ("none", False, "dense"),
    "E": ("none", False, "moe"), "mamba": ("none", True, "none"), "attention": ("full", False, "none"),
    "mlp": ("none", False, "dense"), "moe": ("none", False, "moe"),
}  # fmt: skip
_ATTENTIONS: dict[str, tuple[Attention, bool]] = {
    "sliding_attention": ("window", False),
    "chunked_attention": ("chunk", False),
    "linear_attention": ("none", True),
    "mamba": ("none", True),
    "conv": ("none", True),
    # Falcon-H1: both, side by side.
    "hybrid": ("full", True),
}
_FULL: tuple[Attention, bool] = ("full", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer."""

    attention: Attention
    feed: Feed
    # Whether it has a state that does not grow with the text (recurrent_layers).
    recurrent: bool = False
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
        return tuple(_plain(own, *kinds) for own, kinds in zip(keys.by_layer(len(known)), known, strict=True))
    ratios = keys.entries("compress_ratios")
    return tuple(
        _plain(own, *_attention(keys, index), _feed(keys, index), tokens=_ratio(ratios, index))
        for index, own in enumerate(keys.by_layer(keys.layers))
    )


def _maps(block: Any) -> bool:
    return isinstance(block, dict)


def _plain(keys: Keys, attention: Attention, recurrent: bool, feed: Feed, *, tokens: int = 1) -> Layer:
    kv_heads = keys.whole("num_key_value_heads", "num_kv_heads", "multi_query_group_num", default=keys.heads)
    if attention == "full" and keys.whole("num_global_key_value_heads"):
        kv_heads = keys.whole("num_global_key_value_heads")
    # Llama 4 and Granite 4 call the width of an expert intermediate_size, and that of layers without experts otherwise.
    dense = keys.whole("intermediate_size_mlp") or keys.whole("shared_intermediate_size") or keys.intermediate
    return Layer(
        attention=attention,
        feed=feed,
        recurrent=recurrent,
        kv_heads=kv_heads,
        intermediate=dense,
        tokens_per_entry=max(1, tokens),
    )


def _searched(keys: Keys, block: Keys) -> Layer:
    """A layer of NVIDIA's architecture search: each has heads and a width of its own (nemotron-nas, block_configs)."""
    attention, feed = block.below("attention"), block.below("ffn")
    group = attention.whole("n_heads_in_group")
    # DeciLM: two thirds of the factor times the width, rounded up to a multiple of 256.
    width = int(2 * feed.fraction("ffn_mult", 0.0) * keys.hidden / 3)
    kind: Attention = "full" if group and not attention.flag("no_op") else "none"
    return Layer(
        attention="linear" if attention.flag("replace_with_linear") else kind,
        feed="none" if feed.flag("no_op") else "dense",
        kv_heads=keys.heads // group if group else 0,
        # One matrix in place of three is a third as wide.
        intermediate=keys.hidden // 3
        if feed.flag("replace_with_linear")
        else feed.whole("intermediate_size") or -(-width // 256) * 256,
    )


def _ratio(ratios: tuple[Any, ...], index: int) -> int:
    ratio = ratios[index] if index < len(ratios) else 1
    return ratio if isinstance(ratio, int) and 0 < ratio <= 4096 else 1


def _attention(keys: Keys, index: int) -> tuple[Attention, bool]:
    listed = keys.entries("layer_types")
    if index < len(listed):
        kind = _ATTENTIONS.get(str(listed[index]), _FULL)
        return _FULL if kind[0] == "window" and not window_of(keys) else kind
    if keys.family in _LINEAR:
        every = keys.whole("full_attention_interval", default=4)
        return _FULL if every and (index + 1) % every == 0 else ("none", True)
    if not window_of(keys):
        return _FULL
    every = keys.whole("sliding_window_pattern", "_sliding_window_pattern", default=_PATTERNS.get(keys.family, 0))
    if every:
        return _FULL if (index + 1) % every == 0 else ("window", False)
    return ("window", False) if keys.family in _ALL_WINDOWS else _FULL


def window_of(keys: Keys) -> int:
    """0: no window, or one that the whole context fits into."""
    window = keys.whole("sliding_window", "sliding_window_size")
    used = keys.flag("use_sliding_window", default=True) and window < (keys.max_positions or window + 1)
    return window if used else 0


def _feed(keys: Keys, index: int) -> Feed:
    if keys.experts <= 1:
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
