"""What runs, for a reader and for a program."""

from typing import Any

from sage_reconcile.core.compare import how_it_ended
from sage_reconcile.core.device_notes import unproved
from sage_reconcile.core.facts import AppliedFact, RecordFact
from sage_reconcile.core.observed import Engine, ObservedState, model_of, spec_of
from sage_reconcile.core.quantities import duration_text, gib
from sage_reconcile.core.spec import parse_written, served_model
from sage_reconcile.render.gpu_text import devices_json
from sage_reconcile.render.lines import WIDTH, flowed, sentence, words
from sage_reconcile.render.paint import PLAIN, Paint, columns
from sage_reconcile.render.plan_json import FORMAT_VERSION, timestamp

_COLOURS = {"ready": "green", "starting": "yellow", "draining": "yellow", "stopping": "yellow"}

# What stands below a row, because it does not fit into it, begins here.
_BELOW = 4


# An engine's line in the table, by column.
_Row = dict[str, str]


def status_text(
    engines: tuple[Engine, ...],
    missing: tuple[tuple[AppliedFact, RecordFact | None], ...],
    observed: ObservedState,
    uptimes: dict[int, float],
    paint: Paint = PLAIN,
    width: int = WIDTH,
) -> str:
    """A line for each engine and why it is not ready, then those that should run and do not, then foreign engines."""
    several = len({engine.id.project for engine in engines} | {applied.engine.project for applied, _ in missing}) > 1
    rows = [
        {
            "ENGINE": engine.id.full if several else str(engine.id),
            "STATE": engine.state,
            "KIND": _kind(engine),
            "MODEL": model_of(engine),
            "PORT": str(engine.resolved.placement.port),
            "GPU": _gpus(engine),
            "PID": str(engine.leader.pid),
            "UP": duration_text(uptimes.get(engine.leader.pid, 0.0)),
            "REASON": "" if engine.state == "ready" else engine.reason,
        }
        for engine in engines
    ]
    rows += [_missing_row(applied, record, observed, several=several) for applied, record in missing]
    rows = sorted(rows, key=lambda row: tuple(row.values()))
    if not observed.devices and all(row["GPU"] == "-" for row in rows):
        rows = _without("GPU", rows)
    # An id that names nothing was refused: what is left out is left out because of its project.
    nothing = "no engine of that project runs here" if observed.engines else "no engine of yours runs here"
    lines = _table(rows, width, paint) if rows else [nothing]
    for engine in engines:
        for told in filter(None, (engine.exposed, *unproved(engine, observed))):
            lines += sentence(f"{engine.id} {told}", before="note: ", indent=_BELOW)
    lines += _foreign(observed, width)
    for gap in observed.gaps:
        lines += sentence(f"{gap.what}: {gap.why}", before="cannot see: ", indent=_BELOW)
    if any(applied in observed.applied for applied, _ in missing):
        lines += ["", "start what is missing with: sage apply"]
    return "\n".join(lines)


def _missing_row(applied: AppliedFact, record: RecordFact | None, observed: ObservedState, *, several: bool) -> _Row:
    kind, model = _applied_fields(applied)
    return {
        "ENGINE": applied.engine.full if several else str(applied.engine),
        "STATE": _missing_state(record, observed),
        "KIND": kind,
        "MODEL": model,
        "PORT": str(record.port) if record and record.port else "-",
        "GPU": "-",
        "PID": "-",
        "UP": "-",
        "REASON": _missing_reason(record, observed),
    }


def _without(column: str, rows: list[_Row]) -> list[_Row]:
    return [{name: cell for name, cell in row.items() if name != column} for row in rows]


def _table(rows: list[_Row], width: int, paint: Paint, *, indent: str = "") -> list[str]:
    """The rows below the names of their columns. 1. What nobody has is left out.

    What makes it too wide stands elsewhere: 2. reasons below the rows, 3. models too, 4. the longest names above them.
    """
    below: dict[str, list[str]] = {}
    names = [""] * len(rows)
    # (1)
    if not any(row.get("REASON") for row in rows):
        rows = _without("REASON", rows)
    # (2), (3)
    for column in ("REASON", "MODEL"):
        if column in rows[0] and _width(rows, indent) > width:
            below[column] = [row[column] for row in rows]
            rows = _without(column, rows)
    # (4)
    if (too_much := _width(rows, indent) - width) > 0 and "ENGINE" in rows[0]:
        longest = max(len(row["ENGINE"]) for row in rows) - too_much
        names = [row["ENGINE"] if len(row["ENGINE"]) > longest else "" for row in rows]
        rows = [{**row, "ENGINE": ""} if name else row for row, name in zip(rows, names, strict=True)]
    head, *lines = _columns(rows, indent)
    table = [paint("bold", head)]
    for index, line in enumerate(lines):
        state = rows[index].get("STATE", "")
        painted = f" {paint(_COLOURS.get(state, 'red'), state)} "
        table += [names[index]] if names[index] else []
        table.append(line.replace(f" {state} ", painted, 1) if state else line)
        table += _below(*(below[column][index] if column in below else "" for column in ("MODEL", "REASON")))
    return table


def _below(model: str, reason: str) -> list[str]:
    """What a row has no room for."""
    if not model or not reason:
        return sentence(model or reason, before=" " * _BELOW, indent=_BELOW) if model or reason else []
    return flowed([f"{' ' * _BELOW}{model}:", *words(reason, before=" ")], indent=_BELOW)


def _width(rows: list[_Row], indent: str) -> int:
    return max(map(len, _columns(rows, indent)))


def _columns(rows: list[_Row], indent: str) -> list[str]:
    return columns([tuple(rows[0]), *(tuple(row.values()) for row in rows)], indent=indent)


def _gpus(engine: Engine) -> str:
    return ",".join(map(str, engine.resolved.placement.device_indexes)) or "-"


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
    # Nobody has waited for it yet, unless it is stuck.
    what = "did not come back" if record.phase == "stuck" else "are not given back yet"
    return f"pid {record.leader.pid} is gone, and {not_back} {what}" if not_back else how_it_ended(record)


def _not_back(record: RecordFact, observed: ObservedState) -> str:
    """What a dead engine still holds: "10.0 GiB of gpu0"."""
    parts = [
        f"{gib(entry.held_bytes)} GiB of gpu{device.index}"
        for device in observed.devices
        for entry in device.lingering
        if (entry.engine, entry.pid) == (record.engine, record.leader.pid)
    ]
    return " and ".join(parts)


def _foreign(observed: ObservedState, width: int) -> list[str]:
    if not observed.foreign:
        return []
    rows = [
        {
            "PID": str(foreign.pid),
            "USER": foreign.user,
            "KIND": foreign.kind,
            "MODEL": foreign.model,
            "PORT": str(foreign.port or "-"),
            "PROGRAM": foreign.name,
        }
        for foreign in observed.foreign
    ]
    lines = ["", "not ours:", *_table(rows, width, PLAIN, indent="  ")]
    for foreign in observed.foreign:
        if foreign.note:
            lines += sentence(f"pid {foreign.pid}: {foreign.note}", before="  note: ", indent=_BELOW)
    return lines


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
        "devices": devices_json(observed, observed.devices),
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
