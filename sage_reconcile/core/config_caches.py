"""What each layer of a model keeps of the tokens that it has seen, from its config."""

from collections.abc import Iterator
from itertools import groupby

from sage_reconcile.core.config_keys import Keys
from sage_reconcile.core.config_layers import Attention, Layer, window_of
from sage_reconcile.core.recurrent_layers import recurrent_state
from sage_reconcile.core.shape import Cache, HeadCache, LatentCache, LayerGroup

# What the indexer of DeepSeek's sparse attention keeps per token and layer: 128 numbers in fp8 and a scale of 4 bytes
# (vLLM's DeepseekV32IndexerCache; without it GLM-5 comes out 10.3% low).
_INDEXER_BYTES = 132
# Their latent attention is unpacked before it is kept (vLLM's minicpm3.py; is_deepseek_mla names the others).
_UNPACKED = frozenset({"minicpm3"})


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
    # The last layers may look into the cache of one before them.
    own = 0 if encoder else max(0, len(layers) - keys.whole("num_kv_shared_layers"))
    caches: list[Cache | None] = [None] * (len(layers) - own)
    for layer_keys, layer in zip(keys.by_layer(len(layers))[:own], layers[:own], strict=True):
        caches += _caches(layer_keys, layer)
    order = sorted(caches, key=repr)
    return tuple(LayerGroup(count=len(list(same)), cache=cache) for cache, same in groupby(order))


def _caches(keys: Keys, layer: Layer) -> Iterator[Cache | None]:
    """What a layer keeps: nothing, one, or two side by side."""
    if layer.recurrent:
        yield recurrent_state(keys)
    if layer.attention in ("full", "window", "chunk"):
        yield _cache(keys, layer)
    elif not layer.recurrent:
        yield None


def _cache(keys: Keys, layer: Layer) -> Cache:
    rank = keys.whole("kv_lora_rank")
    if rank and keys.family in _UNPACKED:
        size = keys.whole("qk_nope_head_dim") + keys.whole("qk_rope_head_dim")
        return HeadCache(kv_heads=keys.heads, key_size=size, value_size=size)
    if rank:
        indexer = _INDEXER_BYTES if keys.whole("index_topk") and keys.whole("index_n_heads") else 0
        return LatentCache(rank=rank, rope_size=keys.whole("qk_rope_head_dim"), indexer_bytes=indexer)
    key, value = head_sizes(keys, layer.attention)
    if keys.family == "deepseek_v4":
        # One vector per entry is key and value at once.
        value = 0
    window = {"window": window_of(keys), "chunk": keys.whole("attention_chunk_size", default=8192)}.get(layer.attention)
    return HeadCache(
        kv_heads=layer.kv_heads,
        key_size=key,
        value_size=value,
        window=window,
        tokens_per_entry=layer.tokens_per_entry,
    )
