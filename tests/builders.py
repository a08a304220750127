"""Worlds and wishes in a line each."""

from dataclasses import replace
from typing import Any

from sage_reconcile.core.desired import DesiredState, Wanted
from sage_reconcile.core.facts import Gap, ModelFact, ProgramFact, RecordFact
from sage_reconcile.core.identity import EngineId, ProcessIdentity, engine_id
from sage_reconcile.core.label import LEADER, leader_text, variables
from sage_reconcile.core.observed import Device, Engine, Holder, Lingering, Listener, ObservedState
from sage_reconcile.core.resolved import Placement, Resolved
from sage_reconcile.core.shape import HeadCache, LayerGroup, ModelShape, WeightPart
from sage_reconcile.core.spec import EngineSpec, canonical_json, default_fields, written_fields

PROJECT = "lab"
SOURCE = "/srv/manifests"
NODE = "box"
BOOT = "boot-1"

PROGRAMS = (
    ProgramFact(name="llama-server", argv=("/usr/bin/llama-server",)),
    ProgramFact(name="vllm", argv=(), why="vllm is not on PATH"),
    ProgramFact(name="infinity_emb", argv=(), why="infinity_emb is not on PATH"),
    ProgramFact(name="engine", argv=("/usr/bin/engine",)),
)


def the_id(text: str, project: str = PROJECT) -> EngineId:
    found = engine_id(project, text)
    assert found is not None, text
    return found


def spec(name: str = "chat", **fields: Any) -> EngineSpec:
    """A CPU engine of llama.cpp, unless the fields say otherwise."""
    written = {"name": name, "model": f"/models/{name}.gguf", "use_gpu": False, **fields}
    return EngineSpec.model_validate(written)


def wanted(text: str, **fields: Any) -> Wanted:
    """`depends_on` is written as "stack/name"."""
    engine = the_id(text)
    the_spec = spec(engine.name, **fields)
    return Wanted(id=engine, spec=the_spec, depends_on=the_spec.depends_on, directory="/srv", at="lab.yaml:4:5")


def desired(*engines: Wanted, prune_stacks: tuple[str, ...] | None = None) -> DesiredState:
    return DesiredState(project=PROJECT, source=SOURCE, wanted=engines, prune_stacks=prune_stacks, digest="sha256:0")


def identity(pid: int, ticks: int | None = None, boot: str = BOOT) -> ProcessIdentity:
    return ProcessIdentity(node=NODE, boot_id=boot, pid=pid, start_ticks=pid * 10 if ticks is None else ticks)


def running(
    text: str,
    port: int,
    pid: int,
    /,
    *,
    project: str = PROJECT,
    state: str = "ready",
    source: str = SOURCE,
    **fields: Any,
) -> Engine:
    """An engine as it runs, started from a spec with these fields."""
    engine = the_id(text, project)
    the_spec = spec(engine.name, **fields)
    written = canonical_json(written_fields(the_spec))
    leader = identity(pid)
    argv = ("/usr/bin/llama-server", "--model", the_spec.model, "--port", str(port))
    return Engine(
        id=engine,
        source=source,
        written=written,
        resolved=Resolved(
            placement=Placement(node=NODE, host="127.0.0.1", port=port),
            runtime="llama.cpp",
            argv=argv,
            directory="/srv",
            defaults=canonical_json(default_fields()),
        ),
        leader=leader,
        leader_alive=True,
        members=(leader,),
        state=state,
        proved=state == "ready",
        has_record=True,
        health="ok" if state == "ready" else "refused",
        listens_on=(port,) if state in ("ready", "draining") else (),
    )


def foreign_listener(port: int, pid: int, name: str = "python") -> Listener:
    return Listener(address="127.0.0.1", port=port, pids=(pid,), owner=f"pid {pid} ({name})")


def record(engine: Engine, **fields: Any) -> RecordFact:
    return RecordFact(engine=engine.id, leader=engine.leader, port=engine.resolved.placement.port, **fields)


def world(
    *engines: Engine,
    listeners: tuple[Listener, ...] = (),
    records: tuple[RecordFact, ...] = (),
    gaps: tuple[Gap, ...] = (),
    models: tuple[ModelFact, ...] = (),
    **fields: Any,
) -> ObservedState:
    """A world with these engines, each with its listening socket, and foreign listeners beside them."""
    sockets = tuple(
        Listener(
            address="127.0.0.1",
            port=port,
            pids=tuple(member.pid for member in engine.members),
            owner=f"pid {engine.leader.pid} (llama-server)",
            engine=engine.id,
        )
        for engine in engines
        for port in engine.listens_on
    )
    return ObservedState(
        taken_at=1000.0,
        node=NODE,
        boot_id=BOOT,
        engines=tuple(sorted(engines, key=lambda engine: (engine.id, engine.leader))),
        listeners=tuple(sorted((*sockets, *listeners), key=lambda listener: (listener.port, listener.pids))),
        programs=PROGRAMS,
        records=records,
        gaps=gaps,
        models=models,
        **fields,
    )


# --- GPUs -------------------------------------------------------------------------------------------------------------

GIB = 1024**3

GPU_PROGRAMS = (
    *(fact for fact in PROGRAMS if fact.argv),
    ProgramFact(name="vllm", argv=("/usr/bin/vllm",)),
    ProgramFact(name="infinity_emb", argv=("/usr/bin/infinity_emb",)),
    ProgramFact(name="sglang", argv=("/usr/bin/sglang",)),
)


def gpu(
    index: int,
    gib: float = 80,
    *,
    foreign: tuple[tuple[int, float], ...] = (),
    lingering: tuple[tuple[str, float], ...] = (),
    nobody: float = 0,
    reserved: float = 0,
    **fields: Any,
) -> Device:
    """GPU-0, GPU-1 ... `foreign` are (pid, GiB), `lingering` (engine, GiB) of the dead, `nobody` GiB that no one holds.

    What our engines use is added by `gpu_world`.
    """
    holders = tuple(Holder(pid=pid, name="python", user="bob", used_bytes=round(size * GIB)) for pid, size in foreign)
    dead = tuple(
        Lingering(engine=the_id(engine), pid=700 + number, held_bytes=round(size * GIB))
        for number, (engine, size) in enumerate(lingering)
    )
    orphaned = sum(entry.held_bytes for entry in dead) + round(nobody * GIB)
    held = sum(holder.used_bytes for holder in holders) + orphaned
    written = {
        "uuid": f"GPU-{index}",
        "name": {24: "NVIDIA L4", 80: "NVIDIA H100 80GB HBM3"}.get(int(gib), "NVIDIA A100"),
        **fields,
    }
    return Device(
        node=NODE,
        index=index,
        total_bytes=round(gib * GIB),
        reserved_bytes=round(reserved * GIB),
        used_bytes=held,
        foreign_bytes=held,
        holders=holders,
        orphaned_bytes=orphaned,
        lingering=dead,
        **written,
    )


def mig_slice(index: int, number: int, gib: float = 20, **fields: Any) -> Device:
    """A slice of GPU-`index`; slices have the index of their GPU."""
    name = f"NVIDIA A100 MIG {number}g"
    return gpu(index, gib, uuid=f"MIG-{index}-{number}", name=name, parent=f"GPU-{index}", **fields)


def on_gpus(
    text: str,
    port: int,
    pid: int,
    devices: tuple[Device, ...],
    gib: float,
    /,
    *,
    context: float = 0,
    uses: tuple[float, ...] | None = None,
    **fields: Any,
) -> Engine:
    """An engine that runs on these devices and was given so many GiB of each; `uses` is what it takes of each."""
    count = len(devices)
    spread = {"tensor_parallel": count} if count > 1 and "pipeline_parallel" not in fields else {}
    written = {"use_gpu": True, "gpu_memory": f"{gib}GiB", **spread, **fields}
    engine = running(text, port, pid, **written)
    used = (gib + context,) * count if uses is None else uses
    return replace(
        engine,
        resolved=replace(
            engine.resolved,
            placement=replace(
                engine.resolved.placement,
                devices=tuple(device.uuid for device in devices),
                device_indexes=tuple(device.index for device in devices),
                memory_bytes_per_device=round(gib * GIB),
                context_bytes_per_device=round(context * GIB),
                memory_fraction=round(gib * GIB / devices[0].total_bytes, 4),
                memory_source="declared",
                memory_told=False,
            ),
        ),
        measured_bytes=tuple(
            sorted((device.uuid, round(size * GIB)) for device, size in zip(devices, used, strict=True) if size)
        ),
    )


def gpu_world(devices: tuple[Device, ...], *engines: Engine, **fields: Any) -> ObservedState:
    """A world whose devices are used by what they are said to be, and by these engines."""
    seen = world(*engines, **fields)
    used = {
        device.uuid: device.used_bytes + sum(dict(engine.measured_bytes).get(device.uuid, 0) for engine in engines)
        for device in devices
    }
    return replace(
        seen,
        devices=tuple(replace(device, used_bytes=used[device.uuid]) for device in devices),
        programs=GPU_PROGRAMS,
    )


def dead(text: str, device: Device, gib: float, *, pid: int = 700, phase: str = "") -> RecordFact:
    """The record of an engine that ran on a device and is gone."""
    engine = on_gpus(text, 8001, pid, (device,), gib)
    return record(engine, label=label_of(engine), phase=phase, started_at=1.0)


def label_of(engine: Engine) -> tuple[tuple[str, str], ...]:
    """What its processes carry."""
    label = variables(engine=engine.id, source=engine.source, written=engine.written, resolved=engine.resolved)
    label[LEADER] = leader_text(engine.leader.pid, engine.leader.start_ticks, 1)
    return tuple(sorted(label.items()))


def shape(gib: float = 15, *, heads: int = 32, layers: int = 32, **fields: Any) -> ModelShape:
    """A plain model of 16 bits whose weights are so large."""
    written: dict[str, Any] = {
        "family": "llama",
        "known": True,
        "basis": "tensors",
        "parts": (WeightPart(role="rest", storage="BF16", disk_bytes=round(gib * GIB)),),
        "groups": (LayerGroup(count=layers, cache=HeadCache(kv_heads=8, key_size=128, value_size=128)),),
        "layers": layers,
        "attention_heads": heads,
        "hidden": 4096,
        "intermediate": 14336,
        "vocabulary": 128256,
        "max_positions": 8192,
        **fields,
    }
    return ModelShape(**written)


def leaderless(engine: Engine, child_pid: int) -> Engine:
    """The engine after its first process was killed and a child lived on."""
    return replace(
        engine,
        leader_alive=False,
        members=(identity(child_pid),),
        state="failed",
        reason="its first process is gone; 1 of its processes still run",
        listens_on=(),
    )
