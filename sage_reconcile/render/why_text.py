"""Why an engine is where it is, or is not; and whose the bytes of a device are. 80 columns are enough."""

from sage_reconcile.core.footprint import Footprint, Term
from sage_reconcile.core.needs import SOURCE_WORDS
from sage_reconcile.core.observed import Engine, ObservedState, untold_devices
from sage_reconcile.core.quantities import gib
from sage_reconcile.core.refusal import Shortfall
from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes import runtime_of, told_text
from sage_reconcile.core.spec import needs_gpu, served_model
from sage_reconcile.core.why import DeviceWhy, EngineWhy
from sage_reconcile.render.device_names import device_name
from sage_reconcile.render.gpu_text import device_lines
from sage_reconcile.render.lines import flowed, sentence, words
from sage_reconcile.render.paint import PLAIN, Paint
from sage_reconcile.render.plan_text import SYMBOLS, blocked_lines, devices_text, memory_parts, shortfall_lines

_STATE_COLOURS = {"ready": "green", "starting": "yellow", "draining": "yellow", "stopping": "yellow"}

# Where what is said of an engine begins.
_AT = 12


def why_text(
    engines: tuple[EngineWhy, ...], devices: tuple[DeviceWhy, ...], observed: ObservedState, paint: Paint = PLAIN
) -> str:
    """A block for each engine or device."""
    blocks = [_engine(why, observed, paint) for why in engines]
    blocks += [_device(why, observed, paint) for why in devices]
    return "\n\n".join("\n".join(block) for block in blocks)


# --- an engine --------------------------------------------------------------------------------------------------------


def _engine(why: EngineWhy, observed: ObservedState, paint: Paint) -> list[str]:
    lines = [
        *_head(why, paint),
        *_row("written", _written(why)),
        *_state(why, paint),
        *_plan(why, paint),
        *_place(why, observed),
        *(_row("model", why.files) if why.files else []),
    ]
    for waited in why.waits_for:
        because = f": {waited.reason}" if waited.reason and waited.state != "ready" else ""
        lines += _row("waits for", f"{waited.name}, which is {waited.state}{because}")
    if why.blocked is not None:
        lines += ["", *blocked_lines(why.blocked, kept=why.engine is not None, paint=paint)]
    if why.footprint is not None:
        lines += ["", *_terms(why, why.footprint)]
    if why.devices and (why.blocked is None or not why.blocked.devices):
        lines += ["", "Each GPU without it, once the plan is done:" if why.acts else "Each GPU without it:"]
        lines += [line for device in why.devices for line in _found(device, why)]
    return lines


def _row(name: str, text: str) -> list[str]:
    return sentence(text, before=f"  {name}".ljust(_AT), indent=_AT)


def _head(why: EngineWhy, paint: Paint) -> list[str]:
    name = paint("bold", why.id.full)
    if why.spec is None:
        return [f"{name}  written by a version of sage that this one cannot read"]
    runtime = runtime_of(why.spec).name
    return flowed([name, f"  {why.spec.kind}", f"  {served_model(why.spec)}", f"  {runtime}"], indent=2)


def _written(why: EngineWhy) -> str:
    if why.at:
        return why.at
    if why.engine is None:
        return "it was applied, and no manifest that was read asks for it"
    return f"in the label of its process, from {why.engine.source}; no manifest that was read asks for it"


def _state(why: EngineWhy, paint: Paint) -> list[str]:
    engine = why.engine
    if engine is None:
        return _row("state", f"{paint('red', 'missing')}: {why.missing}")
    state = paint(_STATE_COLOURS.get(engine.state, "red"), engine.state)
    because = f": {engine.reason}" if engine.reason and engine.state != "ready" else ""
    where = f"{state}{because}, pid {engine.leader.pid}, port {engine.resolved.placement.port}"
    return _row("state", f"{where}, started again {engine.restarts} times" if engine.restarts else where)


def _plan(why: EngineWhy, paint: Paint) -> list[str]:
    """What the manifests that were read would change about it."""
    if why.step is not None:
        cause = f"{why.step.reason}: {why.step.cause}" if why.step.cause else why.step.reason
        return _row("plan", f"{SYMBOLS[why.step.action]} {why.step.action}, {cause}")
    if why.blocked is not None:
        return _row("plan", f"{paint('red', '!')} blocked, see below")
    return _row("plan", "no change") if why.at else []


def _place(why: EngineWhy, observed: ObservedState) -> list[str]:
    """Where it is, or would be, and what it was given there."""
    place = why.place
    if why.spec is not None and not needs_gpu(why.spec):
        return _row("place", f"on the CPU: {why.why_there}")
    if place is None or not place.devices:
        return _needs(why)
    starts = why.step is not None and why.step.placement is not None
    lines = _row("place", f"{devices_text(place)}, where it {'would go' if starts else 'runs'}: {why.why_there}")
    lines += flowed(memory_parts(place, _told(why, place), before="  memory".ljust(_AT)), indent=_AT)
    return lines + _uses(why.engine, place, observed, starts=starts)


def _told(why: EngineWhy, place: Placement) -> str:
    if why.step is not None and why.step.argv:
        return told_text(why.step.runtime, why.step.argv, place)
    return told_text(why.engine.resolved.runtime, why.engine.resolved.argv, place) if why.engine else "not told"


def _needs(why: EngineWhy) -> list[str]:
    """What it needs where it has no place."""
    if why.claim is None:
        return []
    spec, claim = why.spec, why.claim
    count = spec.tensor_parallel * spec.pipeline_parallel if spec is not None else 1
    on = "a GPU" if count == 1 else f"each of {count} GPUs"
    beside = f" and {gib(claim.context_bytes)} beside it" if claim.context_bytes else ""
    share = f"{claim.fraction:g}" if claim.fraction <= 1 else "more than all"
    told = f" told {share} of the device" if why.told else " not told"
    if why.told and spec is not None and not runtime_of(spec).fills:
        told = " told as layers and context"
    size = "  needs".ljust(_AT) + f"{gib(claim.memory_bytes)} GiB{beside}"
    return flowed([size, f" on {on},", f" {SOURCE_WORDS.get(claim.source, claim.source)},", told], indent=_AT)


def _uses(engine: Engine | None, place: Placement, observed: ObservedState, *, starts: bool) -> list[str]:
    if engine is None or starts:
        return []
    used = dict(engine.measured_bytes)
    unknown = untold_devices(observed)
    told = [
        f"{'?' if uuid in unknown else gib(used.get(uuid, 0))} GiB of {device_name(index, uuid)}"
        for uuid, index in zip(place.devices, place.device_indexes, strict=True)
    ]
    return _row("uses", ", ".join(told))


def _terms(why: EngineWhy, known: Footprint) -> list[str]:
    """The footprint, term by term: what the engine is told, and what it takes beside that."""
    counts = why.claim is not None and why.claim.source == "computed"
    lines = [f"{'What it needs' if counts else 'What it would need by the files of its model'}, on each GPU, in GiB:"]
    inside = [term for term in known.terms if term.in_budget]
    for term in inside:
        lines += _term(term)
    if why.spec is not None and runtime_of(why.spec).budgeted:
        lines.append(f"    {'= budget'.ljust(13)} {_gib(known.budget_bytes):>6}")
    for term in known.terms:
        lines += [] if term in inside else _term(term)
    lines.append(f"    {'= in all'.ljust(13)} {_gib(known.total_bytes):>6}")
    if known.kv_bytes_per_token:
        lines += sentence(
            f"each further token of context takes {known.kv_bytes_per_token:,} bytes on each GPU", before="  ", indent=4
        )
    return lines


def _term(term: Term) -> list[str]:
    return flowed(words(term.why, before=f"    {term.name.ljust(13)} {_gib(term.memory_bytes):>6}  "), indent=26)


def _gib(size: int) -> str:
    """With two decimals: some terms are that small, and a sum should look like one."""
    return f"{size / 1024**3:.2f}"


def _found(device: Shortfall, why: EngineWhy) -> list[str]:
    here = why.place is not None and device.uuid in why.place.devices
    starts = why.step is not None and why.step.placement is not None
    if not here:
        return shortfall_lines(device)
    ends = why.step is not None and why.step.action == "stop"
    return shortfall_lines(device, fits="would go here" if starts else f"it runs here{' until then' if ends else ''}")


# --- a device ---------------------------------------------------------------------------------------------------------


def _device(why: DeviceWhy, observed: ObservedState, paint: Paint) -> list[str]:
    if why.device is None:
        return _unseen(why, paint)
    lines = device_lines(why.device, observed, paint)
    if not why.device.parent:
        lines.insert(1, f"  {why.device.uuid}")
    if why.reserve_bytes:
        left = max(why.free_bytes - why.reserve_bytes, 0)
        lines += sentence(
            f"{gib(why.reserve_bytes)} GiB of what is free stay so by device_reserve, and {gib(left)} can be given",
            before="  ",
            indent=4,
        )
    for step in why.coming:
        assert step.placement is not None
        size = gib(step.placement.counted_bytes_per_device)
        lines += sentence(f"{SYMBOLS[step.action]} {step.engine} would get {size} GiB", before="  ", indent=4)
    for gap in why.gaps:
        lines += sentence(gap, before="  cannot see: ", indent=4)
    return lines


def _unseen(why: DeviceWhy, paint: Paint) -> list[str]:
    lines = [paint("bold", f"gpu{why.index}") + "  is not seen: nothing is placed there"]
    for gap in why.gaps:
        lines += sentence(gap, before="  ", indent=4)
    for engine in why.stranded:
        lines += sentence(
            f"{engine.id.full} was placed there, and is {engine.state}: {engine.reason}", before="  ", indent=4
        )
    return lines
