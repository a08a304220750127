"""Typed reading of a model's config.json, which anybody may have written: every look-up says what it wants.

A value of the wrong type, or an absurd one, is as good as absent.
"""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

# The largest single size that any published config holds is a context of ten million tokens.
_LARGEST = 10**9
# Rotary scaling that is part of what max_position_embeddings says.
_SCALED_ALREADY = ("", "default", "su", "longrope", "llama3", "mrope", "proportional")
# Longer lists are not about layers.
_MOST_ENTRIES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """One mapping of a config."""

    values: Mapping[str, Any]

    def whole(self, *names: str, default: int = 0) -> int:
        """The first of these keys that holds a whole number from 0 up; of one for each layer, the largest."""
        for name in names:
            value = self.values.get(name)
            if _is_size(value):
                return value
            if _are_sizes(value):
                return max(value)
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

    def by_layer(self, count: int) -> tuple["Keys", ...]:
        """The same for each of so many layers: of a list of whole numbers, one for each, that of the layer."""
        lists = {name: value for name, value in self.values.items() if _are_sizes(value) and len(value) == count}
        if not lists:
            return (self,) * count
        common = dict(self.values)
        # Not a copy for each layer: anybody may have written a config of a million keys.
        return tuple(
            Keys(values=ChainMap({name: value[index] for name, value in lists.items()}, common))
            for index in range(count)
        )

    @property
    def family(self) -> str:
        return self.text("model_type").lower()

    @property
    def hidden(self) -> int:
        return self.whole("hidden_size", "n_embd", "n_embed", "d_model", "dim")

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
        """The longest text, as vLLM finds it (get_and_verify_max_len)."""
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
        said = self.whole("model_max_length") or self.whole(*names)
        scaling = self.below("rope_scaling" if self.below("rope_scaling").values else "rope_parameters")
        kind = scaling.text("rope_type", "type")
        if kind in _SCALED_ALREADY or self.family.startswith("gemma3"):
            return said
        # yarn tells what it scales.
        scaled = scaling.whole("original_max_position_embeddings", default=said) if kind == "yarn" else said
        return min(int(scaled * scaling.fraction("factor", 1.0)), _LARGEST)

    @property
    def intermediate(self) -> int:
        return self.whole("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim", "d_ff")

    @property
    def experts(self) -> int:
        return self.whole("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

    @property
    def moe_intermediate(self) -> int:
        return self.whole("moe_intermediate_size", "expert_intermediate_size") or self.intermediate


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _are_sizes(value: Any) -> TypeGuard[Sequence[int]]:
    return isinstance(value, list | tuple) and 0 < len(value) <= _MOST_ENTRIES and all(map(_is_size, value))
