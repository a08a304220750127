"""A model that is not on this machine: with `ask_hub` a plan knows from the hub what it takes, without it guesses."""

import json
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from sage_reconcile.cli import main as command_line
from tests.fake_hub import FakeHub, serving
from tests.world.test_hub import tiny

MANIFEST = """
version: 1
name: of-the-hub
engines:
  - {name: chat, model: lab/tiny, runtime: vllm, max_model_len: 2048}
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A machine with a made-up GPU and vLLM, an empty cache, and a hub of its own."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "lab.yaml").write_text(MANIFEST)
    with serving() as begin:
        hub = begin(FakeHub(tiny()))
        for name, value in {
            "PATH": f"{program.parent}:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "SAGE_STATE_DIR": str(tmp_path / "state"),
            "SAGE_DISABLE_NVML": "1",
            "SAGE_GPU_MOCK_COUNT": "1",
            "HF_ENDPOINT": hub.url,
        }.items():
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(tmp_path)
        yield hub


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert command_line._run([*words]) in (0, 2)
    return capsys.readouterr().out


def settings(**fields: object) -> None:
    Path("manifests/sage.yaml").write_text(json.dumps({"project": f"hub-{uuid4()}", **fields}))


def test_the_hub_is_not_asked_unless_the_project_says_so(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    settings()

    plan = " ".join(told(capsys, "plan").split())

    assert "is a guess by its model's name" in plan and "sage.yaml does not say ask_hub: true" in plan
    assert hub.seen == []


def test_the_hub_tells_what_a_model_takes(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    settings(ask_hub=True)

    (step,) = json.loads(told(capsys, "plan", "-o", "json"))["steps"]

    assert step["memory_source"] == "computed"
    why = told(capsys, "why", "of-the-hub/chat")
    assert "weights" in why and "guess" not in why


def test_a_snapshot_holds_what_the_hub_said(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    settings(ask_hub=True)
    Path("box.json").write_text(told(capsys, "snapshot", "manifests"))
    here = told(capsys, "plan", "-o", "json")
    hub.seen.clear()

    there = told(capsys, "plan", "--observed", "box.json", "-o", "json")

    assert json.loads(there)["steps"] == json.loads(here)["steps"]
    assert hub.seen == []


def test_an_unreachable_hub_leaves_a_plan_with_a_guess(
    hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings(ask_hub=True)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")

    plan = " ".join(told(capsys, "plan").split())

    assert "is a guess by its model's name" in plan and "127.0.0.1:1 cannot be reached" in plan
