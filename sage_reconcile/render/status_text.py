"""What runs, for a reader and for a program."""

from typing import Any

from sage_reconcile.core.device_notes import unproved
from sage_reconcile.core.facts import AppliedFact, RecordFact
from sage_reconcile.core.observed import Engine, ObservedState, model_of, spec_of
from sage_reconcile.core.quantities import duration_text, gib
from sage_reconcile.core.spec import parse_written, served_model
from sage_reconcile.render.gpu_text import devices_json
from sage_reconcile.render.paint import PLAIN, Paint, columns
from sage_reconcile.render.plan_json import FORMAT_VERSION, timestamp

# Left out on a machine without GPUs.
_GPU_COLUMN = 5

_COLOURS = {"ready": "green", "starting": "yellow", "draining": "yellow", "stopping": "yellow"}


def status_text(
    engines: tuple[Engine, ...],
    missing: tuple[tuple[AppliedFact, RecordFact | None], ...],
    observed: ObservedState,
    uptimes: dict[int, float],
    paint: Paint = PLAIN,
) -> str:
    """A line for each engine, then those that should run and do not, then foreign engines."""
    several = len({engine.id.project for engine in engines} | {applied.engine.project for applied, _ in missing}) > 1
    rows = [
        (
            engine.id.full if several else str(engine.id),
            engine.state,
            _kind(engine),
            model_of(engine),
            str(engine.resolved.placement.port),
            _gpus(engine),
            str(engine.leader.pid),
            duration_text(uptimes.get(engine.leader.pid, 0.0)),
            "" if engine.state == "ready" else engine.reason,
        )
        for engine in engines
    ]
    rows += [
        (
            applied.engine.full if several else str(applied.engine),
            _missing_state(record, observed),
            *_applied_fields(applied),
            str(record.port) if record and record.port else "-",
            "-",
            "-",
            "-",
            _missing_reason(record, observed),
        )
        for applied, record in missing
    ]
    if not rows:
        lines = ["no engine of yours runs here"]
    else:
        table: list[tuple[str, ...]] = [
            ("ENGINE", "STATE", "KIND", "MODEL", "PORT", "GPU", "PID", "UP", "REASON"),
            *sorted(rows),
        ]
        if not observed.devices and all(row[_GPU_COLUMN] == "-" for row in rows):
            table = [(*row[:_GPU_COLUMN], *row[_GPU_COLUMN + 1 :]) for row in table]
        lines = _painted(columns(table), paint)
    lines += [f"note: {engine.id} {engine.exposed}" for engine in engines if engine.exposed]
    lines += [f"note: {engine.id} {sentence}" for engine in engines for sentence in unproved(engine, observed)]
    lines += _foreign(observed)
    lines += [f"cannot see: {gap.what}: {gap.why}" for gap in observed.gaps]
    if any(applied in observed.applied for applied, _ in missing):
        lines += ["", "start what is missing with: sage apply"]
    return "\n".join(lines)


def _gpus(engine: Engine) -> str:
    return ",".join(map(str, engine.resolved.placement.device_indexes)) or "-"


def _painted(lines: list[str], paint: Paint) -> list[str]:
    painted = [paint("bold", lines[0])]
    for line in lines[1:]:
        state = line.split()[1]
        painted.append(line.replace(f" {state} ", f" {paint(_COLOURS.get(state, 'red'), state)} ", 1))
    return painted


def _kind(engine: Engine) -> str:
    spec = spec_of(engine)
    return spec.kind if spec is not None else "?"


def _applied_fields(applied: AppliedFact) -> tuple[str, str]:
    spec = parse_written(applied.written)
    return (spec.kind, served_model(spec)) if spec is not None else ("?", "?")


def _missing_state(record: RecordFact | None, observed: ObservedState) -> str:
    """An engine that has ended and does not give its memory back is stuck, as one that does not end."""
    return "stuck" if record is not None and record.phase == "stuck" and _not_back(record, observed) else "missing"


def _missing_reason(record: RecordFact | None, observed: ObservedState) -> str:
    if record is None:
        return "it was applied and does not run"
    if record.leader.boot_id != observed.boot_id:
        return "the machine was restarted"
    not_back = _not_back(record, observed)
    return f"pid {record.leader.pid} is gone" + (f", and {not_back} did not come back" if not_back else "")


def _not_back(record: RecordFact, observed: ObservedState) -> str:
    """What a dead engine still holds: "10.0 GiB of gpu0"."""
    parts = [
        f"{gib(entry.held_bytes)} GiB of gpu{device.index}"
        for device in observed.devices
        for entry in device.lingering
        if (entry.engine, entry.pid) == (record.engine, record.leader.pid)
    ]
    return " and ".join(parts)


def _foreign(observed: ObservedState) -> list[str]:
    if not observed.foreign:
        return []
    rows = [
        (str(foreign.pid), foreign.user, foreign.kind, foreign.model, str(foreign.port or "-"), foreign.name)
        for foreign in observed.foreign
    ]
    notes = [f"  note: pid {foreign.pid}: {foreign.note}" for foreign in observed.foreign if foreign.note]
    table = columns([("PID", "USER", "KIND", "MODEL", "PORT", "PROGRAM"), *rows], indent="  ")
    return ["", "not ours:", *table, *notes]


def status_json(
    engines: tuple[Engine, ...],
    missing: tuple[tuple[AppliedFact, RecordFact | None], ...],
    observed: ObservedState,
    uptimes: dict[int, float],
) -> dict[str, Any]:
    """The JSON form of the contract."""
    applied = {fact.engine: fact.written for fact in observed.applied}
    rows = [_engine(engine, applied, uptimes, observed) for engine in engines]
    rows += [_missing(fact, record, observed) for fact, record in missing]
    return {
        "format_version": FORMAT_VERSION,
        "observed_at": timestamp(observed.taken_at),
        "engines": sorted(rows, key=lambda row: (row["project"], row["id"])),
        "foreign": [
            {
                "pid": foreign.pid,
                "name": foreign.name,
                "user": foreign.user,
                "kind": foreign.kind,
                "model": foreign.model,
                "port": foreign.port,
                "devices": {
                    device.uuid: holder.used_bytes
                    for device in observed.devices
                    for holder in device.holders
                    if holder.pid == foreign.pid
                },
                "note": foreign.note,
            }
            for foreign in observed.foreign
        ],
        "devices": devices_json(observed),
        "suspended": [],
        "gaps": [{"what": gap.what, "why": gap.why} for gap in observed.gaps],
    }


def _engine(
    engine: Engine, applied: dict[Any, str], uptimes: dict[int, float], observed: ObservedState
) -> dict[str, Any]:
    place = engine.resolved.placement
    spec = spec_of(engine)
    return {
        "project": engine.id.project,
        "id": str(engine.id),
        "stack": engine.id.stack,
        "name": engine.id.name,
        "replica": engine.id.replica,
        "kind": _kind(engine),
        "runtime": engine.resolved.runtime,
        "model": model_of(engine),
        "label": spec.label if spec else None,
        "state": engine.state,
        "reason": engine.reason or engine.exposed or "; ".join(unproved(engine, observed)),
        "pid": engine.leader.pid if engine.leader_alive else None,
        "members": [process.pid for process in engine.members],
        "node": place.node,
        "port": place.port,
        "base_url": f"http://{place.host}:{place.port}/v1",
        "devices": list(place.devices),
        "memory_bytes": place.counted_bytes_per_device * len(place.devices),
        "declared": engine.id in applied,
        "spec_current": applied.get(engine.id) == engine.written,
        "uptime_seconds": round(uptimes.get(engine.leader.pid, 0.0), 1),
        "restarts": engine.restarts,
        "log": engine.log or None,
    }


def _missing(applied: AppliedFact, record: RecordFact | None, observed: ObservedState) -> dict[str, Any]:
    kind, model = _applied_fields(applied)
    return {
        "project": applied.engine.project,
        "id": str(applied.engine),
        "stack": applied.engine.stack,
        "name": applied.engine.name,
        "replica": applied.engine.replica,
        "kind": kind,
        "runtime": None,
        "model": model,
        "label": None,
        "state": _missing_state(record, observed),
        "reason": _missing_reason(record, observed),
        "pid": None,
        "members": [],
        "node": observed.node,
        "port": record.port if record and record.port else None,
        "base_url": None,
        "devices": [],
        "memory_bytes": 0,
        "declared": applied in observed.applied,
        "spec_current": False,
        "uptime_seconds": 0.0,
        "restarts": record.restarts if record else 0,
        "log": record.log if record and record.log else None,
    }
