"""A mistake in a manifest, and how it is told: `file:line:column`, the line itself, a caret and the cure.

Must not know: YAML, fields, or which mistakes there are.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sage_reconcile.errors import InvalidManifests

# A line of a terminal and a half: enough to recognise the place, and a minified file cannot flood the screen.
_LONGEST_SNIPPET = 160
# As much of a value as a sentence bears.
_LONGEST_VALUE = 60
# A sentence longer than this quotes something that nobody reads.
_LONGEST_MESSAGE = 500

# Secrets that somebody wrote down after all: reports end up in the logs of CI, so they show stars instead.
_SECRET_VALUE = re.compile(r"\b(?:hf_|sk-)[A-Za-z0-9_-]{4,}")
_SECRET_FIELD = re.compile(
    r"""(?:TOKEN|KEY|SECRET|PASSWORD)["']?\s*:\s*(?P<value>"[^"]*"?|'[^']*'?|[^\s,}][^,}]*)""", re.IGNORECASE
)


class Mark(NamedTuple):
    """A place in a file, counted from 1."""

    line: int
    column: int


TOP = Mark(1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One mistake in a manifest; `snippet` is the line it stands on, '' if there is none to show."""

    file: str
    line: int
    column: int
    message: str
    hint: str | None
    snippet: str

    def report(self) -> str:
        """The text that a terminal shows."""
        lines = [f"{one_line(self.file)}:{self.line}:{self.column}: error: {self.message}"]
        if self.snippet:
            lines.append(f"    {self.snippet}")
        if self.snippet and self.column <= len(self.snippet) + 1:
            before = self.snippet[: self.column - 1]
            lines.append(f"    {' ' * sum(2 if unicodedata.east_asian_width(c) in 'WF' else 1 for c in before)}^")
        if self.hint is not None:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


class ProblemsFound(InvalidManifests):
    """The manifests hold mistakes: all of them, in the order of files and lines."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(problem.report() for problem in problems))
        self.problems = problems

    def report(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file as the user spells it, and its lines for snippets."""

    file: str
    lines: Sequence[str] = ()

    def problem(self, mark: Mark, message: str, hint: str | None = None) -> Problem:
        return Problem(
            file=self.file,
            line=mark.line,
            column=mark.column,
            message=one_line(without_secrets(message[:_LONGEST_MESSAGE])),
            hint=None if hint is None else one_line(without_secrets(hint)),
            snippet=_snippet(self.lines[mark.line - 1]) if mark.line <= len(self.lines) else "",
        )

    def at(self, mark: Mark) -> str:
        return f"{one_line(self.file)}:{mark.line}:{mark.column}"


def _snippet(line: str) -> str:
    line = line[:_LONGEST_SNIPPET]
    # Stars keep the length, so that the caret still points at its place.
    stars = _SECRET_FIELD.sub(lambda found: found[0][: -len(found["value"])] + "*" * len(found["value"]), line)
    return one_line(without_secrets(stars.replace("\t", " ")).rstrip())[:_LONGEST_SNIPPET]


def without_secrets(text: str) -> str:
    """The text with everything that looks like a token in stars."""
    return _SECRET_VALUE.sub(lambda found: "*" * len(found[0]), text)


def one_line(text: str) -> str:
    """The text with control and other unprintable characters escaped, so that it cannot move a terminal's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shown(value: object) -> str:
    """A value as a sentence names it: `the string "8000"`, `true`, `a list`."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return f'the string "{cut(value)}"'
        case int() | float():
            return f"the number {value}"
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list"
    return "this"


def cut(text: str) -> str:
    """The text, escaped, and cut where a sentence would drown in it."""
    return one_line(text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "...")
