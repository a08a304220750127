"""vLLM: `vllm serve MODEL`, and its older spelling `python -m vllm.entrypoints.openai.api_server --model MODEL`.

Options: https://docs.vllm.ai/en/latest/cli/serve/.
"""

from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes.base import (
    Recognised,
    Runtime,
    module_index,
    no_env,
    option,
    port_option,
    program_index,
)
from sage_reconcile.core.spec import EngineSpec, served_model

_DEFAULT_PORT = 8000
_OLD_MODULE = "vllm.entrypoints.openai.api_server"

# Values of --task, which --runner replaced, that make the server answer with vectors or scores.
_POOLING_TASKS = ("embed", "embedding", "score", "classify", "reward")


def _argv(spec: EngineSpec, program: tuple[str, ...], placement: Placement) -> tuple[str, ...]:
    words = [*program, "serve", spec.model, "--host", placement.host, "--port", str(placement.port)]
    words += ["--served-model-name", served_model(spec)]
    words += ["--runner", "pooling"] if spec.kind == "embedding" else []
    words += ["--tensor-parallel-size", str(spec.tensor_parallel)] if spec.tensor_parallel > 1 else []
    words += ["--pipeline-parallel-size", str(spec.pipeline_parallel)] if spec.pipeline_parallel > 1 else []
    words += ["--max-model-len", str(spec.max_model_len)] if spec.max_model_len is not None else []
    words += ["--dtype", spec.dtype] if spec.dtype is not None else []
    words += ["--quantization", spec.quantization] if spec.quantization is not None else []
    return (*words, *spec.args)


def _no_complaints(_spec: EngineSpec) -> tuple[tuple[str, str], ...]:
    return ()


def _recognise(argv: tuple[str, ...]) -> Recognised | None:
    start = module_index(argv, _OLD_MODULE)
    positional = None
    if start is None:
        program = program_index(argv, "vllm")
        if program is None or argv[program + 1 : program + 2] != ("serve",):
            return None
        start = program + 1
        positional = next(iter(argv[start + 1 : start + 2]), None)
    options = argv[start + 1 :]
    positional = None if positional is None or positional.startswith("-") else positional
    model = option(options, "--served-model-name") or option(options, "--model") or positional
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
    complaints=_no_complaints,
    recognise=_recognise,
)
