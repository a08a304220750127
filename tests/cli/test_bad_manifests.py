"""Every bad manifest through the real command: exit 3, its place told, no traceback, in under a second."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bad_manifests import BAD, Bad, engine, write


@pytest.fixture(scope="session")
def good_manifest_seconds(tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long this machine takes to validate one good manifest."""
    good = tmp_path_factory.mktemp("good") / "a.yaml"
    good.write_text(engine())
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "sage_reconcile", "validate", good], capture_output=True, check=True)
    return time.monotonic() - began


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_it_is_refused_with_its_place_and_nothing_happens(
    bad: Bad, tmp_path: Path, good_manifest_seconds: float
) -> None:
    directory = tmp_path / "lab"
    write(bad, directory)
    state = tmp_path / "state"
    environment = {**os.environ, "SAGE_STATE_DIR": str(state), "SAGE_LOCK_FILE": str(tmp_path / "lock")}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "sage_reconcile", "apply", "-y", "lab"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    took_seconds = time.monotonic() - began
    assert done.returncode == 3, done.stderr
    assert f"lab/{bad.expect}: error: " in done.stderr
    assert bad.message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not state.exists(), "a refused apply wrote something"
    # Under a second; on a machine where even a good manifest takes long, no more than a few times that.
    assert took_seconds < max(1.0, 3 * good_manifest_seconds), f"{took_seconds:.2f} s"
