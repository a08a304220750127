"""The fixed table of what clients may ask for, the checks before it, and the edge where every error gets its shape."""

import ipaddress
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Final
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler

from sage_reconcile.core.routes import RouteTable
from sage_reconcile.router.answers import Rejected, error_response, health, json_response, model_list, readiness
from sage_reconcile.router.body import Room
from sage_reconcile.router.limits import Limits
from sage_reconcile.router.proxy import Endpoint, Proxy, forward
from sage_reconcile.router.traffic import Traffic
from sage_reconcile.router.upstream import make_session

log = logging.getLogger(__name__)

FORWARDED: Final = {
    "/v1/chat/completions": Endpoint(kind="llm", path="/v1/chat/completions", ends_with_done=True),
    "/v1/completions": Endpoint(kind="llm", path="/v1/completions", ends_with_done=True),
    "/v1/embeddings": Endpoint(kind="embedding", path="/v1/embeddings", idempotent=True),
}
ANSWERED: Final[dict[str, Callable[[RouteTable], web.Response]]] = {
    "/v1/models": lambda table: json_response(model_list(table)),
    "/health": lambda table: json_response(health(table, time.time())),
    "/ready": readiness,
}
PROXY: Final = web.AppKey("proxy", Proxy)


class Busy:
    """How many requests are being answered. Used by one loop only."""

    def __init__(self) -> None:
        self.count = 0


BUSY: Final = web.AppKey("busy", Busy)


def make_app(traffic: Traffic, limits: Limits | None = None) -> web.Application:
    """The router as an aiohttp application.

    Run it with handler_cancellation, or a client that goes away does not end its request.
    """
    kept = limits or Limits()
    app = web.Application(middlewares=[_edge])
    app[BUSY] = Busy()

    async def hold_session(app: web.Application) -> AsyncIterator[None]:
        async with make_session(kept) as session:
            app[PROXY] = Proxy(traffic, session, Room(kept.bodies_bytes), kept)
            yield

    app.cleanup_ctx.append(hold_session)
    # One route for everything: aiohttp would match decoded paths, and here only the bytes that were sent count.
    app.router.add_route("*", "/{path:.*}", _dispatch, expect_handler=_expect_nothing)
    return app


@web.middleware
async def _edge(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error of a request ends here, as an answer in one shape and at most one line in the log."""
    try:
        return await handler(request)
    except Rejected as trouble:
        return error_response(trouble)
    except web.HTTPException as error:
        return error_response(Rejected(error.status, "bad_request", "the request cannot be served"))
    except ConnectionError:
        # The client is gone; there is nobody to tell.
        raise
    except Exception as error:  # noqa: BLE001 - the edge of a request: one bad request must not end the others
        log.error("internal error in a request: %s", type(error).__name__)
        if request.writer.output_size:
            raise ConnectionResetError("an answer was begun and cannot be finished") from error
        return error_response(Rejected(500, "internal_error", "the router made a mistake", close=True))


async def _dispatch(request: web.Request) -> web.StreamResponse:
    """1. Who asks. 2. For what: the path as it was sent, byte for byte. 3. How."""
    _check_origin(request)
    path = request.raw_path.partition("?")[0]
    proxy = request.app[PROXY]
    if path in ANSWERED:
        _check_method(request, "GET")
        return ANSWERED[path](proxy.traffic.table())
    if path not in FORWARDED:
        raise Rejected(404, "not_found", f"nothing is served at this path; there is {', '.join(_paths())}")
    _check_method(request, "POST")
    _check_content(request)
    busy = request.app[BUSY]
    if busy.count >= proxy.limits.requests:
        raise Rejected(
            503,
            "overloaded",
            f"the router has {busy.count} requests under way, as many as it may",
            headers=(("Retry-After", "1"),),
            close=True,
        )
    busy.count += 1
    try:
        return await forward(request, FORWARDED[path], proxy)
    finally:
        busy.count -= 1


def _paths() -> list[str]:
    return sorted([*FORWARDED, *ANSWERED])


def _check_origin(request: web.Request) -> None:
    """Refuse what a web page may have sent.

    A page whose name was rebound to this machine sends its own name as Host; a page of another site sends an Origin.
    The port of the Host is free, so that a forwarded port works.
    """
    host = request.headers.get("Host", "")
    if not _is_local(host):
        raise Rejected(421, "wrong_host", "this address serves localhost only; ask for it by that name", close=True)
    origin = request.headers.get("Origin")
    if origin is not None and origin != f"http://{host}":
        raise Rejected(403, "cross_origin", "requests from web pages of another origin are refused", close=True)


def _is_local(host: str) -> bool:
    try:
        parts = urlsplit(f"//{host}")
        # Reading the port checks it.
        name, _ = parts.hostname, parts.port
    except ValueError:
        return False
    return parts.netloc == host and "@" not in host and name in ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether a server bound to this host can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_method(request: web.Request, method: str) -> None:
    if request.method != method:
        raise Rejected(
            405, "method_not_allowed", f"this path answers {method} only", headers=(("Allow", method),), close=True
        )


def _check_content(request: web.Request) -> None:
    if request.content_type != "application/json":
        raise Rejected(415, "unsupported_content", "send JSON, with Content-Type: application/json", close=True)
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Rejected(415, "unsupported_content", "send the body without Content-Encoding", close=True)


async def _expect_nothing(request: web.Request) -> None:
    """An `Expect: 100-continue` is answered when the body is wanted, not before the request was looked at."""
