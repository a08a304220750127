"""vLLM: `vllm serve MODEL`, and its older spelling `python -m vllm.entrypoints.openai.api_server --model MODEL`.

Options: https://docs.vllm.ai/en/latest/cli/serve/.
"""

from sage_reconcile.core.footprint import Serving
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
from sage_reconcile.core.runtimes.startup_log import vllm_log
from sage_reconcile.core.shape import ModelShape
from sage_reconcile.core.spec import EngineSpec, served_model

_DEFAULT_PORT = 8000
_OLD_MODULE, _CLI_MODULE = "vllm.entrypoints.openai.api_server", "vllm.entrypoints.cli.main"

# Values of --task, which --runner replaced, that make the server answer with vectors or scores.
_POOLING_TASKS = ("embed", "embedding", "score", "classify", "reward")


# Its own defaults below 70 GiB of memory, told all the same: its memory depends on both.
_SEQUENCES, _BATCH_TOKENS = 256, 2048

# What sage tells by fields of the manifest.
_TOLD = {
    "--gpu-memory-utilization": "write gpu_memory",
    "--kv-cache-memory-bytes": "write gpu_memory",
    "--tensor-parallel-size": "write tensor_parallel",
    "-tp": "write tensor_parallel",
    "--pipeline-parallel-size": "write pipeline_parallel",
    "-pp": "write pipeline_parallel",
    "--max-model-len": "write max_model_len",
    "--dtype": "write dtype",
    "--quantization": "write quantization",
    "-q": "write quantization",
    "--num-gpu-blocks-override": "write gpu_memory",
    "--data-parallel-size": "write replicas",
    "-dp": "write replicas",
    "--data-parallel-size-local": "write replicas",
    "-dpl": "write replicas",
    "--data-parallel-rank": "write replicas",
    "-dpn": "write replicas",
    "--data-parallel-start-rank": "write replicas",
    "-dpr": "write replicas",
    "--data-parallel-address": "write replicas",
    "-dpa": "write replicas",
    "--data-parallel-rpc-port": "write replicas",
    "-dpp": "write replicas",
    "--data-parallel-backend": "write replicas",
    "-dpb": "write replicas",
    "--headless": "write replicas",
    "--nnodes": "an engine runs on one machine",
    "--node-rank": "an engine runs on one machine",
    "--device-ids": "write devices",
    "--model": "write model",
    "--served-model-name": "write served_name",
    "--uds": "engines listen on 127.0.0.1",
    "--host": "engines listen on 127.0.0.1",
    "--port": "write port",
    "--config": "a file may tell what sage tells",
}

# What may stand in `args`, and is counted.
_NUMBERS = ("--max-num-seqs", "--max-num-batched-tokens")
_TYPES, _FLAGS = ("--kv-cache-dtype",), ("--enforce-eager",)


def _argv(
    spec: EngineSpec, program: tuple[str, ...], placement: Placement, shape: ModelShape | None
) -> tuple[str, ...]:
    words = [*program, "serve", spec.model, "--host", placement.host, "--port", str(placement.port)]
    words += ["--served-model-name", served_model(spec)]
    words += ["--runner", "pooling"] if spec.kind == "embedding" else []
    words += ["--tensor-parallel-size", str(spec.tensor_parallel)] if spec.tensor_parallel > 1 else []
    words += ["--pipeline-parallel-size", str(spec.pipeline_parallel)] if spec.pipeline_parallel > 1 else []
    words += ["--max-model-len", str(spec.max_model_len)] if spec.max_model_len is not None else []
    words += ["--dtype", spec.dtype] if spec.dtype is not None else []
    words += ["--quantization", spec.quantization] if spec.quantization is not None else []
    if placement.devices:
        words += ["--gpu-memory-utilization", str(placement.memory_fraction)]
        words += _batch(spec, shape)
    return (*words, *spec.args)


def _batch(spec: EngineSpec, shape: ModelShape | None) -> list[str]:
    """How much it does at once. `args` come later on the command line, and count."""
    serving = _serving(spec)
    words = ["--max-num-seqs", str(serving.max_num_seqs)]
    if spec.kind == "llm":
        return [*words, "--max-num-batched-tokens", str(serving.max_num_batched_tokens)]
    # A text to embed is not cut into pieces: a batch holds the longest (vLLM refuses less).
    longest = spec.max_model_len or (shape.max_positions if shape else 0)
    return [*words, "--max-num-batched-tokens", str(max(serving.max_num_batched_tokens, longest))] if longest else words


def _serving(spec: EngineSpec) -> Serving:
    words = spec.args
    sequences = whole_number(words, "--max-num-seqs", "--max_num_seqs", default=_SEQUENCES)
    return Serving(
        kind=spec.kind,
        runtime="vllm",
        tensor_parallel=spec.tensor_parallel,
        pipeline_parallel=spec.pipeline_parallel,
        max_model_len=spec.max_model_len,
        max_num_seqs=sequences,
        full_sequences=sequences_at_once(spec, sequences),
        max_num_batched_tokens=whole_number(
            words, "--max-num-batched-tokens", "--max_num_batched_tokens", default=_BATCH_TOKENS
        ),
        kv_dtype=option(words, "--kv-cache-dtype", "--kv_cache_dtype") or "auto",
        dtype=spec.dtype or "auto",
        quantization=spec.quantization or "",
        enforce_eager="--enforce-eager" in words or "--enforce_eager" in words,
    )


def _complaints(spec: EngineSpec) -> tuple[tuple[str, str], ...]:
    short = abbreviated(spec, (*_TOLD, *_NUMBERS, *_TYPES, *_FLAGS), whole=("--device",))
    return told_by_fields(spec, _TOLD) + short + _counted(spec)


def _counted(spec: EngineSpec) -> tuple[tuple[str, str], ...]:
    return uncounted(spec, _NUMBERS, others=_TYPES) + one_word(spec, (*_NUMBERS, *_TYPES, *_FLAGS))


def _told(_spec: EngineSpec, _shape: ModelShape | None) -> bool:
    return True


def _recognise(argv: tuple[str, ...]) -> Recognised | None:
    options = words_of_a_server(argv, "vllm", server=_OLD_MODULE, cli=_CLI_MODULE)
    if options is None:
        return None
    model = option(options, "--served-model-name") or option(options, "--model") or positional(options)
    pooling = option(options, "--runner") == "pooling" or option(options, "--task") in _POOLING_TASKS
    return Recognised(
        runtime="vllm",
        kind="embedding" if pooling else "llm",
        model=model or "?",
        port=port_option(options, "--port", default=_DEFAULT_PORT),
    )


VLLM = Runtime(
    name="vllm",
    program="vllm",
    install_hint="pip install vllm, or write another runtime",
    argv=_argv,
    env=no_env,
    complaints=_complaints,
    recognise=_recognise,
    serving=_serving,
    tells=_told,
    measured_log=vllm_log,
    budgeted=True,
    splits_heads=True,
    # It takes each entry of CUDA_VISIBLE_DEVICES for a number and dies of a UUID, of a slice's too; the memory of a
    # slice it would take for that of the whole GPU (vllm-project/vllm#41848, #46132).
    device_names="index",
    takes_slices=False,
)
