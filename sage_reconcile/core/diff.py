"""What changed between two specs as written. deepdiff's only door: its objects and paths do not leave this file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sage_reconcile.core.spec import IDENTITY_FIELDS, EngineSpec, canonical_json

# The name is the engine's id, and the number of replicas is a matter of how many ids there are.
_NOT_COMPARED = frozenset({"name", "replicas"})


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldChange:
    """One field that differs. `old` and `new` are JSON texts; "null" stands for a field that is not there."""

    path: str
    old: str
    new: str
    # Where the new value is written, "file:line:column"; empty when no file has it.
    at: str = ""

    @property
    def is_identity(self) -> bool:
        """Whether the change needs another process; a policy change does not."""
        return self.path.split(".")[0] in IDENTITY_FIELDS


def field_changes(old: str, new: str, *, old_defaults: str, fields_at: Mapping[str, str]) -> tuple[FieldChange, ...]:
    """The fields that differ between two written specs (JSON), sorted by path.

    A field that neither side writes is not compared: a new default of sage is no reason to act. A field that one side
    writes is compared with what its absence meant: `old_defaults` (JSON) for the old, today's defaults for the new.
    """
    old_fields, new_fields = json.loads(old), json.loads(new)
    if old_fields == new_fields:
        return ()
    defaults = EngineSpec(name="x", model="x").model_dump(mode="json")
    written = (set(old_fields) | set(new_fields)) - _NOT_COMPARED
    old_meant = _meant(old_fields, written, defaults | json.loads(old_defaults))
    new_meant = _meant(new_fields, written, defaults)
    return tuple(
        FieldChange(
            path=".".join(path),
            old=canonical_json(_at(old_meant, path)),
            new=canonical_json(_at(new_meant, path)),
            at=_position(path, fields_at),
        )
        for path in _changed_paths(old_meant, new_meant)
    )


def _meant(fields: Mapping[str, Any], names: set[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    meant = {}
    for name in names:
        default = defaults.get(name)
        value = fields.get(name, default)
        meant[name] = {**default, **value} if isinstance(default, dict) and isinstance(value, dict) else value
    return meant


def _changed_paths(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, ...]]:
    if old == new:
        return []
    # Imported here: it takes 0.2 s, and most plans compare specs that are the same.
    from deepdiff import DeepDiff

    tree = DeepDiff(old, new, view="tree", verbose_level=2)
    levels = [level for found in tree.values() for level in found]
    return sorted({_field_path(level.path(output_format="list")) for level in levels})


def _field_path(path: list[Any]) -> tuple[str, ...]:
    """The path of the field: a list is one value, and so is what lies below a mapping's entry."""
    names = []
    for part in path[:2]:
        if not isinstance(part, str):
            break
        names.append(part)
    return tuple(names)


def _at(fields: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = fields
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _position(path: tuple[str, ...], fields_at: Mapping[str, str]) -> str:
    return next((at for end in range(len(path), 0, -1) if (at := fields_at.get(".".join(path[:end])))), "")
