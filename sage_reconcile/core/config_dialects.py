"""A config.json in common words: a text model's keys as most families write them, whatever its own family calls them.

In goes the config of a model, out come Keys. What a family says in words of its own becomes a width, a number of heads
or a list of its layers (layer_types, mlp_layer_types), which config_layers understands. Nothing that a config says in
common words is changed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sage_reconcile.core.config_keys import Keys

# Encoders with learned positions, biases and a pooler; and those with rotary positions and a gate.
BERTS = frozenset(
    {"bert", "roberta", "xlm-roberta", "camembert", "mpnet", "electra", "distilbert", "deberta-v2"}
)  # fmt: skip
ROTARY_ENCODERS = frozenset({"modernbert", "nomic_bert", "new"})
ENCODERS = BERTS | ROTARY_ENCODERS

# Where vision-language models keep the config of their text model.
_TEXT_CONFIGS = ("thinker_config", "text_config", "llm_config", "language_config")

_OLDER_NAMES = {"refinedweb": "falcon", "refinedwebmodel": "falcon"}

# What transformers' config classes fill in, and save_pretrained, or a wrapper such as llava, therefore leaves out.
_CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
              "vocab_size": 32000, "max_position_embeddings": 2048},
    "mistral": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 131072},
    "gemma3_text": {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
                    "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "sliding_window": 4096,
                    "max_position_embeddings": 131072},
    "gemma2": {"head_dim": 256, "sliding_window": 4096},
    "gemma": {"head_dim": 256},
    "gemma4_text": {"head_dim": 256},
    "gemma3n_text": {"head_dim": 256},
    "falcon": {"max_position_embeddings": 2048, "multi_query": True},
    "gpt_bigcode": {"multi_query": True},
    "mllama_vision_model": {"max_num_tiles": 4, "image_size": 448},
}  # fmt: skip
# Their class (or that of transformers that it inherits from, before version 5) ties the output to the embeddings unless
# the config says otherwise.
_TIED = ENCODERS | frozenset(
    {
        "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "cohere", "cohere2", "falcon", "bloom", "opt",
        "mpt", "gpt2", "gpt_bigcode", "gpt_neo", "starcoder2", "smollm3", "exaone", "minicpm", "minicpm3", "ernie4_5",
        "ernie4_5_moe", "lfm2", "lfm2_moe", "mamba",
    }
)  # fmt: skip
# A feed-forward layer is four times as wide as the model, unless the config says otherwise.
_FOUR_TIMES = frozenset({"falcon", "bloom", "gpt2", "gptj", "gpt_bigcode", "gpt_neo", "codegen"})


def text_keys(config: Mapping[str, Any]) -> Keys:
    """The keys of the text model: those of its own config, and above them what the whole model says."""
    values = dict(config)
    # A wrapper may hold a wrapper (Qwen's omni models); nothing published goes deeper.
    for _ in range(2):
        inner = next((values.get(name) for name in _TEXT_CONFIGS if isinstance(values.get(name), Mapping)), None)
        if not isinstance(inner, Mapping):
            break
        values = {key: value for key, value in values.items() if key not in _TEXT_CONFIGS} | dict(inner)
    return _in_common_words(values)


def tower_keys(config: Mapping[str, Any]) -> tuple[Keys, Keys]:
    """The configs of the towers for images and for sound; empty keys where there is none."""
    outer = Keys(values=config)
    inner = outer.below("thinker_config")
    holder = inner if inner.values else outer
    return _with_defaults(holder.below("vision_config").values), holder.below("audio_config")


def _in_common_words(values: Mapping[str, Any]) -> Keys:
    keys = _with_defaults(values)
    own = DIALECTS.get(keys.family)
    translated = dict(own(keys)) if own is not None else {}
    if keys.family in _FOUR_TIMES and not keys.intermediate:
        translated["intermediate_size"] = 4 * keys.hidden
    return Keys(values={**keys.values, **translated})


def _with_defaults(values: Mapping[str, Any]) -> Keys:
    family = Keys(values=values).family
    family = _OLDER_NAMES.get(family, family)
    said = {key: value for key, value in values.items() if value is not None}
    tied = {"tie_word_embeddings": True} if family in _TIED else {}
    older = {"model_type": family} if family in _OLDER_NAMES.values() else {}
    return Keys(values={**tied, **_CLASS_DEFAULTS.get(family, {}), **said, **older})


def _falcon(keys: Keys) -> Mapping[str, Any]:
    if keys.flag("new_decoder_architecture"):
        return {"num_key_value_heads": keys.whole("num_kv_heads", "n_head_kv", default=keys.heads)}
    return _shared_head(keys)


def _shared_head(keys: Keys) -> Mapping[str, Any]:
    """One key and value for all heads."""
    return {"num_key_value_heads": 1 if keys.flag("multi_query") else keys.heads}


def _dbrx(keys: Keys) -> Mapping[str, Any]:
    experts = keys.below("ffn_config")
    return {
        "num_key_value_heads": keys.below("attn_config").whole("kv_n_heads", default=keys.heads),
        "intermediate_size": experts.whole("ffn_hidden_size"),
        "num_experts": experts.whole("moe_num_experts"),
        "num_experts_per_tok": experts.whole("moe_top_k"),
    }


def _mpt(keys: Keys) -> Mapping[str, Any]:
    return {
        "num_key_value_heads": keys.below("attn_config").whole("kv_n_heads", default=keys.heads),
        "intermediate_size": int(keys.fraction("expansion_ratio", 4.0) * keys.hidden),
    }


def _qwen(keys: Keys) -> Mapping[str, Any]:
    """Its first generation counts the gate and the other half together."""
    return {"intermediate_size": keys.whole("intermediate_size") // 2}


def _minicpm3(keys: Keys) -> Mapping[str, Any]:
    return {"v_head_dim": keys.whole("v_head_dim") or keys.hidden // max(1, keys.heads)}


def _distilbert(keys: Keys) -> Mapping[str, Any]:
    return {"intermediate_size": keys.whole("hidden_dim"), "type_vocab_size": 0}


def _jamba(keys: Keys) -> Mapping[str, Any]:
    attends = _every(keys, "attn_layer_period", "attn_layer_offset")
    has_experts = _every(keys, "expert_layer_period", "expert_layer_offset")
    return {
        "layer_types": ["full_attention" if attends(index) else "mamba" for index in range(keys.layers)],
        "mlp_layer_types": ["sparse" if has_experts(index) else "dense" for index in range(keys.layers)],
    }


def _every(keys: Keys, period: str, offset: str) -> Callable[[int], bool]:
    step, first = max(1, keys.whole(period, default=1)), keys.whole(offset)
    return lambda index: index % step == first


def _bamba(keys: Keys) -> Mapping[str, Any]:
    return _layers(keys, keys.entries("attn_layer_indices"), others="mamba")


def _minimax(keys: Keys) -> Mapping[str, Any]:
    """1: attention, 0: lightning attention."""
    kinds = keys.entries("attn_type_list")
    return _layers(keys, [index for index, kind in enumerate(kinds) if kind], others="linear_attention")


def _kimi_linear(keys: Keys) -> Mapping[str, Any]:
    """Layers are counted from 1."""
    attending = [
        index - 1 for index in keys.below("linear_attn_config").entries("full_attn_layers") if _is_whole(index)
    ]
    return _layers(keys, attending, others="linear_attention")


def _lfm2(keys: Keys) -> Mapping[str, Any]:
    width = keys.whole("block_ff_dim", "intermediate_size")
    if keys.flag("block_auto_adjust_ff_dim", default=keys.family == "lfm2"):
        step = max(1, keys.whole("block_multiple_of", default=256))
        width = int(keys.fraction("block_ffn_dim_multiplier", 1.0) * (2 * width // 3))
        width = -(-width // step) * step
    return {
        **_layers(keys, keys.entries("full_attn_idxs"), others="conv"),
        "intermediate_size": width,
        "first_k_dense_replace": keys.whole("num_dense_layers"),
        "tie_word_embeddings": keys.flag("tie_embedding", default=keys.flag("tie_word_embeddings")),
    }


def _ernie(keys: Keys) -> Mapping[str, Any]:
    first, last = keys.whole("moe_layer_start_index"), keys.whole("moe_layer_end_index", default=keys.layers)
    step = max(1, keys.whole("moe_layer_interval", default=1))
    sparse = [first <= index <= last and (index + 1) % step == 0 for index in range(keys.layers)]
    return {"mlp_layer_types": ["sparse" if one else "dense" for one in sparse]}


def _exaone4(keys: Keys) -> Mapping[str, Any]:
    """LLLG: three local layers, then a global one."""
    pattern = keys.text("sliding_window_pattern") or "G"
    return {} if keys.entries("layer_types") else {
        "layer_types": [
            "sliding_attention" if pattern[index % len(pattern)] == "L" else "full_attention"
            for index in range(keys.layers)
        ]
    }  # fmt: skip


def _falcon_h1(keys: Keys) -> Mapping[str, Any]:
    return {"layer_types": ["hybrid"] * keys.layers}


def _mamba(keys: Keys) -> Mapping[str, Any]:
    """Layers without attention and without a feed-forward."""
    return {
        "hybrid_override_pattern": "M" * min(keys.layers, 200),
        "mamba_num_heads": keys.whole("num_heads"),
        "mamba_head_dim": keys.whole("head_dim"),
    }


def _layers(keys: Keys, attending: Sequence[Any], *, others: str) -> Mapping[str, Any]:
    """The list of layers, unless the config has one, or names none that attends."""
    if keys.entries("layer_types") or not attending:
        return {}
    return {"layer_types": ["full_attention" if index in attending else others for index in range(keys.layers)]}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


DIALECTS: Mapping[str, Callable[[Keys], Mapping[str, Any]]] = {
    "falcon": _falcon, "gpt_bigcode": _shared_head, "dbrx": _dbrx, "mpt": _mpt, "qwen": _qwen, "minicpm3": _minicpm3,
    "distilbert": _distilbert, "jamba": _jamba, "bamba": _bamba, "minimax": _minimax, "minimax_m1": _minimax,
    "minimax_text_01": _minimax, "kimi_linear": _kimi_linear, "lfm2": _lfm2, "lfm2_moe": _lfm2, "ernie4_5_moe": _ernie,
    "exaone4": _exaone4, "falcon_h1": _falcon_h1, "mamba": _mamba, "mamba2": _mamba, "falcon_mamba": _mamba,
}  # fmt: skip
