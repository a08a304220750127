"""Strict YAML: bytes in, plain values out, with the place of every key and element. The only door to the yaml library.

Only parser events are used: they are flat, so nesting cannot exhaust a stack (PyYAML's C composer dies with SIGSEGV
on 60 KB of "["), and limits count before anything is built. Scalars mean what YAML 1.2's core schema says.
Must not know: what a manifest is.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from sage_reconcile.world.manifest_problems import TOP, Mark, Problem, Source, cut

Path = tuple[str | int, ...]

# A manifest needs 6 levels; every level is a frame of our own recursion.
_DEEPEST = 32
# A thousand engines of 40 fields fit, key and value each counted; it bounds time and memory.
_MOST_NODES = 100_000
# The rest of a file with this many mistakes says nothing new.
MOST_PROBLEMS = 100

# Every integer of up to 18 digits fits in 64 bits, and no field needs more.
_LONGEST_INTEGER = 18
_LONGEST_FLOAT = 64
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_WORDS: Mapping[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}

# Control characters other than tab and line ends, the line ends that only some programs see, and byte order marks.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
# Only an escape in quotes can make one, and only the parser without C lets it.
_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_END = re.compile(r"\r\n|\n|\r")


class Broken:
    """Stands where a value was refused, so that nobody complains about it twice."""


_BROKEN = Broken()


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One YAML document, as far as it could be read.

    `top` is None when it is not a mapping, which is then among `problems`. `marks` holds the place of the key for an
    entry of a mapping, and of the value for an element of a list and for the top ().
    """

    source: Source
    top: Mapping[str, Any] | None
    marks: Mapping[Path, Mark]
    problems: tuple[Problem, ...]

    def mark(self, path: Path) -> Mark:
        """The place of a path, or of the nearest thing around it that is written."""
        while path and path not in self.marks:
            path = path[:-1]
        return self.marks.get(path, TOP)


class _Stopped(Exception):
    """Reading cannot go on after this problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def scan(file: str, content: bytes, *, loader: Any = None) -> Document:
    """The document in `content`; never raises. `loader` is a class with PyYAML's parser, by default the fastest."""
    source = Source(file=file)
    try:
        text = _text(source, content)
        source = Source(file=file, lines=_LINE_END.split(text))
        _refuse_forbidden(source, text)
    except _Stopped as stopped:
        return Document(source=source, top=None, marks={}, problems=(stopped.problem,))
    building = _Building(source, _events(source, text, loader or getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    try:
        top = building.document()
    except _Stopped as stopped:
        building.problems.append(stopped.problem)
        top = None
    return Document(source=source, top=top, marks=building.marks, problems=tuple(building.problems))


def _text(source: Source, content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _Stopped(source.problem(TOP, "the file is UTF-16, not UTF-8", "save it as UTF-8"))
    if content.startswith(b"\xef\xbb\xbf"):
        raise _Stopped(source.problem(TOP, "the file starts with a byte order mark", 'save it as "UTF-8 without BOM"'))
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = _LINE_END.split(content[: error.start].decode("utf-8"))
        message = f"byte 0x{content[error.start]:02x} is not UTF-8"
        raise _Stopped(source.problem(Mark(len(before), len(before[-1]) + 1), message, "save it as UTF-8")) from None


def _refuse_forbidden(source: Source, text: str) -> None:
    found = _FORBIDDEN.search(text)
    if found is None:
        return
    before = _LINE_END.split(text[: found.start()])
    name = "a NUL character" if found[0] == "\0" else f"the control character U+{ord(found[0]):04X}"
    hint = 'delete it; in a double-quoted text it can be written as an escape such as "\\t"'
    raise _Stopped(source.problem(Mark(len(before), len(before[-1]) + 1), f"{name} stands in the file", hint))


def _events(source: Source, text: str, loader: Any) -> Iterator[Any]:
    given = 0
    try:
        for event in yaml.parse(text, Loader=loader):
            yield event
            given += 1
    except yaml.MarkedYAMLError as error:
        # libyaml since 0.2.6 gives up on nesting while it reads ahead, before it has told of what is nested. The parser
        # without C goes on from there, to the place where we give up ourselves.
        if "nesting depth" in (error.problem or "") and loader is not yaml.SafeLoader:
            yield from itertools.islice(_events(source, text, yaml.SafeLoader), given, None)
            return
        raise _Stopped(_syntax_problem(source, error)) from None
    # The parser without C lets chr() complain of "\UFFFFFFFF", and ReaderError has no mark.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise _Stopped(source.problem(TOP, f"not valid YAML: {cut(str(error))}")) from None


def _syntax_problem(source: Source, error: yaml.MarkedYAMLError) -> Problem:
    what, mark, hint = error.problem or "it cannot be read", error.problem_mark or error.context_mark, None
    around = error.context or ""
    if mark is None:
        return source.problem(TOP, f"not valid YAML: {what}")
    letter = _letter(source, mark.line, mark.column)
    if "end of stream" in what and "quoted scalar" in around and error.context_mark is not None:
        what, mark, hint = "the quote that opens here is never closed", error.context_mark, "close it"
    elif "tab character" in what or (letter == "\t" and "cannot start any token" in what):
        what, hint = "a tab cannot indent", "indent with spaces"
    elif "cannot start any token" in what:
        what, hint = f"a plain text cannot start with {letter}", "put the text in quotes"
    elif "mapping values are not allowed" in what:
        what, hint = '":" cannot stand here', 'a text that holds ": " needs quotes'
    elif around and error.context_mark is not None:
        what = f"{what} {around} that starts at {error.context_mark.line + 1}:{error.context_mark.column + 1}"
    return source.problem(Mark(mark.line + 1, mark.column + 1), f"not valid YAML: {what}", hint)


def _letter(source: Source, line: int, column: int) -> str:
    text = source.lines[line] if line < len(source.lines) else ""
    return text[column] if column < len(text) else ""


@dataclass(slots=True)
class _Building:
    """Builds values out of events, and keeps the marks and the problems met on the way."""

    source: Source
    events: Iterator[Any]
    marks: dict[Path, Mark] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    nodes: int = 0
    anchor_told: bool = False

    def document(self) -> Mapping[str, Any] | None:
        """The top of the one document; None, with a problem, when it is not a mapping."""
        next(self.events)  # the start of the stream
        start = next(self.events)
        if isinstance(start, yaml.StreamEndEvent):
            raise _Stopped(self.source.problem(TOP, *self._nothing()))
        if start.tags:
            self._problem(start, "%TAG is not allowed", "remove the line")
        first = next(self.events)
        value = self._value(first, (), 0)
        next(self.events)  # the end of the document
        after = next(self.events)
        if not isinstance(after, yaml.StreamEndEvent):
            hint = "write each stack in a file of its own"
            raise _Stopped(self.source.problem(_mark(after), "a second document starts here", hint))
        if isinstance(value, dict):
            return value
        if value is None:
            self.problems.append(self.source.problem(TOP, *self._nothing()))
        elif not isinstance(value, Broken):
            what = "a list" if isinstance(value, list) else "a single value"
            self._problem(first, f"the file holds {what}, not a mapping", "write fields: `version: 1`, `name: ...`")
        return None

    def _nothing(self) -> tuple[str, str]:
        written = any(line.strip() for line in self.source.lines)
        message = "the file holds no manifest, only comments" if written else "the file is empty"
        return message, "write a manifest into it, or delete the file"

    def _value(self, event: Any, path: Path, depth: int) -> Any:
        self.nodes += 1
        if self.nodes > _MOST_NODES:
            raise _Stopped(self.source.problem(_mark(event), f"the file holds more than {_MOST_NODES} values"))
        if depth > _DEEPEST:
            raise _Stopped(self.source.problem(_mark(event), f"nested deeper than {_DEEPEST} levels"))
        self.marks.setdefault(path, _mark(event))
        if event.anchor is not None:
            self._refuse_anchor(event)
        if isinstance(event, yaml.AliasEvent):
            return _BROKEN
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._problem(event, f'the tag "{cut(tag)}" is not allowed', "write the value without a tag")
        value = self._untagged(event, path, depth)
        # What a tag would make of the value is not for us to say.
        return value if event.tag is None else _BROKEN

    def _untagged(self, event: Any, path: Path, depth: int) -> Any:
        if isinstance(event, yaml.SequenceStartEvent):
            return self._list(path, depth)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path, depth)
        return self._scalar(event)

    def _list(self, path: Path, depth: int) -> list[Any]:
        values: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            values.append(self._value(event, (*path, len(values)), depth + 1))
        return values

    def _mapping(self, path: Path, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self._key(event, path, depth)
            # What stands under a refused key is read, so that its own mistakes are told, and then dropped.
            refused = key is None or key in values
            if key is not None and refused:
                first = self.marks[(*path, key)]
                self._problem(event, f'"{cut(key)}" is written twice; first at line {first.line}', "keep one of them")
            below = (*path, -1) if refused or key is None else (*path, key)
            if not refused:
                self.marks[below] = _mark(event)
            value = self._value(next(self.events), below, depth + 1)
            if key is not None and not refused:
                values[key] = value
        return values

    def _key(self, event: Any, path: Path, depth: int) -> str | None:
        told = len(self.problems)
        key = self._value(event, (*path, -1), depth + 1)
        if not isinstance(event, yaml.ScalarEvent):
            if not isinstance(key, Broken):
                self._problem(event, "a key must be a text, not a list or a mapping")
            return None
        if key == "<<" and not event.style:
            self._problem(
                event,
                "merge keys (<<) are not allowed",
                "write the fields out, or use defaults: for what engines share",
            )
            return None
        if not isinstance(key, str) and len(self.problems) == told:
            self._problem(event, f"the key {cut(event.value) or 'null'} is not a text", "put it in quotes")
        return key if isinstance(key, str) else None

    def _scalar(self, event: Any) -> Any:
        text: str = event.value
        if event.style:
            if _SURROGATE.search(text) is None:
                return text
            self._problem(event, "the text holds half of a surrogate pair, which is no character")
            return _BROKEN
        if text in _WORDS:
            return _WORDS[text]
        if text[0] not in "+-.0123456789":
            return text
        if _INTEGER.fullmatch(text):
            return self._integer(event, text)
        if _NOT_FINITE.fullmatch(text) or _FLOAT.fullmatch(text):
            return self._float(event, text)
        return text

    def _integer(self, event: Any, text: str) -> Any:
        if len(text.lstrip("+-")) > _LONGEST_INTEGER:
            self._problem(event, f"the number {cut(text)} is too large", "if it is meant as a text, put it in quotes")
            return _BROKEN
        base = 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10
        return int(text, base)

    def _float(self, event: Any, text: str) -> Any:
        number = math.nan if len(text) > _LONGEST_FLOAT or "n" in text.lower() else float(text)
        if not math.isfinite(number):
            self._problem(event, f"{cut(text)} is not a finite number", "if it is meant as a text, put it in quotes")
            return _BROKEN
        return number

    def _refuse_anchor(self, event: Any) -> None:
        """Told once per file: where there is one, there are its aliases, and a bomb has thousands."""
        if not self.anchor_told:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            hint = "write the value out, or use defaults: for what engines share"
            self._problem(event, f"anchors and aliases ({sign}{cut(event.anchor)}) are not allowed", hint)
        self.anchor_told = True

    def _problem(self, event: Any, message: str, hint: str | None = None) -> None:
        if len(self.problems) >= MOST_PROBLEMS:
            raise _Stopped(self.source.problem(_mark(event), f"more than {MOST_PROBLEMS} mistakes in this file"))
        self.problems.append(self.source.problem(_mark(event), message, hint))


def _mark(event: Any) -> Mark:
    return Mark(event.start_mark.line + 1, event.start_mark.column + 1)
