"""A plan for a reader: drift first, then the steps with their causes, then what is blocked, then one summary line."""

import json

from sage_reconcile.core.observed import ObservedState
from sage_reconcile.core.plan import Blocked, Plan, Step
from sage_reconcile.render.paint import PLAIN, Paint

SYMBOLS = {"start": "+", "stop": "-", "recreate": "-/+", "update": "~", "kept": ".", "blocked": "!"}
_MEANINGS = {
    "start": "start",
    "stop": "stop",
    "recreate": "recreate (downtime)",
    "update": "update in place",
    "kept": "kept",
    "blocked": "blocked",
}
_COLOURS = {"start": "green", "stop": "red", "recreate": "yellow", "update": "cyan", "kept": "dim", "blocked": "red"}

_VERBS = {
    "dependency": "cannot start",
    "model_missing": "cannot start",
    "not_observed": "cannot decide about",
    "program_missing": "cannot start",
}

# Longer values are cut: the manifest has them in full.
_VALUE_WIDTH = 60


def plan_text(plan: Plan, observed: ObservedState, paint: Paint = PLAIN) -> str:
    """The whole plan, without a line break at its end."""
    blocks = [_head(plan, observed), _drift(plan, paint), _steps(plan, paint), _blocked(plan, paint), _notes(plan)]
    return "\n\n".join("\n".join(block) for block in [*blocks, [_summary(plan, paint)]] if block)


def _head(plan: Plan, observed: ObservedState) -> list[str]:
    devices = f"{len(observed.devices)} GPUs" if observed.devices else "no GPU"
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
    ]
    width = max((len(change.path) for change in step.changes), default=0)
    for change in step.changes:
        forces = "  # forces a restart" if change.is_identity else ""
        at = f"  {change.at}" if change.at else ""
        lines.append(f"        {change.path.ljust(width)}  {_value(change.old)} -> {_value(change.new)}{forces}{at}")
    return lines


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
    if blocked.would_help:
        lines.append(f"  would help: {' | '.join(blocked.would_help)}")
    return lines


def _notes(plan: Plan) -> list[str]:
    lines = [f"note: {note}" for note in plan.notes]
    blocked = {entry.engine for entry in plan.blocked}
    kept = [str(engine) for engine in plan.kept if engine not in blocked]
    if kept:
        lines.append(f"note: not asked for, and left alone: {', '.join(kept)}")
    return lines


def _summary(plan: Plan, paint: Paint) -> str:
    counts = {
        action: sum(step.action == action for step in plan.steps) for action in ("start", "recreate", "update", "stop")
    }
    changes = ", ".join(f"{count} to {action}" for action, count in counts.items() if count)
    parts = [changes] if changes else []
    if plan.blocked:
        parts.append(f"{len(plan.blocked)} blocked")
    if plan.unchanged:
        parts.append(f"{len(plan.unchanged)} unchanged")
    if not plan.steps and not plan.blocked:
        return paint("green", "No changes.") + (f" {parts[-1]}." if parts else "")
    return f"Plan: {', '.join(parts)}."
