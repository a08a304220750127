"""The programs behind engines, one file each. Pure: they build and read command lines, they start nothing."""

from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes.base import Recognised, Runtime
from sage_reconcile.core.runtimes.command import COMMAND
from sage_reconcile.core.runtimes.infinity import INFINITY
from sage_reconcile.core.runtimes.llama_cpp import LLAMA_CPP
from sage_reconcile.core.runtimes.sglang import SGLANG
from sage_reconcile.core.runtimes.vllm import VLLM
from sage_reconcile.core.spec import EngineSpec

RUNTIMES = (LLAMA_CPP, VLLM, SGLANG, INFINITY, COMMAND)


def runtime_of(spec: EngineSpec) -> Runtime:
    """The runtime of a spec. auto: a .gguf is llama.cpp, an llm is vllm, an embedding server is infinity."""
    return next(runtime for runtime in RUNTIMES if runtime.name == _name(spec))


def told_text(runtime: str, argv: tuple[str, ...], placement: Placement) -> str:
    """What an engine's command line tells it of its memory, in words; "not told" when nothing does."""
    found = next((one for one in RUNTIMES if one.name == runtime), COMMAND)
    return f"told {found.told(argv, placement)}" if placement.memory_told else "not told"


def is_served(spec: EngineSpec) -> bool:
    """Whether this version has the runtime of a spec."""
    return any(runtime.name == _name(spec) for runtime in RUNTIMES)


def _name(spec: EngineSpec) -> str:
    if spec.runtime != "auto":
        return spec.runtime
    return "llama.cpp" if spec.model.endswith(".gguf") else "vllm" if spec.kind == "llm" else "infinity"


def program_of(spec: EngineSpec) -> str:
    """The name or path of the program that must be installed for a spec."""
    runtime = runtime_of(spec)
    return runtime.program or (spec.command[0] if spec.command else "")


def recognise(argv: tuple[str, ...]) -> Recognised | None:
    """The engine that a command line starts; None when it starts none that sage knows."""
    return next((seen for runtime in RUNTIMES if (seen := runtime.recognise(argv)) is not None), None)
