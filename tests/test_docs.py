"""What the documents say exists, exists. `python -m tests.test_docs` writes the table of fields anew."""

import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from typer.main import get_command

from sage_reconcile.cli.main import app
from sage_reconcile.core.spec import EngineSpec, not_served_yet
from sage_reconcile.world.manifests import load

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FIELDS = ROOT / "docs" / "manifests.md"


def field_table() -> str:
    """A row for each field of an engine: its name, default and meaning, and whether this version serves it."""
    rows = ["| field | default | meaning |", "| --- | --- | --- |"]
    for name, field in EngineSpec.model_fields.items():
        default = "required" if field.is_required() else shown(field.get_default(call_default_factory=True))
        refused = any(path == (name,) for path, _ in not_served_yet({name: "x"}))
        later = " *Not served yet: refused.*" if refused else not_served_values(name, field.annotation)
        rows.append(f"| `{name}` | {default} | {(field.description or '').replace('|', chr(92) + '|')}{later} |")
    return "\n".join(rows)


def not_served_values(name: str, kind: object) -> str:
    """The words that a field, or one below it, may be, and that are refused."""
    if get_origin(kind) is Literal:
        words = [word for word in get_args(kind) if not_served_yet({name: word})]
    else:
        below = getattr(kind, "model_fields", {})
        words = [
            f"{one}: {word}"
            for one, field in below.items()
            for word in get_args(field.annotation)
            if not_served_yet({name: {one: word}}) and not not_served_yet({name: {}})
        ]
    return f" *Not served yet: {', '.join(words)}.*" if words else ""


def shown(default: object) -> str:
    if hasattr(default, "model_dump"):
        return ", ".join(f"{key}: {value:g}s" if isinstance(value, float) else f"{key}: {value}"
                         for key, value in default.model_dump().items())  # fmt: skip
    return (
        {None: "unset", (): "none", "": "empty"}.get(default, str(default)) if not isinstance(default, dict) else "none"
    )


def test_the_table_of_fields_is_the_one_of_the_code() -> None:
    assert field_table() in FIELDS.read_text(encoding="utf-8"), "run: python -m tests.test_docs"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"`((?:sage_reconcile|tests|docs|benchmarks|examples|schemas|core|drive)/[\w./-]*)`", text)
    linked = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [name for name in named if not (ROOT / name).exists() and not (ROOT / "sage_reconcile" / name).exists()]
    missing += [link for link in linked if not (document.parent / link).exists()]
    assert missing == []


def test_the_commands_in_the_documents_are_the_commands_that_work() -> None:
    works = set(get_command(app).commands)  # type: ignore[attr-defined]
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `sage (\w+)", text, re.MULTILINE))
    assert told == works
    for document in DOCUMENTS:
        used = set(re.findall(r"`sage ([a-z]+)", document.read_text(encoding="utf-8")))
        assert used <= works, document


def test_the_options_in_the_documents_are_the_options_that_work() -> None:
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        (row,) = re.findall(rf"^\| `sage {name}.*?` \|(.*)\|$", text, re.MULTILINE)
        told = set(re.findall(r"(?<![\w-])(--?[a-z][a-z-]*)", row))
        works = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert told <= works, name


def test_every_case_that_the_document_names_is_a_test() -> None:
    """`P9 to P16` in docs/reliability.md means each of them; a test of a case is named by it."""
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    table = "\n".join(line.split("|")[1] for line in text.splitlines() if re.match(r"\| [PNDG]\d", line))
    cases = {f"{letter}{number}" for letter, number in re.findall(r"\b([PNDG])(\d+)", table)}
    for letter, first, last in re.findall(r"\b([PNDG])(\d+) to [PNDG](\d+)", table):
        cases |= {f"{letter}{number}" for number in range(int(first), int(last) + 1)}
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    assert len(cases) == 52
    assert {case for case in cases if f"def test_{case.lower()}_" not in tests} == set()


def test_the_readme_s_manifest_is_valid(tmp_path: Path) -> None:
    (manifest,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "lab.yaml").write_text(manifest)
    assert len(manifest.strip().splitlines()) <= 22
    assert [str(wanted.id) for wanted in load((str(tmp_path),), project="lab", home="/").wanted] == [
        "lab/chat",
        "lab/embed",
    ]


def test_the_readme_names_the_two_commands_first() -> None:
    first = re.search(r"```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert first is not None
    assert [line.split("#")[0].strip() for line in first[1].strip().splitlines()] == ["make demo", "make test"]


def test_the_quickstart_project_is_valid() -> None:
    desired = load((str(ROOT / "manifests"),), project=None, home="/")
    assert desired.project == "quickstart"


def test_help_takes_hardly_longer_than_typer_itself(tmp_path: Path) -> None:
    """A ratio within one run, in CPU time, the least of several: other work on the machine does not count."""
    trivial = tmp_path / "trivial.py"
    trivial.write_text(
        "import typer\napp = typer.Typer()\n@app.command()\ndef one(n: int = 1) -> None: ...\n"
        "@app.command()\ndef two() -> None: ...\napp()\n"
    )
    least = dict.fromkeys(("typer", "sage"), 60.0)
    for _ in range(4):
        for name, words in (("typer", [str(trivial)]), ("sage", ["-m", "sage_reconcile"])):
            before = _children_cpu_seconds()
            subprocess.run([sys.executable, *words, "--help"], capture_output=True, check=True)
            least[name] = min(least[name], _children_cpu_seconds() - before)
    assert least["sage"] < 1.3 * least["typer"]


def _children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    written = FIELDS.read_text(encoding="utf-8")
    FIELDS.write_text(re.sub(r"\| field \|.*?\n(?=\n)", lambda _: field_table() + "\n", written, flags=re.DOTALL))
