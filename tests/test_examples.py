"""What the examples say, works: they give commands that there are. `make demo` and `make demo-gpu` run them."""

import ast
from pathlib import Path

import pytest
from typer.main import get_command

from sage_reconcile.cli.main import app

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_gives_commands_that_there_are(example: Path) -> None:
    tree = ast.parse(example.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    given = {ast.literal_eval(call.args[0]) for call in calls if call.func.id == "sage" and call.args}  # type: ignore[attr-defined]
    assert given <= set(get_command(app).commands)  # type: ignore[attr-defined]


def test_there_are_examples() -> None:
    assert {"demo.py", "demo_gpu.py"} <= {example.name for example in EXAMPLES}
