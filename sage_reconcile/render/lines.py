"""Lines that fit a terminal of 80 columns, whatever colours are in them."""

import re
from collections.abc import Iterable

WIDTH = 80

# Blanks at which a sentence may break: a number stays with what it counts, and with what it numbers.
_BREAK = re.compile(r"(?<!\bpid)(?<!\bport)(?<!\buid) (?!(?:GiB|GPUs?|ports|bytes|tokens)\b|\((?:GPU|MIG|MOCK)-)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def shown_width(text: str) -> int:
    """The columns that a text takes, without its colours."""
    return len(_COLOUR.sub("", text))


def flowed(parts: Iterable[str], *, indent: int) -> list[str]:
    """Parts in a row, each whole, on as many lines as it takes; all but the first line are indented.

    A part brings the blanks, commas and bars that stand between it and its neighbours. One that is wider than a line is
    broken at its blanks; what has none, such as a long name, stands alone.
    """
    lines: list[str] = []
    for part in (piece for whole in parts for piece in _pieces(whole, WIDTH - indent)):
        if lines and shown_width(lines[-1]) + shown_width(part.rstrip(" ,|")) <= WIDTH:
            lines[-1] += part
        else:
            lines.append(" " * indent + part.lstrip() if lines else part)
    return [line.rstrip() for line in lines]


def _pieces(part: str, width: int) -> list[str]:
    """A part that is wider than a line as its words, each with the blanks before it."""
    if shown_width(part.strip(" ,|")) <= width:
        return [part]
    pieces = [""]
    for piece in words(part.rstrip(" ")):
        if pieces[-1].strip(" "):
            pieces.append(piece)
        else:
            pieces[-1] += piece
    return [*pieces[:-1], pieces[-1] + part[len(part.rstrip(" ")) :]]


def words(text: str, *, before: str = "") -> list[str]:
    """A sentence as parts: its words, each with the blank before it; `before` goes with the first.

    >>> words("pid 7 holds 2.0 GiB", before="! ")
    ['! pid 7', ' holds', ' 2.0 GiB']
    """
    first, *others = _BREAK.split(text)
    return [before + first, *(f" {word}" for word in others)]


def sentence(text: str, *, before: str = "", indent: int) -> list[str]:
    """A sentence on as many lines as it takes."""
    return flowed(words(text, before=before), indent=indent)
