"""The JSON Schemas of what users write, generated from the models. schemas/ holds copies; a test says when stale."""

import json

from sage_reconcile.core.spec import ProjectSettings, Stack

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def stack_schema_json() -> str:
    """The schema of a manifest file."""
    return json.dumps({"$schema": _DIALECT, **Stack.model_json_schema()}, indent=2, sort_keys=True)


def settings_schema_json() -> str:
    """The schema of `sage.yaml`."""
    return json.dumps({"$schema": _DIALECT, **ProjectSettings.model_json_schema()}, indent=2, sort_keys=True)
