"""The role of each tensor, by its name: names, storage types and bytes in, the parts of the weights out.

Knows the names that Hugging Face checkpoints, Mistral's own format and GGUF files use.
"""

import re
from collections.abc import Iterable

from sage_reconcile.core.shape import Role, WeightPart

# A tensor: its name, its storage type, its bytes.
Tensor = tuple[str, str, int]

# Towers that turn images and sound into tokens, and what joins them to the text model.
_VISION = frozenset(
    {
        "visual", "vision_tower", "vision_model", "vision_encoder", "vision_language_adapter", "audio_tower",
        "audio_model", "audio_encoder", "multi_modal_projector", "mm_projector", "embed_vision", "embed_audio",
        "patch_merger", "image_newline", "mlp1", "resampler", "vpm", "apm",
        "vision", "vision_backbone", "audio", "speech_encoder",
    }
)  # fmt: skip
_EMBEDDINGS = frozenset(
    {
        "embed_tokens", "embed_tokens_per_layer", "wte", "wpe", "word_embeddings", "position_embeddings",
        "token_type_embeddings", "tok_embeddings", "token_embd", "per_layer_token_embd", "position_embd", "token_types",
    }
)  # fmt: skip
_LM_HEAD = frozenset({"lm_head", "output", "embed_out"})
# Every device of a tensor-parallel group holds these entirely (vLLM: ReplicatedLinear, RMSNorm).
_WHOLE = frozenset(
    {
        "gate", "router", "ffn_gate_inp", "q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj", "indexer", "attn_q_a",
        "attn_kv_a_mqa", "shared_expert_gate", "ffn_gate_inp_shexp",
    }
)  # fmt: skip
# Layers for drafting tokens ahead, which are loaded only where speculation is asked for.
_DRAFT = frozenset({"mtp", "nextn"})
# What speaks aloud: engines that answer with words skip it (vLLM's qwen2_5_omni_thinker.py).
_VOICE = frozenset({"talker", "token2wav", "code2wav"})
_LAYER = re.compile(r"(?:^|\.)(?:layers|blk|h)\.(\d{1,6})\.")


def parts_of(tensors: Iterable[Tensor], *, layers: int, quantisation: str | None) -> tuple[WeightPart, ...]:
    """The parts of the weights, sorted.

    `layers` is how many the model has: those beyond are for drafting. 0: not known.
    """
    totals: dict[tuple[Role, str], int] = {}
    for name, storage, size in tensors:
        role = _role(name, layers)
        if role is not None:
            packed = quantisation == "mxfp4" and role == "experts" and storage == "U8"
            key = (role, "mxfp4" if packed else storage)
            totals[key] = totals.get(key, 0) + size
    return tuple(
        WeightPart(role=role, storage=storage, disk_bytes=size) for (role, storage), size in sorted(totals.items())
    )


def _role(name: str, layers: int) -> Role | None:
    """None: not loaded."""
    words = name.lower().split(".")
    if (_DRAFT & set(words)) or words[0] in _VOICE:
        return None
    # Before layers are counted: a tower may be deeper than the text model.
    if any(word in _VISION for word in words):
        return "vision"
    found = _LAYER.search(name)
    if found is not None and layers and int(found[1]) >= layers:
        return None
    if "experts" in words or any(word.endswith("_exps") for word in words):
        return "experts"
    if any(word in _EMBEDDINGS for word in words):
        return "embeddings"
    if words[0] in _LM_HEAD or "lm_head" in words:
        return "lm_head"
    if any(word in _WHOLE or word.endswith("norm") or "layernorm" in word for word in words):
        return "whole"
    return "rest"
