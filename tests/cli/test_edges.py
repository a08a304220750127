"""Exit codes of mistakes on the command line, and streams that are closed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def sage(place: Path, *words: str, shell: str = "") -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "SAGE_STATE_DIR": str(place / "state"), "SAGE_LOCK_FILE": str(place / "lock")}
    command = [sys.executable, "-m", "sage_reconcile", *words]
    if shell:
        command = ["/bin/sh", "-c", f'"$@" {shell}', "sh", *command]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("plan", "--nope"),
        ("frobnicate",),
        ("logs",),
        ("logs", "x", "-n", "abc"),
        ("serve", "--port", "99999999"),
        ("plan", "-o", "xml"),
        ("plan", "--color", "red"),
        ("apply", "--timeout", "soon"),
        ("apply", "--on-failure", "cry"),
        ("plan",),
        ("status", "no/such"),
    ],
)
def test_a_mistake_on_the_command_line_is_64(words: tuple[str, ...], tmp_path: Path) -> None:
    done = sage(tmp_path, *words)
    assert done.returncode == 64, done.stderr
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr


@pytest.mark.parametrize("shell", ["2>&-", "<&-", ">&-", "<&- >&- 2>&-", "| head -0", "> /dev/full"])
def test_a_closed_stream_makes_no_traceback(shell: str, tmp_path: Path) -> None:
    done = sage(tmp_path, "status", shell=shell)
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr


def test_a_full_stdout_is_an_environment_error(tmp_path: Path) -> None:
    assert sage(tmp_path, "status", shell="> /dev/full").returncode == 12


def test_help_and_no_engine_are_fine(tmp_path: Path) -> None:
    assert sage(tmp_path, "--help").returncode == 0
    done = sage(tmp_path, "status")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_path_that_does_not_exist_is_an_invalid_manifest(tmp_path: Path) -> None:
    for command in ("validate", "plan", "apply", "down"):
        assert sage(tmp_path, command, "nowhere/at/all").returncode == 3, command


def test_an_empty_directory_is_valid_and_applying_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lab").mkdir()
    assert sage(tmp_path, "validate", "lab").returncode == 0
    assert sage(tmp_path, "apply", "-y", "lab").returncode == 10
    assert sage(tmp_path, "apply", "-y", "lab", "--allow-empty").returncode == 0


def test_the_state_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lab").mkdir()
    (tmp_path / "state").mkdir(mode=0o777)
    (tmp_path / "state").chmod(0o777)
    done = sage(tmp_path, "apply", "-y", "lab", "--allow-empty")
    assert done.returncode == 12
    assert "others may write to it" in done.stderr
