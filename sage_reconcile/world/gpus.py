"""GPUs and MIG slices, as NVML tells of them (https://docs.nvidia.com/deploy/nvml-api/). pynvml's only door.

Asked in a thread with a deadline: a driver that hangs is a gap, and so is one that fails; one lost GPU spoils only
itself. Facts only; whose memory it is, and what of it may be used, is judged elsewhere.
"""

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

from sage_reconcile.core.facts import DeviceFact, DeviceProcess, Gap
from sage_reconcile.errors import Usage
from sage_reconcile.world.pending import Pending

_LIBRARY = "libnvidia-ml.so.1"

# A healthy driver answers all questions well within this, also while it initialises GPUs that nobody has used.
_DEADLINE_SECONDS = 5.0

_MIB = 1024 * 1024
_MOCK_MEMORY_GB = 24.0

# NVML_GPU_RECOVERY_ACTION_*, but for none, by number: a pynvml that is older than the driver does not name them all.
_RECOVERY_ACTIONS = {
    1: "gpu_reset",
    2: "node_reboot",
    3: "drain_p2p",
    4: "drain_and_reset",
    5: "recover_imex_domain",
    6: "bus_reset",
    7: "system_reboot",
}

_Seen = tuple[tuple[DeviceFact, ...], tuple[Gap, ...]]


class Gpus:
    """The GPUs of this machine. One question at a time: a driver that hangs is not asked again until it answers."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._environment = environment
        self._pending: Pending[_Seen] | None = None

    def look(self, deadline_seconds: float = _DEADLINE_SECONDS) -> _Seen:
        """The devices, and what of them could not be seen. No library: no devices, and nothing that is missing."""
        if self._environment.get("SAGE_DISABLE_NVML", "").lower() in ("1", "true", "yes"):
            return mock_devices(self._environment), ()
        if self._pending is None:
            if not _library_is_there():
                return mock_devices(self._environment), ()
            self._pending = Pending(_asked)
        # A driver that has hung for so long is not waited for again at every look.
        waited_seconds = time.monotonic() - self._pending.begun_at
        answer = self._pending.answer(wait_seconds=deadline_seconds - waited_seconds)
        if answer is None:
            return (), (Gap(what="devices", why=f"the NVIDIA driver did not answer in {deadline_seconds:g} s"),)
        self._pending = None
        return answer


def mock_devices(environment: Mapping[str, str]) -> tuple[DeviceFact, ...]:
    """Made-up devices for trying things out: SAGE_GPU_MOCK_COUNT of SAGE_GPU_MOCK_MEMORY_GB (GiB, 24) each, all alike.

    Raises Usage where these are no numbers of that kind.
    """
    count = _number(environment, "SAGE_GPU_MOCK_COUNT", int, 0, 64) or 0
    size = _number(environment, "SAGE_GPU_MOCK_MEMORY_GB", float, 1, 16_000) or _MOCK_MEMORY_GB
    return tuple(
        DeviceFact(
            index=index,
            uuid=f"MOCK-{index}",
            name="Mock GPU",
            total_bytes=int(size * 1024) * _MIB,
            reserved_bytes=0,
            used_bytes=0,
        )
        for index in range(int(count))
    )


def _number(
    environment: Mapping[str, str], name: str, kind: type[int] | type[float], least: int, most: int
) -> int | float | None:
    """The number that a variable has; None where it is not set, or empty."""
    text = environment.get(name, "")
    try:
        value = kind(text) if text else None
    except ValueError:
        value = -1
    if value is not None and not least <= value <= most:
        numbers = "whole number" if kind is int else "number"
        raise Usage(f"{name} is {text[:40]!r}, which is not a {numbers} from {least} to {most}")
    return value


def _library_is_there() -> bool:
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError:
        return False
    return True


# Whether the library is initialised in this process. It stays so between looks: where nothing else uses a GPU, the
# driver is loaded at each initialisation and unloaded after it, which takes seconds.
_open = threading.Event()


def _asked() -> _Seen:
    """Everything. After a failure the library is shut down, and the next look begins anew."""
    # Imported here: it takes 0.02 s, and a machine without the library never needs it.
    import pynvml

    try:
        if not _open.is_set():
            pynvml.nvmlInit()
            _open.set()
    except pynvml.NVMLError as error:
        return (), (Gap(what="devices", why=f"the NVIDIA driver cannot be used: {error}"),)
    try:
        return _devices(pynvml)
    except pynvml.NVMLError as error:
        _open.clear()
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
        return (), (Gap(what="devices", why=f"the NVIDIA driver failed: {error}"),)


def _devices(nvml: Any) -> _Seen:
    devices: list[DeviceFact] = []
    gaps: list[Gap] = []
    handles: dict[str, Any] = {}
    for index in range(nvml.nvmlDeviceGetCount()):
        uuid = ""
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid = nvml.nvmlDeviceGetUUID(handle)
            found = _device(nvml, handle, index, uuid)
            slices = _slices(nvml, handle, found)
        except (nvml.NVMLError, ValueError) as error:
            is_lost = isinstance(error, nvml.NVMLError_GpuIsLost)
            what, told = ("lost device", "is lost") if is_lost else ("device", "cannot be seen")
            gaps.append(Gap(what=what, why=f"gpu{index} {told}: {error}", subject=uuid or str(index)))
            continue
        handles[uuid] = handle
        devices += slices or [found]
    links = _links(nvml, handles)
    # Of two GPUs there is one pair, and nothing to choose.
    switched = _switched(nvml, handles) if len(handles) > 2 and not any(links.values()) else {}
    return tuple(_with_neighbours(device, links, switched) for device in devices), tuple(gaps)


def _device(nvml: Any, handle: Any, index: int, uuid: str, parent: str = "") -> DeviceFact:
    """One GPU or slice. Raises NVMLError when its memory cannot be told, ValueError when it makes no sense."""
    total, reserved, used = _memory(nvml, handle)
    processes, complete = _processes(nvml, handle)
    return DeviceFact(
        index=index,
        uuid=uuid,
        name=str(nvml.nvmlDeviceGetName(handle)),
        total_bytes=total,
        reserved_bytes=reserved,
        used_bytes=used,
        processes=processes,
        processes_known=complete,
        utilization_percent=_offered(nvml, lambda: int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
        temperature_celsius=_offered(
            nvml, lambda: int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
        ),
        power_watts=_offered(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
        troubles=_troubles(nvml, handle),
        recovery_action=_recovery_action(nvml, handle),
        numa_node=_offered(nvml, lambda: _numa_node(nvml, handle)),
        bus_id=_bus_of(nvml, handle),
        parent=parent,
    )


def _memory(nvml: Any, handle: Any) -> tuple[int, int, int]:
    """(total, reserved, used) in bytes; used is without what is reserved. Total is not used + free."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        total, reserved, used = int(memory.total), int(memory.reserved), int(memory.used)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        # Older drivers count what is reserved as used.
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        total, reserved, used = int(memory.total), 0, int(memory.used)
    # 16 TiB is far beyond any device: such an answer is a broken one.
    if not 0 < total < 1 << 44 or not 0 <= reserved <= total or not 0 <= used <= total:
        raise ValueError(f"it says that {used} of {total} bytes are used and {reserved} reserved")
    return total, reserved, used


def _processes(nvml: Any, handle: Any) -> tuple[tuple[DeviceProcess, ...], bool]:
    """Who uses how much, and whether that is all: in a container the driver does not tell, or tells foreign pids."""
    used: dict[int, int] = {}
    complete = True
    for ask in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        try:
            found = ask(handle)
        except nvml.NVMLError_NotSupported:
            continue
        except nvml.NVMLError:
            complete = False
            continue
        for process in found:
            # pynvml gives None for NVML_VALUE_NOT_AVAILABLE.
            complete = complete and process.usedGpuMemory is not None
            # A process that computes and draws is told twice, with the same figure.
            used[process.pid] = max(used.get(process.pid, 0), process.usedGpuMemory or 0)
    return tuple(DeviceProcess(pid=pid, used_bytes=size) for pid, size in sorted(used.items())), complete


def _offered(nvml: Any, ask: Callable[[], Any]) -> Any:
    """An answer that not every device has; None without one."""
    try:
        return ask()
    except (nvml.NVMLError, AttributeError):
        return None


def _troubles(nvml: Any, handle: Any) -> tuple[str, ...]:
    """Sentences about a device that is not well."""
    troubles = []
    errors = _offered(
        nvml,
        lambda: nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        ),
    )
    if errors:
        troubles.append(f"{errors} uncorrected memory errors since the driver was loaded")
    rows = _offered(nvml, lambda: nvml.nvmlDeviceGetRemappedRows(handle))
    if rows is not None:
        _, _, is_pending, failed = rows
        troubles += ["a row of its memory waits to be remapped: it needs a reset"] if is_pending else []
        troubles += ["a row of its memory could not be remapped"] if failed else []
    return tuple(troubles)


def _recovery_action(nvml: Any, handle: Any) -> str:
    """What the driver asks for, by its name, or its number where it has none here; drivers before 570 do not tell.

    It is all that NVML tells of an Xid error to those who were not there when it came.
    """

    def ask() -> int:
        (field,) = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
        return int(field.value.uiVal) if field.nvmlReturn == nvml.NVML_SUCCESS else 0

    action = _offered(nvml, ask) or 0
    return _RECOVERY_ACTIONS.get(action, str(action)) if action else ""


def _numa_node(nvml: Any, handle: Any) -> int | None:
    """The NUMA node that is nearest to the GPU: the lowest bit of its memory affinity; None without one."""
    (mask,) = nvml.nvmlDeviceGetMemoryAffinity(handle, 1, nvml.NVML_AFFINITY_SCOPE_NODE)
    return (int(mask) & -int(mask)).bit_length() - 1 if mask else None


def _bus_id(nvml: Any, handle: Any) -> str:
    bus = nvml.nvmlDeviceGetPciInfo(handle).busId
    return bus.decode() if isinstance(bus, bytes) else str(bus)


def _slices(nvml: Any, handle: Any, device: DeviceFact) -> list[DeviceFact]:
    """The MIG slices of a GPU; none when it is not divided. Then the GPU itself is what is used."""
    mode = _offered(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle)[0])
    if mode != nvml.NVML_DEVICE_MIG_ENABLE:
        return []
    slices = []
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except nvml.NVMLError_NotFound:
            continue
        uuid = nvml.nvmlDeviceGetUUID(part)
        found = _device(nvml, part, device.index, uuid, parent=device.uuid)
        slices.append(replace(found, recovery_action=device.recovery_action))
    return slices


def _links(nvml: Any, handles: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """For each GPU the others that it reaches through NVLink, directly or through an NVSwitch."""
    buses = {_bus_of(nvml, handle): uuid for uuid, handle in handles.items()}
    ends = {
        uuid: {_remote(nvml, handle, link) for link in range(nvml.NVML_NVLINK_MAX_LINKS)} - {_NOTHING}
        for uuid, handle in handles.items()
    }
    linked: dict[str, tuple[str, ...]] = {}
    for uuid, mine in ends.items():
        others = {buses[bus] for bus, _ in mine if bus in buses}
        # A GPU that is not seen, as one that is lost, passes nothing on.
        switches = {end for end in mine if end[1] and end[0] not in buses}
        others |= {other for other, theirs in ends.items() if switches & theirs}
        linked[uuid] = tuple(sorted(others - {uuid}))
    return linked


def _bus_of(nvml: Any, handle: Any) -> str:
    return _offered(nvml, lambda: _bus_id(nvml, handle)) or ""


# The other end of an NVLink that is not there, or not up.
_NOTHING = ("", False)


def _remote(nvml: Any, handle: Any, link: int) -> tuple[str, bool]:
    """The PCI bus id at the other end of an NVLink, and whether a switch is there, as far as the driver tells."""
    try:
        if nvml.nvmlDeviceGetNvLinkState(handle, link) != nvml.NVML_FEATURE_ENABLED:
            return _NOTHING
        bus = nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId
    except nvml.NVMLError:
        return _NOTHING
    kind = _offered(nvml, lambda: int(nvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, link)))
    return bus.decode() if isinstance(bus, bytes) else str(bus), kind in (None, nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH)


def _switched(nvml: Any, handles: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """For each GPU the others that it reaches across no host bridge: PIX and PXB, as nvidia-smi topo -m calls that.

    A question for each pair, 28 for eight GPUs; nothing where one of them has no answer.
    """
    near: dict[str, list[str]] = {uuid: [] for uuid in handles}
    for one, other in combinations(sorted(handles), 2):
        try:
            level = nvml.nvmlDeviceGetTopologyCommonAncestor(handles[one], handles[other])
        except nvml.NVMLError:
            return {}
        if level <= nvml.NVML_TOPOLOGY_MULTIPLE:
            near[one].append(other)
            near[other].append(one)
    return {uuid: tuple(sorted(others)) for uuid, others in near.items()}


_Neighbours = Mapping[str, tuple[str, ...]]


def _with_neighbours(device: DeviceFact, links: _Neighbours, switched: _Neighbours) -> DeviceFact:
    gpu = device.parent or device.uuid
    return replace(device, links=links.get(gpu, ()), switched=switched.get(gpu, ()))
