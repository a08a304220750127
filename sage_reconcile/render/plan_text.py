"""A plan for a reader: drift first, then the steps with their causes, then what is blocked, then one summary line."""

from sage_reconcile.core.device_table import device_rows
from sage_reconcile.core.needs import SOURCE_WORDS
from sage_reconcile.core.observed import ObservedState
from sage_reconcile.core.plan import Blocked, Plan, Step
from sage_reconcile.core.quantities import gib
from sage_reconcile.core.refusal import Shortfall
from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes import told_text
from sage_reconcile.render.change_text import change_values
from sage_reconcile.render.device_names import device_name
from sage_reconcile.render.lines import WIDTH, flowed, sentence, words
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

# Where a line that is too long goes on.
_CONTINUED = 8

# As wide as the column of what changes may be; a longer path stands out.
_PATH_WIDTH = 24


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
    count = len({device.parent or device.uuid for device in observed.devices})
    slices = sum(bool(device.parent) for device in observed.devices)
    # Unknown is not none.
    none = "GPUs not seen" if any(gap.what == "devices" for gap in observed.gaps) else "no GPU"
    devices = f"{count} GPU{'s' if count > 1 else ''}" if count else none
    devices += f", {slices} MIG slice{'s' if slices > 1 else ''}" if slices else ""
    return flowed([f"project {plan.project}", f"  host {observed.node}", f"  {devices}", f"  {plan.source}"], indent=2)


def _drift(plan: Plan, paint: Paint) -> list[str]:
    if not plan.drift:
        return []
    lines = ["Drift since the last apply:"]
    for drift in plan.drift:
        lines += sentence(drift.what, before=f"  {paint('yellow', '~')} {drift.engine}  ", indent=_CONTINUED)
    return lines


def _steps(plan: Plan, paint: Paint) -> list[str]:
    if not plan.steps:
        return []
    used = _actions_used(plan)
    legend = [f" {SYMBOLS[action]} {_MEANINGS[action]}," for action in _MEANINGS if action in used]
    legend = [*legend[:-1], f"{legend[-1][:-1]}):"]
    lines = flowed([f"Planned ({legend[0].lstrip()}", *legend[1:]], indent=2)
    for step in plan.steps:
        lines += _step(step, paint)
    return lines


def _actions_used(plan: Plan) -> set[str]:
    used = {step.action for step in plan.steps}
    return used | ({"blocked"} if plan.blocked else set())


def _step(step: Step, paint: Paint) -> list[str]:
    symbol = paint(_COLOURS[step.action], SYMBOLS[step.action].ljust(3))
    head = [f"  {symbol} {paint('bold', str(step.engine))}", f"  {step.kind}", f"  {step.model}", f"  {step.runtime}"]
    if step.placement is not None:
        head.append(f"  port {step.placement.port}")
        head += [f"  {devices_text(step.placement)}"] if step.placement.devices else []
    lines = [*flowed(head, indent=_CONTINUED), *sentence(_reason(step), before=" " * 8, indent=_CONTINUED)]
    if step.placement is not None and step.placement.devices:
        told = told_text(step.runtime, step.argv, step.placement)
        lines += flowed(memory_parts(step.placement, told, before="        memory "), indent=_CONTINUED + 2)
    width = min(max((len(change.path) for change in step.changes), default=0), _PATH_WIDTH)
    for change in step.changes:
        old, new = change_values(change.old, change.new)
        parts = [f"        {change.path.ljust(width)}", f"  {old}", f" -> {new}"]
        parts += ["  # forces a restart"] if change.is_identity else []
        lines += flowed([*parts, f"  {change.at}"] if change.at else parts, indent=_CONTINUED + 2)
    return lines


def devices_text(place: Placement) -> str:
    """GPU 0,1; slices, which share the index of their GPU, by name."""
    if any(uuid.startswith("MIG-") for uuid in place.devices):
        return ", ".join(device_name(*one) for one in zip(place.device_indexes, place.devices, strict=True))
    return f"GPU {','.join(map(str, place.device_indexes))}"


def memory_parts(place: Placement, told: str, *, before: str) -> list[str]:
    """The memory that a placement counts for, where that is known from, and what the engine is told."""
    each = " on each" if len(place.devices) > 1 else ""
    beside = f" and {gib(place.context_bytes_per_device)} beside it" if place.context_bytes_per_device else ""
    source = SOURCE_WORDS.get(place.memory_source, place.memory_source)
    return [f"{before}{gib(place.memory_bytes_per_device)} GiB{each}{beside},", f" {source},", f" {told}"]


def _reason(step: Step) -> str:
    return f"{step.reason}: {step.cause}" if step.cause else step.reason


def _blocked(plan: Plan, paint: Paint) -> list[str]:
    lines: list[str] = []
    for blocked in plan.blocked:
        lines += blocked_lines(blocked, kept=blocked.engine in plan.kept, paint=paint)
    return lines


def blocked_sentence(blocked: Blocked) -> str:
    """What cannot be done, and why."""
    return f"{_VERBS.get(blocked.reason, 'cannot place')} {blocked.engine}: {blocked.why}"


def blocked_lines(blocked: Blocked, *, kept: bool, paint: Paint = PLAIN) -> list[str]:
    """A refusal: what cannot be done, why, and what would help."""
    head = words(blocked_sentence(blocked), before=f"{paint('red', '!')} ")
    head += ["  (what runs is kept)"] if kept else []
    lines = flowed([*head, f"  {blocked.at}"] if blocked.at else head, indent=_CONTINUED)
    lines += [line for device in blocked.devices for line in shortfall_lines(device)]
    if blocked.would_help:
        first, *others = [f"{cure} | " for cure in blocked.would_help[:-1]] + [blocked.would_help[-1]]
        verb = _helps(blocked)
        cures = words(first, before=f"  {verb}: ") if not others else [f"  {verb}: {first}", *others]
        lines += flowed(cures, indent=_CONTINUED)
    return lines


def _helps(blocked: Blocked) -> str:
    return "would fit with" if blocked.devices else "would help"


def blocked_text(blocked: Blocked) -> str:
    """A refusal with its numbers and cures, for a reader whose lines are of any width."""
    lines = [blocked_sentence(blocked)]
    lines += [line.strip() for device in blocked.devices for line in shortfall_lines(device)]
    lines += [f"{_helps(blocked)}: {' | '.join(blocked.would_help)}"] if blocked.would_help else []
    return "\n".join(lines)


def shortfall_lines(device: Shortfall, *, fits: str = "fits") -> list[str]:
    """One device as an engine finds it: what is free, what is missing, and who has it."""
    head = f"  {device_name(device.index, device.uuid)}  free {gib(max(device.free_bytes, 0))} of "
    head += f"{gib(device.total_bytes)} GiB"
    if device.why_not:
        return flowed([head, *words(device.why_not, before="  ")], indent=_CONTINUED)
    if not device.short_bytes:
        return [f"{head}  {fits}"]
    head += f"  short {gib(device.short_bytes)}"
    if not device.held_by:
        return [head]
    first, *others = [f"{who}, " for who in device.held_by[:-1]] + [device.held_by[-1]]
    return flowed([head, f"  held by {first}", *others], indent=_CONTINUED)


def _devices(plan: Plan, observed: ObservedState) -> list[str]:
    """What each device holds now, at most, and after; only where the plan puts something on a device, or cannot."""
    on_devices = any(step.placement and step.placement.devices for step in plan.steps)
    freed = any(getattr(act, "devices", ()) for act in plan.acts)
    if not (on_devices or freed or any(blocked.devices for blocked in plan.blocked)):
        return []
    lines = ["Device memory in GiB      now    peak   after      of"]
    for row in device_rows(plan, observed):
        sizes = (row.now_bytes, row.peak_bytes, row.after_bytes, row.total_bytes)
        name = f"  {device_name(row.index, row.uuid)}".ljust(21)
        line = name + "".join(gib(size).rjust(8) for size in sizes) + f"  {row.name}"
        lines.append(line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…")
    if plan.optimality != "proved":
        lines.append("  the search for places ended before it had tried all: there may be better ones")
    return lines


def _notes(plan: Plan) -> list[str]:
    blocked = {entry.engine for entry in plan.blocked}
    kept = [str(engine) for engine in plan.kept if engine not in blocked]
    notes = [*plan.notes, f"not asked for, and left alone: {', '.join(kept)}"] if kept else plan.notes
    return [line for note in notes for line in sentence(note, before="note: ", indent=_CONTINUED)]


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
