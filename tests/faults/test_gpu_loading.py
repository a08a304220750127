"""A start beside an engine that somebody else has begun to start, and that nobody waits for: it waits until that has
taken its memory, and no longer. Real processes over the fake NVML."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.e2e import Place, until
from tests.fakenvml import Gpu, gpu_uuid
from tests.faults.test_gpu_moves import what_they_saw, witnessed

ONE, TWO = (Gpu(index=0),), (Gpu(index=0), Gpu(index=1))

# Half of its memory at once, and the other half just before it is healthy.
SLOWLY = ("--ready-after", "2", "--memory-in-steps", "2")


def on_gpu_0(place: Place, name: str, *modes: str, **fields: Any) -> dict[str, Any]:
    return place.gpu_fake(name, *modes, mib=1000, devices=[0], **fields)


@contextmanager
def another_project(place: Place, engine: dict[str, Any]) -> Iterator[None]:
    """It has applied one engine, which runs."""
    manifests = place.root / "other" / "manifests"
    manifests.mkdir(parents=True)
    settings = {"project": f"{place.project}-b", "ports": {"llm": f"{place.spare[0]}-{place.spare[3]}"}}
    (manifests / "sage.yaml").write_text(json.dumps(settings))
    place.write(engine, stack="far", directory=manifests)
    place.sage("apply", str(manifests), "-y", expect=0)
    yield
    place.sage("down", "-p", settings["project"], "-y", expect=0)


def test_g9_start_waits_for_an_engine_that_loads_and_not_for_its_proof(place: Place) -> None:
    """With --no-wait nobody sends the engine a request, so it is healthy and never ready."""
    place.gpus(*ONE)
    first = on_gpu_0(place, "first", *SLOWLY)
    place.write(first)
    place.apply("--no-wait")

    place.write(first, witnessed(place, on_gpu_0(place, "second"), gpu_uuid(0)))
    place.apply("--no-wait")

    until(lambda: what_they_saw(place), "the second one has begun")
    assert what_they_saw(place) == [("second", 1000)]
    assert place.engines()["lab/first"]["state"] == "starting"


def test_g9_engine_of_another_project_that_was_never_asked_keeps_nobody_waiting(place: Place) -> None:
    place.gpus(*ONE)
    place.write(on_gpu_0(place, "ours", *SLOWLY))
    with place.started("apply", str(place.manifests), "-y") as apply:
        until(place.pids, "it runs")
        apply.send_signal(signal.SIGINT)
        apply.wait(10)

    with another_project(place, witnessed(place, on_gpu_0(place, "theirs"), gpu_uuid(0))):
        assert what_they_saw(place) == [("theirs", 1000)]


def test_g9_start_does_not_wait_for_an_engine_that_the_same_plan_stops(place: Place) -> None:
    """It never gets ready, and what mends it also brings a second engine."""
    place.gpus(*ONE)
    place.write(on_gpu_0(place, "broken", "--never-ready"))
    with place.started("apply", str(place.manifests), "-y") as apply:
        until(place.pids, "it runs")
        apply.send_signal(signal.SIGINT)
        apply.wait(10)

    place.write(on_gpu_0(place, "broken"), on_gpu_0(place, "another"))
    place.apply()

    place.assert_at_rest(again=True)


def test_g9_what_ran_is_put_back_beside_an_engine_that_nobody_asks(place: Place) -> None:
    place.gpus(*TWO)
    ran = on_gpu_0(place, "ran")
    place.write(ran)
    place.apply()
    loads = on_gpu_0(place, "loads", *SLOWLY)
    place.write(ran, loads)
    place.apply("--no-wait")
    fails = place.gpu_fake("fails", "--exit-code", "1", mib=1000, devices=[1])

    place.write(on_gpu_0(place, "ran", "--tokens", "3"), loads, fails)
    place.apply(expect=5)

    assert set(place.pids()) == {"lab/ran", "lab/loads"}
    place.write(ran, loads)
    place.apply()
    place.assert_at_rest(again=True)


def test_g9_engine_whose_own_time_is_over_keeps_nobody_waiting(place: Place) -> None:
    place.gpus(*ONE)
    broken = on_gpu_0(place, "broken", "--never-ready", ready={"timeout": "1s"})
    place.write(broken)
    place.apply("--no-wait")

    with another_project(place, on_gpu_0(place, "theirs")):
        pass
