"""The bytes of a model's weights on the device that holds most of them."""

from collections.abc import Mapping

from sage_reconcile.core.shape import ModelShape, Role, WeightPart

# Numbers that are cast to the dtype that the engine computes in, and their bytes on disk.
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_DTYPE_BYTES = {"auto": 2, "half": 2, "float16": 2, "bfloat16": 2, "float32": 4, "float": 4}

# Bits per weight after quantisation while loading: vLLM's --quantization fp8 and bitsandbytes (nf4 with an absolute
# maximum of 32 bits per 64 weights).
_ON_LOADING_BITS: Mapping[str, float] = {"fp8": 8.0, "bitsandbytes": 4.5, "experts_int8": 8.0}
_ROLES: tuple[Role, ...] = ("embeddings", "lm_head", "vision", "experts", "rest", "whole")
_QUANTISABLE: frozenset[Role] = frozenset({"experts", "rest"})

# vLLM pads the experts of gpt-oss to what its kernel wants: the width of the model to a multiple of 256, the width of
# an expert on one device to a multiple of 128 (Marlin; mxfp4_round_up_hidden_size_and_intermediate_size in vLLM's
# fused_moe/oracle/mxfp4.py). Hopper's Triton kernel pads less, TRTLLM-gen on B200 more (both to 256).
_MODEL_WIDTH_MULTIPLE = 256
_EXPERT_WIDTH_MULTIPLE = 128


def weight_bytes(
    shape: ModelShape, *, runtime: str, tensor_parallel: int, pipeline_parallel: int, dtype: str, quantization: str
) -> int:
    """The bytes of the tensors themselves.

    dtype: the manifest's; "auto": 16 bits. quantization: the manifest's; "": none while loading.
    """
    bytes_of: dict[Role, float] = {
        role: sum(
            # llama.cpp maps tensors as they are in the file.
            part.disk_bytes if runtime == "llama.cpp" else _loaded(shape, part, tensor_parallel, dtype, quantization)
            for part in shape.parts
            if part.role == role
        )
        for role in _ROLES
    }
    if runtime == "llama.cpp":
        return _layers_dealt(shape, bytes_of, tensor_parallel * pipeline_parallel)
    return _tensors_split(shape, bytes_of, tensor_parallel, pipeline_parallel)


def counts_dtype(dtype: str) -> bool:
    """Whether this number format has a figure; one that has none counts as 16 bits."""
    return dtype in _DTYPE_BYTES


def counts_quantization(shape: ModelShape, quantization: str) -> bool:
    """Whether what is written counts: "" is nothing, and weights that are quantised already count as they are."""
    return not quantization or quantization in _ON_LOADING_BITS or shape.quantisation is not None


def _tensors_split(shape: ModelShape, bytes_of: Mapping[Role, float], tensor_parallel: int, stages: int) -> int:
    """vLLM and SGLang: each tensor over the devices of a stage, the layers over the stages."""
    body = (bytes_of["experts"] + bytes_of["rest"]) / tensor_parallel + bytes_of["whole"]
    first = (bytes_of["embeddings"] + bytes_of["vision"]) / tensor_parallel
    last = bytes_of["lm_head"] / tensor_parallel
    if stages == 1:
        return round(body + first + (0 if shape.tied else last))
    if shape.tied:
        # The first stage looks tokens up, the last one scores them.
        last = bytes_of["embeddings"] / tensor_parallel
    return round(body * _share(shape, -(-shape.layers // stages), stages) + max(first, last))


def _layers_dealt(shape: ModelShape, bytes_of: Mapping[Role, float], devices: int) -> int:
    """llama.cpp: whole layers over the devices, the output counted as one more (llama_model_load: n_layer + 1).

    It looks tokens up on the CPU and keeps that table there. Tied embeddings are that table and the output, so they
    stand on the last device; embedding models have no output.
    """
    body = bytes_of["experts"] + bytes_of["rest"] + bytes_of["whole"]
    speaks = any(group.cache is not None for group in shape.groups)
    output = bytes_of["lm_head"] or (bytes_of["embeddings"] if speaks else 0.0)
    if devices == 1:
        return round(body + output)
    layers = -(-(shape.layers + 1) // devices)
    return round(max(body * _share(shape, layers, devices), body * _share(shape, layers - 1, devices) + output))


def _share(shape: ModelShape, layers: int, stages: int) -> float:
    """The part of the body that so many layers are."""
    return layers / shape.layers if shape.layers else 1 / stages


def _loaded(shape: ModelShape, part: WeightPart, tensor_parallel: int, dtype: str, quantization: str) -> float:
    """The bytes of a part once it is loaded, over all devices."""
    if part.storage == "mxfp4" and part.role == "experts":
        return part.disk_bytes * expert_padding(shape, tensor_parallel)
    stored = _FLOATS.get(part.storage)
    if stored is None:
        return part.disk_bytes
    if quantization in _ON_LOADING_BITS and shape.quantisation is None and part.role in _QUANTISABLE:
        return part.disk_bytes / stored * _ON_LOADING_BITS[quantization] / 8
    return part.disk_bytes * _DTYPE_BYTES.get(dtype, 2) / stored


def expert_padding(shape: ModelShape, tensor_parallel: int) -> float:
    """How much larger the experts get by padding; 1.0: not at all."""
    if not shape.moe_intermediate or not shape.hidden:
        return 1.0
    own = -(-shape.moe_intermediate // tensor_parallel)
    wide = -(-own // _EXPERT_WIDTH_MULTIPLE) * _EXPERT_WIDTH_MULTIPLE * tensor_parallel / shape.moe_intermediate
    return wide * (-(-shape.hidden // _MODEL_WIDTH_MULTIPLE) * _MODEL_WIDTH_MULTIPLE) / shape.hidden


def table_bytes(shape: ModelShape, *, tensor_parallel: int, pipeline_parallel: int) -> int:
    """What vLLM and SGLang compute from the weights while loading, and keep on every device.

    The sine and cosine of every position (Llama 3.1 8B: 14.957 GiB of tensors, 14.989 measured, 0.031 of tables); and
    for latent attention the up-projection once more, unpacked to 16 bits, for decoding (MLACommonImpl's W_UK and W_UV).
    """
    rope = shape.max_positions * shape.rope_numbers * 2
    return rope + shape.latent_up_numbers * 2 // tensor_parallel // pipeline_parallel
