"""Where a request goes: the observed engines as a table of routes, and the choice of one backend. Pure.

A route exists only for an engine that was proved ours and ready; its kind comes from its manifest, never from its port.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sage_reconcile.core.identity import EngineId, ProcessIdentity
from sage_reconcile.core.observed import Engine, ObservedState, spec_of
from sage_reconcile.core.spec import EngineSpec, is_path, parse_written, served_model
from sage_reconcile.core.words import shown

# What a client should wait before it asks again, in seconds: engines take seconds to minutes to load.
RETRY_AFTER_SECONDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One running engine, as the router sees it."""

    engine: EngineId
    # The identity of the process that answers: a backend is never just a port.
    leader: ProcessIdentity
    kind: str
    # The model name that the engine itself knows; it replaces an alias or an id in the body of a request.
    model: str
    # All the names that clients may ask for.
    names: tuple[str, ...]
    host: str
    port: int
    max_in_flight: int
    state: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """An engine that was applied and does not run."""

    engine: EngineId
    kind: str
    model: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTable:
    """All that the router knows. `backends` holds engines in every state; only ready ones are sent requests."""

    taken_at: float = 0.0
    backends: tuple[Backend, ...] = ()
    absent: tuple[Absent, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NoBackend:
    """Why a request goes nowhere: an HTTP status, an OpenAI error code, and a sentence."""

    status: int
    code: str
    message: str
    # Seconds; None when asking again would not help.
    retry_after_seconds: int | None = None


def routes(observed: ObservedState, project: str | None = None) -> RouteTable:
    """The table of what runs and of what should: of one project, or of all where it is None."""
    backends = tuple(
        backend
        for engine in observed.engines
        if engine.leader_alive and project in (None, engine.id.project) and (backend := _backend(engine)) is not None
    )
    running = {backend.engine for backend in backends}
    absent = tuple(
        Absent(
            engine=applied.engine,
            kind=spec.kind,
            model=served_model(spec),
            names=_names(applied.engine, spec),
        )
        for applied in observed.applied
        if applied.engine not in running
        and project in (None, applied.engine.project)
        and (spec := parse_written(applied.written)) is not None
    )
    return RouteTable(taken_at=observed.taken_at, backends=backends, absent=absent)


def choose(
    table: RouteTable,
    kind: str,
    model: str | None,
    in_flight: Mapping[ProcessIdentity, int],
    exclude: Collection[ProcessIdentity] = (),
) -> Backend | NoBackend:
    """The ready backend of this kind with the fewest requests outstanding.

    `model` is a model name, alias or engine id; None asks for the only model of its kind. `exclude` are backends that
    were tried already.

    1. Nothing has that name: 404.
    2. Something has it, and is of another kind: 400.
    3. Without a name there must be one model to mean: else 400, or 503 when there is none at all.
    4. Nothing that has it is ready: 503, and what would help.
    5. All that is ready is full: 503.
    """
    if model is None:
        named = [backend for backend in table.backends if backend.kind == kind]
        absent = [engine for engine in table.absent if engine.kind == kind]
    else:
        named = [backend for backend in table.backends if model in backend.names]
        absent = [engine for engine in table.absent if model in engine.names]
    of_kind = [backend for backend in named if backend.kind == kind]
    absent_of_kind = [engine for engine in absent if engine.kind == kind]
    if not of_kind and not absent_of_kind:
        return _nothing_named(table, kind, model, wrong_kind=bool(named or absent))
    ready = [backend for backend in of_kind if backend.state == "ready" and backend.leader not in exclude]
    if model is None and len(models := sorted({backend.model for backend in ready})) > 1:
        return NoBackend(
            status=400,
            code="model_required",
            message=f"the request names no model, and several serve this: {', '.join(models)}",
        )
    if not ready:
        return _none_ready(of_kind, absent_of_kind)
    free = [backend for backend in ready if in_flight.get(backend.leader, 0) < backend.max_in_flight]
    if not free:
        return NoBackend(
            status=503,
            code="overloaded",
            message=f"all replicas of {ready[0].model} are busy with as many requests as they may take",
            retry_after_seconds=1,
        )
    return min(free, key=lambda backend: (in_flight.get(backend.leader, 0), backend.engine, backend.leader))


def models(table: RouteTable) -> tuple[Backend, ...]:
    """One ready backend for each model name that clients can use."""
    first: dict[str, Backend] = {}
    for backend in table.backends:
        if backend.state == "ready":
            first.setdefault(backend.model, backend)
    return tuple(first[name] for name in sorted(first))


def _nothing_named(table: RouteTable, kind: str, model: str | None, *, wrong_kind: bool) -> NoBackend:
    if model is None:
        return NoBackend(
            status=503,
            code="no_backend",
            message=f"no engine of kind {kind} runs here; start one with: sage apply",
            retry_after_seconds=RETRY_AFTER_SECONDS,
        )
    if wrong_kind:
        usable = sorted({backend.model for backend in table.backends if backend.kind == kind})
        return NoBackend(
            status=400,
            code="wrong_kind",
            message=f"{_quoted(model)} is not of kind {kind}" + (f"; use {', '.join(usable)}" if usable else ""),
        )
    known = sorted({backend.model for backend in table.backends} | {engine.model for engine in table.absent})
    return NoBackend(
        status=404,
        code="model_not_found",
        message=f"there is no model {_quoted(model)}; there is {', '.join(known) if known else 'none at all'}",
    )


def _none_ready(backends: list[Backend], absent: list[Absent]) -> NoBackend:
    if backends:
        backend = backends[0]
        why = f": {backend.reason}" if backend.reason else ""
        message = f"{backend.engine} is {backend.state}{why}; look with: sage status"
    else:
        message = f"{absent[0].engine} does not run; start it with: sage apply"
    return NoBackend(status=503, code="not_ready", message=message, retry_after_seconds=RETRY_AFTER_SECONDS)


def _quoted(model: str) -> str:
    """A client's words in a sentence of ours: short, and without control characters."""
    return f'"{shown(model, 100)}"'


def _backend(engine: Engine) -> Backend | None:
    spec = spec_of(engine)
    if spec is None:
        return None
    placement = engine.resolved.placement
    return Backend(
        engine=engine.id,
        leader=engine.leader,
        kind=spec.kind,
        model=served_model(spec),
        names=_names(engine.id, spec),
        host=placement.host,
        port=placement.port,
        max_in_flight=spec.max_concurrent_requests,
        state=engine.state,
        reason=engine.reason,
    )


def _names(engine: EngineId, spec: EngineSpec) -> tuple[str, ...]:
    ids = {str(engine.first), engine.first.full, str(engine), engine.full}
    model = set() if is_path(spec.model) else {spec.model}
    return tuple(sorted({served_model(spec), *spec.aliases} | model | ids))
