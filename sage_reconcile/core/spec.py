"""What users write: stacks, engines and the project's settings, as pydantic models.

Goes in: plain mappings from YAML or from a process's own label. Comes out: frozen models and their canonical JSON.
Must not know: files, positions in files (world/manifests adds those), or what runs.
"""

import json
import posixpath
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from sage_reconcile.core.quantities import HIGHEST_PORT, LOWEST_PORT, bytes_of, ports_of, seconds_of

Kind = Literal["llm", "embedding", "rerank"]
Strategy = Literal["auto", "surge", "recreate"]
RuntimeName = Literal["auto", "vllm", "sglang", "llama.cpp", "infinity", "tei", "command"]

# Every string of the child's environment must stay below the kernel's 128 KiB (MAX_ARG_STRLEN, execve(2)), and the
# spec travels in one of them.
LONGEST_SPEC_BYTES = 96 * 1024

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
_VARIABLE_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]{0,127}$"

# What sage alone decides: which devices a process sees, and the label that it carries.
_RESERVED_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES", "SPT_NOENV")


class Written(BaseModel):
    """The base of all that users write: strict, frozen, and unknown fields are errors."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", populate_by_name=True)


def _whole_text(text: str) -> str:
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise ValueError("must not hold control characters")
    return text


def _argument(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not hold a NUL character")
    return text


def _duration(value: object) -> object:
    return seconds_of(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else value


def _port(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"must be a number from {LOWEST_PORT} to {HIGHEST_PORT}")
    if value < LOWEST_PORT:
        raise ValueError(f"{value} is below {LOWEST_PORT}: engines run without the privilege that such ports need")
    if value > HIGHEST_PORT:
        raise ValueError(f"there is no port {value if value < 10**6 else 'that large'}: the highest is {HIGHEST_PORT}")
    return value


def _port_or_auto(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | str) or (isinstance(value, str) and value != "auto"):
        raise ValueError(f'must be "auto" or a number from {LOWEST_PORT} to {HIGHEST_PORT}')
    return value if value == "auto" else _port(value)


def _version(value: object) -> object:
    # True and 1.0 are equal to 1, and a literal takes them for it.
    if type(value) is not int:
        raise ValueError("must be 1")
    return value


def _memory(value: object) -> object:
    if isinstance(value, str) and value != "auto":
        return f"{bytes_of(value)}B"
    if isinstance(value, bool):
        raise ValueError('must be "auto", a size such as "24GiB", or a fraction such as 0.85')
    if isinstance(value, int | float) and value <= 0:
        raise ValueError(f"{value} is no memory at all")
    if isinstance(value, int):
        raise ValueError(f'{value} has no unit; write "{value}GiB", or a fraction of the device such as 0.85')
    if isinstance(value, float) and not value <= 1:
        raise ValueError(f'{value} is not a fraction of the device between 0 and 1; a size has a unit: "{value}GiB"')
    return value


def _size(value: object) -> object:
    if value is None or isinstance(value, str):
        return value if value is None else f"{bytes_of(value)}B"
    raise ValueError('must be a size such as "2GiB"')


def _pool(value: object) -> object:
    ports_of(value) if isinstance(value, str) else None
    return value


def _variables(variables: Mapping[str, str]) -> Mapping[str, str]:
    for name in variables:
        if name in _RESERVED_VARIABLES or name.startswith("SAGE_"):
            raise ValueError(f"{name} is set by sage alone, so that an engine sees exactly its planned devices")
    return variables


Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Text = Annotated[str, Field(max_length=512), AfterValidator(_whole_text)]
Argument = Annotated[str, Field(max_length=32 * 1024), AfterValidator(_argument)]
Arguments = Annotated[tuple[Argument, ...], Field(strict=False, max_length=512)]
Seconds = Annotated[float, BeforeValidator(_duration)]
FixedPort = Annotated[int, BeforeValidator(_port)]
PortOrAuto = Annotated[Literal["auto"] | int, BeforeValidator(_port_or_auto)]
Pool = Annotated[str, BeforeValidator(_pool)]
VariableName = Annotated[str, Field(pattern=_VARIABLE_PATTERN)]
# In a spec's canonical form a size is its bytes ("25769803776B"), so that 24GiB and 24576MiB are the same wish.
MemoryWish = Annotated[
    Literal["auto"] | str | float,
    BeforeValidator(_memory),
    PlainSerializer(lambda wish: wish, return_type=str | float),
]


class Probe(Written):
    """How sage asks an engine whether it can serve."""

    path: Annotated[str, Field(pattern=r"^/[A-Za-z0-9_./-]{0,255}$")] = Field(
        default="/health", description="The path that answers 200 once the engine can serve."
    )
    timeout: Seconds = Field(
        default=600.0, description="How long the engine may take from its start to its first answer, e.g. 10m."
    )


class Liveness(Written):
    """When a running engine counts as hung."""

    timeout: Seconds = Field(default=120.0, description="How long requests may be outstanding with no progress.")


class Restart(Written):
    """What happens after a crash."""

    policy: Literal["always", "never"] = Field(default="always", description="Whether a crashed engine is restarted.")


class Update(Written):
    """How a running engine is replaced and stopped."""

    strategy: Strategy = Field(
        default="auto", description="surge starts the new before the old stops; recreate stops first; auto chooses."
    )
    drain: Seconds = Field(default=30.0, description="How long running requests may finish before a stop, e.g. 30s.")
    grace: Seconds = Field(default=20.0, description="How long after SIGTERM before SIGKILL, e.g. 20s.")


class SecretReference(Written):
    """Where a secret's value comes from; the value itself is never written down."""

    env: VariableName | None = Field(default=None, description="The variable of sage's own environment that holds it.")
    file: Text | None = Field(default=None, description="The file that holds it, readable by its owner only.")


class EngineSpec(Written):
    """One engine that should run."""

    name: Name = Field(description="The engine's name, unique in its stack; its id is STACK/NAME.")
    kind: Kind = Field(default="llm", description="What it serves: llm, embedding or rerank.")
    model: Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_whole_text)] = Field(
        description="A hub id, or a path: it starts with ./ ../ / or ~/, or ends in .gguf; relative to this file."
    )
    served_name: Text | None = Field(default=None, description="The model name that clients ask for.")
    runtime: RuntimeName = Field(
        default="auto", description="The program behind it. auto: .gguf is llama.cpp, llm is vllm, embedding infinity."
    )
    command: Arguments | None = Field(
        default=None,
        description="The argv for runtime: command, with {port} {host} {model} {devices} {memory_bytes} "
        "{memory_fraction} filled in.",
    )
    replicas: Annotated[int, Field(ge=1, le=64)] = Field(default=1, description="How many of it run.")
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = Field(default=1, description="GPUs that share each layer.")
    pipeline_parallel: Annotated[int, Field(ge=1, le=64)] = Field(default=1, description="Groups of layers.")
    use_gpu: bool | None = Field(default=None, description="null: an llm uses the GPU, an embedding server does not.")
    gpu_memory: MemoryWish = Field(
        default="auto", description='GPU memory per device: auto, a size such as "24GiB", or a fraction such as 0.85.'
    )
    required_memory_gb: Annotated[float, Field(gt=0, le=4096)] | None = Field(
        default=None, description="The older way to write gpu_memory, in GiB."
    )
    devices: Annotated[tuple[int | str, ...], Field(strict=False, min_length=1, max_length=64)] | None = Field(
        default=None, description="Pins the engine to these GPUs, by index, or by UUID in full."
    )
    port: PortOrAuto = Field(default="auto", description="A TCP port, or auto: one from the pool of its kind.")
    label: Text | None = Field(default=None, description="A name for display.")
    aliases: Annotated[tuple[Text, ...], Field(strict=False, max_length=64)] = Field(
        default=(), description="Further model names that clients may ask for."
    )
    max_concurrent_requests: Annotated[int, Field(ge=1, le=100_000)] = Field(
        default=256,
        description="Requests that the router lets through to each replica at once. Where it is written, the KV cache "
        "of vLLM and SGLang has room for as many of max_model_len; else for one.",
    )
    max_model_len: Annotated[int, Field(ge=1, le=100_000_000)] | None = Field(
        default=None, description="The longest context in tokens; unset leaves it to the model."
    )
    dtype: Text | None = Field(default=None, description="The number format of the weights, as the runtime names it.")
    quantization: Text | None = Field(default=None, description="The quantisation, as the runtime names it.")
    args: Arguments = Field(default=(), description="Further arguments, passed to the program as they stand.")
    extra_args: Arguments | None = Field(default=None, description="The older way to write args.")
    env: Annotated[dict[VariableName, Argument], AfterValidator(_variables)] = Field(
        default={}, description="Environment variables of the engine."
    )
    secrets: dict[VariableName, SecretReference] = Field(default={}, description="Environment variables by reference.")
    ready: Probe = Field(default=Probe(), description="When it counts as ready.")
    live: Liveness = Field(default=Liveness(), description="When it counts as hung.")
    restart: Restart = Field(default=Restart(), description="What happens after a crash.")
    update: Update = Field(default=Update(), description="How it is replaced and stopped.")
    depends_on: Annotated[tuple[Text, ...], Field(strict=False, max_length=64)] = Field(
        default=(), description="Engines that must be ready before it starts: NAME, or STACK/NAME."
    )
    protect: bool = Field(default=False, description="Refuse to stop or replace it.")
    adopt: bool = Field(default=False, description="Take over an engine that was started by hand.")
    metadata: dict[str, Any] = Field(default={}, description="Free to use; sage carries it and does not read it.")


class Stack(Written):
    """One manifest file: a named set of engines."""

    version: Annotated[Literal[1], BeforeValidator(_version)] = Field(description="The version of this format: 1.")
    name: Name = Field(description="The stack's name, unique in its project.")
    description: Annotated[str, Field(max_length=4096)] = Field(default="", description="What it is for.")
    defaults: dict[str, Any] = Field(default={}, description="Fills in for the fields that an engine leaves out.")
    engines: Annotated[tuple[EngineSpec, ...], Field(strict=False, min_length=1, max_length=1000)] = Field(
        description="The engines."
    )


class PortPools(Written):
    """The ports that sage may choose from, a pool per kind, tried in the order written."""

    llm: Pool = "8001,8901,8002,8900-8999"
    embedding: Pool = "8090,8091,8100-8199"
    rerank: Pool = "8200-8299"


class RouterSettings(Written):
    """The address that apps use."""

    host: Text = Field(default="127.0.0.1", description="The address that the router listens on.")
    port: FixedPort = Field(default=8000, description="The port that the router listens on.")
    keys_file: Text | None = Field(default=None, description="A file of keys that clients must send.")


class Guards(Written):
    """Limits on what one unattended apply may take away."""

    max_stop: Text = Field(default="50%", description="The most removed engines that it may stop: N or N%.")


class ProjectSettings(Written):
    """`sage.yaml`: what holds for the whole project."""

    project: Name | None = Field(default=None, description="The project's name; unset: the directory's.")
    ports: PortPools = Field(default=PortPools(), description="The ports to choose from.")
    device_reserve: Annotated[str, BeforeValidator(_size)] | None = Field(
        default=None, description="Memory to keep free on each device."
    )
    ask_hub: bool = Field(
        default=False, description="Ask the Hugging Face hub for the shape of a model that is not in its cache."
    )
    guards: Guards = Field(default=Guards(), description="Limits on what one apply may take away.")
    router: RouterSettings = Field(default=RouterSettings(), description="The router's address.")


# Changing one of these changes the running program, so the engine is replaced. Every other field is policy: it is
# updated in place, without a restart.
IDENTITY_FIELDS = frozenset(
    {
        "kind", "model", "served_name", "runtime", "command", "tensor_parallel", "pipeline_parallel", "use_gpu",
        "gpu_memory", "devices", "port", "max_model_len", "dtype", "quantization", "args", "env", "secrets",
    }
)  # fmt: skip

# Described by the schema and refused by `validate`: a field that does nothing must not look as if it did.
_FIELDS_NOT_SERVED_YET = ("secrets", "live", "restart", "protect", "adopt")
_VALUES_NOT_SERVED_YET = {
    ("kind",): ("rerank",),
    ("runtime",): ("tei",),
    ("update", "strategy"): ("surge",),
}
_CHOICES = {("kind",): Kind, ("runtime",): RuntimeName, ("update", "strategy"): Strategy}
_SETTINGS_NOT_SERVED_YET = (("guards",), ("router", "keys_file"))


def not_served_yet(engine: Mapping[str, Any]) -> tuple[tuple[tuple[str, ...], str], ...]:
    """The parts of a written engine that this version does not act on: (path of the field, sentence)."""
    fields = [((name,), f"{name} is not served yet") for name in _FIELDS_NOT_SERVED_YET if name in engine]
    values = [
        (path, f"{'.'.join(path)}: {_at(engine, path)} is not served yet")
        for path, refused in _VALUES_NOT_SERVED_YET.items()
        if _at(engine, path) in refused
    ]
    return tuple(fields + values)


def served_values(path: tuple[str, ...]) -> tuple[str, ...]:
    """The words that such a field of an engine may be and that this version acts on; none when it takes any text."""
    refused = _VALUES_NOT_SERVED_YET.get(path, ())
    return tuple(word for word in get_args(_CHOICES.get(path)) if word not in refused)


def settings_not_served_yet(settings: Mapping[str, Any]) -> tuple[tuple[tuple[str, ...], str], ...]:
    """The parts of a written `sage.yaml` that this version does not act on: (path of the field, sentence)."""
    return tuple(
        (path, f"{'.'.join(path)} is not served yet")
        for path in _SETTINGS_NOT_SERVED_YET
        if _at(settings, path) is not None
    )


def _at(written: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = written
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def canonical_engine(written: Mapping[str, Any]) -> Mapping[str, Any]:
    """An engine as written, with the older spellings of fields replaced by today's.

    Raises ValueError when a field is written in both spellings.
    """
    engine = dict(written)
    if engine.get("extra_args") is not None:
        if "args" in engine:
            raise ValueError("args and extra_args are the same field: write args alone")
        engine["args"] = engine["extra_args"]
    engine.pop("extra_args", None)
    if engine.get("required_memory_gb") is not None:
        if "gpu_memory" in engine:
            raise ValueError("gpu_memory and required_memory_gb are the same field: write gpu_memory alone")
        engine["gpu_memory"] = f"{engine['required_memory_gb']}GiB"
    engine.pop("required_memory_gb", None)
    return engine


def needs_gpu(spec: EngineSpec) -> bool:
    """Whether the engine uses GPUs; unset, an llm does and the other kinds do not."""
    return spec.kind == "llm" if spec.use_gpu is None else spec.use_gpu


def is_path(model: str) -> bool:
    """Whether a model is a file or directory rather than a hub id."""
    return model.startswith(("./", "../", "/", "~/")) or model.endswith(".gguf")


def with_absolute_model(spec: EngineSpec, *, directory: str, home: str) -> EngineSpec:
    """The spec with a model path made absolute: relative to `directory`, `~/` is `home`."""
    if not is_path(spec.model):
        return spec
    model = posixpath.join(home, spec.model[2:]) if spec.model.startswith("~/") else spec.model
    return spec.model_copy(update={"model": posixpath.normpath(posixpath.join(directory, model))})


def served_model(spec: EngineSpec) -> str:
    """The model name that clients ask for: `served_name`, else the hub id, else the file's name without its ending."""
    if spec.served_name is not None:
        return spec.served_name
    if not is_path(spec.model):
        return spec.model
    return posixpath.basename(spec.model.rstrip("/")).removesuffix(".gguf")


def written_fields(spec: EngineSpec) -> dict[str, Any]:
    """The spec as plain JSON values: what was written, without defaults."""
    return spec.model_dump(mode="json", exclude_unset=True)


def parse_written(text: str) -> EngineSpec | None:
    """The spec in canonical JSON; None when another version of sage wrote it and this one cannot read it."""
    try:
        return EngineSpec.model_validate_json(text)
    except ValueError:
        return None


def default_fields() -> dict[str, Any]:
    """Today's defaults of the identity fields, as plain JSON values."""
    spec = EngineSpec(name="x", model="x")
    return {name: value for name, value in spec.model_dump(mode="json").items() if name in IDENTITY_FIELDS - {"model"}}


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: the same value is always the same text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
