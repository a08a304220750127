"""A plan for a program: the JSON form of the contract."""

import hashlib
import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter

from sage_reconcile.core.device_table import device_rows
from sage_reconcile.core.observed import ObservedState
from sage_reconcile.core.plan import Act, Blocked, Plan, RelabelEngine, StartEngine, Step, StopEngine
from sage_reconcile.core.refusal import Shortfall

FORMAT_VERSION = "1.0"

_ACTIONS = ("start", "stop", "recreate", "surge", "update", "move", "adopt", "forget")
_ACT = TypeAdapter(Act)


def plan_json(plan: Plan, observed: ObservedState) -> dict[str, Any]:
    """The plan as plain JSON values. Environment values that came from secrets never are in a plan."""
    counts = {action: sum(step.action == action for step in plan.steps) for action in _ACTIONS}
    return {
        "format_version": FORMAT_VERSION,
        "project": plan.project,
        "source": plan.source,
        "changes": plan.changes,
        "optimality": plan.optimality,
        "basis": {
            "manifests": plan.digest,
            "observed": observed_digest(observed),
            "observed_at": timestamp(observed.taken_at),
            "host": observed.node,
            "boot_id": observed.boot_id,
        },
        "drift": [{"engine": str(drift.engine), "what": drift.what} for drift in plan.drift],
        "notes": list(plan.notes),
        "steps": [_step(step, observed) for step in plan.steps],
        "acts": [_act(act) for act in plan.acts],
        "desired": [{"id": str(engine), "spec": json.loads(written)} for engine, written in plan.desired],
        "blocked": [blocked_json(blocked) for blocked in plan.blocked],
        "unchanged": [str(engine) for engine in plan.unchanged],
        "kept": [str(engine) for engine in plan.kept],
        "devices": [asdict(row) for row in device_rows(plan, observed)],
        "summary": counts | {"unchanged": len(plan.unchanged), "blocked": len(plan.blocked)},
    }


def validation_json(plan: Plan, observed: ObservedState) -> dict[str, Any]:
    """What `sage validate --observed` says of valid manifests: what has no place on the machine."""
    return {
        "format_version": FORMAT_VERSION,
        "valid": True,
        "problems": [],
        "observed": {"host": observed.node, "observed_at": timestamp(observed.taken_at)},
        "placeable": not plan.blocked,
        "blocked": [blocked_json(blocked) for blocked in plan.blocked],
    }


def blocked_json(blocked: Blocked) -> dict[str, Any]:
    """A refusal: why, with each device, and what would help."""
    return {
        "engine": str(blocked.engine),
        "reason": blocked.reason,
        "why": blocked.why,
        "devices": [shortfall_json(device) for device in blocked.devices],
        "would_help": list(blocked.would_help),
        "at": blocked.at,
    }


def timestamp(seconds: float) -> str:
    """Epoch seconds as RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def observed_digest(observed: ObservedState) -> str:
    """A digest of what a plan depends on: engines, sockets, programs, models, gaps. Not of clocks and counters."""
    used = {
        "engines": [
            [
                engine.id.full,
                engine.written,
                engine.leader.pid,
                engine.leader.start_ticks,
                engine.leader_alive,
                engine.phase,
            ]
            for engine in observed.engines
        ],
        "listeners": sorted({(listener.port, listener.owner) for listener in observed.listeners}),
        "programs": [[program.name, *program.argv] for program in observed.programs],
        "models": [[model.model, model.why, repr(model.shape)] for model in observed.models],
        "devices": [
            [device.uuid, device.index, device.total_bytes, device.unavailable_bytes, device.closed]
            for device in observed.devices
        ],
        "gaps": [[gap.what, gap.subject] for gap in observed.gaps],
    }
    text = json.dumps(used, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def shortfall_json(device: Shortfall) -> dict[str, Any]:
    return {
        "index": device.index,
        "uuid": device.uuid,
        "total_bytes": device.total_bytes,
        "free_bytes": device.free_bytes,
        "short_bytes": device.short_bytes,
        "held_by": list(device.held_by),
        "why_not": device.why_not,
    }


def _step(step: Step, observed: ObservedState) -> dict[str, Any]:
    place = step.placement
    return {
        "action": step.action,
        "engine": str(step.engine.first),
        "replica": step.engine.replica,
        "kind": step.kind,
        "runtime": step.runtime,
        "model": step.model,
        "node": place.node if place else observed.node,
        "devices": list(place.devices) if place else [],
        "device_indexes": list(place.device_indexes) if place else [],
        "memory_bytes_per_device": place.memory_bytes_per_device if place else 0,
        "context_bytes_per_device": place.context_bytes_per_device if place else 0,
        "memory_fraction": place.memory_fraction if place else 0.0,
        "free_at_start_bytes": place.free_at_start_bytes if place else 0,
        "fraction_of_free": place.fraction_of_free if place else 0.0,
        "memory_source": place.memory_source if place else "none",
        "memory_told": place.memory_told if place else False,
        "port": place.port if place else None,
        "reason": step.reason,
        "cause": step.cause,
        "changes": [
            {"path": change.path, "old": json.loads(change.old), "new": json.loads(change.new), "at": change.at}
            for change in step.changes
        ],
        "argv": list(step.argv),
        "env": dict(step.env),
    }


def _act(act: Act) -> dict[str, Any]:
    name = {StopEngine: "stop", StartEngine: "start", RelabelEngine: "relabel"}[type(act)]
    fields: dict[str, Any] = _ACT.dump_python(act, mode="json")
    if "env" in fields:
        fields["env"] = dict(fields["env"])
    return {"act": name, **fields, "engine": str(act.engine)}
