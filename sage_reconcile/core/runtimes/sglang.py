"""SGLang: `sglang serve --model-path MODEL`, and its older spelling `python -m sglang.launch_server`.

Options: https://docs.sglang.io/advanced_features/server_arguments.html. Never run by us, on no GPU.

Its fraction is not vLLM's: --mem-fraction-static is a share of what is free once its CUDA context stands and before
anything is loaded, for weights and KV cache alone; activations and graphs lie beside it
(srt/model_executor/model_runner_kv_cache_mixin.py: KV = free after loading - free before * (1 - fraction)).
"""

from sage_reconcile.core.footprint import Serving, footprint
from sage_reconcile.core.quantities import gib
from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes.base import (
    Recognised,
    Runtime,
    abbreviated,
    no_env,
    one_word,
    option,
    port_option,
    positional,
    sequences_at_once,
    told_by_fields,
    uncounted,
    whole_number,
    words_of_a_server,
)
from sage_reconcile.core.runtimes.startup_log import sglang_log
from sage_reconcile.core.shape import ModelShape
from sage_reconcile.core.spec import EngineSpec, needs_gpu, served_model

_DEFAULT_PORT = 30000
_MODULE = "sglang.launch_server"

# Told always: its own defaults differ by the memory of the card, and what it takes depends on both.
_SEQUENCES, _BATCH_TOKENS = 256, 2048

# Without the shape of a model: what SGLang itself leaves beside the static part for a batch of 2048 tokens and 256
# sequences (server_args.py: 512 MiB, 1.5 MiB per token of a chunk, 2 MiB per sequence in a graph).
_BESIDE_BYTES = (512 + 3072 + 512) * 1024**2

# What sage tells by fields of the manifest.
_TOLD = {
    "--mem-fraction-static": "write gpu_memory",
    "--max-total-tokens": "write gpu_memory",
    "--tensor-parallel-size": "write tensor_parallel",
    "--tp-size": "write tensor_parallel",
    "--tp": "write tensor_parallel",
    "--pipeline-parallel-size": "write pipeline_parallel",
    "--pp-size": "write pipeline_parallel",
    "--pp": "write pipeline_parallel",
    "--data-parallel-size": "write replicas",
    "--dp-size": "write replicas",
    "--dp": "write replicas",
    "--context-length": "write max_model_len",
    "--dtype": "write dtype",
    "--quantization": "write quantization",
    "--nnodes": "an engine runs on one machine",
    "--node-rank": "an engine runs on one machine",
    "--dist-init-addr": "an engine runs on one machine",
    "--use-ray": "an engine runs on one machine",
    "--device": "write use_gpu",
    "--base-gpu-id": "write devices",
    "--gpu-id-step": "write devices",
    "--model-path": "write model",
    "--model": "write model",
    "--served-model-name": "write served_name",
    "--grpc-mode": "the router speaks HTTP",
    "--host": "engines listen on 127.0.0.1",
    "--port": "write port",
    "--config": "a file may tell what sage tells",
}

# What may stand in `args`, and is counted.
_NUMBERS = ("--max-running-requests", "--chunked-prefill-size", "--max-prefill-tokens")
_TYPES, _FLAGS = ("--kv-cache-dtype",), ("--disable-cuda-graph",)


def _argv(
    spec: EngineSpec, program: tuple[str, ...], placement: Placement, shape: ModelShape | None
) -> tuple[str, ...]:
    words = [*program, "serve", "--model-path", spec.model, "--host", placement.host, "--port", str(placement.port)]
    words += ["--served-model-name", served_model(spec)]
    words += ["--is-embedding"] if spec.kind == "embedding" else []
    words += ["--tp-size", str(spec.tensor_parallel)] if spec.tensor_parallel > 1 else []
    words += ["--pp-size", str(spec.pipeline_parallel)] if spec.pipeline_parallel > 1 else []
    words += ["--context-length", str(spec.max_model_len)] if spec.max_model_len is not None else []
    words += ["--dtype", spec.dtype] if spec.dtype is not None else []
    words += ["--quantization", spec.quantization] if spec.quantization is not None else []
    serving = _serving(spec)
    words += ["--mem-fraction-static", str(placement.fraction_of_free)]
    tokens = _most_tokens(spec, shape, placement.memory_bytes_per_device)
    words += ["--max-total-tokens", str(tokens)] if tokens else []
    words += ["--max-running-requests", str(serving.max_num_seqs)]
    # A text to embed is not cut into chunks; what stands together in a batch has another name there.
    words += ["--max-prefill-tokens" if spec.kind == "embedding" else "--chunked-prefill-size"]
    words += [str(_batch_tokens(spec, shape))]
    return (*words, *spec.args)


def _batch_tokens(spec: EngineSpec, shape: ModelShape | None) -> int:
    tokens = _serving(spec).max_num_batched_tokens
    longest = spec.max_model_len or (shape.max_positions if shape else 0)
    return max(tokens, longest) if spec.kind == "embedding" else tokens


def static_bytes(spec: EngineSpec, shape: ModelShape | None, memory_bytes: int) -> int:
    """The part of its memory that --mem-fraction-static is about: all but what lies beside weights and cache."""
    if shape is None:
        return max(memory_bytes - _BESIDE_BYTES, memory_bytes // 2)
    beside = footprint(shape, _serving(spec)).bytes_of("activations", "non_torch", "cuda_graphs", "margin", "slack")
    return max(memory_bytes - beside, 0)


def _most_tokens(spec: EngineSpec, shape: ModelShape | None, memory_bytes: int) -> int:
    """The tokens that the planned cache holds, so that it takes no more where more is free than planned; 0: not known.

    Windows and states are sized by ratios of its own, so only plain caches are told.
    """
    if shape is None:
        return 0
    known = footprint(shape, _serving(spec))
    if known.kv_bytes_per_sequence or not known.kv_bytes_per_token:
        return 0
    return max(static_bytes(spec, shape, memory_bytes) - known.bytes_of("weights"), 0) // known.kv_bytes_per_token


def _serving(spec: EngineSpec) -> Serving:
    words = spec.args
    sequences = whole_number(words, "--max-running-requests", default=_SEQUENCES)
    return Serving(
        kind=spec.kind,
        runtime="sglang",
        tensor_parallel=spec.tensor_parallel,
        pipeline_parallel=spec.pipeline_parallel,
        max_model_len=spec.max_model_len,
        max_num_seqs=sequences,
        full_sequences=sequences_at_once(spec, sequences),
        max_num_batched_tokens=whole_number(
            words, "--max-prefill-tokens" if spec.kind == "embedding" else "--chunked-prefill-size",
            default=_BATCH_TOKENS,
        ),
        kv_dtype=option(words, "--kv-cache-dtype") or "auto",
        dtype=spec.dtype or "auto",
        quantization=spec.quantization or "",
        enforce_eager="--disable-cuda-graph" in words,
    )  # fmt: skip


def _complaints(spec: EngineSpec) -> tuple[tuple[str, str], ...]:
    on_cpu = () if needs_gpu(spec) else (("use_gpu", "use_gpu: sage starts sglang on GPUs alone; write use_gpu: true"),)
    short = abbreviated(spec, (*_TOLD, *_NUMBERS, *_TYPES, *_FLAGS))
    return on_cpu + told_by_fields(spec, _TOLD) + short + _counted(spec)


def _counted(spec: EngineSpec) -> tuple[tuple[str, str], ...]:
    return uncounted(spec, _NUMBERS, others=_TYPES) + one_word(spec, (*_NUMBERS, *_TYPES, *_FLAGS))


def _told(_spec: EngineSpec, _shape: ModelShape | None) -> bool:
    return True


def _told_text(_argv: tuple[str, ...], placement: Placement) -> str:
    return f"{placement.fraction_of_free} of the {gib(placement.free_at_start_bytes)} GiB that are free then"


def _recognise(argv: tuple[str, ...]) -> Recognised | None:
    options = words_of_a_server(argv, "sglang", server=_MODULE)
    if options is None:
        return None
    model = option(options, "--served-model-name") or option(options, "--model-path", "--model") or positional(options)
    return Recognised(
        runtime="sglang",
        kind="embedding" if "--is-embedding" in options else "llm",
        model=model or "?",
        port=port_option(options, "--port", default=_DEFAULT_PORT),
    )


SGLANG = Runtime(
    name="sglang",
    program="sglang",
    install_hint="pip install sglang (0.5.6 or newer has the command), or write another runtime",
    argv=_argv,
    env=no_env,
    complaints=_complaints,
    recognise=_recognise,
    serving=_serving,
    tells=_told,
    told=_told_text,
    measured_log=sglang_log,
    budgeted=True,
    static_bytes=static_bytes,
    splits_heads=True,
    # With several devices it takes each entry of CUDA_VISIBLE_DEVICES for a number (custom_all_reduce.py;
    # sgl-project/sglang#25996).
    device_names="index",
    takes_slices=False,
)
