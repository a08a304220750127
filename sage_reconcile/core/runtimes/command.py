"""command: any program that speaks the protocol of its kind; the manifest gives the argv, sage fills in the rest."""

import re

from sage_reconcile.core.footprint import Serving
from sage_reconcile.core.quantities import gib
from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes.base import Recognised, Runtime, no_env, share_of_device, unsupported
from sage_reconcile.core.runtimes.startup_log import any_log
from sage_reconcile.core.shape import ModelShape
from sage_reconcile.core.spec import EngineSpec

PLACEHOLDERS = ("port", "host", "model", "devices", "memory_bytes", "memory_fraction")
_BRACES = {"{{": "{", "}}": "}"}
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(" + "|".join(PLACEHOLDERS) + r")\}")


# The placeholders that tell the program how much memory it may use.
_TELLING = ("memory_bytes", "memory_fraction")


def _argv(
    spec: EngineSpec, program: tuple[str, ...], placement: Placement, _shape: ModelShape | None
) -> tuple[str, ...]:
    assert spec.command is not None
    values = {
        "port": str(placement.port),
        "host": placement.host,
        "model": spec.model,
        "devices": ",".join(placement.devices),
        "memory_bytes": str(placement.memory_bytes_per_device),
        "memory_fraction": str(placement.memory_fraction),
    }
    return (*program, *(filled(word, values) for word in (*spec.command[1:], *spec.args)))


def filled(word: str, values: dict[str, str]) -> str:
    """The word with its {placeholders} filled in; `{{` and `}}` are braces. Other braces stay as they are."""
    return _PLACEHOLDER.sub(lambda found: _BRACES.get(found[0]) or values[found[1]], word)


def _complaints(spec: EngineSpec) -> tuple[tuple[str, str], ...]:
    return unsupported(spec, ("max_model_len", "dtype", "quantization"), "write it on the command line")


def _serving(spec: EngineSpec) -> Serving:
    """As vLLM would: what the program is, nobody knows."""
    return Serving(
        kind=spec.kind,
        runtime="llama.cpp" if spec.model.endswith(".gguf") else "vllm",
        tensor_parallel=spec.tensor_parallel,
        pipeline_parallel=spec.pipeline_parallel,
    )


def _tells(spec: EngineSpec, _shape: ModelShape | None) -> bool:
    words = (*(spec.command or ()), *spec.args)
    return any(found[1] in _TELLING for word in words for found in _PLACEHOLDER.finditer(word))


def _told(argv: tuple[str, ...], placement: Placement) -> str:
    size = str(placement.memory_bytes_per_device)
    told_bytes = any(size in word for word in argv)
    return f"{gib(placement.memory_bytes_per_device)} GiB" if told_bytes else share_of_device(argv, placement)


def _never(_argv: tuple[str, ...]) -> Recognised | None:
    return None


COMMAND = Runtime(
    name="command",
    program="",
    install_hint="the first word of `command` must be a program on PATH, or a path to one",
    argv=_argv,
    env=no_env,
    complaints=_complaints,
    recognise=_never,
    serving=_serving,
    tells=_tells,
    told=_told,
    measured_log=any_log,
)
