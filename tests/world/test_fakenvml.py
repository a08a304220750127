"""The fake NVML as the real pynvml sees it: what is told is seen, and what is to go wrong goes wrong."""

import json
import re
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import fakenvml
from tests.fakenvml import (
    Delay,
    Fault,
    Gpu,
    Hang,
    HiddenPids,
    Link,
    Mig,
    Process,
    ProcessMemoryUnavailable,
    Used,
    Xid,
    allocate,
    claim,
    device,
    entries,
    gpu_uuid,
    memory,
    mig_uuid,
    release,
    write_state,
)
from tests.fakenvml.cuda import visible

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20

# Evaluates a line at a time with the names of pynvml; an answer is JSON, and an error is its class's name.
ASKED = """
import ctypes, json, sys, time
import pynvml

def plain(value):
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, ctypes.Array):
        return list(value)
    if isinstance(value, ctypes.Structure):
        return {name: plain(getattr(value, name)) for name, _ in value._fields_}
    if isinstance(value, pynvml.nvmlFriendlyObject):
        return vars(value)
    return value.value if isinstance(value, ctypes._SimpleCData) else value

def gpu(index):
    return pynvml.nvmlDeviceGetHandleByIndex(index)

def slice_of(index, number):
    return pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu(index), number)

def used(index):
    return pynvml.nvmlDeviceGetMemoryInfo(gpu(index), pynvml.nvmlMemory_v2).used // 2**20

def pids(index):
    return [process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu(index))]

names = {**vars(pynvml), **globals()}
names["keep"] = names.update
for line in sys.stdin:
    try:
        answer = plain(eval(line, names))
    except pynvml.NVMLError as error:
        answer = type(error).__name__
    print(json.dumps(answer), flush=True)
"""


class Client:
    """A process with pynvml in it. It lives through changes of the file, as `sage up` would."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", ASKED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def say(self, expression: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def ask(self, expression: str) -> Any:
        self.say(expression)
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def library() -> Path:
    return fakenvml.library()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "gpus"


@pytest.fixture
def client(library: Path, state: Path) -> Iterator[Client]:
    """Started before the file is there: it is read at the first call."""
    client = Client(fakenvml.environment(library, state))
    yield client
    client.close()


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that holds memory as long as a test wants."""
    process = subprocess.Popen(["/bin/sleep", "60"])
    yield process
    process.kill()
    process.wait()


# --- what the machine is ----------------------------------------------------------------------------------------------


def test_gpus_have_their_names_uuids_and_places(client: Client, state: Path) -> None:
    l4 = Gpu(index=1, uuid="GPU-12345678", name="NVIDIA L4", bus="0000:2a:00.0", minor=3, capability="8.9", numa=1)
    write_state(state, Gpu(index=0), l4, driver="535.1", cuda=12020)
    client.ask("nvmlInit()")

    assert client.ask("nvmlDeviceGetCount()") == 2
    assert client.ask("nvmlSystemGetDriverVersion()") == "535.1"
    assert client.ask("nvmlSystemGetCudaDriverVersion_v2()") == 12020
    assert client.ask("nvmlDeviceGetName(gpu(0))") == "NVIDIA H100 80GB HBM3"
    assert client.ask("nvmlDeviceGetUUID(gpu(0))") == fakenvml.gpu_uuid(0)
    assert client.ask("nvmlDeviceGetName(nvmlDeviceGetHandleByUUID('GPU-12345678'))") == "NVIDIA L4"
    assert client.ask("nvmlDeviceGetIndex(nvmlDeviceGetHandleByPciBusId('00000000:2A:00.0'))") == 1
    assert client.ask("nvmlDeviceGetMinorNumber(gpu(1))") == 3
    assert client.ask("nvmlDeviceGetCudaComputeCapability(gpu(1))") == [8, 9]
    pci = client.ask("nvmlDeviceGetPciInfo(gpu(1))")
    assert (pci["busId"], pci["busIdLegacy"], pci["bus"]) == ("00000000:2A:00.0", "0000:2A:00.0", 0x2A)
    assert client.ask("gpu(2)") == "NVMLError_InvalidArgument"
    assert client.ask("nvmlDeviceGetHandleByUUID('GPU-unknown')") == "NVMLError_NotFound"


def test_measurements_and_wear_are_as_told(client: Client, state: Path) -> None:
    worn = Gpu(index=0, utilisation=97, memory_utilisation=12, ecc_uncorrected=2, remap_pending=True, retired_pages=3)
    write_state(state, worn, Gpu(index=1, ecc_uncorrected=None, remapped_uncorrectable=None))
    client.ask("nvmlInit()")

    assert client.ask("nvmlDeviceGetUtilizationRates(gpu(0))") == {"gpu": 97, "memory": 12}
    assert client.ask("nvmlDeviceGetTemperature(gpu(0), NVML_TEMPERATURE_GPU)") == 35
    assert client.ask("nvmlDeviceGetTemperatureV(gpu(0), NVML_TEMPERATURE_GPU)") == 35
    assert client.ask("nvmlDeviceGetPowerUsage(gpu(0))") == 70_000
    assert client.ask("nvmlDeviceGetPersistenceMode(gpu(0))") == 1
    assert client.ask("nvmlDeviceGetComputeMode(gpu(0))") == 0
    uncorrected = "nvmlDeviceGetTotalEccErrors(gpu({}), NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC)"
    assert client.ask(uncorrected.format(0)) == 2
    assert client.ask(uncorrected.format(1)) == "NVMLError_NotSupported"
    assert client.ask("nvmlDeviceGetRemappedRows(gpu(0))") == [0, 0, 1, 0]
    assert client.ask("nvmlDeviceGetRemappedRows(gpu(1))") == "NVMLError_NotSupported"
    assert len(client.ask("nvmlDeviceGetRetiredPages(gpu(0), NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR)")) == 3


def test_the_recovery_action_is_a_field_that_says_for_itself_whether_it_is_offered(client: Client, state: Path) -> None:
    write_state(
        state,
        Gpu(index=0, recovery_action=4, mig=True),
        Mig(gpu=0, index=0),
        Gpu(index=1),
        Gpu(index=2, recovery_action=None),
    )
    client.ask("nvmlInit()")

    client.ask(
        "keep(asked=lambda device, *fields: [(field.fieldId, field.nvmlReturn, field.value.uiVal) for field in "
        "nvmlDeviceGetFieldValues(device, fields)])"
    )
    action, not_offered = "NVML_FI_DEV_GET_GPU_RECOVERY_ACTION", 3
    assert client.ask(f"asked(gpu(0), {action})") == [[230, 0, 4]]
    assert client.ask(f"asked(gpu(1), {action})") == [[230, 0, 0]]
    assert client.ask(f"asked(gpu(2), {action})") == [[230, not_offered, 0]]
    assert client.ask(f"asked(slice_of(0, 0), {action})") == [[230, not_offered, 0]]
    assert client.ask(f"asked(gpu(0), 1, {action})") == [[1, not_offered, 0], [230, 0, 4]]
    write_state(state, Gpu(index=0), Fault(call="nvmlDeviceGetFieldValues", code="NVML_ERROR_FUNCTION_NOT_FOUND"))
    assert client.ask(f"asked(gpu(0), {action})") == "NVMLError_FunctionNotFound"


def test_affinities_are_bits_and_a_gpu_is_a_numa_node_only_where_told(client: Client, state: Path) -> None:
    write_state(state, Gpu(index=0, numa=1, cpus="0-2,64"), Gpu(index=1, numa=None, numa_node_id=4))
    client.ask("nvmlInit()")

    assert client.ask("nvmlDeviceGetMemoryAffinity(gpu(0), 1, NVML_AFFINITY_SCOPE_NODE)") == [0b10]
    assert client.ask("nvmlDeviceGetMemoryAffinity(gpu(1), 1, NVML_AFFINITY_SCOPE_NODE)") == "NVMLError_NotSupported"
    assert client.ask("nvmlDeviceGetCpuAffinity(gpu(0), 2)") == [0b111, 1]
    assert client.ask("nvmlDeviceGetCpuAffinityWithinScope(gpu(0), 1, NVML_AFFINITY_SCOPE_SOCKET)") == [0b111]
    assert client.ask("nvmlDeviceGetNumaNodeId(gpu(0))") == "NVMLError_NotSupported"
    assert client.ask("nvmlDeviceGetNumaNodeId(gpu(1))") == 4


def test_topology_is_numa_unless_links_say_more(client: Client, state: Path) -> None:
    links = (Link(a=0, b=1, kind="pix"), Link(a=0, b=1, kind="nvlink", count=4, up=3), Link(a=0, b=2, kind="phb"))
    write_state(state, Gpu(index=0), Gpu(index=1), Gpu(index=2), Gpu(index=3, numa=1), *links)
    client.ask("nvmlInit()")

    ancestor = "nvmlDeviceGetTopologyCommonAncestor(gpu({}), gpu({}))"
    levels = {pair: client.ask(ancestor.format(*pair)) for pair in ((0, 1), (2, 0), (1, 2), (0, 3))}
    assert levels == {(0, 1): 10, (2, 0): 30, (1, 2): 40, (0, 3): 50}
    # The number, because pynvml's NVML_P2P_CAPS_INDEX_READ is a tuple.
    peers = "[nvmlDeviceGetP2PStatus(gpu(0), gpu(other), {}) for other in (1, 2, 3)]"
    assert client.ask(peers.format("0")) == [0, 0, 3]
    assert client.ask(peers.format("NVML_P2P_CAPS_INDEX_NVLINK")) == [0, 5, 5]
    assert client.ask("[nvmlDeviceGetNvLinkState(gpu(1), link) for link in range(5)]") == [1, 1, 1, 0, 0]
    assert client.ask("nvmlDeviceGetNvLinkRemotePciInfo(gpu(1), 0)")["busId"] == "00000000:10:00.0"
    assert client.ask("nvmlDeviceGetNvLinkState(gpu(2), 0)") == "NVMLError_NotSupported"


def test_gpus_on_one_switch_reach_each_other_over_nvlink(client: Client, state: Path) -> None:
    write_state(state, Gpu(index=0, nvswitch_links=18), Gpu(index=1, nvswitch_links=18, numa=1), Gpu(index=2))
    client.ask("nvmlInit()")

    assert client.ask("nvmlDeviceGetP2PStatus(gpu(0), gpu(1), NVML_P2P_CAPS_INDEX_NVLINK)") == 0
    assert client.ask("nvmlDeviceGetP2PStatus(gpu(0), gpu(2), NVML_P2P_CAPS_INDEX_NVLINK)") == 5
    assert client.ask("sum(nvmlDeviceGetNvLinkState(gpu(0), link) for link in range(NVML_NVLINK_MAX_LINKS))") == 18
    assert client.ask("nvmlDeviceGetNvLinkRemoteDeviceType(gpu(0), 0) == NVML_NVLINK_DEVICE_TYPE_SWITCH") is True


def test_slices_have_handles_memory_and_processes_of_their_own(
    client: Client, state: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    slices = (Mig(gpu=0, index=0), Mig(gpu=0, index=1, profile="3g.40gb", total_mib=40_000, gi=2, slices=3))
    holding = Process(gpu=fakenvml.mig_uuid(0, 1), pid=sleeper.pid, mib=100)
    write_state(state, Gpu(index=0, mig=True), Gpu(index=1), Gpu(index=2, mig=None), *slices, holding)
    client.ask("nvmlInit()")

    assert client.ask("[nvmlDeviceGetMigMode(gpu(index)) for index in (0, 1)]") == [[1, 1], [0, 0]]
    assert client.ask("nvmlDeviceGetMigMode(gpu(2))") == "NVMLError_NotSupported"
    assert client.ask("[nvmlDeviceGetMaxMigDeviceCount(gpu(index)) for index in (0, 1, 2)]") == [7, 0, 0]
    assert client.ask("slice_of(0, 2)") == "NVMLError_NotFound"
    assert client.ask("nvmlDeviceGetUUID(slice_of(0, 1))") == fakenvml.mig_uuid(0, 1)
    assert client.ask("nvmlDeviceGetName(slice_of(0, 1))") == "NVIDIA H100 80GB HBM3 MIG 3g.40gb"
    assert client.ask("nvmlDeviceGetGpuInstanceId(slice_of(0, 1))") == 2
    assert client.ask("nvmlDeviceGetComputeInstanceId(slice_of(0, 1))") == 0
    assert client.ask("nvmlDeviceGetGpuInstanceId(gpu(0))") == "NVMLError_NotSupported"
    assert client.ask("nvmlDeviceGetAttributes(slice_of(0, 1))")["memorySizeMB"] == 40_000
    whole = "nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvmlDeviceGetHandleByUUID('{}'))"
    assert client.ask(f"nvmlDeviceGetIndex({whole.format(fakenvml.mig_uuid(0, 1))})") == 0
    memory = "[nvmlDeviceGetMemoryInfo(handle).used // 2**20 for handle in (gpu(0), slice_of(0, 0), slice_of(0, 1))]"
    assert client.ask(memory) == [700, 0, 100]
    (process,) = client.ask("nvmlDeviceGetComputeRunningProcesses(gpu(0))")
    assert (process["pid"], process["gpuInstanceId"], process["computeInstanceId"]) == (sleeper.pid, 2, 0)
    assert client.ask("nvmlDeviceGetComputeRunningProcesses(slice_of(0, 0))") == []
    assert client.ask("nvmlDeviceGetUtilizationRates(gpu(0))") == "NVMLError_NotSupported"


# --- memory and processes ---------------------------------------------------------------------------------------------


def test_the_first_version_of_memory_counts_what_is_reserved_as_used_and_the_second_does_not(
    client: Client, state: Path
) -> None:
    write_state(state, Gpu(index=0, total_mib=81_559, reserved_mib=600), Used(gpu=0, mib=70_000))
    client.ask("nvmlInit()")

    first = client.ask("nvmlDeviceGetMemoryInfo(gpu(0))")
    assert first == {"total": 81_559 * MIB, "free": 10_959 * MIB, "used": 70_600 * MIB}
    second = client.ask("nvmlDeviceGetMemoryInfo(gpu(0), nvmlMemory_v2)")
    del second["version"]
    assert second == {"total": 81_559 * MIB, "reserved": 600 * MIB, "free": 10_959 * MIB, "used": 70_000 * MIB}
    assert first["used"] > 2**32
    assert client.ask("nvmlDeviceGetMemoryInfo(gpu(0), 1)") == "NVMLError_ArgumentVersionMismatch"


def test_memory_goes_with_its_process_and_a_zombie_holds_none(
    client: Client, state: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    write_state(state, Gpu(index=0), Gpu(index=1))
    claim(state, 0, sleeper.pid, 58_169)
    client.ask("nvmlInit()")
    (process,) = client.ask("nvmlDeviceGetComputeRunningProcesses(gpu(0))")
    assert (process["pid"], process["usedGpuMemory"]) == (sleeper.pid, 58_169 * MIB)
    assert process["gpuInstanceId"] == 0xFFFFFFFF
    assert client.ask("[used(0), used(1)]") == [58_169, 0]

    sleeper.kill()
    # Waits until it is dead, and leaves it a zombie.
    with open(f"/proc/{sleeper.pid}/stat") as stat:
        while ") Z " not in stat.read():
            stat.seek(0)

    assert client.ask("[used(0), pids(0)]") == [0, []]


def test_memory_lingers_as_long_as_told_after_the_death_was_seen(
    client: Client, state: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    write_state(state, Gpu(index=0))
    claim(state, 0, sleeper.pid, 100, linger_seconds=60)
    client.ask("nvmlInit()")
    sleeper.kill()
    sleeper.wait()
    assert client.ask("[used(0), pids(0)]") == [100, []]

    write_state(state, Gpu(index=0), ahead_seconds=50)
    assert client.ask("used(0)") == 100
    write_state(state, Gpu(index=0), ahead_seconds=70)
    assert client.ask("used(0)") == 0


def test_a_ghost_is_listed_while_its_memory_lingers(client: Client, state: Path) -> None:
    write_state(state, Gpu(index=0), Process(gpu=0, pid=2**22 + 1, mib=1, linger_seconds=60, ghost=True))
    client.ask("nvmlInit()")
    assert client.ask("[used(0), pids(0)]") == [1, [2**22 + 1]]


def test_a_later_process_of_the_same_pid_holds_nothing(
    client: Client, state: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    write_state(state, Gpu(index=0), Process(gpu=0, pid=sleeper.pid, mib=100, start=1))
    client.ask("nvmlInit()")
    assert client.ask("used(0)") == 0


def test_kinds_of_processes_are_lists_of_their_own_in_all_versions(
    client: Client, state: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    pid = sleeper.pid
    write_state(state, Gpu(index=0), Process(gpu=0, pid=pid, mib=7), Process(gpu=0, pid=pid, mib=2, kind="graphics"))
    client.ask("nvmlInit()")

    for version in ("_v2", "_v3"):
        lists = f"[nvmlDeviceGet{{}}RunningProcesses{version}(gpu(0))[0].usedGpuMemory // 2**20]"
        assert client.ask(lists.format("Compute")) == [7]
        assert client.ask(lists.format("Graphics")) == [2]
    assert client.ask("nvmlDeviceGetMPSComputeRunningProcesses_v3(gpu(0))") == []


def test_in_containers_pids_or_their_memory_are_not_told_and_the_sum_is(
    client: Client, state: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    pid = sleeper.pid
    gpus = (Gpu(index=0), Gpu(index=1), Gpu(index=2))
    held = (Process(gpu=0, pid=pid, mib=5), Process(gpu=1, pid=pid, mib=6))
    stranger = Process(gpu=2, pid=2**22 + 1, mib=7, elsewhere=True)
    write_state(state, *gpus, *held, stranger, ProcessMemoryUnavailable(gpu=0), HiddenPids(gpu=1))
    client.ask("nvmlInit()")

    assert client.ask("nvmlDeviceGetComputeRunningProcesses(gpu(0))[0].usedGpuMemory") is None
    assert client.ask("[pids(index) for index in (0, 1, 2)]") == [[pid], [], [2**22 + 1]]
    assert client.ask("[used(index) for index in (0, 1, 2)]") == [5, 6, 7]


def test_claims_of_two_processes_at_once_are_all_kept(client: Client, state: Path) -> None:
    """A claim that read the file before another had written it would lose that one."""
    write_state(state, *(Gpu(index=index) for index in range(20)), Used(gpu=0, mib=1))
    claiming = """
import os, sys
from pathlib import Path
from tests.fakenvml import claim, release
for gpu in range(20):
    claim(Path(sys.argv[1]), gpu, os.getpid(), 1000)
    claim(Path(sys.argv[1]), gpu, os.getpid(), 100)
    if gpu % 2:
        release(Path(sys.argv[1]), gpu, os.getpid())
print("claimed", flush=True)
sys.stdin.read()
"""
    engines = [
        subprocess.Popen(
            [sys.executable, "-c", claiming, state], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        for engine in engines:
            assert engine.stdout
            assert engine.stdout.readline() == "claimed\n"
        client.ask("nvmlInit()")
        assert client.ask("[used(index) for index in range(20)]") == [201, 0, *[200, 0] * 9]
    finally:
        for engine in engines:
            engine.communicate()
    assert client.ask("[used(index) for index in range(2)]") == [1, 0]


def test_a_process_that_releases_holds_nothing_and_one_that_claims_again_holds_the_new_amount(
    client: Client, state: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    write_state(state, Gpu(index=0))
    client.ask("nvmlInit()")
    claim(state, 0, sleeper.pid, 100)
    claim(state, 0, sleeper.pid, 40)
    assert client.ask("used(0)") == 40
    release(state, 0, sleeper.pid)
    assert client.ask("used(0)") == 0


def test_what_was_written_and_claimed_is_read_again(state: Path, sleeper: "subprocess.Popen[bytes]") -> None:
    gpus = (
        Gpu(index=0, name="NVIDIA L4", numa=None, total_mib=None),
        Gpu(index=1, mig=True),
        Mig(gpu=gpu_uuid(1), index=0),
    )
    faults = (Fault(code="NVML_ERROR_UNKNOWN", gpu="0", times=2), Xid(gpu="1", code=79), HiddenPids())
    write_state(state, *gpus, *faults, Link(a="0", b="1", kind="nvlink"), ahead_seconds=5)
    claim(state, gpu_uuid(0), sleeper.pid, 100)

    *written, claimed = entries(state)
    assert written == [*gpus, *faults, Link(a="0", b="1", kind="nvlink")]
    assert isinstance(claimed, Process)
    assert (claimed.gpu, claimed.pid, claimed.mib) == (gpu_uuid(0), sleeper.pid, 100)
    assert [device(state, name) for name in (1, gpu_uuid(1), "0000:11:00.0")] == [gpus[1]] * 3


def test_memory_is_told_from_behind_nvml_whatever_that_is_told_to_say(
    client: Client, state: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    sliced = (Gpu(index=1, mig=True), Mig(gpu=1, index=0))
    lost = (Fault(code="NVML_ERROR_GPU_IS_LOST", call="nvmlInit", after=1), HiddenPids(), Hang(gpu=0))
    write_state(state, Gpu(index=0), *sliced, Used(gpu=0, mib=10), *lost)
    claim(state, mig_uuid(1, 0), sleeper.pid, 100)

    assert [memory(state, name).used_mib for name in (0, gpu_uuid(1), mig_uuid(1, 0))] == [10, 100, 100]
    assert memory(state, 0).free_mib == 81_559 - 600 - 10
    with pytest.raises(LookupError):
        memory(state, 2)
    # It counted as no call.
    assert client.ask("nvmlInit()") is None
    assert client.ask("nvmlInit()") == "NVMLError_GpuIsLost"


def test_two_that_allocate_at_once_do_not_get_more_than_there_is(state: Path) -> None:
    write_state(state, Gpu(index=0, total_mib=1000, reserved_mib=0), Used(gpu=0, mib=100))
    asking = """
import os, sys
from pathlib import Path
from tests.fakenvml import allocate
print(sum(allocate(Path(sys.argv[1]), 0, os.getpid(), mib) for mib in range(10, 1000, 10)), flush=True)
sys.stdin.read()
"""
    words = [sys.executable, "-c", asking, state]
    engines = [
        subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        got = [int(engine.stdout.readline()) for engine in engines if engine.stdout]
        # Each asks for 10 more until nothing is left.
        assert sum(got) == 90
        assert memory(state, 0).used_mib == 1000
    finally:
        for engine in engines:
            engine.communicate()


def test_what_a_process_has_counts_when_it_allocates_more(state: Path, sleeper: "subprocess.Popen[bytes]") -> None:
    write_state(state, Gpu(index=0, total_mib=1000, reserved_mib=0))
    asked = (600, 900, 1001, 1000)
    assert [allocate(state, 0, sleeper.pid, mib) for mib in asked] == [True, True, False, True]
    assert memory(state, 0).used_mib == 1000


# --- what CUDA makes of it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "seen"),
    [
        (None, [2, 1, 0]),
        ("", []),
        ("-1", []),
        ("0", [2]),
        (" 1 , 0", [1, 2]),
        ("1,3,0", [1]),
        ("0x1", []),
        # UUIDs differ from worker to worker, and what a test is called must not.
        pytest.param(gpu_uuid(0), [0], id="uuid"),
        ("GPU-00000001", [1]),
        ("GPU-0000000", []),
        pytest.param(f"{gpu_uuid(0)},GPU-none,{gpu_uuid(1)}", [0], id="uuids"),
    ],
)
def test_cuda_shows_the_gpus_that_are_named_up_to_the_first_that_is_not_there(
    state: Path, names: str | None, seen: list[int]
) -> None:
    """The indexes of NVML go against the order of the buses here."""
    write_state(state, *(Gpu(index=index, bus=f"0000:{9 - index:02x}:00.0") for index in range(3)))
    variables = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} | ({} if names is None else {"CUDA_VISIBLE_DEVICES": names})

    assert visible(state, variables) == tuple(gpu_uuid(index) for index in seen)


def test_cuda_counts_the_fastest_first_unless_told_otherwise(state: Path) -> None:
    write_state(state, Gpu(index=0, capability="8.9"), Gpu(index=1), Gpu(index=2, capability="10.0"))

    assert visible(state, {"CUDA_VISIBLE_DEVICES": "0,1"}) == (gpu_uuid(2), gpu_uuid(1))


def test_cuda_shows_one_slice_and_nothing_else(state: Path) -> None:
    write_state(state, Gpu(index=0), Gpu(index=1, mig=True), Mig(gpu=1, index=0), Mig(gpu=1, index=1))

    asked = (f"{mig_uuid(1, 1)},{mig_uuid(1, 0)}", "1", f"0,{mig_uuid(1, 1)}", "MIG-none")
    seen = [visible(state, {"CUDA_VISIBLE_DEVICES": names}) for names in asked]
    assert seen == [(mig_uuid(1, 1),), (mig_uuid(1, 0),), (mig_uuid(1, 1),), ()]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_without_a_library_or_a_driver_nothing_starts(library: Path, state: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    without_library = Client(fakenvml.no_driver(empty))
    without_driver = Client(fakenvml.environment(library, state))
    try:
        assert without_library.ask("nvmlInit()") == "NVMLError_LibraryNotFound"
        assert without_driver.ask("nvmlInit()") == "NVMLError_DriverNotLoaded"
        write_state(state, Fault(call="nvmlInit", code="NVML_ERROR_LIB_RM_VERSION_MISMATCH"))
        assert without_driver.ask("nvmlInit()") == "NVMLError_LibRmVersionMismatch"
        write_state(state)
        assert without_driver.ask("[nvmlInit(), nvmlDeviceGetCount()]") == [None, 0]
    finally:
        without_library.close()
        without_driver.close()


def test_a_lost_gpu_fails_for_itself_only(client: Client, state: Path) -> None:
    write_state(state, Gpu(index=0), Gpu(index=1), Gpu(index=2))
    client.ask("nvmlInit()")
    client.ask("keep(handles=[gpu(0), gpu(1), gpu(2)])")

    # The second has fallen off the bus, the third is gone from the driver's list.
    write_state(state, Gpu(index=0), Gpu(index=1), Fault(gpu=1, code="NVML_ERROR_GPU_IS_LOST"))

    assert client.ask("nvmlDeviceGetCount()") == 2
    assert client.ask("nvmlDeviceGetMemoryInfo(handles[0]).total") == 81_559 * MIB
    for call in ("gpu(1)", "nvmlDeviceGetMemoryInfo(handles[1])", "nvmlDeviceGetUUID(handles[2])"):
        assert client.ask(call) == "NVMLError_GpuIsLost"
    assert client.ask("nvmlDeviceGetTopologyCommonAncestor(handles[0], handles[1])") == "NVMLError_GpuIsLost"


def test_a_fault_strikes_its_call_in_all_versions_or_in_one(client: Client, state: Path) -> None:
    every = Fault(call="nvmlDeviceGetComputeRunningProcesses", gpu=0, code="NVML_ERROR_NO_PERMISSION")
    one = Fault(call="nvmlDeviceGetMemoryInfo_v2", code="NVML_ERROR_FUNCTION_NOT_FOUND")
    write_state(state, Gpu(index=0), Gpu(index=1), every, one)
    client.ask("nvmlInit()")

    for version in ("_v2", "_v3"):
        assert client.ask(f"nvmlDeviceGetComputeRunningProcesses{version}(gpu(0))") == "NVMLError_NoPermission"
        assert client.ask(f"nvmlDeviceGetComputeRunningProcesses{version}(gpu(1))") == []
    assert client.ask("nvmlDeviceGetMemoryInfo(gpu(0)).total") == 81_559 * MIB
    assert client.ask("nvmlDeviceGetMemoryInfo(gpu(0), nvmlMemory_v2)") == "NVMLError_FunctionNotFound"


def test_a_fault_begins_after_so_many_calls_of_all_processes_and_ends(
    library: Path, client: Client, state: Path
) -> None:
    passing = Fault(call="nvmlDeviceGetPowerUsage", code="NVML_ERROR_UNKNOWN", after=2, times=2)
    write_state(state, Gpu(index=0), passing)
    other = Client(fakenvml.environment(library, state))
    try:
        answers = []
        for asked in (client, other):
            asked.ask("nvmlInit()")
            answers += [asked.ask("nvmlDeviceGetPowerUsage(gpu(0))") for _ in range(3)]
    finally:
        other.close()
    assert answers == [70_000, 70_000, "NVMLError_Unknown", "NVMLError_Unknown", 70_000, 70_000]


def test_a_delay_takes_its_time(client: Client, state: Path) -> None:
    write_state(state, Gpu(index=0), Delay(call="nvmlDeviceGetName", milliseconds=100))
    client.ask("nvmlInit()")
    timed = "(lambda start: [nvmlDeviceGetName(gpu(0)), time.monotonic() - start])(time.monotonic())"
    name, seconds = client.ask(timed)
    assert name == "NVIDIA H100 80GB HBM3"
    assert seconds >= 0.1


def test_a_hang_lasts_until_the_file_has_none(client: Client, state: Path) -> None:
    write_state(state, Gpu(index=0), Hang(call="nvmlInit"))
    client.say("nvmlInit()")
    assert client.process.stdout
    assert not select.select([client.process.stdout], [], [], 0.2)[0]
    write_state(state, Gpu(index=0))
    assert client.answer() is None


def test_an_xid_is_told_to_sets_that_were_registered_before(client: Client, state: Path) -> None:
    write_state(state, Gpu(index=0), Gpu(index=1), Xid(gpu=0, code=31))
    client.ask("nvmlInit()")
    client.ask("keep(events=nvmlEventSetCreate())")
    client.ask("nvmlDeviceRegisterEvents(gpu(0), nvmlEventTypeXidCriticalError, events)")
    assert client.ask("nvmlEventSetWait_v2(events, 0)") == "NVMLError_Timeout"

    write_state(state, Gpu(index=0), Gpu(index=1), Xid(gpu=0, code=31), Xid(gpu=1, code=43), Xid(gpu=0, code=79))

    assert client.ask("nvmlEventSetWait_v2(events, 1000).eventData") == 79
    assert client.ask("nvmlEventSetWait_v2(events, 0)") == "NVMLError_Timeout"
    assert client.ask("nvmlEventSetFree(events)") is None


def test_a_file_that_does_not_parse_ends_the_process_and_says_why(library: Path, state: Path) -> None:
    state.write_text("gpux index=0\n", encoding="ascii")
    done = subprocess.run(
        [sys.executable, "-c", "import pynvml; pynvml.nvmlInit()"],
        env=fakenvml.environment(library, state),
        capture_output=True,
        text=True,
    )
    assert done.stderr.startswith("fakenvml: no such word: gpux")
    assert done.returncode < 0


# --- the library ------------------------------------------------------------------------------------------------------


def test_starts_and_shutdowns_are_counted_and_can_be_repeated(client: Client, state: Path) -> None:
    write_state(state, Gpu(index=0))
    assert client.ask("nvmlDeviceGetCount()") == "NVMLError_Uninitialized"
    rounds = "[(nvmlInit(), nvmlDeviceGetName(gpu(0)), nvmlShutdown()) for _ in range(200)]"
    assert client.ask(rounds) == [[None, "NVIDIA H100 80GB HBM3", None]] * 200
    client.ask("[nvmlInit(), nvmlInit(), nvmlShutdown()]")
    assert client.ask("nvmlDeviceGetCount()") == 1
    client.ask("nvmlShutdown()")
    assert client.ask("nvmlDeviceGetCount()") == "NVMLError_Uninitialized"
    assert client.ask("nvmlShutdown()") == "NVMLError_Uninitialized"
    assert client.ask("str(NVMLError(NVML_ERROR_IN_USE))") == "In use by another client"


def test_threads_may_ask_at_once(client: Client, state: Path) -> None:
    write_state(state, *(Gpu(index=index) for index in range(4)))
    client.ask("nvmlInit()")
    client.ask("keep(pool=__import__('concurrent.futures').futures.ThreadPoolExecutor(4))")
    asked = "list(pool.map(lambda turn: nvmlDeviceGetIndex(gpu(turn % 4)), range(400)))"
    assert client.ask(asked) == [turn % 4 for turn in range(400)]


def test_two_workers_may_build_the_library_at_once(tmp_path: Path) -> None:
    built: list[Path] = []
    builders = [threading.Thread(target=lambda: built.append(fakenvml.library(tmp_path))) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert built == [tmp_path, tmp_path]
    assert [entry.name for entry in tmp_path.iterdir()] == ["libnvidia-ml.so.1"]


def test_every_function_of_the_library_is_one_that_pynvml_looks_up(client: Client) -> None:
    """A name that is spelled wrong would only make FUNCTION_NOT_FOUND."""
    source = (ROOT / "tests/fakenvml/fakenvml.c").read_text(encoding="utf-8")
    defined = set(re.findall(r"\bnvml(?:Init|Shutdown|System|Device|Event|Error)\w*(?=[(,])", source))
    looked_up = set(re.findall(r"\w+", client.ask("open(pynvml.__file__).read()")))
    assert len(defined) > 50
    assert defined - looked_up == {"nvmlInit_v2"}
