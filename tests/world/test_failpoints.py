"""Failpoints do what a test wishes, and nothing without its word."""

import ast
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sage_reconcile.errors import Refused
from sage_reconcile.world.failpoints import NAMES, refuse_outside_tests, traced

ROOT = Path(__file__).resolve().parent.parent.parent

PROGRAM = """
from sage_reconcile.world.failpoints import failpoint
for name in ("lock.opened", "record.begin", "lock.opened", "record.begin"):
    failpoint(name)
print("through")
"""


def run(tmp_path: Path, wishes: str, switch: str = "1") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={
            "SAGE_TEST": switch,
            "SAGE_FAILPOINTS": wishes,
            "SAGE_FAILPOINT_TRACE": str(tmp_path / "trace"),
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("wishes", "reached"),
    [
        ("record.begin=kill", ["lock.opened", "record.begin"]),
        ("lock.opened@2=kill", ["lock.opened", "record.begin", "lock.opened"]),
        ("*@2=kill", ["lock.opened", "record.begin"]),
        ("proof.begin=kill,record.begin@2=kill", ["lock.opened", "record.begin", "lock.opened", "record.begin"]),
    ],
)
def test_a_process_is_killed_where_it_was_wished(tmp_path: Path, wishes: str, reached: list[str]) -> None:
    assert run(tmp_path, wishes).returncode == -signal.SIGKILL
    assert list(traced(tmp_path / "trace")) == reached


@pytest.mark.parametrize(
    ("action", "told"),
    [("ENOSPC", "OSError: [Errno 28]"), ("MemoryError", "MemoryError"), ("interrupt", "KeyboardInterrupt")],
)
def test_an_error_is_raised_where_it_was_wished(tmp_path: Path, action: str, told: str) -> None:
    assert told in run(tmp_path, f"record.begin={action}").stderr


def test_without_the_switch_nothing_happens_and_a_command_refuses_to_start(tmp_path: Path) -> None:
    assert run(tmp_path, "record.begin=kill", switch="").stdout == "through\n"
    assert traced(tmp_path / "trace") == ()
    for name in ("SAGE_FAILPOINTS", "SAGE_FAILPOINT_TRACE"):
        with pytest.raises(Refused, match=name):
            refuse_outside_tests({name: "x"})
    refuse_outside_tests({"SAGE_TEST": "1"})
    refuse_outside_tests({"SAGE_FAILPOINTS": "x", "SAGE_TEST": "1"})


def test_every_place_in_the_code_is_on_the_list_and_the_other_way_round() -> None:
    found: set[str] = set()
    wholes: set[str] = set()
    moments: set[str] = set()
    for path in sorted((ROOT / "sage_reconcile").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id == "failpoint" and isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value))
            elif node.func.id == "failpoint" and isinstance(node.args[0], ast.JoinedStr):
                moments.add(str(ast.literal_eval(node.args[0].values[-1])))
            elif node.func.id == "write_whole":
                wholes |= {str(ast.literal_eval(key.value)) for key in node.keywords if key.arg == "what"}
    assert found | {whole + moment for whole in wholes for moment in moments} == set(NAMES)
