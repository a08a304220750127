"""Colour, where it is wanted. Every text reads the same without it."""

from collections.abc import Sequence
from dataclasses import dataclass

# Select Graphic Rendition parameters, ECMA-48 8.3.117.
_CODES = {"red": "31", "green": "32", "yellow": "33", "cyan": "36", "dim": "2", "bold": "1"}


@dataclass(frozen=True, slots=True)
class Paint:
    """Wraps texts in colour, or leaves them as they are."""

    enabled: bool

    def __call__(self, colour: str, text: str) -> str:
        return f"\x1b[{_CODES[colour]}m{text}\x1b[0m" if self.enabled and text else text


PLAIN = Paint(False)


def columns(rows: Sequence[Sequence[str]], *, indent: str = "") -> list[str]:
    """Rows as lines with aligned columns; the last column is not padded."""
    if not rows:
        return []
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        (indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


def one_line(text: str, width: int) -> str:
    """A text on one line of a terminal: without control characters, and cut where it would wrap."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return shown if len(shown) <= width else shown[: max(width - 1, 0)] + "…"
