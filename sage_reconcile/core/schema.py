"""The JSON Schemas of what users write, generated from the models. schemas/ holds copies; a test says when stale."""

import json
from typing import Any

from sage_reconcile.core.spec import ProjectSettings, Stack

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def stack_schema_json() -> str:
    """The schema of a manifest file.

    `defaults` fills in for engines, so it has the fields of an engine but its name, and a model that stands there need
    not be written again: an engine alone cannot be told to have one.
    """
    schema = Stack.model_json_schema()
    engine = schema["$defs"]["EngineSpec"]
    engine["required"] = ["name"]
    filled_in = {name: field for name, field in engine["properties"].items() if name != "name"}
    schema["properties"]["defaults"] |= {"additionalProperties": False, "properties": filled_in}
    return _text(schema)


def settings_schema_json() -> str:
    """The schema of `sage.yaml`."""
    return _text(ProjectSettings.model_json_schema())


def _text(schema: dict[str, Any]) -> str:
    return json.dumps({"$schema": _DIALECT, **schema}, indent=2, sort_keys=True)
