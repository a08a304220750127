"""Machines with GPUs and what runs on them, with names, UUIDs and paths as long as real ones."""

from dataclasses import replace
from typing import Any

from sage_reconcile.core.desired import DesiredState, Wanted
from sage_reconcile.core.facts import Gap, ModelFact, ProgramFact
from sage_reconcile.core.identity import in_stack
from sage_reconcile.core.model_shape import shape_of_config
from sage_reconcile.core.observed import Device, Engine, Holder, ObservedState
from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.shape import ModelShape
from sage_reconcile.core.spec import EngineSpec, canonical_json, written_fields
from tests.builders import NODE, running, the_id, world

GIB = 1024**3
MIB = 1024**2
SOURCE = "/srv/inference/manifests"

LLAMA_70B, LLAMA_8B = "meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"

PROGRAMS = (
    ProgramFact(name="llama-server", argv=("/usr/local/bin/llama-server",)),
    ProgramFact(name="sglang", argv=("/opt/inference/sglang/bin/sglang",)),
    ProgramFact(name="vllm", argv=("/opt/inference/vllm/bin/vllm",)),
)


def uuid(index: int) -> str:
    return f"GPU-5b8f3a5{index}-9d35-1f5c-2d4c-0a0d7b2a6c1{index}"


def h100(index: int, **fields: Any) -> Device:
    """An H100 as NVML tells it; `holders` are foreign processes that use all that they are said to."""
    holders = fields.get("holders", ())
    foreign = sum(holder.used_bytes for holder in holders) + fields.pop("orphaned_bytes", 0)
    made = Device(
        node=NODE,
        index=index,
        uuid=uuid(index),
        name="NVIDIA H100 80GB HBM3",
        total_bytes=81559 * MIB,
        reserved_bytes=600 * MIB,
        used_bytes=foreign,
        foreign_bytes=foreign,
        orphaned_bytes=foreign - sum(holder.used_bytes for holder in holders),
        utilization_percent=0,
        temperature_celsius=35,
        power_watts=70.0,
    )
    return replace(made, **fields)


def holder(pid: int, gib: float, name: str = "python3", user: str = "bob") -> Holder:
    return Holder(pid=pid, name=name, user=user, used_bytes=round(gib * GIB))


def llama(layers: int, hidden: int, heads: int, intermediate: int) -> ModelShape:
    found = shape_of_config(
        {
            "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
            "num_key_value_heads": 8, "intermediate_size": intermediate, "vocab_size": 128256,
            "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
        }
    )  # fmt: skip
    assert isinstance(found, ModelShape)
    return found


MODELS = (
    # It was asked about for the CPU, where its shape does not matter.
    ModelFact(model="/srv/models/small.gguf"),
    ModelFact(model=LLAMA_8B, shape=llama(32, 4096, 32, 14336)),
    ModelFact(model=LLAMA_70B, shape=llama(80, 8192, 64, 28672)),
    ModelFact(model="mistralai/Mistral-7B-v0.3", shape_why="mistralai/Mistral-7B-v0.3 is not in the hub's cache"),
)


def wants(text: str, at: str = "manifests/chat.yaml:14:5", **fields: Any) -> Wanted:
    """An engine of vLLM on GPUs, unless the fields say otherwise."""
    engine = the_id(text)
    spec = EngineSpec.model_validate({"name": engine.name, "model": LLAMA_8B, **fields})
    names = tuple(in_stack(name, engine.stack) for name in spec.depends_on)
    return Wanted(id=engine, spec=spec, depends_on=names, directory=SOURCE, at=at)


def desired(*engines: Wanted, **fields: Any) -> DesiredState:
    return DesiredState(project="lab", source=SOURCE, wanted=engines, digest="sha256:0", **fields)


def on_gpu(
    text: str, port: int, pid: int, *indexes: int, gib: float, uses: float | None = None, **fields: Any
) -> Engine:
    """An engine of vLLM that runs on these GPUs and was given so much of each, half a GiB of it beside its budget."""
    spec = wants(
        text, **{key: value for key, value in fields.items() if key not in ("state", "reason", "project")}
    ).spec
    engine = running(text, port, pid, source=SOURCE, project=fields.get("project", "lab"))
    used = gib if uses is None else uses
    return replace(
        engine,
        written=canonical_json(written_fields(spec)),
        resolved=replace(
            engine.resolved,
            runtime="vllm",
            directory=SOURCE,
            argv=("/opt/inference/vllm/bin/vllm", "serve", spec.model),
            placement=Placement(
                node=NODE,
                host="127.0.0.1",
                port=port,
                devices=tuple(map(uuid, indexes)),
                device_indexes=indexes,
                memory_bytes_per_device=round((gib - 0.5) * GIB),
                context_bytes_per_device=GIB // 2,
                memory_fraction=round((gib - 0.5) * GIB / (81559 * MIB), 4),
                memory_source="computed",
                memory_told=True,
            ),
        ),
        measured_bytes=tuple((uuid(index), round(used * GIB)) for index in indexes if used),
        state=fields.get("state", "ready"),
        reason=fields.get("reason", ""),
    )


def machine(
    *devices: Device, engines: tuple[Engine, ...] = (), gaps: tuple[Gap, ...] = (), **fields: Any
) -> ObservedState:
    """A machine with these GPUs; what the engines use of them is added to what is used."""
    measured = {device.uuid: 0 for device in devices}
    for engine in engines:
        for name, used in engine.measured_bytes:
            measured[name] = measured.get(name, 0) + used
    seen = tuple(replace(device, used_bytes=device.used_bytes + measured[device.uuid]) for device in devices)
    made = world(*engines, gaps=gaps, devices=seen, **{"models": MODELS, **fields})
    return replace(made, programs=PROGRAMS)
