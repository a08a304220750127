"""What a model's layers keep of the tokens they have seen, in bytes on one device."""

from dataclasses import dataclass

from sage_reconcile.core.shape import Cache, HeadCache, LatentCache, ModelShape, StateCache

# Bytes of 32 numbers. The q-types are those of ggml-common.h: blocks of 32 with a scale of 16 bits, q4_1 and q5_1 with
# an offset too; nvfp4 has a scale of 8 bits for 16 numbers.
_BYTES_OF_32 = {
    "auto": 64, "float16": 64, "half": 64, "bfloat16": 64, "f16": 64, "bf16": 64, "float32": 128, "float": 128,
    "f32": 128, "fp8": 32, "fp8_e4m3": 32, "fp8_e5m2": 32, "fp8_inc": 32, "int8": 32, "q8_0": 34, "q5_1": 24,
    "q5_0": 22, "q4_1": 20, "q4_0": 18, "iq4_nl": 18, "nvfp4": 18,
}  # fmt: skip

# vLLM gives memory out in blocks of 16 tokens; llama.cpp rounds a context up to 256 cells.
_BLOCK_TOKENS = 16
_PADDED_CELLS = 256

# A sparse latent cache in fp8: 512 numbers of 8 bits, four scales of 32 bits, and the position at 16 bits (vLLM's
# fp8_ds_mla).
_SPARSE_FP8_ENTRY_BYTES = 656


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSettings:
    """What decides how much is kept."""

    runtime: str
    key_dtype: str
    value_dtype: str
    tensor_parallel: int
    pipeline_parallel: int
    max_model_len: int
    max_num_batched_tokens: int
    # Every layer keeps every token (llama.cpp's --swa-full, vLLM's --disable-hybrid-kv-cache-manager).
    without_windows: bool


def known_dtype(name: str) -> bool:
    return name in _BYTES_OF_32


def bytes_per_token(shape: ModelShape, settings: KvSettings) -> int:
    """What each further token of a long sequence takes: in the layers that keep them all."""
    numbers = sum(
        group.count * _entry_bytes(group.cache, settings) / _tokens_per_entry(group.cache)
        for group in shape.groups
        if group.cache is not None and _keeps_all(group.cache, settings)
    )
    return round(numbers * _stage_share(shape, settings))


def bytes_per_sequence(shape: ModelShape, settings: KvSettings) -> int:
    """What a sequence takes at most in layers that do not grow with it: windows and states."""
    total = 0.0
    for group in shape.groups:
        if isinstance(group.cache, StateCache):
            total += group.count * _state_bytes(group.cache, settings.tensor_parallel)
        elif group.cache is not None and not _keeps_all(group.cache, settings):
            total += group.count * _entry_bytes(group.cache, settings) * _cells(group.cache, settings)
    return round(total * _stage_share(shape, settings))


def rounded_tokens(tokens: int, settings: KvSettings) -> int:
    """Tokens in whole blocks."""
    step = _PADDED_CELLS if settings.runtime == "llama.cpp" else _BLOCK_TOKENS
    return -(-tokens // step) * step


def _keeps_all(cache: Cache, settings: KvSettings) -> bool:
    if isinstance(cache, StateCache):
        return False
    return isinstance(cache, LatentCache) or cache.window is None or settings.without_windows


def _tokens_per_entry(cache: Cache) -> int:
    return cache.tokens_per_entry if isinstance(cache, HeadCache) else 1


def _entry_bytes(cache: Cache, settings: KvSettings) -> int:
    """Bytes of one entry of one layer."""
    if isinstance(cache, LatentCache):
        return _latent_bytes(cache, settings)
    if isinstance(cache, StateCache):
        return 0
    # Heads are dealt out over the devices; when there are fewer than devices, each device holds one.
    heads = -(-cache.kv_heads // _split(settings))
    keys = heads * cache.key_size * _BYTES_OF_32[settings.key_dtype] // 32
    return keys + heads * cache.value_size * _BYTES_OF_32[settings.value_dtype] // 32


def _latent_bytes(cache: LatentCache, settings: KvSettings) -> int:
    """The same on every device: there is one vector for all heads."""
    if cache.indexer_bytes and settings.key_dtype.startswith("fp8"):
        return _SPARSE_FP8_ENTRY_BYTES + cache.indexer_bytes
    return (cache.rank + cache.rope_size) * _BYTES_OF_32[settings.key_dtype] // 32 + cache.indexer_bytes


def _split(settings: KvSettings) -> int:
    return 1 if settings.runtime == "llama.cpp" else settings.tensor_parallel


def _cells(cache: Cache, settings: KvSettings) -> int:
    """Tokens that a window may hold at once: itself, and the batch that is being worked on.

    llama.cpp rounds that up (gpt-oss-120b with -ub 1024: 128 + 1024 make 1280 cells, as its log says).
    """
    window = cache.window if isinstance(cache, HeadCache) and cache.window is not None else 0
    return min(
        rounded_tokens(window + settings.max_num_batched_tokens, settings),
        rounded_tokens(settings.max_model_len, settings),
    )


def _state_bytes(cache: StateCache, tensor_parallel: int) -> int:
    whole = cache.convolution_numbers * 2 + cache.state_numbers * cache.state_number_bytes
    return -(-whole // tensor_parallel)


def _stage_share(shape: ModelShape, settings: KvSettings) -> float:
    """The share of the layers that the fullest stage of a pipeline has."""
    llama_cpp = settings.runtime == "llama.cpp"
    stages = settings.pipeline_parallel * (settings.tensor_parallel if llama_cpp else 1)
    if stages == 1 or not shape.layers:
        return 1.0
    # llama.cpp deals out the output as one more layer.
    return -(-(shape.layers + (1 if llama_cpp else 0)) // stages) / shape.layers
