"""infinity: an embedding server, `infinity_emb v2 --model-id MODEL`.

Options: https://michaelfeil.github.io/infinity/. Under --url-prefix /v1 it speaks OpenAI's protocol; /health stays at
the root.
"""

from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes.base import Recognised, Runtime, option, port_option, program_index, unsupported
from sage_reconcile.core.spec import EngineSpec, needs_gpu, served_model

_DEFAULT_PORT = 7997


def _argv(spec: EngineSpec, program: tuple[str, ...], placement: Placement) -> tuple[str, ...]:
    words = [*program, "v2", "--model-id", spec.model, "--served-model-name", served_model(spec)]
    words += ["--host", placement.host, "--port", str(placement.port), "--url-prefix", "/v1"]
    words += ["--device", "cuda" if needs_gpu(spec) else "cpu"]
    words += ["--dtype", spec.dtype] if spec.dtype is not None else []
    return (*words, *spec.args)


def _env(_spec: EngineSpec, _placement: Placement) -> dict[str, str]:
    return {"DO_NOT_TRACK": "1"}


def _complaints(spec: EngineSpec) -> tuple[tuple[str, str], ...]:
    wrong_kind = (("kind", f"kind: infinity serves embedding, not {spec.kind}"),) if spec.kind != "embedding" else ()
    return wrong_kind + unsupported(spec, ("quantization", "max_model_len"), "infinity has no such option")


def _recognise(argv: tuple[str, ...]) -> Recognised | None:
    start = program_index(argv, "infinity_emb")
    if start is None:
        return None
    options = argv[start + 1 :]
    return Recognised(
        runtime="infinity",
        kind="embedding",
        model=option(options, "--served-model-name") or option(options, "--model-id", "--model-name-or-path") or "?",
        port=port_option(options, "--port", default=_DEFAULT_PORT),
    )


INFINITY = Runtime(
    name="infinity",
    program="infinity_emb",
    install_hint="pip install 'infinity-emb[all]', or write another runtime",
    argv=_argv,
    env=_env,
    complaints=_complaints,
    recognise=_recognise,
)
