"""Exit codes of mistakes on the command line, and streams that are closed."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Protocol

import pytest

from tests.forks import Forks
from tests.oracle import Ran, environment


class Sage(Protocol):
    def __call__(self, place: Path, *words: str, shell: str = "") -> Ran: ...


@pytest.fixture
def sage(commands: Forks) -> Sage:
    """Runs a command; through a shell where its streams are the point."""

    def run(place: Path, *words: str, shell: str = "") -> Ran:
        if not shell:
            return commands.run(place / "state", *words)
        done = subprocess.run(
            ["/bin/sh", "-c", f'"$@" {shell}', "sh", sys.executable, "-m", "sage_reconcile", *words],
            cwd=place,
            env=environment(place / "state"),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return Ran(code=done.returncode, stdout=done.stdout, stderr=done.stderr, seconds=0.0)

    return run


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
        ("apply", "--timeout", "-5"),
        ("apply", "--timeout", "99999999"),
        ("apply", "--on-failure", "cry"),
        ("plan",),
        ("status", "no/such"),
    ],
)
def test_a_mistake_on_the_command_line_is_64(words: tuple[str, ...], tmp_path: Path, sage: Sage) -> None:
    done = sage(tmp_path, *words)
    assert done.code == 64, done.stderr
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr


@pytest.mark.parametrize("shell", ["2>&-", "<&-", ">&-", "<&- >&- 2>&-", "| head -0", "> /dev/full"])
def test_a_closed_stream_makes_no_traceback(shell: str, tmp_path: Path, sage: Sage) -> None:
    done = sage(tmp_path, "status", shell=shell)
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr


@pytest.mark.parametrize("shell", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_what_goes_to_a_closed_stream_goes_nowhere_and_into_no_file(shell: str, tmp_path: Path, sage: Sage) -> None:
    # 2026-11-28: the next file that was opened took the number of the stream, and the plan was written into the lock.
    (tmp_path / "lab").mkdir()
    done = sage(tmp_path, "apply", "-y", "lab", "--allow-empty", shell=shell)
    assert done.code == 0, done.stderr
    (line,) = (tmp_path / "lock").read_text().splitlines()
    assert line.endswith(f"(apply {tmp_path / 'lab'})")
    for words in (("snapshot",), ("plan", "lab"), ("status",)):
        assert sage(tmp_path, *words, shell=shell).code == 0, words


def test_an_error_names_what_is_blocked_as_long_as_it_fits_80_columns(tmp_path: Path, sage: Sage) -> None:
    some_projects(tmp_path)
    assert sage(tmp_path, "plan", "blocked").stderr == "error: cannot place lab/chat, see above\n"
    lab = tmp_path / "blocked" / "lab.yaml"
    lab.write_text(lab.read_text().replace('"chat"', f'"{"c" * 63}"'))
    assert sage(tmp_path, "plan", "blocked").stderr == "error: cannot place 1 engine, see above\n"


READER_LEFT = [
    (("plan", "blocked"), 4),
    (("plan", "blocked", "-o", "json"), 4),
    (("plan", "empty"), 0),
    (("apply", "-y", "blocked"), 4),
    (("apply", "-y", "empty", "--allow-empty"), 0),
    (("down", "-y", "empty"), 0),
    (("validate", "blocked"), 0),
    (("validate", "wrong"), 3),
    (("validate", "wrong", "-o", "json"), 3),
    (("schema",), 0),
    (("status",), 0),
    (("status", "-o", "json"), 0),
    (("gpu",), 0),
    (("gpu", "-o", "json"), 0),
    (("why", "blocked:lab/chat", "blocked"), 0),
    (("why", "blocked:lab/chat", "blocked", "-o", "json"), 0),
    (("snapshot",), 0),
    (("logs", "lab/chat"), 0),
    (("plan", "--help"), 0),
]


@pytest.mark.parametrize(("words", "code"), READER_LEFT)
def test_a_reader_that_has_left_changes_no_exit_code(words: tuple[str, ...], code: int, tmp_path: Path) -> None:
    some_projects(tmp_path)
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [sys.executable, "-m", "sage_reconcile", *words],
        cwd=tmp_path,
        env=environment(tmp_path / "state"),
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
        check=False,
    )
    os.close(theirs)
    assert done.returncode == code, done.stderr
    assert "ipe" not in done.stderr


def test_a_log_that_is_followed_ends_when_its_reader_leaves(tmp_path: Path) -> None:
    some_projects(tmp_path)
    command = [sys.executable, "-m", "sage_reconcile", "logs", "lab/chat", "-f"]
    process = subprocess.Popen(command, env=environment(tmp_path / "state"), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "it begins\n"
        process.stdout.close()
        with (tmp_path / "state" / "blocked" / "logs" / "lab" / "chat.log").open("a") as log:
            print("and goes on", file=log)
        assert process.wait(10) == 0
    finally:
        process.kill()


def some_projects(place: Path) -> None:
    """Manifests whose program is not there, that want nothing, and that are not valid; and a log."""
    for name in ("blocked", "empty", "wrong"):
        (place / name).mkdir()
    chat = {"name": "chat", "model": "m", "runtime": "command", "command": ["/no/such", "{port}"], "use_gpu": False}
    (place / "blocked" / "lab.yaml").write_text(json.dumps({"version": 1, "name": "lab", "engines": [chat]}))
    (place / "wrong" / "lab.yaml").write_text("version: 2\n")
    (place / "state" / "blocked" / "logs" / "lab").mkdir(parents=True)
    (place / "state").chmod(0o700)
    (place / "state" / "blocked" / "logs" / "lab" / "chat.log").write_text("it begins\n")


@pytest.mark.parametrize(
    ("words", "missing"),
    [(("why",), "ID|gpuN"), (("logs",), "ID"), (("wait",), "ID"), (("logs", "x", "-n", "y"), "-n")],
)
def test_a_mistake_on_the_command_line_names_what_is_meant(
    words: tuple[str, ...], missing: str, tmp_path: Path, sage: Sage
) -> None:
    done = sage(tmp_path, *words)
    first, hint = done.stderr.splitlines()
    assert f"'{missing}'" in first
    assert hint == f"  hint: see sage {words[0]} --help"


@pytest.mark.parametrize("words", [("status",), ("plan", "blocked")])
def test_a_full_stdout_is_an_environment_error_and_told_once(
    words: tuple[str, ...], tmp_path: Path, sage: Sage
) -> None:
    some_projects(tmp_path)
    done = sage(tmp_path, *words, shell="> /dev/full")
    assert done.code == 12
    assert done.stderr.count("error:") == 1


@pytest.mark.parametrize(
    "words", [("validate", "m"), ("schema",), ("snapshot", "m"), ("status",), ("gpu",), ("plan", "m"), ("wait", "x")]
)
def test_every_command_takes_color_and_refuses_what_is_none(words: tuple[str, ...], tmp_path: Path, sage: Sage) -> None:
    (tmp_path / "m").mkdir()
    assert "--color" not in sage(tmp_path, *words, "--color", "never").stderr
    done = sage(tmp_path, *words, "--color", "red")
    assert (done.code, '--color is "red"' in done.stderr) == (64, True)


@pytest.mark.parametrize(
    "words",
    [("validate", "m"), ("schema",), ("plan", "m"), ("snapshot", "m"), ("status",), ("gpu",), ("gpu", "-o", "json")],
)
def test_every_command_takes_a_project(words: tuple[str, ...], tmp_path: Path, sage: Sage) -> None:
    (tmp_path / "m").mkdir()
    for option in ("-p", "--project"):
        done = sage(tmp_path, *words, option, "lab")
        assert done.code == 0, done.stderr


def test_the_version_is_told_as_it_is_packaged(tmp_path: Path, sage: Sage) -> None:
    packaged = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["version"]
    done = sage(tmp_path, "--version")
    assert (done.code, done.stdout, done.stderr) == (0, f"sage {packaged}\n", "")


def test_the_usage_of_a_command_is_said_as_people_write_it(tmp_path: Path, sage: Sage) -> None:
    usages = {"plan": "[PATH]...", "down": "[PATH|ID]...", "status": "[ID]", "wait": "{ID}..."}
    for command, arguments in usages.items():
        first = next(line for line in sage(tmp_path, command, "--help").stdout.splitlines() if line.strip())
        assert first.strip() == f"Usage: sage {command} [OPTIONS] {arguments}"


def test_one_engine_is_not_called_engines(tmp_path: Path, sage: Sage) -> None:
    some_projects(tmp_path)
    assert sage(tmp_path, "validate", "blocked").stdout == "valid: project blocked, 1 stack, 1 engine\n"
    assert sage(tmp_path, "validate", "empty").stdout == "valid: project empty, 0 stacks, 0 engines\n"


def test_help_and_no_engine_are_fine(tmp_path: Path, sage: Sage) -> None:
    assert sage(tmp_path, "--help").code == 0
    done = sage(tmp_path, "status")
    assert (done.code, done.stderr) == (0, "")


def test_a_path_that_does_not_exist_is_an_invalid_manifest(tmp_path: Path, sage: Sage) -> None:
    for command in ("validate", "plan", "apply", "down"):
        assert sage(tmp_path, command, "nowhere/at/all").code == 3, command


def test_an_empty_directory_is_valid_and_applying_it_is_refused(tmp_path: Path, sage: Sage) -> None:
    (tmp_path / "lab").mkdir()
    assert sage(tmp_path, "validate", "lab").code == 0
    assert sage(tmp_path, "apply", "-y", "lab").code == 10
    assert sage(tmp_path, "apply", "-y", "lab", "--allow-empty").code == 0


@pytest.mark.parametrize("duration", ["5", "0.5", "30s", "1m30s"])
def test_a_duration_may_be_a_number_of_seconds(duration: str, tmp_path: Path, sage: Sage) -> None:
    (tmp_path / "lab").mkdir()
    words = ("--timeout", duration, "--lock-timeout", duration)
    assert sage(tmp_path, "apply", "-y", "lab", "--allow-empty", *words).code == 0


def test_the_state_of_others_is_refused(tmp_path: Path, sage: Sage) -> None:
    (tmp_path / "lab").mkdir()
    (tmp_path / "state").mkdir(mode=0o777)
    (tmp_path / "state").chmod(0o777)
    done = sage(tmp_path, "apply", "-y", "lab", "--allow-empty")
    assert done.code == 12
    assert "others may write to it" in done.stderr
