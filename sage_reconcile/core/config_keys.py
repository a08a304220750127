"""Typed reading of a model's config.json, which anybody may have written: every look-up says what it wants.

A value of the wrong type, or an absurd one, is as good as absent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The largest single size that any published config holds is a context of ten million tokens.
_LARGEST = 10**9
# Longer lists are not about layers.
_MOST_ENTRIES = 2000

# Where vision-language models keep the config of their text model.
_TEXT_CONFIGS = ("thinker_config", "text_config", "llm_config", "language_config")

# What transformers' config classes fill in, and wrappers such as llava and Gemma 3 therefore leave out.
_CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
              "vocab_size": 32000, "max_position_embeddings": 2048},
    "mistral": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 131072},
    "gemma3_text": {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
                    "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "sliding_window": 4096,
                    "max_position_embeddings": 131072, "tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "head_dim": 256, "sliding_window": 4096},
    "gemma": {"tie_word_embeddings": True, "head_dim": 256},
    "gemma4_text": {"tie_word_embeddings": True, "head_dim": 256},
    "gemma3n_text": {"tie_word_embeddings": True, "head_dim": 256},
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """One mapping of a config."""

    values: Mapping[str, Any]

    def whole(self, *names: str, default: int = 0) -> int:
        """The first of these keys that holds a whole number from 0 up."""
        for name in names:
            value = self.values.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST:
                return value
        return default

    def fraction(self, name: str, default: float) -> float:
        value = self.values.get(name)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1000
        return float(value) if fits and value is not None else default

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        return value if isinstance(value, bool) else default

    def text(self, *names: str) -> str:
        """The first of these keys that holds a short text; "" when none does."""
        for name in names:
            value = self.values.get(name)
            if isinstance(value, str) and 0 < len(value) <= 200:
                return value
        return ""

    def entries(self, name: str) -> tuple[Any, ...]:
        """The list at this key; empty when there is none, or it is too long to be about layers."""
        value = self.values.get(name)
        return tuple(value) if isinstance(value, list | tuple) and len(value) <= _MOST_ENTRIES else ()

    def below(self, name: str) -> "Keys":
        """The mapping at this key; empty when there is none."""
        value = self.values.get(name)
        return Keys(values=value if isinstance(value, Mapping) else {})

    @property
    def family(self) -> str:
        return self.text("model_type").lower()

    @property
    def hidden(self) -> int:
        return self.whole("hidden_size", "n_embd", "d_model", "dim")

    @property
    def heads(self) -> int:
        return self.whole("num_attention_heads", "n_head", "n_heads", "num_heads")

    @property
    def layers(self) -> int:
        return min(self.whole("num_hidden_layers", "n_layer", "n_layers", "num_layers"), _MOST_ENTRIES)

    @property
    def vocabulary(self) -> int:
        return self.whole("padded_vocab_size", "vocab_size")

    @property
    def max_positions(self) -> int:
        return self.whole("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")

    @property
    def intermediate(self) -> int:
        return self.whole("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim", "d_ff")

    @property
    def experts(self) -> int:
        return self.whole("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

    @property
    def moe_intermediate(self) -> int:
        return self.whole("moe_intermediate_size", "expert_intermediate_size") or self.intermediate


def text_keys(config: Mapping[str, Any]) -> Keys:
    """The keys of the text model: those of its own config, and above them what the whole model says."""
    values = dict(config)
    # A wrapper may hold a wrapper (Qwen's omni models); nothing published goes deeper.
    for _ in range(2):
        inner = next((values.get(name) for name in _TEXT_CONFIGS if isinstance(values.get(name), Mapping)), None)
        if not isinstance(inner, Mapping):
            break
        values = {key: value for key, value in values.items() if key not in _TEXT_CONFIGS} | dict(inner)
    defaults = _CLASS_DEFAULTS.get(str(values.get("model_type")), {})
    return Keys(values={**defaults, **{key: value for key, value in values.items() if value is not None}})


def tower_keys(config: Mapping[str, Any]) -> tuple[Keys, Keys]:
    """The configs of the towers for images and for sound; empty keys where there is none."""
    outer = Keys(values=config)
    inner = outer.below("thinker_config")
    holder = inner if inner.values else outer
    return holder.below("vision_config"), holder.below("audio_config")
