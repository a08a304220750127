"""How many numbers a model holds in each of its parts, counted from its config, and the bytes that they take.

For a model of which only config.json is here.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from sage_reconcile.core.config_keys import Keys, tower_keys
from sage_reconcile.core.config_layers import Layer, head_sizes
from sage_reconcile.core.quantisation import Quantisation
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
_TWO_MATRICES = frozenset(
    {
        "bert", "roberta", "xlm-roberta", "camembert", "mpnet", "gpt2", "gpt_neox", "gptj", "gpt_bigcode", "opt", "phi",
        "falcon", "bloom", "mpt", "starcoder2", "nemotron", "nemotron_h",
    }
)  # fmt: skip
_ENCODERS = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "mpnet"})
_QKV_BIAS = _ENCODERS | frozenset(
    {
        "qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl", "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "gpt2",
    }
)  # fmt: skip
_GATED_TOWERS = frozenset({"qwen2_5_vl", "qwen2_5_omni_vision_encoder", "pixtral", "gemma4_vision"})


def parts_of_config(
    config: Mapping[str, Any], keys: Keys, layers: tuple[Layer, ...], quantisation: Quantisation | None
) -> tuple[WeightPart, ...]:
    """The parts of the weights, as bytes."""
    totals: Counter[tuple[Role, str]] = Counter()
    for index, layer in enumerate(layers):
        for category, numbers in _pieces(keys, layer, quantisation):
            bits = _bits(category, index, quantisation)
            storage = quantisation.method if quantisation is not None and bits != 16 else "BF16"
            totals[(_ROLES[category], storage)] += round(numbers * bits)
    totals[("embeddings", "BF16")] += 16 * _embeddings(keys)
    if not keys.flag("tie_word_embeddings", default=keys.family in _ENCODERS) and keys.family not in _ENCODERS:
        totals[("lm_head", "BF16")] += 16 * keys.vocabulary * keys.hidden
    totals[("vision", "BF16")] += 16 * _towers(config, keys)
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
    elif layer.attention in ("linear", "mamba"):
        yield ("linear", _linear(keys) if layer.attention == "linear" else _mamba(keys))
    yield from _feed(keys, layer)
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


def _linear(keys: Keys) -> int:
    """Gated delta net: queries, keys, values, gates and decays in, a convolution, and the way out."""
    key = keys.whole("linear_num_key_heads") * keys.whole("linear_key_head_dim")
    heads = keys.whole("linear_num_value_heads")
    value = heads * keys.whole("linear_value_head_dim")
    kernel = keys.whole("linear_conv_kernel_dim", default=4)
    return keys.hidden * (2 * key + 2 * value + 2 * heads) + (2 * key + value) * kernel + value * keys.hidden


def _mamba(keys: Keys) -> int:
    heads = keys.whole("mamba_num_heads", "mamba_n_heads")
    inner = heads * keys.whole("mamba_head_dim", "mamba_d_head")
    mixed = inner + 2 * keys.whole("n_groups", "mamba_n_groups") * keys.whole("ssm_state_size", "mamba_d_state")
    kernel = keys.whole("conv_kernel", "mamba_d_conv", default=4)
    return keys.hidden * (inner + mixed + heads) + mixed * kernel + inner * keys.hidden


def _feed(keys: Keys, layer: Layer) -> Iterator[_Piece]:
    matrices = 2 if keys.family in _TWO_MATRICES else 3
    if layer.feed in ("dense", "both"):
        yield ("dense", matrices * keys.hidden * layer.intermediate)
        if keys.family in _ENCODERS:
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
    own = keys.whole("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
    return own or keys.whole("n_shared_experts", "num_shared_experts") * keys.moe_intermediate


def _embeddings(keys: Keys) -> int:
    words = keys.vocabulary * keys.hidden
    if keys.family in _ENCODERS:
        # Positions, kinds of token, and the pooler.
        return words + (keys.max_positions + keys.whole("type_vocab_size", default=2)) * keys.hidden + keys.hidden**2
    # Gemma 3n and the small Gemma 4: a further embedding for every layer.
    narrow = keys.whole("hidden_size_per_layer_input")
    return words + narrow * keys.whole("vocab_size_per_layer_input", default=keys.vocabulary) * keys.layers


def _towers(config: Mapping[str, Any], keys: Keys) -> int:
    """The towers for images and sound, and what joins them to the text model."""
    vision, audio = tower_keys(config)
    total = 0
    width = vision_width(vision)
    if width:
        depth = vision.whole("depth", "num_hidden_layers", "layers") + vision.whole("num_global_layers")
        layer = config.get("vision_feature_layer")
        if isinstance(layer, int) and -depth <= layer < -1:
            # llava takes the output of the last layer but one, and leaves out the last.
            depth += 1 + layer
        inner = vision.whole("intermediate_size") or int(vision.fraction("mlp_ratio", 4.0) * width)
        matrices = 3 if vision.family in _GATED_TOWERS or keys.family.startswith("qwen2_5_vl") else 2
        total += depth * (4 * width**2 + matrices * width * inner) + _joint(vision, keys, width)
    sound = audio.whole("d_model", "hidden_size")
    if sound:
        depth = audio.whole("encoder_layers", "num_hidden_layers")
        total += depth * (4 * sound**2 + 2 * sound * audio.whole("encoder_ffn_dim", default=4 * sound))
    return total


def vision_width(vision: Keys) -> int:
    return vision.whole("embed_dim", "hidden_size", "width")


def _joint(vision: Keys, keys: Keys, width: int) -> int:
    """The patches' embedding and the projector: Qwen merges 2 x 2 patches, the others take each as it is."""
    patches = 3 * vision.whole("patch_size", default=14) ** 2 * vision.whole("temporal_patch_size", default=1) * width
    merge = vision.whole("spatial_merge_size")
    if merge and merge <= 8:
        wide = width * merge**2
        mergers = 1 + len(vision.entries("deepstack_visual_indexes"))
        return patches + mergers * (wide**2 + wide * keys.hidden)
    out = vision.whole("vision_output_dim", default=width)
    return patches + out * keys.hidden + (keys.hidden**2 if not vision.whole("vision_output_dim") else 0)
