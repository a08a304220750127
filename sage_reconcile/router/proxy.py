"""One request of a client: its body read, a backend chosen, asked, at most once more, and its answer relayed."""

import asyncio
from dataclasses import dataclass

import aiohttp
from aiohttp import web

from sage_reconcile.core.identity import ProcessIdentity
from sage_reconcile.core.routes import Backend, NoBackend
from sage_reconcile.router.answers import Rejected, rejected
from sage_reconcile.router.body import Asked, Room, parse_asked, read_body, with_model
from sage_reconcile.router.limits import Limits
from sage_reconcile.router.relay import relay
from sage_reconcile.router.traffic import Traffic
from sage_reconcile.router.upstream import Failed, Failure, ask

# How often to look whether a fresh table has come, in seconds. Only done after an engine broke a connection.
LOOK_SECONDS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """What the router forwards: the kind of engine, the path there, and how far a request may be repeated."""

    kind: str
    path: str
    # Asking twice costs nothing but time: no tokens are drawn.
    idempotent: bool = False
    # Its streams end with `data: [DONE]`.
    ends_with_done: bool = False


@dataclass(frozen=True, slots=True)
class Proxy:
    """What forwarding needs besides the request."""

    traffic: Traffic
    session: aiohttp.ClientSession
    room: Room
    limits: Limits


async def forward(request: web.Request, endpoint: Endpoint, proxy: Proxy) -> web.StreamResponse:
    """The answer of a backend, already sent. Raises Rejected when there is none to send."""
    body = await read_body(request, proxy.limits, proxy.room)
    try:
        return await _forward(request, endpoint, body, proxy)
    finally:
        proxy.room.free(len(body))


async def _forward(request: web.Request, endpoint: Endpoint, body: bytes, proxy: Proxy) -> web.StreamResponse:
    asked = parse_asked(body, proxy.limits)
    first = _take(proxy.traffic, endpoint.kind, asked.model)
    try:
        return await _attempt(request, endpoint, first, body, asked, proxy)
    except Failed as failed:
        failure = failed.failure
    if not await _may_repeat(failure, endpoint, first, proxy):
        raise _rejected(first, failure)
    # The model of the first choice: a request that names none must not come out at another model the second time.
    second = proxy.traffic.take(endpoint.kind, asked.model or first.model, {first.leader})
    if isinstance(second, NoBackend):
        # A request that never arrived anywhere is as if the engine had not been ready: it may be sent again.
        raise rejected(second) if failure is Failure.UNREACHED else _rejected(first, failure)
    try:
        return await _attempt(request, endpoint, second, body, asked, proxy)
    except Failed as failed:
        raise _rejected(second, failed.failure) from failed


def _take(traffic: Traffic, kind: str, model: str | None) -> Backend:
    chosen = traffic.take(kind, model)
    if isinstance(chosen, NoBackend):
        raise rejected(chosen)
    return chosen


async def _attempt(
    request: web.Request, endpoint: Endpoint, backend: Backend, body: bytes, asked: Asked, proxy: Proxy
) -> web.StreamResponse:
    """Ask one backend, which was taken and is given back here. Raises Failed as long as nothing was sent."""
    try:
        body = with_model(body, asked, backend.model)
        answer = await ask(proxy.session, backend, endpoint.path, request.headers, body, proxy.limits)
        try:
            if proxy.traffic.succeeded(backend):
                raise Failed(Failure.ODD)
            response, broke_off = await relay(request, answer, backend, endpoint.ends_with_done, proxy.limits)
        finally:
            # At once, also when the client is gone: the engine should not work for nobody.
            answer.close()
        if broke_off:
            proxy.traffic.eject(backend.leader)
        return response
    except Failed as failed:
        if failed.failure in (Failure.UNREACHED, Failure.BROKEN):
            proxy.traffic.eject(backend.leader)
        raise
    finally:
        proxy.traffic.give_back(backend.leader)


async def _may_repeat(failure: Failure, endpoint: Endpoint, backend: Backend, proxy: Proxy) -> bool:
    """Whether the request can be sent to another backend without being worked on twice.

    1. It never arrived: yes.
    2. It arrived, and the connection ended without an answer: yes if repeating is harmless, or once the table says
       that the engine is gone, and what it had done with it. The table may take a moment to say so.
    3. Otherwise no: it may be under way still.
    """
    if failure is Failure.UNREACHED:
        return True
    if failure is not Failure.BROKEN:
        return False
    return endpoint.idempotent or await _is_gone(backend.leader, proxy)


async def _is_gone(leader: ProcessIdentity, proxy: Proxy) -> bool:
    try:
        async with asyncio.timeout(proxy.limits.fresh_table_seconds):
            while proxy.traffic.observed_ready(leader):
                await asyncio.sleep(LOOK_SECONDS)
    except TimeoutError:
        return False
    return True


def _rejected(backend: Backend, failure: Failure) -> Rejected:
    message = f"{backend.engine}: {failure.value}"
    if failure is Failure.LATE:
        return Rejected(504, "upstream_timeout", message)
    if failure is Failure.SHORTAGE:
        return Rejected(503, "overloaded", message, headers=(("Retry-After", "1"),))
    return Rejected(502, "upstream_error", message)
