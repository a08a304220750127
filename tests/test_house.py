"""The rules of the house, as tests. docs/decisions/0004 tells how each was seen to fail."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutants import MUTANTS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sage_reconcile"

# The one door of each outside library. Two files of world ask psutil and yaml nothing of each other.
DOORS = {
    "psutil": {"world/processes.py"},
    "subprocess": {"world/processes.py"},
    "yaml": {"world/yaml_scan.py"},
    "deepdiff": {"core/diff.py"},
    "pynvml": {"world/gpus.py"},
    "typer": {"cli/"},
    "aiohttp": {"router/"},
    "xllamacpp": {"launchers/"},
    "http": {"world/probes.py", "world/hub_http.py", "router/"},
    "urllib": {"world/hub_http.py", "router/"},
    "fcntl": {"world/lock.py", "world/router_files.py"},
}

# What starts a process, by any of its names.
SPAWNING = {
    "Popen", "run", "call", "check_call", "check_output", "system", "popen", "fork", "forkpty", "posix_spawn",
    "posix_spawnp", "execv", "execve", "execvp", "execvpe", "execl", "execle", "execlp", "execlpe", "spawnl", "spawnv",
    "create_subprocess_exec", "create_subprocess_shell", "startfile",
}  # fmt: skip

# Built-in functions that touch the world.
TOUCHING = {"open", "print", "input", "exec", "eval", "compile", "__import__", "breakpoint"}


def sources(folder: str = "") -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        yield str(path.relative_to(PACKAGE)), ast.parse(path.read_text(encoding="utf-8"))


def calls(tree: ast.AST) -> Iterator[tuple[str, str, int]]:
    """(what it is called on, name, line) of every call; the first is empty for a plain name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            yield owner.id if isinstance(owner, ast.Name) else "", node.func.attr, node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield "", node.func.id, node.lineno


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]


def test_every_arrow_points_down() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_exactly_one_function_starts_processes() -> None:
    owners = ("subprocess", "os", "asyncio", "pty", "multiprocessing", "")
    found = []
    for name, tree in sources():
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]:
            local = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            found += [
                (name, function.name, f"{owner}.{called}")
                for owner, called, _ in calls(function)
                if called in SPAWNING and owner in owners and not (owner == "" and called in local)
                # It runs a loop, not a process.
                if (owner, called) != ("asyncio", "run")
            ]
    assert found == [("world/processes.py", "spawn", "subprocess.Popen")]


def test_the_one_spawner_wants_a_placement() -> None:
    tree = dict(sources())["world/processes.py"]
    (spawn,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "spawn"]
    first = spawn.args.args[0]
    assert isinstance(first.annotation, ast.Name)
    assert (first.arg, first.annotation.id) == ("placement", "Placement")
    assert not spawn.args.defaults, "a spawner with defaults starts what nobody planned"


def test_only_the_planner_makes_placements() -> None:
    makers = {name for name, tree in sources() for _, called, _ in calls(tree) if called == "Placement"}
    assert makers == {"core/placement.py"}


@pytest.mark.parametrize("library", sorted(DOORS))
def test_each_outside_library_has_one_door(library: str) -> None:
    users = {name for name, tree in sources() if library in set(imports(tree))}
    strangers = {name for name in users if not any(name.startswith(door) for door in DOORS[library])}
    assert not strangers
    assert users, f"nobody uses {library}: take it out of this list"


def test_core_touches_nothing() -> None:
    """import-linter sees the imports; this sees the built-in functions that need none."""
    touching = [
        f"core/{name}:{line} {called}"
        for name, tree in ((name.removeprefix("core/"), tree) for name, tree in sources("core"))
        for owner, called, line in calls(tree)
        if owner == "" and called in TOUCHING
    ]
    assert touching == []


def test_nothing_is_caught_whole_but_at_the_edges() -> None:
    """`except Exception` lives where a command, a request and a background look end."""
    found = set()
    for name, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                caught = {entry.id for entry in ast.walk(node.type or node) if isinstance(entry, ast.Name)}
                if node.type is None or caught & {"Exception", "BaseException"}:
                    found.add(name)
    assert found <= {"cli/main.py", "router/app.py", "app/serving.py"}


def test_no_module_keeps_state() -> None:
    """A name bound at the top of a module to a list, a dict or a set that grows is a second truth."""
    growing = []
    for name, tree in sources():
        for node in tree.body:
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            empty = isinstance(value, ast.List | ast.Dict | ast.Set) and not list(ast.iter_child_nodes(value))
            if empty or isinstance(node, ast.Global):
                growing.append(f"{name}:{node.lineno}")
    assert growing == []


def test_tests_pass_fakes_and_patch_nothing() -> None:
    patching = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8")
        patching += [str(path) for word in ("mock.patch", "monkeypatch.setattr", "MagicMock") if word in text]
    assert patching == []


@pytest.mark.parametrize("command", ["--help", "validate --help", "plan --help", "status --help"])
def test_help_imports_nothing_heavy(command: str) -> None:
    """A command pays only for what it uses: help needs typer alone.

    typer itself imports pydantic, where it is installed, for the help of a command with options.
    """
    heavy = ("aiohttp", "deepdiff", "yaml", "psutil", "openai", "asyncio", "sage_reconcile.core.spec")
    probe = f"""
import sys
from sage_reconcile.cli.main import main
try:
    main({command.split()!r})
except SystemExit:
    pass
print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"


def test_apply_and_plan_never_import_aiohttp_and_load_deepdiff_only_for_a_difference(tmp_path: Path) -> None:
    probe = """
import sys
import sage_reconcile.app.verbs, sage_reconcile.cli.outcome, sage_reconcile.cli.plans
print([name for name in ("aiohttp", "deepdiff", "asyncio") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_bug_that_can_be_planted_has_its_place() -> None:
    """`make mutants` plants them; it takes half an hour, so what went stale is told here."""
    stale = [mutant.bug for mutant in MUTANTS if mutant.old not in (ROOT / mutant.file).read_text(encoding="utf-8")]
    assert stale == []
