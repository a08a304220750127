"""Measured footprints on the disk: whole or nothing, ours alone, never trusted when damaged, never in the way."""

from dataclasses import replace
from pathlib import Path

import pytest

from sage_reconcile.core.facts import FootprintFact
from sage_reconcile.core.measuring import MOST_KEPT
from sage_reconcile.core.seal import sealed, unsealed
from sage_reconcile.core.spec import canonical_json
from sage_reconcile.errors import Environment, NewerState
from sage_reconcile.world.footprint_files import FootprintFiles

FACT = FootprintFact(
    key="0123456789abcdef",
    device_name="NVIDIA H100 80GB HBM3",
    version="0.24.0",
    peak_bytes=20 * 1024**3,
    beyond_bytes=600 * 1024**2,
    non_kv_bytes=17 * 1024**3,
    weights_bytes=15 * 1024**3,
    kv_cache_bytes=2 * 1024**3,
    graphs_bytes=1024**3,
    kv_tokens=158_656,
)
TOLD_NOTHING = replace(FACT, key="f" * 16, beyond_bytes=None)


def written(root: Path, *facts: FootprintFact) -> Path:
    FootprintFiles(root).write("lab", facts or (FACT, TOLD_NOTHING))
    return root / "lab" / "footprints.json"


def test_footprints_come_back_as_they_were_written_and_of_all_projects(tmp_path: Path) -> None:
    path = written(tmp_path)
    files = FootprintFiles(tmp_path)
    files.write("other", (FACT,))

    assert files.read() == (FACT, TOLD_NOTHING, FACT)
    assert (files.of("lab"), files.of("nothing")) == ((FACT, TOLD_NOTHING), ())
    assert (files.newer(), files.mend("lab")) == ((), ())
    assert path.stat().st_mode & 0o077 == 0
    files.write("lab", (FACT,))
    assert files.read() == (FACT, FACT)
    path.unlink()
    assert files.read() == (FACT,)


def test_a_cut_or_damaged_file_says_nothing_that_was_not_written_and_is_set_aside(tmp_path: Path) -> None:
    """Cut at one in three places, and one in three bytes changed."""
    path = written(tmp_path)
    whole = path.read_bytes()
    cuts = [whole[:end] for end in range(0, len(whole) - 1, 3)]
    flips = [
        whole[:at] + bytes([byte ^ (1 << at % 8)]) + whole[at + 1 :]
        for at, byte in enumerate(whole[:-1])
        if at % 3 == 0
    ]
    for damaged in (*cuts, *flips, b"", b"null", b"[]", bytes(5000), b"{" * 100_000):
        path.write_bytes(damaged)
        files = FootprintFiles(tmp_path)
        assert (files.read(), files.newer()) == ((), ())

    assert FootprintFiles(tmp_path).mend("lab") != ()
    assert [one.name for one in (tmp_path / "lab" / "damaged").iterdir()] == ["1-footprints.json"]
    assert not path.exists()


def test_what_is_sealed_and_makes_no_sense_is_damaged(tmp_path: Path) -> None:
    path = written(tmp_path)
    for fields in ({"format": 1}, {"format": 1, "footprints": [{"key": "a"}]}, {"format": 1, "footprints": {}}):
        path.write_text(sealed(canonical_json(fields)), encoding="utf-8")
        assert FootprintFiles(tmp_path).read() == ()
        assert len(FootprintFiles(tmp_path).mend("lab")) == 1


def test_what_a_newer_sage_wrote_is_left_as_it_is(tmp_path: Path) -> None:
    path = written(tmp_path)
    fields = unsealed(path.read_bytes().strip())
    assert fields is not None
    path.write_text(sealed(canonical_json(fields | {"format": 2, "of_the_future": True})), encoding="utf-8")
    before = path.read_bytes()
    files = FootprintFiles(tmp_path)

    assert (files.read(), files.newer()) == ((), (path,))
    for refused in (files.of, files.mend):
        with pytest.raises(NewerState, match="a newer sage wrote it"):
            refused("lab")
    assert path.read_bytes() == before


def test_what_others_may_write_to_is_not_believed(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "lab").chmod(0o777)

    assert FootprintFiles(tmp_path).read() == ()


def test_as_many_as_are_kept_fit_what_is_read(tmp_path: Path) -> None:
    facts = tuple(replace(FACT, key=f"{number:016x}", device_name="x" * 200) for number in range(MOST_KEPT))

    assert written(tmp_path, *facts).stat().st_size < 200_000
    assert FootprintFiles(tmp_path).read() == facts


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    monkeypatch.setenv("SAGE_TEST", "1")
    monkeypatch.setenv("SAGE_FAILPOINT_TRACE", str(tmp_path / "trace"))
    monkeypatch.setenv("SAGE_FAILPOINTS", "footprints.written=ENOSPC")

    with pytest.raises(Environment, match="No space left on device"):
        written(tmp_path, FACT)
    assert path.read_bytes() == before
    assert [one.name for one in path.parent.iterdir()] == ["footprints.json"]
