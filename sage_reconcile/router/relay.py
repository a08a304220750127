"""From an engine's response to the client's: chunk by chunk, never ahead of the client, and never a silent end."""

import asyncio
import json
import re

import aiohttp
from aiohttp import web

from sage_reconcile.core.routes import Backend
from sage_reconcile.router.answers import SERVER, error_body
from sage_reconcile.router.limits import CHUNK_BYTES, WRITE_BYTES, Limits

# All that a client gets to see of an engine's headers.
PASSED_HEADERS = ("Content-Type", "X-Request-ID", "Retry-After")
# The last event of a complete stream. Newlines inside of JSON are escaped, so only an event of its own looks like this.
DONE = re.compile(rb"[\r\n]data: ?\[DONE\]")
DONE_BYTES = len(b"\ndata: [DONE]")


async def relay(
    request: web.Request, answer: aiohttp.ClientResponse, backend: Backend, ends_with_done: bool, limits: Limits
) -> tuple[web.StreamResponse, bool]:
    """Send the client all that the engine sends; also returns whether the engine broke off.

    `ends_with_done` says that a stream of events on this path is complete only after `data: [DONE]`.

    1. Pass on each chunk when it comes; read the next one when the client has taken enough of it.
    2. A stream of events that breaks off ends with an error event and without the last chunk of HTTP.
    3. Anything else that breaks off ends with the connection, short of its announced length.
    """
    is_events = answer.content_type == "text/event-stream"
    response = _response(answer, backend, is_events)
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client is gone")
    transport.set_write_buffer_limits(high=WRITE_BYTES)
    await response.prepare(request)
    tail = b"\n"
    is_done = False
    while chunk := await _next_chunk(answer, limits):
        await response.write(chunk)
        # write() itself waits only after every 64 KiB.
        await request.writer.drain()
        is_done = is_done or DONE.search(tail + chunk) is not None
        tail = (tail + chunk)[-DONE_BYTES:]
    broke_off = chunk is None and not is_done
    if is_events and answer.status == 200 and ends_with_done and not is_done:
        await response.write(_last_event(backend, tail))
        # Everything written is still sent, and then the end of the connection instead of the end of the response.
        transport.close()
    elif broke_off:
        transport.abort()
    return response, broke_off


def _response(answer: aiohttp.ClientResponse, backend: Backend, is_events: bool) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status)
    for name in PASSED_HEADERS:
        if name in answer.headers:
            response.headers[name] = answer.headers[name]
    response.headers["X-Sage-Engine"] = str(backend.engine)
    response.headers["Server"] = SERVER
    if is_events:
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"
    elif answer.content_length is not None:
        response.content_length = answer.content_length
    return response


async def _next_chunk(answer: aiohttp.ClientResponse, limits: Limits) -> bytes | None:
    """What came next; empty at the end, None when the engine broke off or went silent."""
    try:
        async with asyncio.timeout(limits.idle_seconds):
            return await answer.content.read(CHUNK_BYTES)
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None


def _last_event(backend: Backend, tail: bytes) -> bytes:
    error = error_body(f"{backend.engine} ended before its answer was complete", "upstream_error", "engine_died")
    # An event that was cut in two must not swallow this one.
    start = b"" if tail.endswith((b"\n\n", b"\r\n\r\n")) else b"\n\n"
    return start + b"data: " + json.dumps({"error": error}).encode() + b"\n\n"
