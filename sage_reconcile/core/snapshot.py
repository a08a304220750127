"""A snapshot: one look at a machine as JSON, with the place of the manifests that it was taken for. Pure.

Its form is that of a world (core.observed) with two more keys, so that a snapshot is a test's world as it stands.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sage_reconcile.core.facts import ExitFact
from sage_reconcile.core.observed import Engine, ObservedState, observed_json, parse_observed

# Major and minor. A file of a later one may hold facts that this version would overlook.
FORMAT = (1, 0)

# The end of the year 9999, where calendars of programs end.
_LATEST = 253402300799.0
# A file that passes this has no number that arithmetic could choke on.
_LARGEST_NUMBER = 2**60


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestsPlace:
    """Where the manifests of a snapshot lay on its machine."""

    # The real path of their directory, which relative paths in them mean.
    source: str
    # What `~/` meant.
    home: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One look, and for what."""

    observed: ObservedState
    # None when it was taken without manifests: then nobody looked for any program or model.
    manifests: ManifestsPlace | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    format_version: str = f"{FORMAT[0]}.{FORMAT[1]}"
    manifests: ManifestsPlace | None = None


_HEAD = TypeAdapter(_Head)


def snapshot_json(snapshot: Snapshot) -> str:
    """The snapshot as JSON: the same for the same look."""
    head: dict[str, Any] = _HEAD.dump_python(_Head(manifests=snapshot.manifests), mode="json")
    world: dict[str, Any] = json.loads(observed_json(snapshot.observed))
    return json.dumps(head | world, indent=2, ensure_ascii=False)


def parse_snapshot(text: bytes) -> Snapshot:
    """What `snapshot_json` wrote, or the JSON of a world alone; in whatever order its lists are.

    Raises ValueError with a sentence for anything else.
    """
    try:
        head = _HEAD.validate_json(text)
        if _is_newer(head.format_version):
            raise ValueError(f"a newer sage wrote it: its format is {head.format_version[:20]}")
        observed = parse_observed(text)
    except ValidationError as error:
        raise ValueError(_told(error)) from None
    trouble = next(_troubles(observed), "")
    if trouble:
        raise ValueError(trouble)
    return Snapshot(observed=_in_order(observed), manifests=head.manifests)


def _is_newer(version: str) -> bool:
    parts = version.split(".")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        return True  # No version that there is yet looks like this.
    return (int(parts[0]), int(parts[1])) > FORMAT


def _told(error: ValidationError) -> str:
    """The first thing that is wrong, and where."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    what = first["msg"].removeprefix("Invalid JSON: ")
    if where:
        return f"{where}: {what}"
    return f"it is no whole JSON: {what}" if first["type"] == "json_invalid" else what


def _troubles(observed: ObservedState) -> Iterator[str]:
    """What no look could have seen, and a plan would stumble over."""
    if not 0 <= observed.taken_at <= _LATEST:
        yield "taken_at: this is no time"
    yield from (f"{where}: {number} is no size, count or number of anything" for where, number in _odd(observed, ""))
    uuids = [device.uuid for device in observed.devices]
    if len(set(uuids)) < len(uuids):
        yield "devices: two of them have one UUID"
    yield from (f"devices: {device.uuid} has no memory" for device in observed.devices if device.total_bytes < 1)
    leaders = [engine.leader for engine in observed.engines]
    if len(set(leaders)) < len(leaders):
        yield "engines: two of them are one process"
    yield from (f"engines: {engine.id} {why}" for engine in observed.engines if (why := _engine_trouble(engine)))
    for applied in observed.applied:
        if not _is_object(applied.written):
            yield f"applied: what was written of {applied.engine} is no JSON object"


def _engine_trouble(engine: Engine) -> str:
    place = engine.resolved.placement
    if not _is_object(engine.written) or not _is_object(engine.resolved.defaults):
        return "was started from something that is no JSON object"
    if len(place.devices) != len(place.device_indexes):
        return "has more or fewer devices than indexes of devices"
    return "" if 0 < place.port < 65536 else f"has the port {place.port}"


def _odd(value: Any, where: str) -> Iterator[tuple[str, int | float]]:
    """Numbers that are negative or beyond all measure, and where they stand."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return
    if isinstance(value, int | float):
        if not 0 <= value <= _LARGEST_NUMBER:
            yield where, value
    elif isinstance(value, tuple):
        for number, entry in enumerate(value):
            yield from _odd(entry, f"{where}.{number}" if where else str(number))
    elif is_dataclass(value) and not isinstance(value, ExitFact):
        for field in fields(value):
            yield from _odd(getattr(value, field.name), f"{where}.{field.name}" if where else field.name)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _in_order(observed: ObservedState) -> ObservedState:
    """In the order in which a look has them."""
    return replace(
        observed,
        devices=tuple(sorted(observed.devices, key=lambda one: (one.index, one.uuid))),
        engines=tuple(sorted(observed.engines, key=lambda one: (one.id, one.leader))),
        listeners=tuple(sorted(observed.listeners, key=lambda one: (one.port, one.address, one.pids))),
        programs=tuple(sorted(observed.programs, key=lambda one: one.name)),
        models=tuple(sorted(observed.models, key=lambda one: one.model)),
        records=tuple(sorted(observed.records, key=lambda one: (one.engine, one.leader))),
        applied=tuple(sorted(observed.applied, key=lambda one: one.engine)),
        footprints=tuple(sorted(observed.footprints, key=lambda one: (one.key, one.device_name, one.version))),
        gaps=tuple(sorted(observed.gaps, key=lambda one: (one.what, one.subject, one.why))),
    )
