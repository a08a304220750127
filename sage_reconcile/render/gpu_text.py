"""The devices: whose their memory is, as a bar and a line for each holder, and as JSON. 80 columns are enough."""

from typing import Any

from sage_reconcile.core.device_shares import Share, devices_of, shares
from sage_reconcile.core.observed import Device, Engine, Holder, Lingering, ObservedState, free_bytes, held_bytes
from sage_reconcile.core.quantities import gib
from sage_reconcile.render.lines import flowed, sentence
from sage_reconcile.render.paint import PLAIN, Paint
from sage_reconcile.render.plan_json import FORMAT_VERSION, timestamp

_BAR_WIDTH = 48

# What each letter of a bar stands for, and its colour.
_PARTS = (("#", "green", "engines"), ("x", "yellow", "foreign"), ("-", "dim", "reserved"), (".", "dim", "free"))

# Where the words of a share begin.
_WORDS_AT = 10


def gpu_text(observed: ObservedState, paint: Paint = PLAIN, project: str | None = None) -> str:
    """Each device with a bar and whose bytes they are, then what could not be seen.

    With a project, the devices that its engines are on: whole, so that the numbers add up.
    """
    lines: list[str] = []
    devices = _shown(observed, project)
    for device in devices:
        lines += [*device_lines(device, observed, paint), ""]
    if devices:
        lines.append("".join(f"{paint(colour, letter)} {meaning}  " for letter, colour, meaning in _PARTS).rstrip())
    elif observed.devices:
        lines.append(f"no engine of project {project} is on a GPU of {observed.node}")
    else:
        lines.append(f"no GPU is observed on {observed.node}")
    for gap in observed.gaps:
        if "device" in gap.what:
            lines += sentence(f"{gap.what}: {gap.why}", before="cannot see: ", indent=4)
    return "\n".join(lines)


def _shown(observed: ObservedState, project: str | None) -> tuple[Device, ...]:
    return observed.devices if project is None else devices_of(project, observed)


def device_lines(device: Device, observed: ObservedState, paint: Paint) -> list[str]:
    """One device: what it is, a bar, whose bytes they are, and what is wrong with it."""
    mine = shares(device, observed)
    free = free_bytes(device, observed.engines)
    ours = sum(size for size, who in mine if isinstance(who, Engine))
    lines = [
        *_head(device, paint),
        f"  [{_bar(device, ours, paint)}]  {gib(max(free, 0))} of {gib(device.total_bytes)} GiB free",
    ]
    for share in mine:
        lines += share_lines(share, device, observed)
    if device.closed:
        lines += _painted(paint, "red", sentence(device.closed, before="  closed: ", indent=4))
    if free < 0:
        lines.append(paint("red", f"  over-full by {gib(-free)} GiB"))
    for trouble in device.troubles:
        if device.closed.startswith(trouble):
            continue  # It was just told.
        lines += _painted(paint, "red", sentence(trouble, before="  ", indent=4))
    return lines


def _painted(paint: Paint, colour: str, lines: list[str]) -> list[str]:
    return [paint(colour, line) for line in lines]


def _head(device: Device, paint: Paint) -> list[str]:
    extras = (
        f"{device.utilization_percent}% busy" if device.utilization_percent is not None else "",
        f"{device.temperature_celsius} C" if device.temperature_celsius is not None else "",
        f"{device.power_watts:.0f} W" if device.power_watts is not None else "",
    )
    name = paint("bold", f"gpu{device.index}  {device.name}")
    told = ", ".join(extra for extra in extras if extra)
    head = flowed([name, f"  {told}" if told else ""], indent=6)
    return [*head, f"  {device.uuid}, a slice of gpu{device.index}"] if device.parent else head


def share_lines(share: Share, device: Device, observed: ObservedState) -> list[str]:
    """How much it is, and whose."""
    size, who = share
    return flowed(_owner(who, device, observed, before=f"  {gib(size):>6}  "), indent=_WORDS_AT)


def _owner(who: object, device: Device, observed: ObservedState, *, before: str) -> list[str]:
    """Who has a part of a device, in parts of a line."""
    match who:
        case Engine():
            return [before + who.id.full, *_engine_words(who, device, observed)]
        case Holder():
            return [f"{before}foreign  pid {who.pid} {who.name}", f" of {who.user}" if who.user != "?" else ""]
        case Lingering():
            return [f"{before}not given back yet by {who.engine.full},", f" which ended as pid {who.pid}"]
        case "unnamed":
            return [f"{before}foreign  of no process that the driver names"]
        case _:
            return [f"{before}reserved by the driver"]


def _engine_words(engine: Engine, device: Device, observed: ObservedState) -> list[str]:
    place = engine.resolved.placement
    planned = f"planned {gib(place.counted_bytes_per_device)}" if device.uuid in place.devices else "not planned here"
    unknown = any(gap.what == "device memory" and gap.subject == device.uuid for gap in observed.gaps)
    uses = dict(engine.measured_bytes).get(device.uuid, 0)
    used = "how much it uses is not told" if unknown else f"uses {gib(uses) if uses else 'nothing yet'}"
    state = "" if engine.state == "ready" else f", {engine.state}"
    return [f"  {planned},", f" {used}{state}"]


def _bar(device: Device, ours_bytes: int, paint: Paint) -> str:
    """A bar of fixed width; every part that there is has a letter at least."""
    foreign = min(device.foreign_bytes, device.total_bytes)
    parts = [ours_bytes, foreign, device.reserved_bytes]
    widths = [min(max(round(size / device.total_bytes * _BAR_WIDTH), 1), _BAR_WIDTH) if size else 0 for size in parts]
    while sum(widths) > _BAR_WIDTH:
        widths[widths.index(max(widths))] -= 1
    widths.append(_BAR_WIDTH - sum(widths))
    return "".join(paint(colour, letter * width) for (letter, colour, _), width in zip(_PARTS, widths, strict=True))


def gpu_json(observed: ObservedState, project: str | None = None) -> dict[str, Any]:
    """The devices, for a program; with a project, those that its engines are on."""
    return {
        "format_version": FORMAT_VERSION,
        "observed_at": timestamp(observed.taken_at),
        "devices": devices_json(observed, _shown(observed, project)),
        "gaps": [{"what": gap.what, "why": gap.why} for gap in observed.gaps],
    }


def devices_json(observed: ObservedState, devices: tuple[Device, ...]) -> list[dict[str, Any]]:
    """Each of these devices with its bytes, and the processes that use it and are no engine's."""
    return [
        {
            "node": device.node,
            "index": device.index,
            "uuid": device.uuid,
            "name": device.name,
            "parent": device.parent or None,
            "total_bytes": device.total_bytes,
            "reserved_bytes": device.reserved_bytes,
            "used_bytes": device.used_bytes,
            "foreign_bytes": device.foreign_bytes,
            "free_bytes": free_bytes(device, observed.engines),
            "utilization": device.utilization_percent,
            "temperature_celsius": device.temperature_celsius,
            "power_watts": device.power_watts,
            "island": device.island,
            "numa_node": device.numa_node,
            "troubles": list(device.troubles),
            "closed": device.closed or None,
            "not_given_back": [
                {"engine": entry.engine.full, "pid": entry.pid, "held_bytes": entry.held_bytes}
                for entry in device.lingering
            ],
            "engines": {
                engine.id.full: held for engine in observed.engines if (held := held_bytes(engine, device.uuid))
            },
            "processes": [
                {"pid": holder.pid, "name": holder.name, "user": holder.user, "used_bytes": holder.used_bytes}
                for holder in device.holders
            ],
        }
        for device in devices
    ]
