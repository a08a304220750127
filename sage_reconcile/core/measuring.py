"""What ready engines take of their devices: an ObservedState and logs in, footprints to be kept out. Pure.

An engine that only just became ready has not reached its peak: of all looks and runs the most counts.
"""

from collections.abc import Iterable
from dataclasses import replace

from sage_reconcile.core.facts import FootprintFact
from sage_reconcile.core.needs import footprint_key
from sage_reconcile.core.observed import Engine, ObservedState, spec_of
from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes import is_served
from sage_reconcile.core.runtimes.startup_log import LoggedFootprint

# The last used of so many are kept of a project: a specification that nobody uses any more is forgotten some time.
MOST_KEPT = 256

# What grows by less is not written anew, so that a loop does not write at every look.
_GROWTH_SHARE, _GROWTH_BYTES = 0.01, 64 * 1024**2


def measurable(engine: Engine, observed: ObservedState) -> bool:
    """Whether what it uses now says what it needs: it is ready, and the driver tells of each of its devices."""
    devices = {device.uuid for device in observed.devices}
    untold = {gap.subject for gap in observed.gaps if gap.what == "device memory"}
    return (
        engine.state == "ready"
        and bool(set(engine.resolved.placement.devices) & devices)
        and not set(engine.resolved.placement.devices) & untold
        and any(size for _, size in engine.measured_bytes)
    )


def measurement(engine: Engine, observed: ObservedState, logged: LoggedFootprint | None) -> FootprintFact | None:
    """What a measurable engine takes now of the device of which it takes most.

    None where nobody wrote down which version of its program it runs, or this sage cannot read what was written.
    """
    spec, place = spec_of(engine), engine.resolved.placement
    record = next((record for record in observed.records if record.leader == engine.leader), None)
    used = dict(engine.measured_bytes)
    devices = [device for device in observed.devices if device.uuid in place.devices and used.get(device.uuid)]
    if spec is None or not is_served(spec) or record is None or record.program_version is None or not devices:
        return None
    fullest = max(devices, key=lambda device: (used[device.uuid], device.uuid))
    peak = used[fullest.uuid]
    logged = logged or LoggedFootprint()
    return FootprintFact(
        key=footprint_key(spec, told=place.memory_told),
        device_name=fullest.name,
        version=record.program_version,
        peak_bytes=peak,
        beyond_bytes=max(peak - place.memory_bytes_per_device, 0) if place.memory_told else None,
        non_kv_bytes=_without_cache(place, logged),
        weights_bytes=logged.weights_bytes,
        kv_cache_bytes=logged.kv_cache_bytes,
        graphs_bytes=logged.graphs_bytes,
        kv_tokens=logged.kv_tokens,
    )


def _without_cache(place: Placement, logged: LoggedFootprint) -> int:
    """What was told less the cache: so an engine that fills what it is told makes its cache. 0 where that is unknown.

    Whatever else its log says is a part of that, and not all of it (vLLM: total x share - weights - activations - what
    is not PyTorch's = cache, to 0.01 GiB in 25 logs).
    """
    if not place.memory_told or not logged.kv_cache_bytes:
        return 0
    rest = place.memory_bytes_per_device - logged.kv_cache_bytes
    return rest if rest > logged.weights_bytes else 0


def merged(earlier: FootprintFact, later: FootprintFact) -> FootprintFact:
    """The most of two measurements of the same; of two logs, the one that left more without a cache."""
    logged = later if later.non_kv_bytes >= earlier.non_kv_bytes and later.weights_bytes else earlier
    beyond = [fact.beyond_bytes for fact in (earlier, later) if fact.beyond_bytes is not None]
    return replace(
        logged,
        peak_bytes=max(earlier.peak_bytes, later.peak_bytes),
        beyond_bytes=max(beyond, default=None),
        non_kv_bytes=max(earlier.non_kv_bytes, later.non_kv_bytes),
    )


def kept(entries: tuple[FootprintFact, ...], found: Iterable[FootprintFact]) -> tuple[FootprintFact, ...] | None:
    """What shall be kept of the entries, the last used at the end, and of what was found; None when all can stay as is.

    One that is used again moves to the end only once it has come into the older half of a file that has half of what it
    may have: so the last used are kept without a clock, and nothing is written for the order alone at every use.
    """
    by_name = {_name(fact): fact for fact in entries}
    old = {_name(fact) for fact in entries[: len(entries) // 2]} if len(entries) >= MOST_KEPT // 2 else set()
    changed = False
    for fact in found:
        earlier = by_name.get(_name(fact))
        now = fact if earlier is None else merged(earlier, fact)
        if earlier is None or _grew(earlier, now) or _name(fact) in old:
            by_name.pop(_name(fact), None)
            by_name[_name(fact)] = now
            changed = True
    return tuple(by_name.values())[-MOST_KEPT:] if changed else None


def _name(fact: FootprintFact) -> tuple[str, str, str]:
    return fact.key, fact.device_name, fact.version


def _grew(earlier: FootprintFact, later: FootprintFact) -> bool:
    sizes = (
        (earlier.peak_bytes, later.peak_bytes),
        (earlier.beyond_bytes or 0, later.beyond_bytes or 0),
        (earlier.non_kv_bytes, later.non_kv_bytes),
    )
    # A part of the whole is no smaller news than the whole.
    least = min(earlier.peak_bytes * _GROWTH_SHARE, _GROWTH_BYTES)
    newly_told = earlier.beyond_bytes is None and later.beyond_bytes is not None
    return newly_told or any(now - before > least for before, now in sizes)
