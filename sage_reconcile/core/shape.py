"""The shape of a model: all that a prediction of its memory needs to know, whatever file it was read from.

Must not know: files, runtimes, devices.
"""

from dataclasses import dataclass
from typing import Literal

# What a piece of the weights is, because each is divided over devices and quantised by rules of its own. "whole" is
# what every device of a tensor-parallel group holds entirely: norms, routers, the down-projections of latent attention.
Role = Literal["embeddings", "lm_head", "vision", "experts", "rest", "whole"]

# From what the bytes of the weights are known: the tensors themselves, the size of all files, or only the config.
Basis = Literal["tensors", "total", "config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPart:
    """The weights of one role and storage type, in bytes on disk."""

    role: Role
    # The name of the number format: BF16, F32, F8_E4M3, mxfp4, Q4_K ...
    storage: str
    disk_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadCache:
    """A layer that keeps a key and a value for each head of each token."""

    kv_heads: int
    # Numbers kept per head.
    key_size: int
    value_size: int
    # The latest tokens that it keeps; None: all of them.
    window: int | None = None
    # How many tokens are compressed into one entry.
    tokens_per_entry: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentCache:
    """A layer of multi-head latent attention: one latent vector per token, for all heads, on every device."""

    # The rank of the latent vector, and the part of each key that carries the position.
    rank: int
    rope_size: int
    # What the indexer of sparse attention (DSA) keeps per token; 0 without one.
    indexer_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StateCache:
    """A layer of linear attention or Mamba: a state per sequence, however long that is."""

    # Numbers of 16 bits that the convolution keeps.
    convolution_numbers: int
    state_numbers: int
    state_number_bytes: int = 4


Cache = HeadCache | LatentCache | StateCache


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers that keep the same."""

    count: int
    # None: they keep nothing, or share what another layer keeps.
    cache: Cache | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What there is to know of a model. A size that is not known is 0."""

    # config.json's model_type, or the architecture that a GGUF file names.
    family: str
    # Whether this version has rules for the family.
    known: bool
    basis: Basis
    parts: tuple[WeightPart, ...]
    groups: tuple[LayerGroup, ...]
    layers: int
    attention_heads: int
    hidden: int
    intermediate: int
    vocabulary: int
    max_positions: int
    tied: bool = False
    experts: int = 0
    experts_per_token: int = 0
    moe_intermediate: int = 0
    # Numbers in one line of all tables of rotary positions: the sum of their rotary sizes.
    rope_numbers: int = 0
    # Numbers in the up-projections of latent attention over all layers.
    latent_up_numbers: int = 0
    is_multimodal: bool = False
    # The width of the vision tower, and whether it takes images of any size as Qwen's do.
    vision_hidden: int = 0
    any_resolution: bool = False
    # awq, gptq, fp8, mxfp4, nvfp4, bitsandbytes, gguf ...; None: not quantised.
    quantisation: str | None = None
    torch_dtype: str = "bfloat16"

    @property
    def disk_bytes(self) -> int:
        return sum(part.disk_bytes for part in self.parts)

    def bytes_of(self, *roles: Role) -> int:
        """The bytes on disk of these roles."""
        return sum(part.disk_bytes for part in self.parts if part.role in roles)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownShape:
    """Why a model's shape cannot be told, in a sentence."""

    why: str
