"""What tells one version of a program from another, without running it."""

import importlib.metadata
import os
from pathlib import Path

from sage_reconcile.world.programs import Versions, programs


def script(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def environment(root: Path, package: str, version: str) -> Path:
    """A virtual environment with one package, and the script that it brings."""
    (root / "lib/python3.11/site-packages" / f"{package}-{version}.dist-info").mkdir(parents=True)
    (root / "lib/python3.11/site-packages" / f"{package}_extras-9.9.dist-info").mkdir()
    return script(root / "bin" / package)


def version_of(path: Path | str, versions: Versions | None = None) -> str:
    (fact,) = programs([(str(path), "/")], versions or Versions())
    return fact.version


def test_a_script_of_an_environment_has_the_version_of_its_package(tmp_path: Path) -> None:
    assert version_of(environment(tmp_path / "a", "vllm", "0.24.0")) == "0.24.0"
    assert version_of(environment(tmp_path / "b", "infinity_emb", "0.0.78")) == "0.0.78"


def test_a_link_to_a_script_has_the_version_of_what_it_leads_to(tmp_path: Path) -> None:
    """As pipx makes one in ~/.local/bin."""
    link = tmp_path / "bin" / "vllm"
    link.parent.mkdir()
    link.symlink_to(environment(tmp_path / "venv", "vllm", "0.11.0+cu129"))

    assert version_of(link) == "0.11.0+cu129"


def test_a_program_that_was_replaced_is_another_one_by_its_time_or_size(tmp_path: Path) -> None:
    program, versions = script(tmp_path / "llama-server"), Versions()
    os.utime(program, ns=(1, 1))
    first = version_of(program, versions)

    script(program, "#!/bin/sh\n\n")
    os.utime(program, ns=(1, 1))
    second = version_of(program, versions)
    os.utime(program, ns=(2, 2))

    assert len({first, second, version_of(program, versions)}) == 3


def test_a_version_is_looked_up_again_when_the_script_was_written_anew(tmp_path: Path) -> None:
    program, versions = environment(tmp_path, "vllm", "0.23.0"), Versions()
    assert version_of(program, versions) == "0.23.0"
    packages = tmp_path / "lib/python3.11/site-packages"
    (packages / "vllm-0.23.0.dist-info").rename(packages / "vllm-0.24.0.dist-info")
    assert version_of(program, versions) == "0.23.0"

    os.utime(program, ns=(5, 5))

    assert version_of(program, versions) == "0.24.0"


def test_the_launcher_has_the_version_of_its_library() -> None:
    (fact,) = programs([("llama-server", "/")], Versions())
    if fact.argv[1:2] == ("-m",):
        assert fact.version == importlib.metadata.version("xllamacpp")


def test_what_is_missing_has_no_version(tmp_path: Path) -> None:
    assert version_of(tmp_path / "nothing") == ""
    assert version_of("no-such-program") == ""
