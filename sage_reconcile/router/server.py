"""The router as a server: a bound socket in, requests served, and a stop that lets running ones finish."""

import asyncio
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import web

from sage_reconcile import errors
from sage_reconcile.router.app import BUSY, is_loopback, make_app
from sage_reconcile.router.connection import Connection
from sage_reconcile.router.limits import BACKLOG, READ_BYTES, SOCKET_BYTES, Limits
from sage_reconcile.router.traffic import Traffic

log = logging.getLogger(__name__)

# How often the loop looks whether another thread asked it to stop, or the last request ended, in seconds.
LOOK_SECONDS = 0.05

__all__ = ["Limits", "Traffic", "bound_socket", "make_app", "serve"]


def serve(
    traffic: Traffic,
    listening: socket.socket,
    *,
    ready: Callable[[str], None],
    stopping: threading.Event,
    limits: Limits | None = None,
) -> None:
    """Serve on a bound socket until `stopping` is set, or SIGINT or SIGTERM comes when this is the main thread.

    Calls `ready` with the address once it listens. When it stops it accepts nothing more, gives running requests
    `drain_seconds`, and a second signal ends them at once; the socket is closed. Raises errors.Environment when
    somebody else listens on the port by now.
    """
    with listening:
        try:
            listening.listen(BACKLOG)
        except OSError as error:
            host, port = listening.getsockname()[:2]
            raise _cannot_serve(host, port, error) from error
        asyncio.run(_serve(traffic, listening, ready, stopping, limits or Limits()))


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket for `serve`, that does not listen yet; port 0 takes any free port.

    Raises errors.Refused for a host beyond loopback, errors.Environment when the port cannot be had.
    """
    if not is_loopback(host):
        raise errors.Refused(
            f"cannot serve on {host}: beyond this machine clients need a key, and keys are not served yet",
            hint="serve on 127.0.0.1, and reach it from elsewhere through ssh -L",
        )
    host = "127.0.0.1" if host == "localhost" else host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit it.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        listening.bind((host, port))
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise _cannot_serve(host, port, error) from error
    return listening


def _cannot_serve(host: str, port: int, error: OSError) -> errors.Environment:
    if error.errno == errno.EADDRINUSE:
        return errors.Environment(
            f"cannot serve on {host}:{port}: another program listens there",
            hint="stop that program, or serve elsewhere with --port",
        )
    return errors.Environment(
        f"cannot serve on {host}:{port}: {error.strerror}", hint="choose another port with --port"
    )


async def _serve(
    traffic: Traffic, listening: socket.socket, ready: Callable[[str], None], stopping: threading.Event, limits: Limits
) -> None:
    """1. Listen. 2. Wait for the word to stop. 3. Accept nothing more and let requests finish. 4. End the rest."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_line)
    asked_to_stop = _StopCount()
    _watch_signals(loop, asked_to_stop)
    app = make_app(traffic, limits)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=LOOK_SECONDS)
    await runner.setup()
    try:
        server = await _listen(runner, listening, limits)
        ready(_url(listening))
        while not asked_to_stop.count and not stopping.is_set():
            await asyncio.sleep(LOOK_SECONDS)
        server.close()
        assert runner.server is not None
        runner.server.pre_shutdown()
        deadline = loop.time() + limits.drain_seconds
        while app[BUSY].count and asked_to_stop.count < 2 and loop.time() < deadline:
            await asyncio.sleep(LOOK_SECONDS)
    finally:
        await runner.cleanup()


class _StopCount:
    """How many signals came."""

    def __init__(self) -> None:
        self.count = 0

    def add(self) -> None:
        self.count += 1


def _watch_signals(loop: asyncio.AbstractEventLoop, asked_to_stop: _StopCount) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked_to_stop.add)


async def _listen(runner: web.AppRunner, listening: socket.socket, limits: Limits) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    served = runner.server
    assert served is not None

    def connection() -> Connection:
        return Connection(
            served,
            loop=loop,
            keepalive_timeout=limits.header_seconds,
            lingering_time=limits.linger_seconds,
            read_bufsize=READ_BYTES,
            auto_decompress=False,
            access_log=None,  # type: ignore[arg-type]  # aiohttp means None by "no log" and annotates a Logger
        )

    return await loop.create_server(connection, sock=listening, backlog=BACKLOG)


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log_line(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """asyncio would print a traceback, for instance when no socket is left to accept with."""
    error = context.get("exception")
    log.error("%s%s", context.get("message", "error in the loop"), f": {error}" if error else "")
