"""The devices: whose their memory is, as a bar and a line for each holder, and as JSON. 80 columns are enough."""

from typing import Any

from sage_reconcile.core.observed import Device, Engine, ObservedState, free_bytes, held_bytes
from sage_reconcile.render.paint import PLAIN, Paint
from sage_reconcile.render.plan_json import FORMAT_VERSION, timestamp

_BAR_WIDTH = 48
_GIB = 1024**3

# What each letter of a bar stands for, and its colour.
_PARTS = (("#", "green", "engines"), ("x", "yellow", "foreign"), ("-", "dim", "reserved"), (".", "dim", "free"))


def gpu_text(observed: ObservedState, paint: Paint = PLAIN) -> str:
    """Each device with a bar and whose bytes they are, then what could not be seen."""
    lines: list[str] = []
    for device in observed.devices:
        lines += [*_device(device, observed, paint), ""]
    if observed.devices:
        lines.append("".join(f"{paint(colour, letter)} {meaning}  " for letter, colour, meaning in _PARTS).rstrip())
    else:
        lines.append(f"no GPU is observed on {observed.node}")
    lines += [f"cannot see: {gap.what}: {gap.why}" for gap in observed.gaps if "device" in gap.what]
    return "\n".join(lines)


def _device(device: Device, observed: ObservedState, paint: Paint) -> list[str]:
    ours = [(engine, held) for engine in observed.engines if (held := held_bytes(engine, device.uuid))]
    free = free_bytes(device, observed.engines)
    extras = [
        f"{device.utilization_percent}% busy" if device.utilization_percent is not None else "",
        f"{device.temperature_celsius} C" if device.temperature_celsius is not None else "",
        f"{device.power_watts:.0f} W" if device.power_watts is not None else "",
    ]
    head = f"gpu{device.index}  {device.name}  {gib(device.total_bytes)} GiB"
    slice_of = f"  slice of {device.parent}" if device.parent else ""
    lines = [
        f"{paint('bold', head)}{slice_of}  {', '.join(extra for extra in extras if extra)}".rstrip(),
        f"  [{_bar(device, sum(held for _, held in ours), paint)}]  {gib(max(free, 0))} GiB free",
    ]
    rows = [(held, _engine_words(engine, device)) for engine, held in ours]
    rows += [
        (holder.used_bytes, f"foreign  pid {holder.pid} {holder.name} ({holder.user})") for holder in device.holders
    ]
    unnamed = device.foreign_bytes - sum(holder.used_bytes for holder in device.holders)
    lingering = sum(entry.held_bytes for entry in device.lingering)
    rows += [
        (entry.held_bytes, f"not given back yet by {entry.engine.full}, which ended as pid {entry.pid}")
        for entry in device.lingering
    ]
    unnamed -= lingering
    rows += [(unnamed, "foreign  of no process that the driver names")] if unnamed > 0 else []
    rows += [(device.reserved_bytes, "reserved by the driver")] if device.reserved_bytes else []
    lines += [f"  {gib(size):>6}  {words}" for size, words in rows]
    if device.closed:
        lines.append(paint("red", f"  closed: {device.closed}"))
    if free < 0:
        lines.append(paint("red", f"  over-full by {gib(-free)} GiB"))
    return lines + [paint("red", f"  {trouble}") for trouble in device.troubles]


def _engine_words(engine: Engine, device: Device) -> str:
    place = engine.resolved.placement
    uses = dict(engine.measured_bytes).get(device.uuid)
    planned = f"planned {gib(place.counted_bytes_per_device)}" if device.uuid in place.devices else "not planned here"
    return f"{engine.id.full}  {planned}, uses {gib(uses) if uses is not None else '?'}"


def _bar(device: Device, ours_bytes: int, paint: Paint) -> str:
    """A bar of fixed width; every part that there is has a letter at least."""
    foreign = min(device.foreign_bytes, device.total_bytes)
    parts = [ours_bytes, foreign, device.reserved_bytes]
    widths = [min(max(round(size / device.total_bytes * _BAR_WIDTH), 1), _BAR_WIDTH) if size else 0 for size in parts]
    while sum(widths) > _BAR_WIDTH:
        widths[widths.index(max(widths))] -= 1
    widths.append(_BAR_WIDTH - sum(widths))
    return "".join(paint(colour, letter * width) for (letter, colour, _), width in zip(_PARTS, widths, strict=True))


def gib(size: int) -> str:
    return f"{size / _GIB:.1f}"


def gpu_json(observed: ObservedState) -> dict[str, Any]:
    """The devices, for a program."""
    return {
        "format_version": FORMAT_VERSION,
        "observed_at": timestamp(observed.taken_at),
        "devices": devices_json(observed),
        "gaps": [{"what": gap.what, "why": gap.why} for gap in observed.gaps],
    }


def devices_json(observed: ObservedState) -> list[dict[str, Any]]:
    """Each device with its bytes, and the processes that use it."""
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
            "troubles": list(device.troubles),
            "engines": {
                engine.id.full: held for engine in observed.engines if (held := held_bytes(engine, device.uuid))
            },
            "processes": [
                {"pid": holder.pid, "name": holder.name, "user": holder.user, "used_bytes": holder.used_bytes}
                for holder in device.holders
            ],
        }
        for device in observed.devices
    ]
