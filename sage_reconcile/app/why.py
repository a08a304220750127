"""why: one engine or one device, with all that a plan would go by. Reads manifests where there are any."""

import re
from dataclasses import dataclass, replace

from sage_reconcile.app.project import load_if_there, local_host, refuse_other_source
from sage_reconcile.app.verbs import matching
from sage_reconcile.core.desired import DesiredState
from sage_reconcile.core.identity import EngineId
from sage_reconcile.core.lookup import Lookup, lookup, questions
from sage_reconcile.core.observed import ObservedState, spec_of
from sage_reconcile.core.plan import Plan, PlanOptions
from sage_reconcile.core.spec import parse_written
from sage_reconcile.core.why import DeviceWhy, EngineWhy, device_why, engine_why
from sage_reconcile.drive.reconciler import sound_plan
from sage_reconcile.errors import Refused, Usage

_DEVICE = re.compile(r"gpu(\d{1,3})", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What `sage why` shows."""

    observed: ObservedState
    engines: tuple[EngineWhy, ...] = ()
    devices: tuple[DeviceWhy, ...] = ()
    # What to know about the manifests that were, or were not, read; empty when there is nothing.
    note: str = ""


def why(target: str, paths: tuple[str, ...], project: str | None) -> Answer:
    """About an engine by its id, or a device as gpuN. Raises Usage for what is not there, InvalidManifests."""
    desired, note = load_if_there(paths, project)
    host = local_host(desired)
    observed = host.look()
    try:
        if desired is not None:
            refuse_other_source(desired, observed, take_over=False)
    except Refused as other:
        desired, note = None, f"{desired.source if desired else ''} is left out: {other.message}"
    device = _DEVICE.fullmatch(target)
    if device is not None:
        found = device_why(int(device[1]), desired, observed, _plan(desired, observed))
        if not found:
            there_is = ", ".join(sorted({f"gpu{one.index}" for one in observed.devices})) or "none"
            raise Usage(f"there is no {target}; of GPUs there is {there_is}")
        return Answer(observed=observed, devices=found, note=note)
    ids = sorted(matching(target, _known(desired, observed), project))
    asked = _asked(ids, desired, observed)
    if asked.models != host.lookup.models:
        # Of an engine that no manifest asks for, only now it is known which model it has.
        host.lookup = asked
        observed = host.look()
    plan = _plan(desired, observed)
    return Answer(
        observed=observed, engines=tuple(engine_why(the_id, desired, observed, plan) for the_id in ids), note=note
    )


def _plan(desired: DesiredState | None, observed: ObservedState) -> Plan | None:
    return sound_plan(desired, observed, PlanOptions(only_shown=True)) if desired is not None else None


def _known(desired: DesiredState | None, observed: ObservedState) -> set[EngineId]:
    wanted = {one.id for one in desired.wanted} if desired is not None else set()
    return wanted | {engine.id for engine in observed.engines} | {applied.engine for applied in observed.applied}


def _asked(ids: list[EngineId], desired: DesiredState | None, observed: ObservedState) -> Lookup:
    """What the manifests ask, and the models of these engines as they run or ran."""
    asked = lookup(desired) if desired is not None else Lookup()
    wanted = tuple(one.spec for one in desired.wanted) if desired is not None else ()
    found = [spec_of(engine) for engine in observed.engines if engine.id in ids]
    found += [parse_written(applied.written) for applied in observed.applied if applied.engine in ids]
    specs = (*wanted, *(spec for spec in found if spec is not None))
    return replace(asked, models=questions(specs, ask_hub=desired is not None and desired.ask_hub))
