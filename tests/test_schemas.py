"""schemas/ is generated from the models: `make schemas` writes it anew. Examples must agree with it."""

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from sage_reconcile.core.schema import settings_schema_json, stack_schema_json
from sage_reconcile.core.spec import EngineSpec
from tests.seed_preset import SEED_PRESET

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = {"stack.schema.json": stack_schema_json, "settings.schema.json": settings_schema_json}


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_the_schema_in_the_tree_is_the_schema_of_the_code(name: str) -> None:
    assert (ROOT / "schemas" / name).read_text(encoding="utf-8") == SCHEMAS[name]() + "\n", "run: make schemas"


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_the_schema_is_a_schema(name: str) -> None:
    Draft202012Validator.check_schema(json.loads(SCHEMAS[name]()))


def test_every_field_says_what_it_means() -> None:
    assert [name for name, field in EngineSpec.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("text", [SEED_PRESET, (ROOT / "manifests" / "quickstart.yaml").read_text(encoding="utf-8")])
def test_good_manifests_agree_with_the_schema(text: str) -> None:
    Draft202012Validator(json.loads(stack_schema_json())).validate(yaml.safe_load(text))


def test_a_typo_disagrees_with_the_schema() -> None:
    written = yaml.safe_load(SEED_PRESET.replace("label:", "labell:"))
    assert list(Draft202012Validator(json.loads(stack_schema_json())).iter_errors(written))


if __name__ == "__main__":
    for file_name, text_of in SCHEMAS.items():
        (ROOT / "schemas" / file_name).write_text(text_of() + "\n", encoding="utf-8")
