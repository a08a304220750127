"""The connection to an engine: one request each, to an address that only the table knows, with headers of our choice.

A connection is never used twice, so none outlives the engine that it was opened to: a port that is handed to another
engine is reached by a new connection or not at all.
"""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Mapping
from enum import Enum

import aiohttp
from aiohttp.typedefs import LooseHeaders
from yarl import URL

from sage_reconcile.core.routes import Backend
from sage_reconcile.router.limits import CHUNK_BYTES, READ_BYTES, SOCKET_BYTES, Limits

# All that an engine gets to see of a client's headers. Keys and cookies are for the router, never for an engine.
FORWARDED_HEADERS = ("Content-Type", "Accept", "User-Agent", "X-Request-ID")
# The router's own shortage of sockets or memory says nothing about the engine.
OWN_SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM)


class Failure(Enum):
    """How an engine failed before it said anything that a client could be sent."""

    # There never was a connection.
    UNREACHED = "it did not accept a connection"
    # It took the request, and the connection ended before the head of a response.
    BROKEN = "it closed the connection before it answered"
    # It answered with something that is not for a client: not HTTP, a redirect, an encoding nobody asked for.
    ODD = "it answered with something that cannot be passed on"
    LATE = "it did not begin to answer in time"
    SHORTAGE = "the router is short of sockets"


class Failed(Exception):
    """An engine failed before the first byte of an answer."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.value)
        self.failure = failure


def make_session(limits: Limits) -> aiohttp.ClientSession:
    """A session that keeps no connection, no cookie, and no setting of the environment (proxies, .netrc)."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=_small_socket),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=limits.connect_seconds, sock_read=None),
        trust_env=False,
        auto_decompress=False,
        read_bufsize=READ_BYTES,
    )


async def ask(
    session: aiohttp.ClientSession,
    backend: Backend,
    path: str,
    client_headers: Mapping[str, str],
    body: bytes,
    limits: Limits,
) -> aiohttp.ClientResponse:
    """POST the body, and return as soon as the head of the response is there. Raises Failed. The caller closes it."""
    headers = {name: client_headers[name] for name in FORWARDED_HEADERS if name in client_headers}
    headers |= {"Accept-Encoding": "identity", "Content-Length": str(len(body))}
    try:
        async with asyncio.timeout(limits.response_head_seconds):
            answer = await _post(session, backend, path, headers, body)
    except aiohttp.ClientConnectorError as error:
        raise Failed(Failure.SHORTAGE if error.errno in OWN_SHORTAGE else Failure.UNREACHED) from error
    except aiohttp.ConnectionTimeoutError as error:
        raise Failed(Failure.UNREACHED) from error
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
        raise Failed(Failure.BROKEN) from error
    except TimeoutError as error:
        raise Failed(Failure.LATE) from error
    except aiohttp.ClientError as error:
        raise Failed(Failure.ODD) from error
    if answer.status < 200 or 300 <= answer.status < 400 or _encoded(answer):
        answer.close()
        raise Failed(Failure.ODD)
    _end_with_connection(answer)
    return answer


async def _post(
    session: aiohttp.ClientSession, backend: Backend, path: str, headers: LooseHeaders, body: bytes
) -> aiohttp.ClientResponse:
    url = URL.build(scheme="http", host=backend.host, port=backend.port, path=path)
    # A large body goes out in pieces, so that other requests get their turn.
    content = body if len(body) <= CHUNK_BYTES else _pieces(body)
    return await session.post(url, data=content, headers=headers, allow_redirects=False)


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), CHUNK_BYTES):
        yield body[start : start + CHUNK_BYTES]


def _end_with_connection(answer: aiohttp.ClientResponse) -> None:
    """Let the body end when its connection does.

    After a malformed chunk aiohttp 3.14.5 closes the connection and tells the reader of the body nothing, who then
    waits for ever (found by a test, November 2026).
    """

    def tell_reader(closed: asyncio.Future[None] | None) -> None:
        if closed is not None and not closed.cancelled():
            # Looked at, so that asyncio does not call it forgotten.
            closed.exception()
        if not answer.content.is_eof() and answer.content.exception() is None:
            answer.content.set_exception(aiohttp.ClientPayloadError("the connection ended within the body"))

    if answer.connection is None or answer.connection.protocol is None:
        # The whole body is here already.
        return
    closed = answer.connection.protocol.closed
    if closed is None:
        tell_reader(None)
    else:
        closed.add_done_callback(tell_reader)


def _encoded(answer: aiohttp.ClientResponse) -> bool:
    return answer.headers.get("Content-Encoding", "identity").lower() != "identity"


def _small_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket whose receive buffer does not grow: an engine should feel it when a client reads slowly."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setblocking(False)
    # Before the connect, or the window was already offered.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
    return made
