"""The body of a request: read within limits, its model found, and that one value replaced. Nothing else is touched."""

import asyncio
import json
from dataclasses import dataclass

from aiohttp import HttpVersion11, hdrs, web

from sage_reconcile.router.answers import Rejected
from sage_reconcile.router.limits import Limits

# What RFC 8259 calls whitespace.
SPACE = " \t\n\r"


class Room:
    """How much memory the bodies of all requests hold. Used by one loop only."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0

    def hold(self, count: int) -> None:
        """Count these bytes, or raise Rejected when they are too many."""
        if self._held_bytes + count > self._limit_bytes:
            raise Rejected(
                503,
                "overloaded",
                "the bodies of the requests under way fill the router's memory",
                headers=(("Retry-After", "1"),),
                close=True,
            )
        self._held_bytes += count

    def free(self, count: int) -> None:
        self._held_bytes -= count


@dataclass(frozen=True, slots=True)
class Asked:
    """A body that is a JSON object, and where its model stands."""

    text: str
    # What the client asks for; None when it names nothing.
    model: str | None
    # The values of the top-level "model" keys: (start, end) in `text`. More than one only when a key stands twice.
    spans: tuple[tuple[int, int], ...] = ()


async def read_body(request: web.Request, limits: Limits, room: Room) -> bytes:
    """The whole body. Raises Rejected: 413 too large, 408 too slow, 400 broken, 503 no room.

    The caller frees the room that the returned body takes.
    """
    if (request.content_length or 0) > limits.body_bytes:
        raise _too_large(limits)
    if request.version >= HttpVersion11 and request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # Nothing of the answer itself has been sent yet.
        request.writer.output_size = 0
    body = bytearray()
    whole = False
    try:
        async with asyncio.timeout(limits.body_seconds):
            while chunk := await _next_chunk(request, limits):
                room.hold(len(chunk))
                body += chunk
                if len(body) > limits.body_bytes:
                    raise _too_large(limits)
        whole = True
        return bytes(body)
    except TimeoutError:
        raise Rejected(408, "request_timeout", "the body of the request did not arrive in time", close=True) from None
    except web.RequestPayloadError:
        raise Rejected(400, "bad_request", "the body of the request is not valid HTTP", close=True) from None
    finally:
        if not whole:
            room.free(len(body))


def parse_asked(body: bytes, limits: Limits) -> Asked:
    """What the body asks for. Raises Rejected with 400 when it is not one JSON object in UTF-8."""
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > limits.body_values:
        raise _bad_json("has too many values")
    try:
        text = body.decode()
        found = _model_values(text, limits.body_keys)
    except RecursionError:
        raise _bad_json("is nested too deeply") from None
    except ValueError:
        raise _bad_json("is not a JSON object in UTF-8") from None
    values = [value for value, _ in found]
    if not all(value is None or isinstance(value, str) for value in values):
        raise Rejected(400, "invalid_model", "model must be a string", param="model")
    # Where a key stands twice, the last one counts, as in Python, JavaScript and Go.
    last = values[-1] if values else None
    return Asked(text=text, model=str(last) if last else None, spans=tuple(span for _, span in found))


def with_model(body: bytes, asked: Asked, model: str) -> bytes:
    """The body with this model in place of the one asked for, all other bytes as they were.

    A body that already names it is returned as it is; in one without a model, none is put.
    """
    if all(json.loads(asked.text[start:end]) == model for start, end in asked.spans):
        return body
    written = json.dumps(model)
    parts = []
    end_of_last = 0
    for start, end in asked.spans:
        parts += [asked.text[end_of_last:start], written]
        end_of_last = end
    return "".join([*parts, asked.text[end_of_last:]]).encode()


async def _next_chunk(request: web.Request, limits: Limits) -> bytes:
    async with asyncio.timeout(limits.body_progress_seconds):
        return await request.content.readany()


def _model_values(text: str, most_keys: int) -> list[tuple[object, tuple[int, int]]]:
    """The values of the top-level keys called "model", with where they stand. Raises ValueError or RecursionError.

    The json module reads keys and values; only the braces, colons and commas of the outermost object are read here.
    """
    decoder = json.JSONDecoder()
    found = []
    at = _expect(text, _skip(text, 0), "{")
    if text[at : at + 1] == "}":
        _expect_end(text, at + 1)
        return []
    for _ in range(most_keys):
        if text[at : at + 1] != '"':
            raise ValueError("a key is missing")
        key, at = decoder.raw_decode(text, at)
        start = _expect(text, _skip(text, at), ":")
        value, end = decoder.raw_decode(text, start)
        if key == "model":
            found.append((value, (start, end)))
        at = _skip(text, end)
        if text[at : at + 1] == "}":
            _expect_end(text, at + 1)
            return found
        at = _expect(text, at, ",")
    raise _bad_json("has too many keys")


def _skip(text: str, at: int) -> int:
    """The place of the next character that is not whitespace."""
    while text[at : at + 1] and text[at] in SPACE:
        at += 1
    return at


def _expect(text: str, at: int, character: str) -> int:
    """The place of what follows this character."""
    if text[at : at + 1] != character:
        raise ValueError(f"{character} is missing")
    return _skip(text, at + 1)


def _expect_end(text: str, at: int) -> None:
    if _skip(text, at) != len(text):
        raise ValueError("something follows the object")


def _bad_json(problem: str) -> Rejected:
    return Rejected(400, "invalid_json", f"the body of the request {problem}")


def _too_large(limits: Limits) -> Rejected:
    return Rejected(
        413, "request_too_large", f"the body of the request is larger than {limits.body_bytes} bytes", close=True
    )
