"""GPUs: what is full, lost or not told. The real command line over real processes, NVML as tests/fakenvml has it."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests import fakenvml
from tests.e2e import Place, fake, kill, until
from tests.fakenvml import Fault, Gpu, HiddenPids, Link, ProcessMemoryUnavailable, gpu_uuid
from tests.oracle import environ, stat_fields

# GPU 0 of the bug report: of its 81559 MiB another program uses so many, and engines were put there all the same.
FOREIGN_MIB = 58169
TWO = (Gpu(index=0), Gpu(index=1))
FOUR = tuple(Gpu(index=index) for index in range(4))

# NVML as it is when its kernel module has gone.
NO_NVML = Fault(code="NVML_ERROR_DRIVER_NOT_LOADED")


def sees(place: Place) -> dict[str, str]:
    """The GPUs that each engine's process is let see: from its environment, not from sage."""
    variables = {engine: environ(pid) for engine, pid in place.pids().items()}
    orders = {one.get("CUDA_DEVICE_ORDER") for one in variables.values()}
    assert orders <= {"PCI_BUS_ID"}, orders
    return {engine: one["CUDA_VISIBLE_DEVICES"] for engine, one in variables.items()}


def blocked(plan: dict[str, Any]) -> dict[str, str]:
    """The reason why each blocked engine is."""
    return {entry["engine"]: entry["reason"] for entry in plan["blocked"]}


# --- G1: a full GPU is never taken, whatever starts the engine --------------------------------------------------------


def test_g1_apply_and_a_restart_after_a_crash_and_an_edit_take_the_gpu_with_room(place: Place) -> None:
    place.gpus(*TWO)
    place.write(place.gpu_fake("chat", mib=50_000, gpu_memory=0.7))
    with place.foreign_on(0, FOREIGN_MIB):
        place.apply()
        assert sees(place) == {"lab/chat": gpu_uuid(1)}
        assert place.held_mib() == {"lab/chat": {gpu_uuid(1): 50_000}}

        kill(place.pids()["lab/chat"])
        place.apply()
        assert sees(place) == {"lab/chat": gpu_uuid(1)}

        place.write(place.gpu_fake("chat", "--tokens", "3", mib=50_000, gpu_memory=0.7))
        place.apply()
        assert sees(place) == {"lab/chat": gpu_uuid(1)}
        assert place.used_mib(0) == FOREIGN_MIB
        place.assert_at_rest(again=True)


def test_g1_rollback_puts_an_engine_back_on_its_own_gpu(place: Place) -> None:
    """The replacement fits GPU 0 alone, which is free by then, and what it replaces would fit there too."""
    place.gpus(*TWO)
    place.write(place.gpu_fake("chat", mib=50_000, gpu_memory=0.7))
    with place.foreign_on(1, 15_000):
        with place.foreign_on(0, FOREIGN_MIB):
            place.apply()
        before = place.pids()
        place.write(place.gpu_fake("chat", "--exit-code", "3", mib=50_000, gpu_memory=0.9))
        (step,) = place.plan()["steps"]
        assert (step["action"], step["device_indexes"]) == ("recreate", [0])

        place.apply(expect=5)

        assert place.pids() != before
        assert sees(place) == {"lab/chat": gpu_uuid(1)}
        assert place.held_mib() == {"lab/chat": {gpu_uuid(1): 50_000}}


def test_g1_up_takes_the_gpu_with_room(place: Place) -> None:
    place.gpus(*TWO)
    place.write(place.gpu_fake("chat", mib=50_000, gpu_memory=0.7))
    with place.foreign_on(0, FOREIGN_MIB), place.started("up", str(place.manifests), "-y") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("serving"):
                break

        assert sees(place) == {"lab/chat": gpu_uuid(1)}

        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 0
    place.assert_nothing_left()


# --- use_gpu: who sees what -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_sage", [{}, {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}])
def test_use_gpu_decides_what_a_process_sees_whatever_sage_sees(place: Place, of_sage: dict[str, str]) -> None:
    """The six rows of kind and use_gpu. None sees more than it was given, and none gets what sage's own shell has."""
    place.gpus(*FOUR)
    silent = place.gpu_fake("llm", mib=50_000)
    del silent["use_gpu"]
    place.write(
        silent,
        place.gpu_fake("llm-true", mib=50_000, use_gpu=True),
        fake("llm-false", use_gpu=False),
        fake("embed", kind="embedding", use_gpu=None),
        place.gpu_fake("embed-true", mib=50_000, kind="embedding", use_gpu=True),
        fake("embed-false", kind="embedding", use_gpu=False),
    )

    place.apply(**of_sage)

    seen = sees(place)
    given = {engine: seen.pop(f"lab/{engine}") for engine in ("llm", "llm-true", "embed-true")}
    assert seen == {"lab/llm-false": "", "lab/embed": "", "lab/embed-false": ""}
    assert len(set(given.values())) == 3 and set(given.values()) < {gpu_uuid(index) for index in range(4)}
    assert place.held_mib() == {
        **dict.fromkeys(seen, {}),
        **{f"lab/{engine}": {uuid: 50_000} for engine, uuid in given.items()},
    }
    place.assert_at_rest()


def test_use_gpu_in_quotes_is_refused_where_it_stands(place: Place) -> None:
    """The seeds took "false" for true, as Python does with any text."""
    place.gpus(*TWO)
    path = place.manifests / "lab.yaml"
    path.write_text('version: 1\nname: lab\nengines:\n  - name: chat\n    model: m\n    use_gpu: "false"\n')

    ran = place.apply(expect=3)

    assert f"{path}:6:5: " in ran.stderr and "write false without quotes" in ran.stderr
    assert place.pids() == {}


# --- two that fit alone and not together ------------------------------------------------------------------------------


def test_two_engines_of_one_plan_are_separated_and_refused_where_there_is_no_second_gpu(place: Place) -> None:
    place.gpus(*TWO)
    place.write(place.gpu_fake("a", mib=50_000), place.gpu_fake("b", mib=50_000))
    with place.foreign_on(1, FOREIGN_MIB):
        assert list(blocked(place.plan(expect=4)).values()) == ["memory"]
        place.apply(expect=4)
        assert place.pids() == {}

    place.apply()

    assert sorted(sees(place).values()) == [gpu_uuid(0), gpu_uuid(1)]
    assert sorted(map(list, map(dict.values, place.held_mib().values()))) == [[50_000], [50_000]]
    place.assert_at_rest()


def test_engine_that_has_not_taken_its_memory_yet_counts_for_all_of_it(place: Place) -> None:
    """Nothing of the first one's memory is used when the second is planned; it was told that it may use it."""
    place.gpus(*TWO)
    slow = place.gpu_fake("a", "--memory-after", "600", mib=50_000)
    place.write(slow)
    place.apply("--no-wait")
    (first,) = sees(place).values()
    other = gpu_uuid(1) if first == gpu_uuid(0) else gpu_uuid(0)
    place.write(slow, place.gpu_fake("b", mib=50_000))
    with place.foreign_on(other, FOREIGN_MIB):
        place.apply("--no-wait", expect=4)
        assert sees(place) == {"lab/a": first}

    place.apply("--no-wait")

    assert sees(place) == {"lab/a": first, "lab/b": other}
    assert place.used_mib(first) == 0


def test_engine_that_takes_more_than_it_was_given_counts_for_what_it_takes(place: Place) -> None:
    place.gpus(Gpu(index=0))
    greedy = place.gpu_fake("greedy", mib=50_000, gpu_memory="20000MiB")
    place.write(greedy)
    place.apply()
    place.write(greedy, place.gpu_fake("chat", mib=40_000))

    ran = place.apply(expect=4)

    assert "held by lab/greedy (48.8)" in ran.stdout
    assert "note: lab/greedy uses 48.8 GiB of gpu0, and was given 19.5" in ran.stdout
    assert place.pids().keys() == {"lab/greedy"}


def test_engines_of_another_project_count(place: Place) -> None:
    place.gpus(*TWO)
    place.write(place.gpu_fake("chat", mib=50_000))
    other = place.root / "other" / "manifests"
    other.mkdir(parents=True)
    settings = {"project": f"{place.project}-b", "ports": {"llm": f"{place.spare[0]}-{place.spare[3]}"}}
    (other / "sage.yaml").write_text(json.dumps(settings))
    place.write(place.gpu_fake("theirs", mib=50_000), stack="far", directory=other)
    place.apply()
    try:
        (mine,) = sees(place).values()
        left = gpu_uuid(1) if mine == gpu_uuid(0) else gpu_uuid(0)
        with place.foreign_on(left, FOREIGN_MIB):
            ran = place.sage("apply", str(other), "-y", expect=4)
            assert f"held by {place.project}:lab/chat (48.8)" in ran.stdout

        place.sage("apply", str(other), "-y")

        assert sees(place) == {"lab/chat": mine, "far/theirs": left}
    finally:
        place.sage("down", "-p", f"{place.project}-b", "-y")


def test_gpu_of_a_project_shows_the_gpus_that_its_engines_are_on_each_as_a_whole(place: Place) -> None:
    place.gpus(*FOUR)
    place.write(place.gpu_fake("chat", mib=20_000, devices=[1]), place.gpu_fake("next", mib=20_000, devices=[3]))
    place.apply()
    with place.foreign_on(1, 1_000), place.foreign_on(2, FOREIGN_MIB) as theirs:
        answer = json.loads(place.sage("gpu", "-p", place.project, "-o", "json").stdout)
        text = place.sage("gpu", "-p", place.project).stdout

        assert [device["index"] for device in answer["devices"]] == [1, 3]
        assert answer["devices"][0]["foreign_bytes"] == 1_000 * 1024 * 1024
        assert [line[:4] for line in text.splitlines() if line.startswith("gpu")] == ["gpu1", "gpu3"]
        assert f"pid {theirs.pid}" not in text
        nobody = f"no engine of project {place.project}-b is on a GPU of "
        assert place.sage("gpu", "-p", f"{place.project}-b").stdout.startswith(nobody)


def test_engine_that_is_split_in_four_sees_four_gpus(place: Place) -> None:
    place.gpus(*FOUR)
    big = place.gpu_fake("big", mib=50_000, tensor_parallel=2, pipeline_parallel=2)
    place.write(big)
    with place.foreign_on(2, FOREIGN_MIB):
        (refused,) = place.plan(expect=4)["blocked"]
        assert (refused["reason"], refused["why"]) == ("memory", "needs 4 GPUs x 48.8 GiB (declared), 3 fit")

    place.apply()

    assert sees(place) == {"lab/big": ",".join(gpu.uuid for gpu in FOUR)}
    assert place.held_mib() == {"lab/big": {gpu.uuid: 50_000 for gpu in FOUR}}
    place.assert_at_rest()


def test_engine_that_is_split_in_two_gets_two_gpus_behind_one_pcie_switch(place: Place) -> None:
    """Next to the first GPU by number is one that only the host's memory connects it to."""
    place.gpus(*FOUR, Link(a=0, b=2, kind="pix"), Link(a=1, b=3, kind="pix"))
    place.write(place.gpu_fake("big", mib=50_000, tensor_parallel=2))

    place.apply()

    assert sees(place) == {"lab/big": f"{gpu_uuid(0)},{gpu_uuid(2)}"}
    place.assert_at_rest()


# --- G2: no room ------------------------------------------------------------------------------------------------------


def test_g2_replacement_that_fits_nowhere_is_refused_with_numbers_and_what_is_said_to_help_helps(place: Place) -> None:
    place.gpus(*TWO)
    place.write(place.gpu_fake("chat", mib=20_000, devices=[0]), place.gpu_fake("other", mib=30_000, devices=[1]))
    place.apply()
    pids = place.pids()
    other = place.gpu_fake("other", mib=30_000, devices=[1])

    def wish(mib: int, *others: dict[str, Any]) -> None:
        # It may go anywhere now.
        place.write(place.gpu_fake("chat", mib=mib), *others)

    with place.foreign_on(0, 15_000) as foreign:
        wish(70_000, other)

        ran = place.apply(expect=4)
        (refused,) = place.plan(expect=4)["blocked"]

        assert place.pids() == pids
        assert "(what runs is kept)" in ran.stdout
        assert f"gpu0  free 64.4 of 79.6 GiB  short 3.9  held by foreign pid {foreign.pid} sleep (14.6)" in ran.stdout
        assert "gpu1  free 49.8 of 79.6 GiB  short 18.6  held by lab/other (29.3)" in ran.stdout
        mib = 1024**2
        assert [
            (device["index"], device["free_bytes"] // mib, device["short_bytes"] // mib)
            for device in refused["devices"]
        ] == [
            (0, 81_559 - 600 - 15_000, 70_000 - 65_959),
            (1, 81_559 - 600 - 30_000, 70_000 - 50_959),
        ]
        cures = refused["would_help"]
        assert cures[1:] == [f"without foreign pid {foreign.pid} (sleep)", "without lab/other"]
        smaller = re.fullmatch(r"gpu_memory <= (.+)GiB", cures[0])
        assert smaller is not None
        wish(int(float(smaller[1]) * 1024), other)
        (step,) = place.plan()["steps"]
        assert (step["action"], step["device_indexes"]) == ("recreate", [0])
        wish(70_000)
        assert {
            step["engine"]: step["device_indexes"] for step in place.plan()["steps"] if step["action"] != "stop"
        } == {"lab/chat": [1]}
        wish(70_000, other)

    place.apply()

    assert sees(place) == {"lab/chat": gpu_uuid(0), "lab/other": gpu_uuid(1)}
    assert place.pids()["lab/other"] == pids["lab/other"]
    place.assert_at_rest()


def test_g2_pin_that_cannot_be_kept_is_refused_and_goes_elsewhere_without_it(place: Place) -> None:
    place.gpus(*TWO)
    with place.foreign_on(0, FOREIGN_MIB):
        place.write(place.gpu_fake("chat", mib=50_000, devices=[0]))
        (refused,) = place.plan(expect=4)["blocked"]
        assert "other devices than those it is pinned to" in refused["would_help"]
        place.write(place.gpu_fake("chat", mib=50_000, devices=[7]))
        assert blocked(place.plan(expect=4)) == {"lab/chat": "device_pin"}
        place.write(place.gpu_fake("chat", mib=50_000))

        (step,) = place.plan()["steps"]

        assert step["device_indexes"] == [1]


# --- G3: NVML goes while a plan is carried out ------------------------------------------------------------------------


def test_g3_nvml_lost_while_a_start_waits_for_its_gpu_ends_the_plan_and_keeps_what_ran(place: Place) -> None:
    """Both go on GPU 0, one after the other: the driver goes while the first loads."""
    place.gpus(*TWO)
    keep = place.gpu_fake("keep", mib=30_000, devices=[1])
    place.write(keep)
    place.apply()
    pids = place.pids()
    slow = place.gpu_fake("a", "--ready-after", "1.5", mib=20_000, devices=[0])
    place.write(keep, slow, place.gpu_fake("b", mib=20_000, devices=[0]))
    with place.started("apply", str(place.manifests), "-y") as process:
        until(lambda: "lab/a" in place.pids(), "the first one runs")
        place.gpus(*TWO, NO_NVML)

        _, said = process.communicate(timeout=60)

    assert process.returncode == 11, said
    assert "out of sight" in said and "Driver Not Loaded" in said
    assert place.pids() == pids
    assert [row["state"] for row in place.engines().values()] == ["ready"]
    place.gpus(*TWO)
    place.apply()
    assert sees(place) == {"lab/a": gpu_uuid(0), "lab/b": gpu_uuid(0), "lab/keep": gpu_uuid(1)}
    assert place.pids()["lab/keep"] == pids["lab/keep"]
    place.assert_at_rest()


def test_g3_nvml_lost_between_the_gate_and_the_program_starts_nothing_unseen(place: Place) -> None:
    """The last look at the devices, right before the program runs, finds none."""
    place.gpus(*TWO)
    keep = place.gpu_fake("keep", mib=30_000, devices=[1])
    place.write(keep, place.gpu_fake("chat", mib=20_000, devices=[0]))
    place.apply()
    pids = place.pids()
    place.write(keep, place.gpu_fake("chat", mib=25_000, devices=[0]))
    with place.started("apply", str(place.manifests), "-y", **place.failing("gate.recorded=stop")) as process:
        until(lambda: stat_fields(process.pid)[:1] == ["T"], "it has stopped at the gate")
        place.gpus(*TWO, NO_NVML)
        os.kill(process.pid, signal.SIGCONT)

        _, said = process.communicate(timeout=60)

    assert process.returncode == 11, said
    assert place.pids() == {"lab/keep": pids["lab/keep"]}
    place.gpus(*TWO)
    place.apply()
    assert sees(place) == {"lab/chat": gpu_uuid(0), "lab/keep": gpu_uuid(1)}
    place.assert_at_rest()


def chat_on_one_of_two(place: Place, mib: int) -> tuple[dict[str, Any], dict[str, int], str, int]:
    """An engine that runs alone on a machine with two GPUs, the pids, and the UUID and index of its GPU."""
    place.gpus(*TWO)
    chat = place.gpu_fake("chat", mib=mib)
    place.write(chat)
    place.apply()
    (home,) = sees(place).values()
    return chat, place.pids(), home, next(gpu.index for gpu in TWO if gpu.uuid == home)


# --- G4: one GPU is lost ----------------------------------------------------------------------------------------------


def test_g4_engine_on_a_lost_gpu_is_told_and_goes_to_another_and_the_others_stay(place: Place) -> None:
    place.gpus(*FOUR)
    # One of four is what it asks for, so three will do.
    engines = [place.gpu_fake(name, mib=50_000, devices=[0, 1, 2, 3]) for name in ("a", "b", "c")]
    place.write(*engines)
    place.apply()
    pids, homes = place.pids(), sees(place)
    lost = homes["lab/b"]
    (spare,) = {gpu.uuid for gpu in FOUR} - set(homes.values())
    index = next(gpu.index for gpu in FOUR if gpu.uuid == lost)

    place.gpus(*FOUR, Fault(gpu=index, code="NVML_ERROR_GPU_IS_LOST"))

    rows = {row["id"]: row for row in place.status("--exit-code", expect=2)["engines"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        "lab/a": "ready",
        "lab/b": "unready",
        "lab/c": "ready",
    }
    assert f"lost gpu{index}" in rows["lab/b"]["reason"]
    (step,) = place.plan()["steps"]
    assert (step["action"], step["engine"], step["reason"], step["devices"]) == (
        "recreate",
        "lab/b",
        "device_lost",
        [spare],
    )
    place.apply()
    assert sees(place) == homes | {"lab/b": spare}
    assert {name: pid for name, pid in place.pids().items() if name != "lab/b"} == {
        "lab/a": pids["lab/a"],
        "lab/c": pids["lab/c"],
    }
    place.assert_at_rest()


def test_g4_engine_on_a_lost_gpu_is_kept_where_no_other_has_room(place: Place) -> None:
    place.gpus(*TWO)
    place.write(place.gpu_fake("a", mib=50_000), place.gpu_fake("b", mib=50_000))
    place.apply()
    pids, homes = place.pids(), sees(place)
    index = next(gpu.index for gpu in TWO if gpu.uuid == homes["lab/a"])

    place.gpus(*TWO, Fault(gpu=index, code="NVML_ERROR_GPU_IS_LOST"))
    place.write(place.gpu_fake("a", mib=50_000), place.gpu_fake("b", mib=50_000), fake("cpu"))

    assert blocked(place.plan(expect=4)) == {"lab/a": "memory"}
    place.apply("--on-failure", "continue", expect=4)
    now = place.pids()
    assert now.pop("lab/cpu") and now == pids


def test_g4_gpu_that_cannot_be_seen_is_not_lost(place: Place) -> None:
    """Unknown is not gone: nothing new goes there, and what runs there is left alone."""
    chat, pids, home, index = chat_on_one_of_two(place, mib=30_000)

    place.gpus(*TWO, Fault(gpu=index, code="NVML_ERROR_UNKNOWN"))

    assert place.engines()["lab/chat"]["state"] == "ready"
    place.assert_at_rest()
    place.write(chat, place.gpu_fake("new", mib=10_000))
    plan = place.plan()
    assert [(step["engine"], step["device_indexes"]) for step in plan["steps"]] == [("lab/new", [1 - index])]
    assert any(f"gpu{index} cannot be seen" in note for note in plan["notes"])
    place.apply()
    assert place.pids()["lab/chat"] == pids["lab/chat"]


def test_g4_what_only_the_unseen_gpu_could_have_room_for_waits_until_it_is_seen(place: Place) -> None:
    """2026-11-25: it was "not there", and the plan ended as infeasible (4) and not as incomplete (11)."""
    fault = Fault(gpu=1, call="nvmlDeviceGetMemoryInfo", code="NVML_ERROR_UNKNOWN")
    place.gpus(*TWO, fault)
    engines = (
        place.gpu_fake("here", mib=1000, devices=[0]),
        place.gpu_fake("pinned", mib=1000, devices=[1]),
        place.gpu_fake("wide", mib=1000, tensor_parallel=2),
        place.gpu_fake("large", mib=90_000),
        place.gpu_fake("too-large-for-its-pin", mib=90_000, devices=[0]),
    )
    place.write(*engines)

    plan = place.plan(expect=11)

    assert blocked(plan) == {
        "lab/pinned": "not_observed",
        "lab/wide": "not_observed",
        "lab/large": "not_observed",
        "lab/too-large-for-its-pin": "memory",
    }
    whys = {entry["engine"]: entry["why"] for entry in plan["blocked"]}
    assert whys["lab/pinned"] == "it is pinned to gpu1, and gpu1 cannot be seen: Unknown Error"
    assert whys["lab/wide"] == "needs 2 GPUs x 1.0 GiB (declared), 1 fits, and gpu1 cannot be seen: Unknown Error"

    place.write(engines[0], engines[1])
    place.gpus(*TWO, Fault(gpu=1, code="NVML_ERROR_GPU_IS_LOST"))
    (entry,) = place.plan(expect=4)["blocked"]
    assert (entry["reason"], entry["why"]) == ("device_pin", "it is pinned to gpu1, which the driver has lost")


# --- G5: whose the memory is, is not told -----------------------------------------------------------------------------


@pytest.mark.parametrize("veil", [ProcessMemoryUnavailable(gpu=0), HiddenPids(gpu=0)], ids=["no figures", "no pids"])
def test_g5_what_is_not_told_by_process_counts_as_a_whole(place: Place, veil: fakenvml.Entry) -> None:
    """As in containers: 30,000 MiB are ours, 20,000 somebody's, and the driver tells of 50,000 only."""
    place.gpus(Gpu(index=0), veil)
    first, second = place.gpu_fake("first", mib=30_000), place.gpu_fake("second", mib=25_000)
    place.write(first)
    with place.foreign_on(0, 20_000):
        place.apply()
        assert place.engines()["lab/first"]["state"] == "ready"
        assert "cannot see: device memory: " in place.sage("gpu").stdout

        # 30,959 MiB are free: not all that no process is known to hold is foreign, and not nothing.
        place.write(first, second)
        place.apply()

        assert place.used_mib(0) == 75_000
        place.assert_at_rest()
        place.write(first, second, place.gpu_fake("third", mib=10_000))
        plan = place.plan(expect=4)
        assert list(blocked(plan)) == ["lab/third"]
        assert any("gpu0" in note and "which process uses what" in note for note in plan["notes"])
        place.write(first, second)


@pytest.mark.parametrize("taken_mib", [50_000, 0])
@pytest.mark.parametrize("veil", [ProcessMemoryUnavailable(gpu=0), HiddenPids(gpu=0)], ids=["no figures", "no pids"])
def test_g5_engine_that_loads_counts_once_whatever_it_has_taken_so_far(
    place: Place, veil: fakenvml.Entry, taken_mib: int
) -> None:
    """2026-11-25: what it had taken was counted as foreign, beside all that it was given."""
    place.gpus(Gpu(index=0), veil)
    late = [] if taken_mib else ["--memory-after", "600"]
    loads = place.gpu_fake("loads", "--ready-after", "600", *late, mib=50_000)
    place.write(loads)
    with place.foreign_on(0, 10_000):
        place.apply("--no-wait")
        until(lambda: place.used_mib(0) == 10_000 + taken_mib, "it has taken its memory")
        assert place.engines()["lab/loads"]["state"] == "starting"

        shown = place.sage("gpu").stdout

        assert re.findall(r"([0-9.]+)  (?:\S+:(lab/\S+)|(foreign  of no process))", shown) == [
            ("48.8", "lab/loads", ""),
            ("9.8", "", "foreign  of no process"),
        ]
        assert "over-full" not in shown and "20.5 of 79.6 GiB free" in " ".join(shown.split())
        if taken_mib:
            assert "cannot see: device memory: " in shown
        place.write(loads, place.gpu_fake("fits", mib=20_000))
        assert [step["device_indexes"] for step in place.plan()["steps"]] == [[0]]
        place.write(loads, place.gpu_fake("more", mib=21_000))
        (refused,) = place.plan(expect=4)["blocked"]
        free_mib = 81_559 - 600 - 10_000 - 50_000
        assert refused["devices"][0]["free_bytes"] == free_mib * 1024**2
        place.write(loads)


# --- G6: no NVML ------------------------------------------------------------------------------------------------------


def test_g6_without_nvml_gpu_engines_are_refused_and_others_are_managed(place: Place, tmp_path: Path) -> None:
    """However NVML is missing: the GPU engine that runs goes on, none starts, and engines on the CPU come and go."""
    place.gpus(*TWO)
    chat = place.gpu_fake("chat", mib=30_000)
    place.write(chat)
    place.apply()
    pids = place.pids()
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    # What fails, and of which call: a driver that answers and cannot tell what memory there is will not do, either.
    ways: list[tuple[str, str, dict[str, str], int]] = [
        ("nvmlInit", "NVML_ERROR_LIB_RM_VERSION_MISMATCH", {}, 11),
        ("nvmlInit", "NVML_ERROR_NO_PERMISSION", {}, 11),
        ("nvmlInit", "NVML_ERROR_NOT_SUPPORTED", {}, 11),
        ("nvmlDeviceGetMemoryInfo", "NVML_ERROR_NOT_SUPPORTED", {}, 11),
        ("", "", fakenvml.no_driver(nowhere), 4),
        ("", "", {"SAGE_DISABLE_NVML": "1"}, 4),
        ("", "", {"SAGE_DISABLE_NVML": "1", "SAGE_GPU_MOCK_COUNT": "2"}, 4),
    ]
    for number, (call, code, variables, expected) in enumerate(ways):
        place.gpus(*TWO, *([Fault(call=call, code=code)] if code else []))
        cpu = fake(f"cpu{number}", kind="embedding")
        place.write(chat, cpu, place.gpu_fake("more", mib=10_000))

        ran = place.apply("--on-failure", "continue", expect=expected, **variables)

        assert "lab/more" in ran.stdout
        assert place.pids().keys() == {"lab/chat", f"lab/cpu{number}"}
        if "SAGE_GPU_MOCK_COUNT" in variables:
            shown = json.loads(place.sage("plan", str(place.manifests), "-o", "json", **variables).stdout)
            assert [step["engine"] for step in shown["steps"]] == ["lab/more"]
            assert any("can be looked at, and not applied" in note for note in shown["notes"])
        # All that is wanted now runs, or needs no GPU: nothing is in the way.
        place.write(chat)
        place.apply(**variables)
        assert place.pids() == pids
    place.gpus(*TWO)
    place.assert_at_rest()


def test_g6_made_up_gpus_are_of_one_kind(place: Place) -> None:
    """2026-11-25: each had a name of its own, so that no engine could have two of them."""
    place.write(place.gpu_fake("wide", mib=10_000, tensor_parallel=2))
    ran = place.sage("plan", str(place.manifests), "-o", "json", SAGE_DISABLE_NVML="1", SAGE_GPU_MOCK_COUNT="2")
    assert [step["device_indexes"] for step in json.loads(ran.stdout)["steps"]] == [[0, 1]]


def test_g6_running_gpu_engine_is_kept_when_its_edit_comes_while_nvml_is_gone(place: Place) -> None:
    place.gpus(*TWO)
    place.write(place.gpu_fake("chat", mib=30_000))
    place.apply()
    pids = place.pids()
    place.gpus(*TWO, NO_NVML)
    # 2026-11-28: it said "no GPU", as on a machine that has none.
    assert "  GPUs not seen" in place.sage("plan", str(place.manifests)).stdout.splitlines()[0]
    place.write(place.gpu_fake("chat", mib=31_000))

    assert blocked(place.plan(expect=11)) == {"lab/chat": "not_observed"}
    place.apply(expect=11)
    assert place.pids() == pids
    # To stop it, no GPU has to be seen.
    place.sage("down", str(place.manifests), "-y")
    assert place.pids() == {}
    place.gpus(*TWO)
    place.assert_nothing_left()


# --- nothing proves that an engine is where it was placed -------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 2])
def test_engine_that_holds_nothing_of_a_gpu_is_told_by_apply_and_by_status(place: Place, devices: int) -> None:
    """It may compute on the CPU; one that is split in two may hold memory of one GPU alone."""
    place.gpus(*TWO)
    nowhere = fake("chat", use_gpu=True, gpu_memory="1000MiB")
    on_one = place.gpu_fake("chat", "--claims-on", "0", mib=1000, tensor_parallel=2)
    place.write(nowhere if devices == 1 else on_one)

    ran = place.apply()

    bare = [uuid for uuid in sees(place)["lab/chat"].split(",") if uuid not in place.held_mib().get("lab/chat", {})]
    assert len(bare) == 1
    index = next(gpu.index for gpu in TWO if gpu.uuid == bare[0])
    why = f"holds no memory of gpu{index}: nothing proves that it runs there"
    assert f"note: lab/chat {why}" in " ".join(ran.stderr.split())
    assert (place.engines()["lab/chat"]["state"], place.engines()["lab/chat"]["reason"]) == ("ready", why)
    assert f"note: lab/chat {why}" in " ".join(place.sage("status").stdout.split())


# --- the driver asks for a reset of a GPU -----------------------------------------------------------------------------


def asking(*indexes: int, action: int = 1) -> tuple[Gpu, ...]:
    """Two GPUs, of which these wait for a reset, as after some Xid errors."""
    return tuple(Gpu(index=index, recovery_action=action if index in indexes else 0) for index in range(2))


def test_nothing_is_started_on_a_gpu_that_is_to_be_reset_and_what_runs_there_stays(place: Place) -> None:
    chat, pids, home, index = chat_on_one_of_two(place, mib=10_000)
    other = gpu_uuid(1 - index)

    place.gpus(*asking(index))

    assert place.engines()["lab/chat"]["state"] == "ready"
    place.assert_at_rest(again=True)
    asked = f"the driver asks for a reset of this GPU; once nothing runs on it: nvidia-smi --gpu-reset -i {index}"
    assert f"lab/chat runs on gpu{index}, where nothing new is started: {asked}" in place.plan()["notes"]
    new = place.gpu_fake("new", mib=10_000)
    place.write(chat, new)
    with place.foreign_on(other, FOREIGN_MIB + 15_000):
        (refused,) = place.plan(expect=4)["blocked"]
        assert {row["index"]: row["why_not"] for row in refused["devices"]}[index] == f"closed: {asked}"
        for ran in (place.apply(expect=4), place.sage("why", "lab/new", str(place.manifests))):
            assert f"closed: {asked}" in " ".join(ran.stdout.split())
        assert place.pids() == pids

    place.apply()

    assert sees(place) == {"lab/chat": home, "lab/new": other}
    assert place.pids()["lab/chat"] == pids["lab/chat"]
    place.assert_at_rest(again=True)


def test_engine_that_died_of_the_error_is_started_on_another_gpu_and_goes_home_after_the_reset(
    place: Place,
) -> None:
    place.gpus(*TWO)
    place.write(place.gpu_fake("chat", mib=50_000, devices=[0]))
    place.apply()
    kill(place.pids()["lab/chat"])
    place.gpus(*asking(0))

    place.apply(expect=4)
    assert place.pids() == {}
    place.write(place.gpu_fake("chat", mib=50_000))
    place.apply()
    assert sees(place) == {"lab/chat": gpu_uuid(1)}
    place.assert_at_rest(again=True)

    kill(place.pids()["lab/chat"])
    place.write(place.gpu_fake("chat", mib=50_000, devices=[0]))
    place.gpus(*TWO)
    place.apply()
    assert sees(place) == {"lab/chat": gpu_uuid(0)}
    place.assert_at_rest(again=True)


@pytest.mark.parametrize("change", ["the engine itself", "its removal"])
def test_what_ran_on_a_gpu_that_is_to_be_reset_is_put_back_on_another(place: Place, change: str) -> None:
    """2026-11-25: it was put back nowhere, since what is put back is put back where it was."""
    chat, _, home, index = chat_on_one_of_two(place, mib=10_000)
    place.gpus(*asking(index))
    name = "chat" if change == "the engine itself" else "other"
    place.write(place.gpu_fake(name, "--exit-code", "1", mib=10_000))

    if change == "the engine itself":
        assert f"lab/chat leaves gpu{index}, where nothing new is started: " in " ".join(place.plan()["notes"])
    ran = place.apply(expect=5)

    assert sees(place) == {"lab/chat": gpu_uuid(1 - index)}
    assert f"lab/chat leaves gpu{index}" in " ".join((ran.stdout + ran.stderr).split())
    place.write(chat)
    place.assert_at_rest(again=True)


def test_gpu_that_came_to_need_a_reset_between_the_gate_and_the_program_is_not_started_on(place: Place) -> None:
    place.gpus(*TWO)
    keep = place.gpu_fake("keep", mib=30_000, devices=[1])
    place.write(keep)
    place.apply()
    pids = place.pids()
    place.write(keep, place.gpu_fake("chat", mib=20_000, devices=[0]))
    with place.started("apply", str(place.manifests), "-y", **place.failing("gate.recorded=stop")) as process:
        until(lambda: stat_fields(process.pid)[:1] == ["T"], "it has stopped at the gate")
        place.gpus(*asking(0))
        os.kill(process.pid, signal.SIGCONT)

        _, said = process.communicate(timeout=60)

    assert process.returncode == 5, said
    assert "gpu0 is closed: the driver asks for a reset of this GPU" in " ".join(said.split())
    assert place.pids() == pids
    assert not place.log("lab/chat")
    place.gpus(*TWO)
    place.apply()
    place.assert_at_rest()
