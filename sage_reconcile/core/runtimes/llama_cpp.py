"""llama.cpp: `llama-server`, or sage's own launcher over the same server, which takes the same flags.

Options: https://github.com/ggml-org/llama.cpp/tree/master/tools/server.
"""

from sage_reconcile.core.footprint import Serving, footprint
from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes.base import (
    Recognised,
    Runtime,
    module_index,
    no_env,
    one_word,
    option,
    port_option,
    program_index,
    told_by_sage,
    uncounted,
    unsupported,
    whole_number,
)
from sage_reconcile.core.runtimes.startup_log import llama_cpp_log
from sage_reconcile.core.shape import ModelShape
from sage_reconcile.core.spec import EngineSpec, is_path, needs_gpu, served_model

_DEFAULT_PORT = 8080
_LAUNCHER = "sage_reconcile.launchers.llama_cpp"


# Its defaults: slots that share one context, and the physical batch.
_SLOTS, _BATCH_TOKENS = 4, 512
# What may stand in `args`, and is counted.
_NUMBERS = ("--parallel", "-np", "--ubatch-size", "-ub")
_TYPES = ("--cache-type-k", "-ctk", "--cache-type-v", "-ctv")
# More layers than any model has: all of them.
_ALL_LAYERS = 999


def _argv(
    spec: EngineSpec, program: tuple[str, ...], placement: Placement, shape: ModelShape | None
) -> tuple[str, ...]:
    words = [*program, "--model", spec.model, "--host", placement.host, "--port", str(placement.port)]
    words += ["--alias", served_model(spec), "--metrics"]
    if spec.kind == "embedding":
        words += ["--embedding"]
    if not needs_gpu(spec):
        words += ["--ctx-size", str(spec.max_model_len)] if spec.max_model_len is not None else []
        return (*words, "--n-gpu-layers", "0", *spec.args)
    # Told in full, so that what was counted is what it takes: by itself it makes both fit what is free when it starts.
    length = spec.max_model_len or (shape.max_positions if shape else None)
    words += ["--ctx-size", str(length)] if length else []
    words += ["--n-gpu-layers", str(gpu_layers(spec, shape, placement.memory_bytes_per_device))]
    return (*words, *spec.args)


def gpu_layers(spec: EngineSpec, shape: ModelShape | None, memory_bytes: int) -> int:
    """The most layers whose weights and cache fit the memory of each device; the rest stays on the CPU.

    Without a shape, all of them; and with no limit asked for: what it was measured to take may be less than computed.
    """
    if shape is None or spec.gpu_memory == "auto":
        return _ALL_LAYERS
    whole = footprint(shape, _serving(spec))
    if whole.total_bytes <= memory_bytes or not shape.layers:
        return _ALL_LAYERS
    devices = spec.tensor_parallel * spec.pipeline_parallel
    each = -(-shape.layers // devices)
    left = memory_bytes - whole.bytes_of("activations", "cuda_context")
    fitting = left * each // max(whole.bytes_of("weights", "kv_cache"), 1)
    return max(min(fitting, each), 0) * devices


def _told(argv: tuple[str, ...], _placement: Placement) -> str:
    layers = whole_number(argv, "--n-gpu-layers", default=_ALL_LAYERS)
    length = option(argv, "--ctx-size")
    context = f" and a context of {length} tokens" if length else ""
    return f"{'all' if layers >= _ALL_LAYERS else layers} layers{context}"


def _remarks(spec: EngineSpec, shape: ModelShape | None, memory_bytes: int) -> tuple[str, ...]:
    layers = gpu_layers(spec, shape, memory_bytes)
    if shape is None or layers >= min(shape.layers, _ALL_LAYERS):
        return ()
    fitting = f"{layers} of its {shape.layers} layers fit" if layers else f"none of its {shape.layers} layers fits"
    return (f"{fitting} into gpu_memory: the CPU computes {'the others' if layers else 'all of them'}",)


def _serving(spec: EngineSpec) -> Serving:
    return Serving(
        kind=spec.kind,
        runtime="llama.cpp",
        tensor_parallel=spec.tensor_parallel,
        pipeline_parallel=spec.pipeline_parallel,
        max_model_len=spec.max_model_len,
        max_num_seqs=whole_number(spec.args, "--parallel", "-np", default=_SLOTS),
        max_num_batched_tokens=whole_number(spec.args, "--ubatch-size", "-ub", default=_BATCH_TOKENS),
        kv_dtype=option(spec.args, "--cache-type-k", "-ctk") or "auto",
        value_dtype=option(spec.args, "--cache-type-v", "-ctv") or "auto",
    )


def _tells(_spec: EngineSpec, shape: ModelShape | None) -> bool:
    """By the number of layers and the length of its context, whose bytes are known with the shape."""
    return shape is not None


def _complaints(spec: EngineSpec) -> tuple[tuple[str, str], ...]:
    found: tuple[tuple[str, str], ...] = ()
    if not is_path(spec.model):
        found += (("model", "model: llama.cpp needs the path of a .gguf file"),)
    found += told_by_sage(spec, ("--model", "-m", "-hf", "--hf-repo"), "write model")
    found += told_by_sage(spec, ("--alias", "-a"), "write served_name")
    found += told_by_sage(spec, ("--port",), "write port")
    found += told_by_sage(spec, ("--host",), "engines listen on 127.0.0.1")
    if needs_gpu(spec):
        found += told_by_sage(spec, ("--n-gpu-layers", "--gpu-layers", "-ngl"), "write gpu_memory")
        found += told_by_sage(spec, ("--ctx-size", "-c"), "write max_model_len")
        found += told_by_sage(spec, ("--main-gpu", "-mg", "--device", "-dev", "--tensor-split", "-ts"), "write devices")
    found += uncounted(spec, _NUMBERS, others=_TYPES) + one_word(spec, (*_NUMBERS, *_TYPES))
    return found + unsupported(spec, ("dtype", "quantization"), "a .gguf file carries its own number format")


def _recognise(argv: tuple[str, ...]) -> Recognised | None:
    start = program_index(argv, "llama-server")
    if start is None:
        start = module_index(argv, _LAUNCHER)
    if start is None:
        return None
    options = argv[start + 1 :]
    embedding = any(word in ("--embedding", "--embeddings") for word in options)
    rerank = any(word in ("--rerank", "--reranking") for word in options)
    loaded = option(options, "--model", "-m") or option(options, "-hf", "--hf-repo")
    if start > 0 and loaded is None:
        return None  # `grep llama-server`: the word alone, behind another program, starts nothing.
    model = option(options, "--alias", "-a") or loaded
    return Recognised(
        runtime="llama.cpp",
        kind="rerank" if rerank else "embedding" if embedding else "llm",
        model=model or "?",
        port=port_option(options, "--port", default=_DEFAULT_PORT),
    )


LLAMA_CPP = Runtime(
    name="llama.cpp",
    program="llama-server",
    install_hint="put llama-server on PATH, or: pip install 'sage-reconcile[cpu]'",
    argv=_argv,
    env=no_env,
    complaints=_complaints,
    recognise=_recognise,
    serving=_serving,
    tells=_tells,
    told=_told,
    remarks=_remarks,
    measured_log=llama_cpp_log,
    # What it takes follows from its layers and its context.
    fills=False,
)
