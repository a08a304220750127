"""Worlds and wishes in a line each."""

from dataclasses import replace
from typing import Any

from sage_reconcile.core.desired import DesiredState, Wanted
from sage_reconcile.core.facts import Gap, ModelFact, ProgramFact, RecordFact
from sage_reconcile.core.identity import EngineId, ProcessIdentity, engine_id
from sage_reconcile.core.observed import Engine, Listener, ObservedState
from sage_reconcile.core.resolved import Placement, Resolved
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
