"""The door to NVML: the real pynvml over the fake library, in the real command line; drivers that fail or hang."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import fakenvml
from tests.fakenvml import Delay, Fault, Gpu, Hang, Link, Mig, Process, ProcessMemoryUnavailable, Used
from tests.forks import Forks
from tests.oracle import Ran, environment

MIB = 1024**2


class Box:
    """A machine with GPUs as a file says."""

    def __init__(self, root: Path, commands: Forks) -> None:
        self.state, self.nvml, self._commands = root / "state", root / "nvml", commands

    def sage(self, *words: str, **more: str) -> Ran:
        done = self._commands.run(self.state, *words, more_environment=more)
        assert "Traceback" not in done.stderr
        return done

    def gpus(self, *things: Any, **more: str) -> dict[str, Any]:
        fakenvml.write_state(self.nvml, *things)
        done = self.sage("gpu", "-o", "json", **more)
        assert done.code == 0, done.stderr
        answer = json.loads(done.stdout)
        assert isinstance(answer, dict)
        return answer


@pytest.fixture
def box(tmp_path: Path, commands: Forks) -> Box:
    return Box(tmp_path, commands)


@pytest.fixture
def holder() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(["/bin/sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_memory_of_a_foreign_process_is_told_with_its_owner_and_is_not_free(
    box: Box, holder: "subprocess.Popen[bytes]"
) -> None:
    answer = box.gpus(Gpu(index=0), Gpu(index=1), Process(gpu=0, pid=holder.pid, mib=58169))

    full, idle = answer["devices"]
    assert (full["total_bytes"], full["reserved_bytes"]) == (81559 * MIB, 600 * MIB)
    assert full["foreign_bytes"] == 58169 * MIB
    assert full["free_bytes"] == (81559 - 600 - 58169) * MIB
    assert [(row["pid"], row["name"]) for row in full["processes"]] == [(holder.pid, "sleep")]
    assert (idle["foreign_bytes"], idle["free_bytes"]) == (0, (81559 - 600) * MIB)
    assert answer["gaps"] == []


def test_memory_that_the_driver_gives_to_nobody_is_not_free(box: Box) -> None:
    (device,) = box.gpus(Gpu(index=0), Used(gpu=0, mib=1000))["devices"]
    assert device["foreign_bytes"] == 1000 * MIB and device["processes"] == []


def test_one_lost_gpu_spoils_only_itself(box: Box) -> None:
    answer = box.gpus(*(Gpu(index=index) for index in range(4)), Fault(gpu=1, code="NVML_ERROR_GPU_IS_LOST"))
    assert [device["index"] for device in answer["devices"]] == [0, 2, 3]
    (gap,) = answer["gaps"]
    assert gap["what"] == "lost device" and "gpu1" in gap["why"] and "lost" in gap["why"].lower()


@pytest.mark.parametrize(
    "code", ["NVML_ERROR_DRIVER_NOT_LOADED", "NVML_ERROR_LIB_RM_VERSION_MISMATCH", "NVML_ERROR_NO_PERMISSION"]
)
def test_driver_that_cannot_be_used_is_a_gap_and_no_error(box: Box, code: str) -> None:
    answer = box.gpus(Gpu(index=0), Fault(call="nvmlInitWithFlags", code=code), Fault(call="nvmlInit_v2", code=code))
    assert answer["devices"] == []
    assert [gap["what"] for gap in answer["gaps"]] == ["devices"]


def test_no_library_is_no_gpu_and_nothing_is_missing(box: Box, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    answer = box.gpus(Gpu(index=0), **fakenvml.no_driver(tmp_path / "none"))
    assert (answer["devices"], answer["gaps"]) == ([], [])


def test_memory_that_is_not_told_by_process_is_counted_whole_and_said(box: Box) -> None:
    fakes = (Gpu(index=0), Process(gpu=0, pid=os.getpid(), mib=700), ProcessMemoryUnavailable(gpu=0))
    answer = box.gpus(*fakes)
    assert answer["devices"][0]["foreign_bytes"] == 700 * MIB
    assert [gap["what"] for gap in answer["gaps"]] == ["device memory"]


def test_slices_are_devices_and_the_sliced_gpu_is_none(box: Box) -> None:
    answer = box.gpus(Gpu(index=0, mig=True), Mig(gpu=0, index=0), Mig(gpu=0, index=1), Gpu(index=1))
    shown = [
        (device["index"], device["parent"] is not None, device["total_bytes"] // MIB) for device in answer["devices"]
    ]
    assert shown == [(0, True, 9984), (0, True, 9984), (1, False, 81559)]


@pytest.mark.parametrize(
    ("action", "trouble", "helps"),
    [
        (1, "the driver asks for a reset of this GPU", "; once nothing runs on it: nvidia-smi --gpu-reset -i 1"),
        (2, "the driver asks for a reboot of this machine, because of this GPU", ""),
        (
            4,
            "the driver asks for this GPU to be drained and reset",
            "; once nothing runs on it: nvidia-smi --gpu-reset",
        ),
        (6, "the driver asks for a reset of this GPU's PCIe bus", ""),
        (7, "the driver asks for a reboot of the whole system, because of this GPU", ""),
    ],
)
def test_gpu_for_which_the_driver_asks_a_reset_or_a_reboot_is_closed(
    box: Box, action: int, trouble: str, helps: str
) -> None:
    well, ill = box.gpus(Gpu(index=0), Gpu(index=1, recovery_action=action))["devices"]
    assert (well["closed"], well["troubles"]) == (None, [])
    assert ill["closed"].startswith(trouble + helps) and ill["troubles"] == [trouble]
    # The bytes are counted as ever: it is what may be started there that changes.
    assert ill["free_bytes"] == well["free_bytes"]
    said = " ".join(box.sage("gpu").stdout.split())
    assert said.count(trouble) == 1 and f"closed: {trouble}{helps}" in said


@pytest.mark.parametrize(
    ("action", "trouble"),
    [
        (3, "the driver asks for an end of all traffic between this GPU and others"),
        (5, "the driver asks for its IMEX domain to be recovered"),
        (99, "the driver asks for something that this sage does not know (action 99)"),
    ],
)
def test_gpu_for_which_the_driver_asks_for_less_is_told_and_stays_open(box: Box, action: int, trouble: str) -> None:
    (device,) = box.gpus(Gpu(index=0, recovery_action=action))["devices"]
    assert (device["closed"], device["troubles"]) == (None, [trouble])
    assert trouble in " ".join(box.sage("gpu").stdout.split())


def test_slices_are_closed_with_their_gpu(box: Box) -> None:
    answer = box.gpus(Gpu(index=0, mig=True, recovery_action=1), Mig(gpu=0, index=0), Mig(gpu=0, index=1))
    assert [device["closed"][:39] for device in answer["devices"]] == ["the driver asks for a reset of this GPU"] * 2


@pytest.mark.parametrize(
    "older",
    [
        (Gpu(index=0, recovery_action=None),),
        (Gpu(index=0), Fault(call="nvmlDeviceGetFieldValues", code="NVML_ERROR_FUNCTION_NOT_FOUND")),
        (Gpu(index=0), Fault(call="nvmlDeviceGetFieldValues", code="NVML_ERROR_UNKNOWN")),
    ],
    ids=["field not offered", "no such function", "it fails"],
)
def test_driver_that_does_not_tell_what_it_asks_for_asks_for_nothing(box: Box, older: tuple[Any, ...]) -> None:
    answer = box.gpus(*older)
    (device,) = answer["devices"]
    assert (device["closed"], device["troubles"], answer["gaps"]) == (None, [], [])


def test_gpus_that_nvlink_connects_are_one_island(box: Box) -> None:
    answer = box.gpus(*(Gpu(index=i) for i in range(4)), Link(a=0, b=2, kind="nvlink"), Link(a=1, b=3, kind="nvlink"))
    islands = [device["island"] for device in answer["devices"]]
    assert islands[0] == islands[2] != islands[1] == islands[3]


def test_gpus_that_reach_each_other_through_an_nvswitch_are_one_island(box: Box) -> None:
    switched = [Gpu(index=index, numa=index % 2, nvswitch_links=18) for index in range(3)]
    answer = box.gpus(*switched, Gpu(index=3, numa=0))
    islands = [device["island"] for device in answer["devices"]]
    assert islands[0] == islands[1] == islands[2] != islands[3]


def test_without_links_gpus_of_one_numa_node_are_one_island(box: Box) -> None:
    answer = box.gpus(Gpu(index=0, numa=0), Gpu(index=1, numa=1), Gpu(index=2, numa=0))
    islands = [device["island"] for device in answer["devices"]]
    assert islands[0] == islands[2] != islands[1]


def test_gpus_that_are_linked_to_a_lost_one_alone_do_not_reach_each_other(box: Box) -> None:
    gpus = (Gpu(index=0, numa=0), Gpu(index=1), Gpu(index=2, numa=1))
    links = (Link(a=0, b=1, kind="nvlink"), Link(a=2, b=1, kind="nvlink"))
    answer = box.gpus(*gpus, *links, Fault(gpu=1, code="NVML_ERROR_GPU_IS_LOST"))
    assert len({device["island"] for device in answer["devices"]}) == 2


def test_without_nvlink_gpus_behind_common_pcie_switches_are_one_island(box: Box) -> None:
    links = (Link(a=0, b=2, kind="pix"), Link(a=1, b=3, kind="pxb"), Link(a=0, b=1, kind="phb"))
    answer = box.gpus(*(Gpu(index=index) for index in range(5)), *links)
    islands = [device["island"] for device in answer["devices"]]
    assert islands[0] == islands[2] and islands[1] == islands[3]
    assert len(set(islands)) == 3


def test_driver_that_does_not_tell_the_pcie_topology_leaves_the_numa_node(box: Box) -> None:
    silent = Fault(call="nvmlDeviceGetTopologyCommonAncestor", code="NVML_ERROR_NOT_SUPPORTED", gpu=2)
    gpus = [Gpu(index=index, numa=index // 2) for index in range(4)]
    answer = box.gpus(*gpus, Link(a=0, b=3, kind="pix"), silent)
    islands = [device["island"] for device in answer["devices"]]
    assert islands[0] == islands[1] != islands[2] == islands[3]
    assert answer["gaps"] == []


@pytest.mark.parametrize(
    ("count", "links", "asked"),
    [(4, (), 6), (4, (Link(a=0, b=1, kind="nvlink"),), 0), (2, (), 0)],
    ids=["each pair once", "there is NVLink", "there is one pair"],
)
def test_the_pcie_topology_is_asked_for_only_where_it_decides(
    box: Box, count: int, links: tuple[Link, ...], asked: int
) -> None:
    # It never strikes, but counts.
    counted = Delay(call="nvmlDeviceGetTopologyCommonAncestor", milliseconds=0, after=10**9)
    box.gpus(*(Gpu(index=index) for index in range(count)), *links, counted)
    told = sum(path.stat().st_size for path in box.nvml.parent.glob("nvml.calls.*"))
    # A second look where an engine of another test ends during the first one.
    assert told in (asked, 2 * asked)


def test_disabled_or_mocked_gpus_are_as_the_variables_say(box: Box) -> None:
    assert box.gpus(Gpu(index=0), SAGE_DISABLE_NVML="1")["devices"] == []
    mocked = box.gpus(Gpu(index=0), SAGE_DISABLE_NVML="true", SAGE_GPU_MOCK_COUNT="2", SAGE_GPU_MOCK_MEMORY_GB="48")
    assert [(d["name"], d["free_bytes"]) for d in mocked["devices"]] == [
        ("Mock GPU", 48 * 1024 * MIB),
        ("Mock GPU", 48 * 1024 * MIB),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("SAGE_GPU_MOCK_COUNT", "abc"),
        ("SAGE_GPU_MOCK_COUNT", "1.5"),
        ("SAGE_GPU_MOCK_COUNT", "-1"),
        ("SAGE_GPU_MOCK_MEMORY_GB", "80GiB"),
        ("SAGE_GPU_MOCK_MEMORY_GB", "-5"),
        ("SAGE_GPU_MOCK_MEMORY_GB", "nan"),
    ],
)
def test_a_variable_for_made_up_gpus_that_is_no_such_number_is_told(box: Box, name: str, text: str) -> None:
    """2026-11-25: "abc" of them were none, and "-5" GiB were 24."""
    done = box.sage("gpu", **{"SAGE_DISABLE_NVML": "1", "SAGE_GPU_MOCK_COUNT": "1", name: text})
    assert done.code == 64
    assert f"error: {name} is '{text}', which is not a " in done.stderr


def test_driver_that_hangs_is_a_gap_and_is_waited_for_once(tmp_path: Path) -> None:
    """In a process of its own that looks twice: the second look does not wait again."""
    fakenvml.write_state(tmp_path / "nvml", Gpu(index=0), Hang(call="nvmlDeviceGetCount_v2"))
    program = (
        "import time; from sage_reconcile.world.gpus import Gpus; gpus = Gpus()\n"
        "print(gpus.look(0.5)); began = time.monotonic(); print(gpus.look(0.5)); print(time.monotonic() - began < 0.25)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(tmp_path / "state") | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    first, second, soon = done.stdout.splitlines()
    assert first == second and "did not answer in 0.5 s" in first
    assert soon == "True"
