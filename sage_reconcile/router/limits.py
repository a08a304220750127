"""Every number that bounds what a client or an engine may cost the router, and the reason for each."""

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB

# What one stream may hold in the router stays below 256 KiB: one read of what the kernel held (SOCKET_BYTES, which
# Linux doubles), twice READ_BYTES in the reader, and WRITE_BYTES plus one chunk on the way to the client.
READ_BYTES = 16 * KIB
CHUNK_BYTES = 32 * KIB
WRITE_BYTES = 32 * KIB
# Kernel buffers of both connections. Left alone, Linux grows each of them to megabytes for a client that reads slowly.
SOCKET_BYTES = 32 * KIB
# Linux cuts it down to net.core.somaxconn. With 128, opening 10,000 connections at once loses SYNs.
BACKLOG = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits that a caller may set otherwise."""

    # A chat with a few pictures in it fits; a model is never uploaded here.
    body_bytes: int = 32 * MIB
    # All request bodies held at once.
    bodies_bytes: int = 512 * MIB
    # Commas and opening brackets in one body, also those in text: no fewer than its values. Reading a million keys or
    # empty arrays takes 0.3 to 0.6 s, in which nobody else is served. Text of a million tokens stays below this.
    body_values: int = 500_000
    # Keys of the outermost object, which cost most. A chat request has about thirty.
    body_keys: int = 1000
    # Without one more byte of the body, and for the whole of it.
    body_progress_seconds: float = 30.0
    body_seconds: float = 300.0
    # From the connect, or from the last response, to the end of the next request's header. Also how long an idle
    # connection is kept: aiohttp has one timer for both, and it does not restart when bytes drip in.
    header_seconds: float = 10.0
    # How long the rest of a body that nobody wants is read, so that its sender gets to see why.
    linger_seconds: float = 2.0
    # Requests at once that are forwarded or wait to be; the next one is told 503.
    requests: int = 2048
    connect_seconds: float = 5.0
    # A long prompt on a busy engine may take minutes to its first byte.
    response_head_seconds: float = 600.0
    # Between two chunks of an answer.
    idle_seconds: float = 600.0
    # How long to wait for a table that says whether an engine that broke a connection is gone.
    fresh_table_seconds: float = 3.0
    # How long running requests may take to finish once the router stops.
    drain_seconds: float = 10.0
