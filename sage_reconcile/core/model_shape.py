"""The shape of a model from its config.json, with the bytes of its tensors where they are known."""

from collections.abc import Mapping
from typing import Any

from sage_reconcile.core.config_caches import groups_of, head_sizes
from sage_reconcile.core.config_dialects import ENCODERS, text_keys, tower_keys
from sage_reconcile.core.config_keys import Keys
from sage_reconcile.core.config_layers import Layer, layers_of
from sage_reconcile.core.config_numbers import latent_up_numbers, parts_of_config
from sage_reconcile.core.config_towers import vision_width
from sage_reconcile.core.quantisation import Quantisation, quantisation_of
from sage_reconcile.core.shape import Basis, ModelShape, UnknownShape, WeightPart
from sage_reconcile.core.tensor_roles import Tensor, parts_of

# Families whose configs and parameter counts this version was tried on, or that share a class with one that was.
_KNOWN = ENCODERS | frozenset(
    {
        "apertus", "baichuan", "bailing_moe", "bamba", "bloom", "chatglm", "cohere", "cohere2", "dbrx", "deepseek",
        "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5", "ernie4_5_moe", "exaone", "exaone4",
        "falcon", "falcon_h1", "falcon_mamba", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm",
        "glm4", "glm4_moe", "glm_moe_dsa", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite",
        "granitemoe", "granitemoehybrid", "hunyuan_v1_dense", "hunyuan_v1_moe", "internlm2", "internlm3", "jamba",
        "kimi_k2", "kimi_linear", "lfm2", "lfm2_moe", "llama", "llama4_text", "mamba2", "minicpm3", "minimax_m1",
        "minimax_m2", "ministral", "mistral", "mixtral", "mllama_text_model", "mpt", "nemotron", "nemotron-nas",
        "nemotron_h", "olmo", "olmo2", "olmoe", "opt", "phi", "phi3", "phimoe", "qwen", "qwen2", "qwen2_5_omni_text",
        "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_moe", "qwen2_vl", "qwen2_vl_text", "qwen3", "qwen3_5_moe_text",
        "qwen3_5_text", "qwen3_moe", "qwen3_next", "qwen3_vl_moe_text", "qwen3_vl_text", "seed_oss", "smollm3",
        "stablelm", "starcoder2",
    }
)  # fmt: skip
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_k", "moe_topk", "top_k")
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
    attends = any(layer.attention in ("full", "window", "chunk") for layer in layers)
    countable = bool(keys.hidden and (keys.heads or not attends) and layers and keys.vocabulary)
    if not countable and not tensors:
        return UnknownShape(why="config.json does not say how wide and how deep the model is")
    basis, parts = _parts(config, keys, layers, quantisation, tensors, total_bytes)
    vision, audio = tower_keys(config)
    moe_layers = [layer for layer in layers if layer.feed in ("moe", "both")]
    latent = sum(layer.attention == "full" for layer in layers)
    return ModelShape(
        family=keys.family or "unknown",
        known=keys.family in _KNOWN,
        basis=basis,
        parts=parts,
        groups=groups_of(keys, layers, encoder=keys.family in ENCODERS),
        layers=len(layers),
        attention_heads=keys.heads,
        hidden=keys.hidden,
        intermediate=max((layer.intermediate for layer in layers if layer.feed in ("dense", "both")), default=0),
        vocabulary=keys.vocabulary,
        max_positions=keys.max_positions,
        tied=keys.flag("tie_word_embeddings") or keys.family in ENCODERS,
        experts=keys.experts if moe_layers else 0,
        experts_per_token=keys.whole(*_TOP_K) if moe_layers else 0,
        moe_intermediate=keys.moe_intermediate if moe_layers else 0,
        rope_numbers=_rope_numbers(keys, layers),
        latent_up_numbers=latent_up_numbers(keys) * latent if keys.whole("kv_lora_rank") else 0,
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
    if keys.family in ENCODERS:
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
