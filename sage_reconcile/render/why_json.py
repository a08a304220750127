"""The same as why_text, for a program."""

from dataclasses import asdict
from typing import Any

from sage_reconcile.core.device_shares import Share
from sage_reconcile.core.footprint import Footprint
from sage_reconcile.core.needs import Claim
from sage_reconcile.core.observed import Engine, Holder, Lingering, ObservedState
from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes import runtime_of
from sage_reconcile.core.spec import served_model
from sage_reconcile.core.why import DeviceWhy, EngineWhy
from sage_reconcile.render.plan_json import FORMAT_VERSION, blocked_json, shortfall_json, timestamp


def why_json(engines: tuple[EngineWhy, ...], devices: tuple[DeviceWhy, ...], observed: ObservedState) -> dict[str, Any]:
    """Engines or devices, whichever were asked about."""
    return {
        "format_version": FORMAT_VERSION,
        "observed_at": timestamp(observed.taken_at),
        "engines": [_engine(why) for why in engines],
        "devices": [_device(why) for why in devices],
    }


def _engine(why: EngineWhy) -> dict[str, Any]:
    spec, engine, step = why.spec, why.engine, why.step
    return {
        "project": why.id.project,
        "id": str(why.id),
        "kind": spec.kind if spec else None,
        "runtime": runtime_of(spec).name if spec else None,
        "model": served_model(spec) if spec else None,
        "at": why.at or None,
        "source": engine.source if engine else None,
        "state": engine.state if engine else "missing",
        "reason": engine.reason if engine else why.missing,
        "pid": engine.leader.pid if engine and engine.leader_alive else None,
        "restarts": engine.restarts if engine else 0,
        "action": step.action if step else "blocked" if why.blocked else "none" if why.at else None,
        "cause": (f"{step.reason}: {step.cause}" if step.cause else step.reason) if step else None,
        "placement": _placement(why.place, why.why_there) if why.place else None,
        "uses_bytes": dict(engine.measured_bytes) if engine else {},
        "needs": _claim(why.claim, told=why.told) if why.claim else None,
        "footprint": _footprint(why.footprint) if why.footprint else None,
        "model_files": why.files or None,
        "waits_for": [asdict(waited) for waited in why.waits_for],
        "blocked": blocked_json(why.blocked) if why.blocked else None,
        "devices": [shortfall_json(device) for device in why.devices],
    }


def _placement(place: Placement, why_there: str) -> dict[str, Any]:
    return {
        "node": place.node,
        "port": place.port,
        "devices": list(place.devices),
        "device_indexes": list(place.device_indexes),
        "memory_bytes_per_device": place.memory_bytes_per_device,
        "context_bytes_per_device": place.context_bytes_per_device,
        "memory_fraction": place.memory_fraction,
        "memory_source": place.memory_source,
        "memory_told": place.memory_told,
        "why": why_there,
    }


def _claim(claim: Claim, *, told: bool) -> dict[str, Any]:
    return {
        "memory_bytes_per_device": claim.memory_bytes,
        "context_bytes_per_device": claim.context_bytes,
        "memory_fraction": claim.fraction,
        "memory_source": claim.source,
        "memory_told": told,
    }


def _footprint(known: Footprint) -> dict[str, Any]:
    return {
        "terms": [
            {"name": term.name, "bytes": term.memory_bytes, "why": term.why, "in_budget": term.in_budget}
            for term in known.terms
        ],
        "budget_bytes": known.budget_bytes,
        "total_bytes": known.total_bytes,
        "kv_bytes_per_token": known.kv_bytes_per_token,
        "kv_bytes_per_sequence": known.kv_bytes_per_sequence,
    }


def _device(why: DeviceWhy) -> dict[str, Any]:
    device = why.device
    return {
        "index": why.index,
        "uuid": device.uuid if device else None,
        "name": device.name if device else None,
        "seen": device is not None,
        "total_bytes": device.total_bytes if device else 0,
        "free_bytes": why.free_bytes,
        "reserve_bytes": why.reserve_bytes,
        "shares": [_share(share) for share in why.shares],
        "closed": (device.closed or None) if device else None,
        "troubles": list(device.troubles) if device else [],
        "coming": [
            {"engine": str(step.engine), "action": step.action, "bytes": step.placement.counted_bytes_per_device}
            for step in why.coming
            if step.placement is not None
        ],
        "gaps": list(why.gaps),
        "stranded": [engine.id.full for engine in why.stranded],
    }


def _share(share: Share) -> dict[str, Any]:
    size, who = share
    match who:
        case Engine():
            return {"kind": "engine", "bytes": size, "engine": who.id.full, "pid": who.leader.pid, "state": who.state}
        case Holder():
            return {"kind": "foreign", "bytes": size, "pid": who.pid, "name": who.name, "user": who.user}
        case Lingering():
            return {"kind": "not given back", "bytes": size, "engine": who.engine.full, "pid": who.pid}
        case _:
            return {"kind": who, "bytes": size}
