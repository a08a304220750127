"""Fields against their models: what pydantic refuses becomes a sentence, at the place where it was written.

Goes in: a scanned document. Comes out: validated models and problems.
Must not know: files, or rules that span several fields.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sage_reconcile.core.quantities import HIGHEST_PORT, LOWEST_PORT, size_meant
from sage_reconcile.core.spec import EngineSpec, ProjectSettings, Stack, not_served_yet
from sage_reconcile.world.manifest_problems import Mark, Problem, cut, shown
from sage_reconcile.world.yaml_scan import MOST_PROBLEMS, Broken, Document, Path

M = TypeVar("M", bound=BaseModel)

# A field and its older spelling: a default in one gives way to an engine's own in the other.
OLDER_SPELLINGS = {"args": "extra_args", "gpu_memory": "required_memory_gb"}

_NOUNS = {Stack: "the stack", EngineSpec: "engine", ProjectSettings: "the project"}
_WANTED_BY_FIELD = {
    "port": f'"auto" or a number from {LOWEST_PORT} to {HIGHEST_PORT}',
    "use_gpu": "true, false or null",
    "gpu_memory": '"auto", a size such as "24GiB", or a fraction such as 0.85',
    "name": 'letters, digits, ".", "_" and "-": the first a letter or digit, and at most 63 of them',
    "path": 'a path such as "/health"',
    "timeout": 'a duration such as "30s" or "5m"',
    "drain": 'a duration such as "30s" or "5m"',
    "grace": 'a duration such as "30s" or "5m"',
}
# Fields that are sizes, and whether a fraction may stand there too.
_SIZES = {"gpu_memory": True, "device_reserve": False}
_NO_MEMORY = ("0", "0.0", "0b", "0gib", "0mib", "0gb", "none", "no", "off", "null", "")
_WANTED_BY_FIELD["project"] = _WANTED_BY_FIELD["name"]
_WANTED_BY_TYPE = {
    "string": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping",
    "model": "a mapping",
}
_LIMITS = {"greater_than_equal": "at least", "greater_than": "more than", "less_than_equal": "at most"}
_DEVICE_INDEX = re.compile(r"(?:gpu)?\s?(\d{1,3})", re.ASCII | re.IGNORECASE)
_BOOLEAN_WORDS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
_NUMBER = re.compile(r"[-+]?[0-9]{1,18}(?:\.[0-9]{1,18})?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """A mapping to validate, and where in its document each part of it was written."""

    document: Document
    values: Mapping[str, Any]
    # From a path in `values` to the path in the document; what lies below follows.
    origins: Mapping[Path, Path]

    def origin(self, path: Path) -> Path:
        for length in range(len(path), -1, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]] + path[length:]
        return path

    def mark(self, path: Path) -> Mark:
        return self.document.mark(self.origin(path))

    def at(self, path: Path) -> str:
        return self.document.source.at(self.mark(path))

    def problem(self, path: Path, message: str, hint: str | None = None) -> Problem:
        return self.document.source.problem(self.mark(path), message, hint)

    def name(self, path: Path) -> str:
        """The field as the user spells it: `ready.timeout`, `extra_args[2]`."""
        # Where the value came from, without the engine or the defaults that it stood in.
        written = self.origin(path)[len(self.origin(path)) - len(path) :]
        return "".join(f"[{part}]" if isinstance(part, int) else f".{cut(part)}" for part in written).lstrip(".")


def top_fields(document: Document) -> Fields:
    """The fields at the top of a file."""
    return Fields(document=document, values=document.top or {}, origins={(): ()})


def default_fields(document: Document, defaults: Mapping[str, Any]) -> Fields:
    """A stack's defaults, made whole, so that they can be validated where they stand."""
    values = {"name": "x", "model": "x"} | {key: value for key, value in defaults.items() if key != "name"}
    return Fields(document=document, values=values, origins={(): ("defaults",)})


def engine_fields(document: Document, index: int, engine: Mapping[str, Any], defaults: Mapping[str, Any]) -> Fields:
    """An engine with the stack's defaults merged in.

    Mappings (env, ready, update ...) merge one level deep; anything else that the engine writes replaces the default.
    """
    values = dict(engine)
    origins: dict[Path, Path] = {(): ("engines", index)}
    spelled_otherwise = {old: new for new, old in OLDER_SPELLINGS.items()} | OLDER_SPELLINGS
    for key, default in defaults.items():
        if key == "name" or spelled_otherwise.get(key) in engine:
            continue
        if key not in engine:
            values[key] = default
            origins[(key,)] = ("defaults", key)
        elif isinstance(engine[key], Mapping) and isinstance(default, Mapping):
            values[key] = {**default, **engine[key]}
            origins |= {(key, below): ("defaults", key, below) for below in default if below not in engine[key]}
    return Fields(document=document, values=values, origins=origins)


def validated(model: type[M], fields: Fields) -> tuple[M | None, tuple[Problem, ...]]:
    """The model, or None and what is wrong with the fields."""
    try:
        return model.model_validate(fields.values), ()
    except ValidationError as error:
        found = error.errors(include_url=False)
    # The branches of a union complain one by one about the same value: the first speaks for all.
    seen: dict[tuple[Path, str], Problem] = {}
    for one in found[:MOST_PROBLEMS]:
        path, value = _written(fields.values, one["loc"])
        if isinstance(value, Broken) or (one["type"] == "too_short" and value):
            continue
        missing = str(one["loc"][-1]) if one["type"] == "missing" else ""
        if (path, missing) not in seen:
            seen[path, missing] = _problem(model, fields, path, value, one)
    return None, tuple(seen.values())


def _written(values: Mapping[str, Any], location: tuple[str | int, ...]) -> tuple[Path, Any]:
    """The part of pydantic's location that the user wrote, without names of union branches, and its value."""
    path: Path = ()
    value: Any = values
    for part in location:
        inside = part in value if isinstance(value, Mapping) else False
        if isinstance(value, list) and isinstance(part, int):
            inside = 0 <= part < len(value)
        if not inside:
            break
        path, value = (*path, part), value[part]
    return path, value


def _problem(model: type[BaseModel], fields: Fields, path: Path, value: Any, error: Mapping[str, Any]) -> Problem:
    kind: str = error["type"]
    context: Mapping[str, Any] = error.get("ctx", {})
    field = fields.name(path)
    match kind:
        case "missing":
            noun = _NOUNS.get(model, "this") if not path else field
            missing = error["loc"][-1]
            return fields.problem(path, f'{noun} has no "{missing}"', f"add `{missing}: ...`")
        case "extra_forbidden":
            return fields.problem(path, f'unknown field "{field}"', _unknown_hint(model, path))
        case "literal_error" if _last_name(path) not in _WANTED_BY_FIELD:
            return fields.problem(path, *_choice(path, field, value, context["expected"]))
        case "value_error":
            return _refused(fields, path, value, str(context["error"]))
        case "string_pattern_mismatch" if "[key]" in error["loc"]:
            return fields.problem(path, f'"{cut(str(path[-1]))}" is not a name that a variable can have')
    limit = _limit(kind, context)
    if limit is not None:
        return fields.problem(path, f"{field} {limit}" + (f", not {value}" if isinstance(value, int | float) else ""))
    return fields.problem(path, *_wrong_type(path, field, value, kind))


def _wrong_type(path: Path, field: str, value: Any, kind: str) -> tuple[str, str | None]:
    wanted = _WANTED_BY_TYPE.get(kind.split("_")[0], "something else")
    if not isinstance(path[-1] if path else "", int):
        wanted = _WANTED_BY_FIELD.get(_last_name(path), wanted) if kind != "model_type" else wanted
    elif path[0] == "devices":
        wanted = "a GPU's index or UUID"
    if kind == "tuple_type" and _last_name(path) == "devices" and isinstance(value, int | str):
        return f"{field} must be {wanted}, not {shown(value)}", f"write a list: [{device_index(value) or value}]"
    return f"{field} must be {wanted}, not {shown(value)}", _type_hint(kind, value)


def device_index(written: int | str) -> str:
    """The index in what a person may write for a GPU: "0" for 0, "0" and "gpu0"; "" where there is none."""
    found = _DEVICE_INDEX.fullmatch(str(written))
    return found[1] if found is not None else ""


def _type_hint(kind: str, value: Any) -> str | None:
    """The cure for a value that would be right in other clothes."""
    if value is None:
        return "leave the field out to get its default"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "put it in quotes"
    if kind == "tuple_type" and isinstance(value, str):
        return "write a list: [a, b]"
    if not isinstance(value, str):
        return None
    if kind == "bool_type" and value.lower() in _BOOLEAN_WORDS:
        return f"YAML 1.2 has only true and false: write {_BOOLEAN_WORDS[value.lower()]}"
    if kind == "bool_type" and value.lower() in ("true", "false"):
        return f"write {value.lower()} without quotes"
    if kind in ("int_type", "float_type", "value_error") and _NUMBER.fullmatch(value):
        return f"write {value} without quotes"
    return None


def _choice(path: Path, field: str, value: Any, expected: str) -> tuple[str, str | None]:
    choices = re.findall(r"'([^']*)'", expected)
    served = [choice for choice in choices if not not_served_yet(_nested(path, choice))]
    if not served:
        return f"{field} must be {expected}, not {shown(value)}", _type_hint("int_type", value)
    wanted = " or ".join(part for part in (", ".join(f'"{one}"' for one in served[:-1]), f'"{served[-1]}"') if part)
    close = difflib.get_close_matches(value[:64].lower(), served, n=1, cutoff=0.5) if isinstance(value, str) else ()
    return f"{field} must be {wanted}, not {shown(value)}", f'did you mean "{close[0]}"?' if close else None


def _nested(path: Path, value: str) -> Mapping[str, Any]:
    nested: Any = value
    for part in reversed(path):
        nested = {str(part): nested}
    return nested if isinstance(nested, dict) else {}


def _refused(fields: Fields, path: Path, value: Any, why: str) -> Problem:
    """The sentence of a validator of ours, with the field before it."""
    # The validator of a mapping speaks of one of its keys.
    key = why.split(" ", 1)[0]
    if isinstance(value, Mapping) and key in value:
        return fields.problem((*path, key), why)
    if isinstance(value, str) and len(value) > len(cut(value)):
        why = why.replace(value, cut(value))
    field = fields.name(path)
    hint = _size_hint(_last_name(path), value) if _last_name(path) in _SIZES else _type_hint("value_error", value)
    if not why.startswith("must "):
        return fields.problem(path, f"{field}: {why}", hint)
    told = f", not {shown(value)}" if why.startswith("must be ") else ""
    return fields.problem(path, f"{field} {why}{told}", hint)


def _size_hint(field: str, value: Any) -> str | None:
    """The size or the fraction that was meant, in a spelling that is taken."""
    text = str(value)
    meant = size_meant(text, or_fraction=_SIZES[field])
    if meant:
        return f"write {meant} without quotes" if isinstance(value, str) and meant == text else f"write {meant}"
    if not isinstance(value, bool) and text.lower() in _NO_MEMORY:
        return f"leave {field} out: {'it is computed then' if _SIZES[field] else 'nothing is kept free then'}"
    return None


def _limit(kind: str, context: Mapping[str, Any]) -> str | None:
    """What a value must keep to, as the end of a sentence; None when the error is not about a limit."""
    bound = next((context[name] for name in ("ge", "gt", "le", "lt") if name in context), None)
    if kind in _LIMITS:
        return f"must be {_LIMITS[kind]} {bound:g}" if isinstance(bound, float) else f"must be {_LIMITS[kind]} {bound}"
    match kind:
        case "too_long":
            return f"must not have more than {context['max_length']} entries"
        case "string_too_long":
            return f"must not be longer than {context['max_length']} characters"
        case "too_short" | "string_too_short":
            return "must not be empty"
    return None


def _unknown_hint(model: type[BaseModel], path: Path) -> str | None:
    word = str(path[-1])
    known = _field_names(model, path[:-1])
    close = difflib.get_close_matches(word[:64].lower().replace("-", "_"), known, n=1, cutoff=0.6)
    if close:
        return f'did you mean "{close[0]}"?'
    if model is Stack and word in EngineSpec.model_fields:
        return f'"{word}" belongs to an engine: write it there, or under defaults:'
    return f"it may be one of: {', '.join(known)}" if known and len(known) <= 8 else None


def _field_names(model: type[BaseModel], path: Path) -> tuple[str, ...]:
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return ()
        model = field.annotation
    return tuple(model.model_fields)


def _last_name(path: Path) -> str:
    return next((part for part in reversed(path) if isinstance(part, str)), "")


def paths_of(values: Mapping[str, Any]) -> Iterator[Path]:
    """The path of every field that is written, down into mappings and not into lists."""
    for key, value in values.items():
        yield (key,)
        if isinstance(value, Mapping):
            yield from ((key, *below) for below in paths_of(value))
