"""What a model needs beside its weights and its cache while it works, in bytes on the device that needs most.

Each function gives bytes and the sentence that explains them. Constants are measurements; docs/footprints.md says how
far they hold.
"""

from dataclasses import dataclass

from sage_reconcile.core.shape import LatentCache, ModelShape

GIB = 2**30

# The sampler of vLLM works on the logits of all sequences at once: as 32-bit numbers, sorted, with 64-bit indexes,
# their softmax and its running sum. Measured by unsloth (unsloth_zoo/vllm_utils.py, a table of one model with a
# vocabulary of 151,936): 1.38 GiB more for 256 more sequences, from 256 to 2048, is 38.1 bytes per sequence and word.
# Besides, two vectors of 16 bits per token of the batch stand.
_SAMPLER_BYTES = 38.1
_HIDDEN_BYTES = 4

# While a chunk of prompts is worked on, a token has the gate, the other half and their product (three times the
# intermediate size) and four vectors of the model's width, in 16 bits. The same table: 77 kB per token measured from
# 2,048 to 32,768 tokens, 78.8 kB computed; Qwen2.5-1.5B with 32,768 tokens: 2.02 GiB measured, 2.02 computed.
_MLP_VECTORS = 3
_WIDTH_VECTORS = 4

# Experts in fp8 bring workspaces that do not depend on the batch: what one pair of logs of Qwen3-235B-A22B-FP8 leaves
# (12.78 GiB with 65,536 tokens of 163,840 bytes). Experts of other formats showed none.
_FP8_EXPERTS_BYTES = round(2.75 * GIB)

# A tower that takes images of any size is profiled with the largest: 16,384 tokens of 2 x 2 patches. Qwen2.5-VL-7B has
# 4.93 GiB and Qwen2.5-Omni-7B 5.48 GiB, with a tower 1,280 wide: 63 and 70 bytes per patch and number of its width.
_LARGEST_IMAGE_PATCHES = 65_536
_PATCH_BYTES = 67
# Towers with images of one size: what one log of llava-v1.6-mistral-7b has more than its text model.
_FIXED_IMAGE_BYTES = round(0.7 * GIB)

# llama.cpp keeps the logits of a physical batch as 32-bit numbers, and two vectors of the model's width for it:
# Qwen3-235B, Gemma 3 27B and gpt-oss-120b within 1% of their logs' compute buffers.
_LLAMA_CPP_VECTORS = 2
# With several devices it keeps four copies of the attention mask, in 16 bits (n_copies of ggml-backend).
_LLAMA_CPP_MASK_BYTES = 8
# Latent attention without flash attention: 2.05 GiB with -ub 512 for DeepSeek-R1, up to 12 GiB in other modes.
_LLAMA_CPP_LATENT_BYTES = round(1.8 * GIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What an engine works on at once."""

    # Whether it answers with words; an embedding server has no sampler.
    speaks: bool
    max_num_seqs: int
    # Tokens in one pass; for llama.cpp its physical batch (-ub).
    max_num_batched_tokens: int
    max_model_len: int
    tensor_parallel: int
    stages: int
    # Bytes of the numbers that it computes with.
    number_bytes: int


def torch_activations(shape: ModelShape, batch: Batch) -> tuple[int, str]:
    """The peak of vLLM, SGLang and servers built on PyTorch: whichever step needs most."""
    tokens = batch.max_num_batched_tokens
    sequences = min(batch.max_num_seqs, tokens)
    per_token = _token_bytes(shape, batch)
    steps = {f"a batch of {tokens:,} tokens at {per_token:,} bytes": tokens * per_token + _fixed_bytes(shape)}
    if batch.speaks:
        steps[f"sampling for {sequences:,} sequences over {shape.vocabulary:,} words"] = round(
            _SAMPLER_BYTES * sequences * shape.vocabulary + _HIDDEN_BYTES * shape.hidden * tokens
        )
    why = max(steps, key=lambda step: steps[step])
    peak = steps[why]
    if not shape.is_multimodal:
        return peak, f"the peak is {why}"
    if not shape.any_resolution:
        return peak + _FIXED_IMAGE_BYTES, f"the peak is {why}, with images beside it"
    image = _LARGEST_IMAGE_PATCHES * shape.vision_hidden * _PATCH_BYTES
    return (image, "the peak is one image of the largest size") if image > peak else (peak, f"the peak is {why}")


def _token_bytes(shape: ModelShape, batch: Batch) -> int:
    """What one token of a batch needs while it passes through the layer that needs most."""
    own = -(-shape.intermediate // batch.tensor_parallel)
    dense = _MLP_VECTORS * own + _WIDTH_VECTORS * shape.hidden
    # Each of its experts has two rows, as wide as the model or as both halves of the expert (vLLM's modular kernels).
    both = 2 * -(-shape.moe_intermediate // batch.tensor_parallel)
    moe = 2 * shape.experts_per_token * max(both, shape.hidden) + _WIDTH_VECTORS * shape.hidden
    return batch.number_bytes * max(dense, moe if shape.experts else 0)


def _fixed_bytes(shape: ModelShape) -> int:
    return _FP8_EXPERTS_BYTES if shape.experts and shape.quantisation == "fp8" else 0


def tei_activations(shape: ModelShape, batch: Batch) -> tuple[int, str]:
    """text-embeddings-inference frees each vector at once.

    What its two logs leave beside weights and context: 36 kB per token for Qwen3-Embedding-8B, 10 kB for embeddinggemma
    in 32 bits, with its 16,384 tokens per batch.
    """
    per_token = batch.number_bytes * (shape.intermediate + 2 * shape.hidden)
    tokens = batch.max_num_batched_tokens
    return tokens * per_token, f"the peak is a batch of {tokens:,} tokens at {per_token:,} bytes"


def llama_cpp_activations(shape: ModelShape, batch: Batch) -> tuple[int, str]:
    """The compute buffer of llama.cpp."""
    rows = batch.max_num_batched_tokens
    if not batch.speaks and all(group.cache is None for group in shape.groups):
        # Encoders attend without flash attention: each head has a score for each pair of tokens.
        row = 4 * (shape.attention_heads * rows + shape.intermediate + _WIDTH_VECTORS * shape.hidden)
        return rows * row, f"the compute buffer of {rows:,} tokens that attend to each other"
    row = 4 * (shape.vocabulary + _LLAMA_CPP_VECTORS * shape.hidden)
    if batch.stages > 1:
        row += _LLAMA_CPP_MASK_BYTES * batch.max_model_len
    latent = any(isinstance(group.cache, LatentCache) for group in shape.groups)
    why = f"the compute buffer: logits of {rows:,} tokens over {shape.vocabulary:,} words"
    return rows * row + (_LLAMA_CPP_LATENT_BYTES if latent else 0), why
