"""How many numbers a model holds in each of its parts, counted from its config, and the bytes that they take.

For a model of which only config.json is here.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from sage_reconcile.core.config_caches import head_sizes
from sage_reconcile.core.config_dialects import BERTS, ENCODERS
from sage_reconcile.core.config_keys import Keys
from sage_reconcile.core.config_layers import Layer
from sage_reconcile.core.config_towers import tower_numbers
from sage_reconcile.core.quantisation import Quantisation
from sage_reconcile.core.recurrent_layers import recurrent_numbers
from sage_reconcile.core.shape import Role, WeightPart

# A piece of a layer: its category, how many numbers.
_Piece = tuple[str, int]

_ROLES: Mapping[str, Role] = {
    "attention": "rest", "linear": "rest", "dense": "rest", "shared": "rest", "bias": "rest", "experts": "experts",
    "down": "whole", "indexer": "whole", "router": "whole", "norm": "whole", "code books": "rest",
}  # fmt: skip
# The names that the module of a category goes by, in layer {0}.
_MODULES: Mapping[str, tuple[str, ...]] = {
    "attention": ("model.layers.{0}.self_attn.o_proj",),
    "down": ("model.layers.{0}.self_attn.kv_a_proj_with_mqa",),
    "linear": ("model.layers.{0}.linear_attn.out_proj", "backbone.layers.{0}.mixer.out_proj"),
    "dense": ("model.layers.{0}.mlp.down_proj",),
    "shared": ("model.layers.{0}.mlp.shared_experts.down_proj", "model.layers.{0}.mlp.shared_expert.down_proj"),
    "experts": ("model.layers.{0}.mlp.experts.0.down_proj", "model.layers.{0}.block_sparse_moe.experts.0.w2"),
}
# What is 16 bits in every published checkpoint.
_NEVER_QUANTISED = frozenset({"bias", "norm", "router", "indexer", "code books"})

# Feed-forward layers with two matrices; all others have three, one of them a gate.
_TWO_MATRICES = BERTS | frozenset(
    {
        "gpt2", "gpt_neo", "gpt_neox", "gptj", "codegen", "gpt_bigcode", "opt", "phi", "falcon", "bloom", "mpt",
        "starcoder2", "nemotron", "nemotron_h", "apertus",
    }
)  # fmt: skip
# A bias beside every matrix.
_BIASED = BERTS | frozenset({"gpt2", "gpt_neox", "gpt_bigcode", "opt", "phi", "bloom", "starcoder2"})
_QKV_BIAS = _BIASED | frozenset(
    {"qwen", "qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl", "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text"}
)  # fmt: skip
# Encoders whose class for vectors has no pooler (transformers' DistilBertModel, ElectraModel, DebertaV2Model).
_NO_POOLER = frozenset({"distilbert", "electra", "deberta-v2"})
# Learned positions: so many more than there are tokens.
_POSITIONS = {"gpt2": 0, "gpt_bigcode": 0, "gpt_neo": 0, "opt": 2}


def parts_of_config(
    config: Mapping[str, Any], keys: Keys, layers: tuple[Layer, ...], quantisation: Quantisation | None
) -> tuple[WeightPart, ...]:
    """The parts of the weights, as bytes."""
    totals: Counter[tuple[Role, str]] = Counter()
    for index, (own, layer) in enumerate(zip(keys.by_layer(len(layers)), layers, strict=True)):
        for category, numbers in _pieces(own, layer, quantisation):
            bits = _bits(category, index, quantisation)
            storage = quantisation.method if quantisation is not None and bits != 16 else "BF16"
            totals[(_ROLES[category], storage)] += round(numbers * bits)
    totals[("embeddings", "BF16")] += 16 * _embeddings(keys)
    if not keys.flag("tie_word_embeddings") and keys.family not in ENCODERS:
        totals[("lm_head", "BF16")] += 16 * keys.vocabulary * keys.hidden
    totals[("vision", "BF16")] += 16 * tower_numbers(config, keys)
    # Gemma 3n: a matrix into and out of each further stream beside the first.
    totals[("rest", "BF16")] += 16 * 2 * max(0, keys.whole("altup_num_inputs") - 1) * keys.hidden**2
    # The norm after the last layer.
    totals[("whole", "BF16")] += 16 * keys.hidden
    return tuple(
        WeightPart(role=role, storage=storage, disk_bytes=bits // 8)
        for (role, storage), bits in sorted(totals.items())
        if bits
    )


def _bits(category: str, index: int, quantisation: Quantisation | None) -> float:
    if quantisation is None or category in _NEVER_QUANTISED:
        return 16
    if category == "experts":
        return 16 if _left(category, index, quantisation) else quantisation.expert_bits
    return 16 if quantisation.experts_only or _left(category, index, quantisation) else quantisation.bits


def _left(category: str, index: int, quantisation: Quantisation) -> bool:
    return any(quantisation.leaves(module.format(index)) for module in _MODULES[category])


def _pieces(keys: Keys, layer: Layer, quantisation: Quantisation | None) -> Iterator[_Piece]:
    if layer.attention in ("full", "window", "chunk"):
        yield from _latent_attention(keys) if keys.whole("kv_lora_rank") else _attention(keys, layer)
    elif layer.attention == "linear":
        yield ("attention", keys.hidden**2)
    if layer.recurrent:
        yield ("linear", recurrent_numbers(keys))
    yield from _feed(keys, layer)
    # Gemma 3n and the small Gemma 4: what goes into and comes out of the further embedding, and a low-rank bypass.
    yield ("dense", 3 * keys.hidden * keys.whole("hidden_size_per_layer_input"))
    yield ("dense", 2 * keys.hidden * keys.whole("laurel_rank"))
    yield ("norm", 2 * keys.hidden)
    if quantisation is not None and quantisation.method == "aqlm":
        # A code book of 65,536 groups of 8 numbers for each of the seven matrices of a layer (AQLM 1x16).
        yield ("code books", 7 * 65_536 * 8)


def _attention(keys: Keys, layer: Layer) -> Iterator[_Piece]:
    key, value = head_sizes(keys, layer.attention)
    queries = keys.heads * key * (2 if _gated(keys) else 1)
    values = 0 if keys.flag("attention_k_eq_v") and layer.attention == "full" else layer.kv_heads * value
    into = queries + layer.kv_heads * key + values
    yield ("attention", keys.hidden * into + keys.heads * value * keys.hidden)
    if keys.family in _QKV_BIAS or keys.flag("attention_bias") or keys.flag("qkv_bias"):
        yield ("bias", into + keys.hidden)


def _gated(keys: Keys) -> bool:
    """Qwen3-Next and its successors: the query projection yields a gate beside the query."""
    return keys.family in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text") and keys.flag("attn_output_gate", True)


def latent_up_numbers(keys: Keys) -> int:
    """The up-projection of one layer of latent attention: from the latent vector to keys and values of all heads."""
    return keys.whole("kv_lora_rank") * keys.heads * (keys.whole("qk_nope_head_dim") + keys.whole("v_head_dim"))


def _latent_attention(keys: Keys) -> Iterator[_Piece]:
    hidden, heads, rank = keys.hidden, keys.heads, keys.whole("kv_lora_rank")
    nope, rope, value = keys.whole("qk_nope_head_dim"), keys.whole("qk_rope_head_dim"), keys.whole("v_head_dim")
    query_rank = keys.whole("q_lora_rank")
    yield ("down", hidden * (query_rank + rank + rope))
    yield (
        "attention",
        (query_rank or hidden) * heads * (nope + rope) + latent_up_numbers(keys) + heads * value * hidden,
    )
    indexers, size = keys.whole("index_n_heads"), keys.whole("index_head_dim")
    if indexers and size:
        yield ("indexer", query_rank * indexers * size + hidden * (size + indexers))


def _feed(keys: Keys, layer: Layer) -> Iterator[_Piece]:
    matrices = 2 if keys.family in _TWO_MATRICES else 3
    if layer.feed in ("dense", "both"):
        yield ("dense", matrices * keys.hidden * layer.intermediate)
        if keys.family in _BIASED:
            yield ("bias", layer.intermediate + keys.hidden)
    if layer.feed in ("moe", "both"):
        # Nemotron 3 lets its experts work in a narrower space.
        width = keys.whole("moe_latent_size") or keys.hidden
        yield ("experts", keys.experts * matrices * width * keys.moe_intermediate)
        yield ("router", keys.experts * keys.hidden)
        yield ("shared", matrices * keys.hidden * _shared(keys))
        if keys.family == "gpt_oss":
            yield ("bias", keys.experts * (2 * keys.moe_intermediate + keys.hidden))


def _shared(keys: Keys) -> int:
    """The width of the experts that every token passes through."""
    if keys.family == "llama4_text":
        return keys.moe_intermediate
    for name in ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size"):
        if keys.whole(name):
            return keys.whole(name)
    counts = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
    return keys.whole(*counts) * keys.moe_intermediate


def _embeddings(keys: Keys) -> int:
    words = keys.vocabulary * keys.hidden
    if keys.family in BERTS:
        pooler = 0 if keys.family in _NO_POOLER else keys.hidden**2
        return words + (keys.max_positions + keys.whole("type_vocab_size", default=2)) * keys.hidden + pooler
    if keys.family in _POSITIONS:
        words += (keys.max_positions + _POSITIONS[keys.family]) * keys.hidden
    # Gemma 3n and the small Gemma 4: a further embedding for every layer.
    narrow = keys.whole("hidden_size_per_layer_input")
    return words + narrow * keys.whole("vocab_size_per_layer_input", default=keys.vocabulary) * keys.layers
