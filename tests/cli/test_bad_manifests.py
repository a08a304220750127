"""Every bad manifest through the real command: exit 3, its place told, no traceback, in under a second.

One in ten is a program of its own, as a user's is; the others are forked from one that has sage loaded.
"""

import time
from pathlib import Path

import pytest

from tests.bad_manifests import BAD, Bad, engine, write
from tests.forks import Forks
from tests.oracle import Ran, run_sage

_EVERY = 10


@pytest.fixture(scope="session")
def good_manifest_seconds(tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long this machine takes to validate one good manifest."""
    root = tmp_path_factory.mktemp("good")
    good = root / "a.yaml"
    good.write_text(engine())
    began = time.monotonic()
    assert run_sage(root / "state", "validate", str(good)).code == 0
    return time.monotonic() - began


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_it_is_refused_with_its_place_and_nothing_happens(bad: Bad, tmp_path: Path, commands: Forks) -> None:
    write(bad, tmp_path / "lab")
    assert_refused(bad, tmp_path, commands.run(tmp_path / "state", "apply", "-y", "lab"))


@pytest.mark.parametrize("bad", BAD[::_EVERY], ids=lambda bad: bad.name)
def test_it_takes_no_longer_than_a_good_one(bad: Bad, tmp_path: Path, good_manifest_seconds: float) -> None:
    write(bad, tmp_path / "lab")
    ran = run_sage(tmp_path / "state", "apply", "-y", "lab")
    assert_refused(bad, tmp_path, ran)
    # Under a second; on a machine where even a good manifest takes long, no more than a few times that.
    assert ran.seconds < max(1.0, 3 * good_manifest_seconds)


def assert_refused(bad: Bad, root: Path, ran: Ran) -> None:
    assert ran.code == 3, ran.stderr
    assert f"lab/{bad.expect}: error: " in ran.stderr
    assert bad.message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""
    assert not (root / "state").exists(), "a refused apply wrote something"
