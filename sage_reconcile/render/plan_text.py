"""A plan for a reader: drift first, then the steps with their causes, then what is blocked, then one summary line."""

import json

from sage_reconcile.core.device_table import device_rows
from sage_reconcile.core.observed import ObservedState
from sage_reconcile.core.plan import Blocked, Plan, Step
from sage_reconcile.core.refusal import Shortfall
from sage_reconcile.render.gpu_text import gib
from sage_reconcile.render.paint import PLAIN, Paint

SYMBOLS = {"start": "+", "stop": "-", "recreate": "-/+", "move": ">", "update": "~", "kept": ".", "blocked": "!"}
_MEANINGS = {
    "start": "start",
    "stop": "stop",
    "recreate": "recreate (downtime)",
    "move": "move (downtime)",
    "update": "update in place",
    "kept": "kept",
    "blocked": "blocked",
}
_COLOURS = {
    "start": "green",
    "stop": "red",
    "recreate": "yellow",
    "move": "yellow",
    "update": "cyan",
    "kept": "dim",
    "blocked": "red",
}
_COUNTED = ("start", "recreate", "move", "update", "stop")

_VERBS = {
    "dependency": "cannot start",
    "model_missing": "cannot start",
    "not_observed": "cannot decide about",
    "program_missing": "cannot start",
}

# Refusals read well on a terminal of 80 columns.
_LINE_WIDTH = 80
_CONTINUED = 8

# Longer values are cut: the manifest has them in full.
_VALUE_WIDTH = 60


def plan_text(plan: Plan, observed: ObservedState, paint: Paint = PLAIN) -> str:
    """The whole plan, without a line break at its end."""
    blocks = [
        _head(plan, observed),
        _drift(plan, paint),
        _steps(plan, paint),
        _blocked(plan, paint),
        _devices(plan, observed),
        _notes(plan),
    ]
    return "\n\n".join("\n".join(block) for block in [*blocks, [_summary(plan, paint)]] if block)


def _head(plan: Plan, observed: ObservedState) -> list[str]:
    count = len(observed.devices)
    devices = f"{count} GPU{'s' if count > 1 else ''}" if count else "no GPU"
    return [f"project {plan.project}  host {observed.node}  {devices}  {plan.source}"]


def _drift(plan: Plan, paint: Paint) -> list[str]:
    if not plan.drift:
        return []
    lines = [f"  {paint('yellow', '~')} {drift.engine}  {drift.what}" for drift in plan.drift]
    return ["Drift since the last apply:", *lines]


def _steps(plan: Plan, paint: Paint) -> list[str]:
    if not plan.steps:
        return []
    legend = ", ".join(
        f"{SYMBOLS[action]} {_MEANINGS[action]}" for action in _MEANINGS if action in _actions_used(plan)
    )
    lines = [f"Planned ({legend}):"]
    for step in plan.steps:
        lines += _step(step, paint)
    return lines


def _actions_used(plan: Plan) -> set[str]:
    used = {step.action for step in plan.steps}
    return used | ({"blocked"} if plan.blocked else set())


def _step(step: Step, paint: Paint) -> list[str]:
    symbol = paint(_COLOURS[step.action], SYMBOLS[step.action].ljust(3))
    where = f"  port {step.placement.port}" if step.placement else ""
    devices = (
        f"  GPU {','.join(map(str, step.placement.device_indexes))}"
        if step.placement and step.placement.devices
        else ""
    )
    lines = [
        f"  {symbol} {paint('bold', str(step.engine))}  {step.kind}  {step.model}  {step.runtime}{where}{devices}",
        f"        {_reason(step)}",
        *_memory(step),
    ]
    width = max((len(change.path) for change in step.changes), default=0)
    for change in step.changes:
        forces = "  # forces a restart" if change.is_identity else ""
        at = f"  {change.at}" if change.at else ""
        lines.append(f"        {change.path.ljust(width)}  {_value(change.old)} -> {_value(change.new)}{forces}{at}")
    return lines


def _memory(step: Step) -> list[str]:
    """The memory that a start counts for, where that is known from, and what the engine is told."""
    place = step.placement
    if place is None or not place.devices:
        return []
    each = " on each" if len(place.devices) > 1 else ""
    beside = f" and {gib(place.context_bytes_per_device)} beside it" if place.context_bytes_per_device else ""
    told = f"told {place.memory_fraction} of the device" if place.memory_told else "not told"
    if place.fraction_of_free:
        told = f"told {place.fraction_of_free} of the {gib(place.free_at_start_bytes)} GiB that are free then"
    return [f"        memory {gib(place.memory_bytes_per_device)} GiB{each}{beside}, {place.memory_source}, {told}"]


def _reason(step: Step) -> str:
    return f"{step.reason}: {step.cause}" if step.cause else step.reason


def _value(text: str) -> str:
    """A JSON value as people write it."""
    if json.loads(text) is None:
        return "(unset)"
    return text if len(text) <= _VALUE_WIDTH else text[:_VALUE_WIDTH] + "…"


def _blocked(plan: Plan, paint: Paint) -> list[str]:
    lines: list[str] = []
    for blocked in plan.blocked:
        lines += blocked_lines(blocked, kept=blocked.engine in plan.kept, paint=paint)
    return lines


def blocked_lines(blocked: Blocked, *, kept: bool, paint: Paint = PLAIN) -> list[str]:
    """A refusal: what cannot be done, why, and what would help."""
    stays = "  (what runs is kept)" if kept else ""
    verb = _VERBS.get(blocked.reason, "cannot place")
    lines = [f"{paint('red', '!')} {verb} {blocked.engine}: {blocked.why}{stays}"]
    if blocked.at:
        lines[0] += f"  {blocked.at}"
    lines += [line for device in blocked.devices for line in _shortfall(device)]
    if blocked.would_help:
        verb = "would fit with" if blocked.devices else "would help"
        first, *others = [f"{cure} | " for cure in blocked.would_help[:-1]] + [blocked.would_help[-1]]
        lines += _wrapped([f"  {verb}: {first}", *others])
    return lines


def _shortfall(device: Shortfall) -> list[str]:
    """One device of a refusal: what is free, what is missing, and who has it."""
    head = f"  gpu{device.index}  free {gib(max(device.free_bytes, 0))} of {gib(device.total_bytes)} GiB"
    if device.why_not:
        return _wrapped([head, f"  {device.why_not}"])
    if not device.short_bytes:
        return [f"{head}  fits"]
    head += f"  short {gib(device.short_bytes)}"
    if not device.held_by:
        return [head]
    first, *others = [f"{who}, " for who in device.held_by[:-1]] + [device.held_by[-1]]
    return _wrapped([head, f"  held by {first}", *others])


def _wrapped(parts: list[str]) -> list[str]:
    """Parts in a row, each whole, on as many lines as it takes; all but the first line are indented."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part.rstrip(" ,|")) > _LINE_WIDTH:
            lines.append(" " * _CONTINUED + part.lstrip())
        else:
            lines[-1] += part
    return [line.rstrip() for line in lines]


def _devices(plan: Plan, observed: ObservedState) -> list[str]:
    """What each device holds now, at most, and after; only where the plan puts something on a device, or cannot."""
    on_devices = any(step.placement and step.placement.devices for step in plan.steps)
    freed = any(getattr(act, "devices", ()) for act in plan.acts)
    if not (on_devices or freed or any(blocked.devices for blocked in plan.blocked)):
        return []
    lines = ["Device memory in GiB      now    peak   after      of"]
    for row in device_rows(plan, observed):
        sizes = (row.now_bytes, row.peak_bytes, row.after_bytes, row.total_bytes)
        lines.append(f"  gpu{row.index}".ljust(21) + "".join(gib(size).rjust(8) for size in sizes) + f"  {row.name}")
    if plan.optimality != "proved":
        lines.append("  the search for places ended before it had tried all: there may be better ones")
    return lines


def _notes(plan: Plan) -> list[str]:
    lines = [f"note: {note}" for note in plan.notes]
    blocked = {entry.engine for entry in plan.blocked}
    kept = [str(engine) for engine in plan.kept if engine not in blocked]
    if kept:
        lines.append(f"note: not asked for, and left alone: {', '.join(kept)}")
    return lines


def _summary(plan: Plan, paint: Paint) -> str:
    counts = {action: sum(step.action == action for step in plan.steps) for action in _COUNTED}
    changes = ", ".join(f"{count} to {action}" for action, count in counts.items() if count)
    parts = [changes] if changes else []
    if plan.blocked:
        parts.append(f"{len(plan.blocked)} blocked")
    if plan.unchanged:
        parts.append(f"{len(plan.unchanged)} unchanged")
    if not plan.steps and not plan.blocked:
        return paint("green", "No changes.") + (f" {parts[-1]}." if parts else "")
    return f"Plan: {', '.join(parts)}."
