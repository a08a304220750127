"""The shape of a model from its config.json, with the bytes of its tensors where they are known."""

from collections.abc import Mapping
from typing import Any

from sage_reconcile.core.config_keys import Keys, text_keys, tower_keys
from sage_reconcile.core.config_layers import Layer, groups_of, head_sizes, layers_of
from sage_reconcile.core.config_numbers import latent_up_numbers, parts_of_config, vision_width
from sage_reconcile.core.quantisation import Quantisation, quantisation_of
from sage_reconcile.core.shape import Basis, ModelShape, UnknownShape, WeightPart
from sage_reconcile.core.tensor_roles import Tensor, parts_of

_ENCODERS = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "mpnet", "nomic_bert", "modernbert", "new"})
# Families whose configs and parameter counts this version was tried on, or that share a class with one that was.
_KNOWN = _ENCODERS | frozenset(
    {
        "llama", "llama4_text", "mllama_text_model", "mistral", "ministral", "mixtral", "qwen2", "qwen2_moe",
        "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_5_omni_text", "qwen3", "qwen3_moe",
        "qwen3_next",
        "qwen3_vl_text", "qwen3_vl_moe_text", "qwen3_5_text", "qwen3_5_moe_text", "gemma", "gemma2", "gemma3_text",
        "gemma4_text", "phi", "phi3", "gpt_oss", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm", "glm4",
        "glm4_moe", "glm_moe_dsa", "kimi_k2", "minimax_m2", "nemotron", "nemotron_h", "nemotron-nas", "smollm3",
        "olmo2",
    }
)  # fmt: skip
# Towers that take images of any size, and are therefore profiled with the largest (vLLM's qwen2_vl.py and its heirs).
_ANY_RESOLUTION = ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "qwen3_vl", "qwen3_5")


def shape_of_config(
    config: Mapping[str, Any], *, tensors: tuple[Tensor, ...] = (), total_bytes: int = 0
) -> ModelShape | UnknownShape:
    """The shape that a config.json tells.

    tensors: the name, storage type and bytes of each tensor, where all are known.
    total_bytes: the bytes of all weights together, where only that is known; 0: not known.
    """
    keys = text_keys(config)
    layers = layers_of(keys)
    quantisation = quantisation_of(config)
    countable = bool(keys.hidden and keys.heads and layers and keys.vocabulary)
    if not countable and not tensors:
        return UnknownShape(why="config.json does not say how wide and how deep the model is")
    basis, parts = _parts(config, keys, layers, quantisation, tensors, total_bytes)
    vision, audio = tower_keys(config)
    moe_layers = [layer for layer in layers if layer.feed in ("moe", "both")]
    is_mla = any(layer.attention == "full" for layer in layers) and keys.whole("kv_lora_rank") > 0
    return ModelShape(
        family=keys.family or "unknown",
        known=keys.family in _KNOWN,
        basis=basis,
        parts=parts,
        groups=groups_of(keys, layers, encoder=keys.family in _ENCODERS),
        layers=len(layers),
        attention_heads=keys.heads,
        hidden=keys.hidden,
        intermediate=max((layer.intermediate for layer in layers if layer.feed in ("dense", "both")), default=0),
        vocabulary=keys.vocabulary,
        max_positions=keys.max_positions,
        tied=keys.flag("tie_word_embeddings") or keys.family in _ENCODERS,
        experts=keys.experts if moe_layers else 0,
        experts_per_token=keys.whole("num_experts_per_tok", "top_k_experts", "moe_k") if moe_layers else 0,
        moe_intermediate=keys.moe_intermediate if moe_layers else 0,
        rope_numbers=_rope_numbers(keys, layers),
        latent_up_numbers=latent_up_numbers(keys) * len(layers) if is_mla else 0,
        is_multimodal=bool(vision.values or audio.values),
        vision_hidden=vision_width(vision),
        any_resolution=str(config.get("model_type", "")).startswith(_ANY_RESOLUTION),
        quantisation=quantisation.method if quantisation is not None else None,
        torch_dtype=keys.text("dtype", "torch_dtype").removeprefix("torch.") or "bfloat16",
    )


def _parts(
    config: Mapping[str, Any],
    keys: Keys,
    layers: tuple[Layer, ...],
    quantisation: Quantisation | None,
    tensors: tuple[Tensor, ...],
    total_bytes: int,
) -> tuple[Basis, tuple[WeightPart, ...]]:
    method = quantisation.method if quantisation is not None else None
    if tensors:
        return "tensors", parts_of(tensors, layers=len(layers), quantisation=method)
    parts = parts_of_config(config, keys, layers, quantisation)
    if total_bytes <= 0:
        return "config", parts
    return "total", _with_total(parts, total_bytes)


def _with_total(parts: tuple[WeightPart, ...], total_bytes: int) -> tuple[WeightPart, ...]:
    """The parts with their layers scaled, so that all together take what the files take."""
    fixed = sum(part.disk_bytes for part in parts if part.role in ("embeddings", "lm_head", "vision"))
    counted = sum(part.disk_bytes for part in parts) - fixed
    if counted <= 0 or total_bytes <= fixed:
        return (WeightPart(role="rest", storage="unknown", disk_bytes=total_bytes),)
    return tuple(
        part
        if part.role in ("embeddings", "lm_head", "vision")
        else WeightPart(
            role=part.role,
            storage=part.storage,
            disk_bytes=part.disk_bytes * (total_bytes - fixed) // counted,
        )
        for part in parts
    )


def _rope_numbers(keys: Keys, layers: tuple[Layer, ...]) -> int:
    """The rotary size of each kind of layer that has a table of its own."""
    if keys.family in _ENCODERS:
        return 0
    if keys.whole("kv_lora_rank"):
        return keys.whole("qk_rope_head_dim")
    if keys.family == "mllama_text_model" or not layers:
        return 0
    kinds = sorted({layer.attention for layer in layers if layer.attention in ("full", "window", "chunk")})
    if keys.family not in ("gemma3_text", "gemma3n_text", "gemma4_text"):
        # One base for all layers, so one table.
        kinds = kinds[:1]
    return sum(_rotary_size(keys, head_sizes(keys, kind)[0]) for kind in kinds)


def _rotary_size(keys: Keys, head_size: int) -> int:
    factor = keys.fraction("partial_rotary_factor", 1.0)
    nested = keys.below("rope_parameters")
    if factor == 1.0:
        factor = nested.fraction("partial_rotary_factor", 1.0)
    return keys.whole("rotary_dim") or int(head_size * factor)
