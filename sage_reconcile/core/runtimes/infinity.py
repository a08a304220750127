"""infinity: an embedding server, `infinity_emb v2 --model-id MODEL`.

Options: https://michaelfeil.github.io/infinity/. Measured with infinity-emb 0.0.78 on a CPU, never yet on a GPU:

- It binds only when its model is loaded, and with SO_REUSEADDR: a port that is held for it, it gets.
- It answers to every model name; /v1/models lists the one that it was given.
- SIGTERM ends it within a second when idle; while a model loads or a request runs, only after that.
- It makes a directory .infinity_cache in $INFINITY_HOME, $HF_HOME or else where it runs, and dies where it may not.
"""

from sage_reconcile.core.footprint import Serving
from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes.base import (
    Recognised,
    Runtime,
    never_told,
    option,
    port_option,
    program_index,
    told_by_fields,
    unsupported,
)
from sage_reconcile.core.runtimes.startup_log import no_log
from sage_reconcile.core.shape import ModelShape
from sage_reconcile.core.spec import EngineSpec, needs_gpu, served_model

_DEFAULT_PORT = 7997
_BATCH_TEXTS = 32


# What sage tells by fields of the manifest.
_TOLD = {
    "--model-id": "write model",
    "--served-model-name": "write served_name",
    "--host": "engines listen on 127.0.0.1",
    "--port": "write port",
    "--url-prefix": "the API stands at /v1",
    "--device": "write use_gpu",
    "--device-id": "write devices",
    "--dtype": "write dtype",
}


def _argv(
    spec: EngineSpec, program: tuple[str, ...], placement: Placement, _shape: ModelShape | None
) -> tuple[str, ...]:
    words = [*program, "v2", "--model-id", spec.model, "--served-model-name", served_model(spec)]
    # Without the prefix it answers at /models and /embeddings; /health stays at the root with it (0.0.78).
    words += ["--host", placement.host, "--port", str(placement.port), "--url-prefix", "/v1"]
    # By its source, cuda without --device-id means every GPU that it sees; device_env shows it the planned ones alone.
    words += ["--device", "cuda" if needs_gpu(spec) else "cpu"]
    words += ["--dtype", spec.dtype] if spec.dtype is not None else []
    return (*words, *spec.args)


def _env(_spec: EngineSpec, _placement: Placement) -> dict[str, str]:
    return {"DO_NOT_TRACK": "1"}


def _complaints(spec: EngineSpec) -> tuple[tuple[str, str], ...]:
    wrong_kind = (("kind", f"kind: infinity serves embedding, not {spec.kind}"),) if spec.kind != "embedding" else ()
    # By the source of 0.0.78 (loading_strategy.py), which knows no way to split a model.
    split = (("tensor_parallel", spec.tensor_parallel), ("pipeline_parallel", spec.pipeline_parallel))
    copies = tuple((name, f"{name}: infinity loads the whole model on each GPU") for name, gpus in split if gpus > 1)
    told = told_by_fields(spec, _TOLD)
    return (
        wrong_kind + copies + told + unsupported(spec, ("quantization", "max_model_len"), "infinity has no such option")
    )


def _serving(spec: EngineSpec) -> Serving:
    # Its batches are of 32 texts (--batch-size), each as long as the model takes at most.
    return Serving(kind=spec.kind, runtime="infinity", dtype=spec.dtype or "auto", max_num_seqs=_BATCH_TEXTS)


def _recognise(argv: tuple[str, ...]) -> Recognised | None:
    start = program_index(argv, "infinity_emb")
    if start is None:
        return None
    options = argv[start + 1 :]
    loaded = option(options, "--model-id", "--model-name-or-path")
    if start > 0 and loaded is None and options[:1] not in (("v1",), ("v2",)):
        return None  # `pip install infinity_emb`: the word alone, behind another program, starts nothing.
    # Unless it is told a name, it serves a/b/c as b/c (0.0.78).
    model = option(options, "--served-model-name") or "/".join((loaded or "?").split("/")[-2:])
    return Recognised(
        runtime="infinity",
        kind="embedding",
        model=model,
        port=port_option(options, "--port", default=_DEFAULT_PORT),
    )


INFINITY = Runtime(
    name="infinity",
    program="infinity_emb",
    install_hint="pip install 'infinity-emb[server,torch]', or write another runtime",
    argv=_argv,
    env=_env,
    complaints=_complaints,
    recognise=_recognise,
    serving=_serving,
    tells=never_told,
    measured_log=no_log,
)
