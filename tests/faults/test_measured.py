"""What engines take is measured and kept: the next start is given that, and no plan for what runs changes for it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sage_reconcile.core.facts import FootprintFact
from sage_reconcile.core.seal import sealed
from sage_reconcile.world.footprint_files import FootprintFiles
from tests.e2e import Place, kill, until
from tests.fakenvml import Gpu

CHAOS = os.environ.get("CHAOS") == "1"

MIB = 1024**2

# As vLLM 0.11 writes it: of 6 GiB that it was told 4 are for its cache.
LOG = (
    "(EngineCore_DP0 pid=441) INFO 11-24 11:43:54 [gpu_model_runner.py:3341] Model loading took 1.2513 GiB memory",
    "(EngineCore_DP0 pid=441) INFO 11-24 11:44:17 [gpu_worker.py:348] Available KV cache memory: 4.00 GiB",
)


def kept(place: Place) -> tuple[FootprintFact, ...]:
    return FootprintFiles(place.state).of(place.project)


def footprints(place: Place) -> Path:
    return place.state / place.project / "footprints.json"


def given(place: Place) -> tuple[int, str]:
    """What the one start of a plan is given, in MiB, and from what that is known."""
    (step,) = place.plan()["steps"]
    return step["memory_bytes_per_device"] // MIB, step["memory_source"]


def at_rest(place: Place) -> dict[str, Any]:
    planned = place.plan()
    assert (planned["steps"], planned["blocked"]) == ([], [])
    return planned


def test_an_engine_that_takes_less_than_declared_is_given_that_at_its_next_start(place: Place) -> None:
    place.gpus(Gpu(index=0))
    place.write(place.gpu_fake("chat", mib=4096, gpu_memory="16GiB"))
    place.apply()

    (fact,) = kept(place)
    assert (fact.peak_bytes, fact.beyond_bytes, fact.device_name) == (4096 * MIB, None, "NVIDIA H100 80GB HBM3")
    (note,) = [note for note in at_rest(place)["notes"] if "measured" in note]
    assert note == "lab/chat was given 16.0 GiB of gpu0; a start would now be given 4.0, measured"

    place.sage("down", str(place.manifests), "-y")
    assert given(place) == (4096, "measured")
    footprints(place).unlink()
    assert given(place) == (16384, "declared"), "only the figure is lost with the file"


def test_an_engine_that_sage_wait_waited_for_is_measured_as_by_an_apply(place: Place) -> None:
    place.gpus(Gpu(index=0))
    place.write(place.gpu_fake("chat", "--ready-after", "0.5", mib=4096, gpu_memory="16GiB"))
    place.apply("--no-wait")
    assert kept(place) == ()

    place.sage("wait", "lab/chat", "-p", place.project, expect=0)
    kill(place.pids()["lab/chat"])

    assert given(place) == (4096, "measured")
    place.apply()


def test_what_an_engine_that_cannot_be_told_takes_is_not_made_less_by_writing_less(place: Place) -> None:
    """2026-11-25: gpu_memory <= 39.9GiB was to help, the plan was green, and the apply ended out of memory."""
    place.gpus(Gpu(index=0), Gpu(index=1))
    place.write(place.gpu_fake("chat", mib=57_000))
    place.apply()
    place.sage("down", str(place.manifests), "-y")
    with place.foreign_on(0, 40_000), place.foreign_on(1, 50_000):
        for written in ("57000MiB", "30.0GiB"):
            place.write(place.gpu_fake("chat", mib=57_000, gpu_memory=written))
            (refused,) = place.plan(expect=4)["blocked"]
            assert "needs a GPU with 55.7 GiB" in refused["why"]
            assert not [cure for cure in refused["would_help"] if "gpu_memory" in cure]


def test_an_engine_that_takes_more_later_is_measured_when_it_is_stopped(place: Place) -> None:
    place.gpus(Gpu(index=0))
    place.write(place.gpu_fake("chat", "--memory-grows-to", "9000", mib=2000, gpu_memory="4GiB"))
    place.apply()
    until(lambda: place.used_mib(0) == 9000, "it has grown")
    before = footprints(place).read_bytes()
    place.status()
    assert footprints(place).read_bytes() == before, "a look writes nothing"

    place.sage("down", str(place.manifests), "-y")

    assert [fact.peak_bytes for fact in kept(place)] == [9000 * MIB]
    assert given(place) == (9000, "measured")


def test_what_the_log_says_is_kept_beside_what_was_taken_beyond_what_was_told(place: Place) -> None:
    place.gpus(Gpu(index=0))
    said = [word for line in LOG for word in ("--say", line)]
    place.write(place.gpu_fake("chat", *said, mib=6500, gpu_memory="6GiB", args=["--told", "{memory_bytes}"]))

    place.apply()

    (fact,) = kept(place)
    assert (fact.beyond_bytes, fact.non_kv_bytes) == ((6500 - 6144) * MIB, 2048 * MIB)
    assert (fact.weights_bytes, fact.kv_cache_bytes) == (round(1.2513 * 1024**3), 4096 * MIB)


def test_a_measurement_that_cannot_be_kept_is_a_note_and_the_apply_has_worked(place: Place) -> None:
    place.gpus(Gpu(index=0))
    place.write(place.gpu_fake("chat", mib=4096, gpu_memory="16GiB"))

    ran = place.apply(**place.failing("footprints.begin=ENOSPC"))
    assert "was not kept: cannot write" in ran.stderr and "No space left on device" in ran.stderr
    pids = place.pids()
    place.apply(expect=-9, **place.failing("footprints.written=kill"))
    assert kept(place) == ()

    place.apply()

    assert (place.pids(), len(kept(place))) == (pids, 1)
    place.assert_at_rest()


@pytest.mark.parametrize("moment", ["begin", "written", "synced", "renamed", "done"] if CHAOS else ["renamed"])
def test_p1_killed_while_a_measurement_is_kept_leaves_nothing_that_one_apply_does_not_put_right(
    place: Place, moment: str
) -> None:
    place.gpus(Gpu(index=0))
    place.write(place.gpu_fake("chat", mib=4096, gpu_memory="16GiB"))
    place.apply(expect=-9, **place.failing(f"footprints.{moment}=kill"))
    pids = place.pids()

    place.apply()

    assert (place.pids(), [fact.peak_bytes for fact in kept(place)]) == (pids, [4096 * MIB])
    place.assert_at_rest()


def test_a_damaged_file_is_set_aside_and_one_of_a_newer_sage_is_refused(place: Place) -> None:
    place.gpus(Gpu(index=0))
    place.write(place.gpu_fake("chat", mib=4096, gpu_memory="16GiB"))
    place.apply()
    path, whole = footprints(place), footprints(place).read_bytes()
    path.write_bytes(b"garbage")

    ran = place.apply()

    assert f"{path} cannot be read, and was set aside" in ran.stderr
    assert path.read_bytes() == whole
    fields = {name: value for name, value in json.loads(whole).items() if name != "crc32"}
    path.write_text(sealed(json.dumps(fields | {"format": 2})), encoding="utf-8")
    assert str(path) in place.apply(expect=3).stderr
    assert [gap["why"] for gap in place.status()["gaps"]] == [f"{path} was written by a newer sage"]
    path.write_bytes(whole)
