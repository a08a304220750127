"""`sage why`: engines that run, that are wanted, that no manifest asks for, and GPUs."""

import json
from pathlib import Path
from uuid import uuid4

import pytest

from sage_reconcile.cli import main as command_line
from tests import fakenvml
from tests.e2e import place_in


def test_why_tells_of_what_runs_of_what_has_no_place_and_whose_the_bytes_are(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    with place_in(tmp_path / "place") as place:
        # With a UUID of its own: engines of other tests on this machine are engines of this user, too.
        place.gpus(fakenvml.Gpu(index=0, uuid=f"GPU-{uuid4()}"))
        old = place.gpu_fake("old", mib=2048)
        place.write(old)
        place.apply()
        place.write(old, place.gpu_fake("new", mib=90_000, depends_on=["old"]))
        pid = place.pids()["lab/old"]

        # manifests/ lies in the place's directory, and is read without being named.
        (wanted,) = json.loads(place.sage("why", "lab/new", "-o", "json").stdout)["engines"]
        assert (wanted["state"], wanted["action"], wanted["reason"]) == ("missing", "blocked", "it does not run")
        assert wanted["needs"]["memory_source"] == "declared"
        assert wanted["blocked"]["devices"][0]["short_bytes"] > 0
        assert wanted["waits_for"] == [{"name": "lab/old", "state": "ready", "reason": ""}]

        (gpu,) = json.loads(place.sage("why", "gpu0", "-o", "json").stdout)["devices"]
        assert [(share["kind"], share.get("pid")) for share in gpu["shares"]] == [("engine", pid), ("reserved", None)]

        # Where no manifests are, what runs tells of itself.
        text = place.sage("why", "lab/old", "-p", place.project, directory=tmp_path).stdout
        assert f"ready, pid {pid}" in text and "no manifest that was read asks for it" in " ".join(text.split())
        assert "memory    2.0 GiB, declared, not told" in text and "uses      2.0 GiB of gpu0" in text
        place.write(old)


MANIFEST = """
version: 1
name: lab
engines:
  - {name: small, model: /no/such/small.gguf, use_gpu: false}
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with manifests/ in it, on this machine as it is."""
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "lab.yaml").write_text(MANIFEST)
    (tmp_path / "manifests" / "sage.yaml").write_text(f"project: why-{uuid4()}\n")
    monkeypatch.setenv("SAGE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sage(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """A command in this process."""
    code = command_line._run(list(words))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_an_engine_that_cannot_start_says_why(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = sage(capsys, "why", "lab/small")
    assert code == 0
    assert "state     missing: it does not run" in out and "place     on the CPU: use_gpu: false" in out
    assert "cannot start lab/small: there is no /no/such/small.gguf" in out


def test_what_is_not_there_is_64_and_says_what_is(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for unknown, words in (("lab/no", "there is no engine lab/no"), ("gpu77", "there is no gpu77")):
        code, out, err = sage(capsys, "why", unknown)
        assert (code, out) == (64, "") and words in err


def test_manifests_that_are_not_named_may_be_bad_and_those_that_are_may_not(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (lab / "manifests" / "bad.yaml").write_text("version: 2")
    code, _, err = sage(capsys, "why", "lab/small", "manifests")
    assert code == 3 and "bad.yaml" in err
    # Without them nobody has heard of it.
    assert sage(capsys, "why", "lab/small")[0] == 64
