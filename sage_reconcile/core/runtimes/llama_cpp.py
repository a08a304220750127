"""llama.cpp: `llama-server`, or sage's own launcher over the same server, which takes the same flags.

Options: https://github.com/ggml-org/llama.cpp/tree/master/tools/server.
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
    unsupported,
)
from sage_reconcile.core.spec import EngineSpec, is_path, needs_gpu, served_model

_DEFAULT_PORT = 8080
_LAUNCHER = "sage_reconcile.launchers.llama_cpp"


def _argv(spec: EngineSpec, program: tuple[str, ...], placement: Placement) -> tuple[str, ...]:
    words = [*program, "--model", spec.model, "--host", placement.host, "--port", str(placement.port)]
    words += ["--alias", served_model(spec), "--metrics"]
    if spec.kind == "embedding":
        words += ["--embedding"]
    if spec.max_model_len is not None:
        words += ["--ctx-size", str(spec.max_model_len)]
    if not needs_gpu(spec):
        words += ["--n-gpu-layers", "0"]
    return (*words, *spec.args)


def _complaints(spec: EngineSpec) -> tuple[tuple[str, str], ...]:
    no_path = () if is_path(spec.model) else (("model", "model: llama.cpp needs the path of a .gguf file"),)
    return no_path + unsupported(spec, ("dtype", "quantization"), "a .gguf file carries its own number format")


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
)
