"""GPUs without a driver: a libnvidia-ml.so.1 of our own, for the unmodified pynvml of any process.

In: what the machine has, what holds its memory, what is to go wrong. Out: the library, the file that it reads at every
call, and the environment that makes a process see them. state.h tells the file's format. Knows nothing of sage.
Standard library only: fake_engine.py imports it.
"""

import fcntl
import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

_SOURCE = Path(__file__).with_name("fakenvml.c")
_NAME = "libnvidia-ml.so.1"  # what pynvml loads
_BUILT = Path(__file__).resolve().parents[2] / "build" / "fakenvml"

# Whose the GPUs are that are given no UUID. An engine counts on the GPU that its label names, whoever started it: were
# they called alike in two runs of tests, each would find the other's engines on its own. (2026-11-25: it did.)
_MAKER = os.getpid()


def library(directory: Path | None = None) -> Path:
    """The directory that holds libnvidia-ml.so.1: this one; the library is built into it if it is not there.

    None: one for these sources, which all who ask have in common.
    """
    if directory is None:
        import hashlib  # Here, as all that engines, which start by the hundred, do not need at once.

        sources = (_SOURCE.read_bytes(), _SOURCE.with_name("state.h").read_bytes())
        directory = _BUILT / hashlib.sha256(b"".join(sources)).hexdigest()[:16]
        directory.mkdir(parents=True, exist_ok=True)
    if not (directory / _NAME).exists():
        import subprocess
        import tempfile

        # Under another name first: two workers may build at once, and nobody may load a half of it.
        with tempfile.TemporaryDirectory(dir=directory) as temporary:
            made = Path(temporary) / _NAME
            flags = ("-std=gnu11", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
            # It has no soname: a process that has loaded it by its path, to read memory, would find it by name, too.
            subprocess.run(["gcc", *flags, _SOURCE, "-o", made], check=True)
            made.replace(directory / _NAME)
    return directory


def environment(library: Path, state: Path) -> dict[str, str]:
    """The environment in which a process that loads NVML loads `library`, which tells what `state` says."""
    return {"LD_LIBRARY_PATH": _searched_first(library), "FAKE_NVML_STATE": str(state.resolve())}


def no_driver(directory: Path) -> dict[str, str]:
    """The environment in which NVML cannot be loaded, not even where there is one: what is found is no library."""
    (directory / _NAME).write_bytes(b"")
    return {"LD_LIBRARY_PATH": _searched_first(directory)}


def _searched_first(directory: Path) -> str:
    assert ":" not in str(directory), "LD_LIBRARY_PATH has no way to write such a directory"
    before = os.environ.get("LD_LIBRARY_PATH")
    return f"{directory.resolve()}:{before}" if before else str(directory.resolve())


# --- what the file says -----------------------------------------------------------------------------------------------
# A field is a key of state.h. None leaves the key out: the machine does not tell, which NVML calls NOT_SUPPORTED.
# `gpu` is an index, a UUID, a PCI bus id, or the UUID of a slice.


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """By default an H100 of SXM5 that does nothing."""

    WORD: ClassVar[str] = "gpu"

    index: int
    uuid: str = ""  # empty: one made of the index
    name: str = "NVIDIA H100 80GB HBM3"
    bus: str = ""  # domain:bus:device.function; empty: one made of the index
    minor: int | None = None  # of /dev/nvidiaN; None: the index
    total_mib: int | None = 81559  # None: no memory of its own, as an integrated GPU
    reserved_mib: int = 600  # in the used of version 1, and not in that of version 2; the number is a guess
    numa: int | None = 0  # the NUMA node of the host's memory near it
    cpus: str | None = None  # "0-15,32-47"
    numa_node_id: int | None = (
        None  # the NUMA node that is the GPU's own memory; only Grace Hopper and its like have one
    )
    utilisation: int | None = 0
    memory_utilisation: int | None = 0
    temperature_celsius: int | None = 35
    power_milliwatts: int | None = 70_000
    capability: str = "9.0"
    compute_mode: int = 0  # NVML_COMPUTEMODE_*
    persistence: int = 1
    mig: bool | None = False  # None: cannot be sliced
    ecc_corrected: int | None = 0
    ecc_uncorrected: int | None = 0  # None: no ECC
    remapped_correctable: int = 0
    remapped_uncorrectable: int | None = 0  # None: no row remapper, as before Ampere
    remap_pending: bool = False
    remap_failed: bool = False
    retired_pages: int | None = None  # what GPUs had before the row remapper
    nvswitch_links: int | None = None  # active NVLinks to an NVSwitch
    recovery_action: int | None = 0  # NVML_GPU_RECOVERY_ACTION_*; None: not told, as by drivers before 570

    def __post_init__(self) -> None:
        object.__setattr__(self, "uuid", self.uuid or gpu_uuid(self.index))
        object.__setattr__(self, "bus", self.bus or f"0000:{0x10 + self.index:02x}:00.0")
        object.__setattr__(self, "minor", self.index if self.minor is None else self.minor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mig:
    """A slice of a GPU that has mig=True. Processes hold its memory when they name its UUID as their gpu."""

    WORD: ClassVar[str] = "mig"

    gpu: int | str
    index: int
    uuid: str = ""  # empty: one made of the GPU and the index
    profile: str = "1g.10gb"
    total_mib: int = 9984
    reserved_mib: int = 0
    gi: int | None = None  # GPU instance; None: 7 + index, as the driver numbers the smallest slices
    ci: int = 0  # compute instance
    multiprocessors: int = 16
    slices: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "uuid", self.uuid or mig_uuid(self.gpu, self.index))
        object.__setattr__(self, "gi", 7 + self.index if self.gi is None else self.gi)


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What a process holds; the memory goes with its life, at once or `linger_seconds` after it was first seen dead."""

    WORD: ClassVar[str] = "process"

    gpu: int | str
    pid: int
    mib: int
    kind: str = "compute"  # or graphics, or mps
    start: int | None = None  # start time in ticks, field 22 of proc(5) stat; None: any process of that pid
    linger_seconds: int = 0
    ghost: bool = False  # in the list, too, while its memory lingers
    elsewhere: bool = False  # a pid of another namespace, taken as alive


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """Memory that no listed process holds."""

    WORD: ClassVar[str] = "used"

    gpu: int | str
    mib: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What is between two GPUs: NVLinks, or the PCI ancestor that they share (one line for each of the two)."""

    WORD: ClassVar[str] = "link"

    a: int | str
    b: int | str
    kind: str  # nvlink; or internal, pix, pxb, phb, node, sys
    count: int | None = None  # of NVLinks; None: 1
    up: int | None = None  # how many of them work; None: all
    p2p: str | None = None  # ok, cns, gns, tns, disabled, ns or unknown; None: what the kind allows


@dataclass(frozen=True, slots=True, kw_only=True)
class Xid:
    """An error of the GPU, told to every event set that was registered for it before."""

    WORD: ClassVar[str] = "xid"

    gpu: int | str
    code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A call fails. call: "nvmlDeviceGetMemoryInfo" is all its versions, "*" every call. gpu None: on every GPU."""

    WORD: ClassVar[str] = "error"

    code: str  # "NVML_ERROR_GPU_IS_LOST"
    call: str = "*"
    gpu: int | str | None = None
    after: int = 0  # calls, of all processes since the file was written, before it begins
    times: int | None = None  # how often it strikes; None: for ever


@dataclass(frozen=True, slots=True, kw_only=True)
class Delay:
    """A call takes longer."""

    WORD: ClassVar[str] = "delay"

    milliseconds: int
    call: str = "*"
    gpu: int | str | None = None
    after: int = 0
    times: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hang:
    """A call does not return until a file without this is written."""

    WORD: ClassVar[str] = "hang"

    call: str = "*"
    gpu: int | str | None = None
    after: int = 0
    times: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemoryUnavailable:
    """Processes are listed and their memory is not told, as in some containers."""

    WORD: ClassVar[str] = "procs_unavailable"

    gpu: int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenPids:
    """No process is listed, as in a pid namespace; gpu None: on every GPU."""

    WORD: ClassVar[str] = "hide_pids"

    gpu: int | str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The memory of a GPU or slice; what is used is without what is reserved."""

    total_mib: int
    reserved_mib: int
    used_mib: int

    @property
    def free_mib(self) -> int:
        return max(self.total_mib - self.reserved_mib - self.used_mib, 0)


Entry = Gpu | Mig | Process | Used | Link | Xid | Fault | Delay | Hang | ProcessMemoryUnavailable | HiddenPids


def gpu_uuid(index: int) -> str:
    """The UUID of a Gpu that was given none: this process's own."""
    return f"GPU-{index:08x}-0000-4000-8000-{_MAKER:06x}{index:06x}"


def mig_uuid(gpu: int | str, index: int) -> str:
    """The UUID of a Mig that was given none. Those of a GPU that is named by its own UUID are like those of GPU 0."""
    return f"MIG-{gpu if isinstance(gpu, int) else 0:08x}-0000-5000-8000-{_MAKER:06x}{index:06x}"


def write_state(
    path: Path, *entries: Entry, driver: str = "580.159.04", cuda: int = 13000, ahead_seconds: int = 0
) -> None:
    """Replace the file: a call of NVML sees the old one or the new, nothing between. Claims stay; counts begin anew.

    `ahead_seconds`: how far the time that `linger_seconds` is measured in has moved on.
    """
    counters = f"{time.monotonic_ns()}"  # a name of their own, so that nothing has to be set back
    lines = [f"driver version={driver} cuda={cuda}", f"clock ahead_seconds={ahead_seconds}"]
    for number, entry in enumerate(entries):
        counter = f" counter={counters}-{number}" if isinstance(entry, Fault | Delay | Hang) else ""
        lines.append(_line(entry) + counter)
    _replace(path, lines)


def entries(state: Path) -> tuple[Entry, ...]:
    """What the file says, and then the claims; a GPU is called as it is there."""
    lines = [*state.read_text(encoding="utf-8").splitlines(), *_claims(state)]
    return tuple(entry for line in lines if (entry := _entry(line)) is not None)


def device(state: Path, gpu: int | str) -> Gpu | Mig:
    """The GPU or slice that has this index, UUID, or PCI bus id. Raises LookupError when there is none."""
    for entry in entries(state):
        if isinstance(entry, Gpu) and str(gpu) in (str(entry.index), entry.uuid, entry.bus):
            return entry
        if isinstance(entry, Mig) and gpu == entry.uuid:
            return entry
    raise LookupError(f"there is no GPU {gpu}")


def memory(state: Path, gpu: int | str) -> Memory:
    """What is true now, whatever NVML is told to say of it. Raises LookupError when there is no such GPU."""
    import ctypes

    sizes = (ctypes.c_ulonglong * 3)()
    if not _read_memory()(os.fsencode(state), str(gpu).encode(), sizes):
        raise LookupError(f"there is no GPU {gpu}")
    total, reserved, used = sizes
    return Memory(total_mib=total, reserved_mib=reserved, used_mib=used)


@functools.cache
def _read_memory() -> Callable[..., bool]:
    import ctypes

    function = ctypes.CDLL(str(library() / _NAME)).fakenvml_memory
    function.restype = ctypes.c_bool
    return function


def claim(
    state: Path,
    gpu: int | str,
    pid: int,
    mib: int,
    *,
    kind: str = "compute",
    linger_seconds: int = 0,
    ghost: bool = False,
) -> None:
    """From now on the process, and no later one of its pid, holds so much of the GPU, whatever it held before.

    Claims are kept beside the file, so `write_state` leaves them. A GPU is to be named alike in all of them. Nobody
    asks whether the memory is there.
    """
    process = Process(
        gpu=gpu, pid=pid, mib=mib, kind=kind, start=_start(pid), linger_seconds=linger_seconds, ghost=ghost
    )
    _change_claims(state, lambda lines: [*_without(lines, gpu, pid), _line(process)])


def allocate(state: Path, gpu: int | str, pid: int, mib: int, *, linger_seconds: int = 0) -> bool:
    """Claim so much for the process, all in all, if the GPU has it; whether it had. Two who ask at once take turns."""
    process = Process(gpu=gpu, pid=pid, mib=mib, start=_start(pid), linger_seconds=linger_seconds)

    def changed(lines: list[str]) -> list[str]:
        others = _without(lines, gpu, pid)
        own = [entry for line in lines if line not in others and isinstance(entry := _entry(line), Process)]
        if mib > memory(state, gpu).free_mib + sum(entry.mib for entry in own):
            return lines
        return [*others, _line(process)]

    return _line(process) in _change_claims(state, changed)


def release(state: Path, gpu: int | str, pid: int) -> None:
    """The process holds nothing of the GPU any more; nothing happens if it held nothing."""
    _change_claims(state, lambda lines: _without(lines, gpu, pid))


def _change_claims(state: Path, changed: Callable[[list[str]], list[str]]) -> list[str]:
    """The claims as they are now."""
    with _locked(state.with_name(f"{state.name}.lock")):
        lines = changed(_claims(state))
        _replace(_claims_file(state), lines)
    return lines


def _claims(state: Path) -> list[str]:
    file = _claims_file(state)
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def _claims_file(state: Path) -> Path:
    return state.with_name(f"{state.name}.claims")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _without(lines: list[str], gpu: int | str, pid: int) -> list[str]:
    return [line for line in lines if not line.startswith(f"process gpu={gpu} pid={pid} ")]


def _start(pid: int) -> int | None:
    """Field 22 of proc(5) stat; None for a pid that is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[19])


def _line(entry: Entry) -> str:
    pairs = [(field.name, getattr(entry, field.name)) for field in fields(entry)]
    return " ".join([entry.WORD, *(f"{key}={_value(value)}" for key, value in pairs if value is not None)])


def _value(value: int | str) -> str:
    text = str(int(value)) if isinstance(value, bool) else str(value)
    assert '"' not in text and "\n" not in text, text
    return f'"{text}"' if " " in text or not text else text


def _entry(line: str) -> Entry | None:
    """The opposite of _line; None for what is no entry: the driver, the clock."""
    word = line.partition(" ")[0]
    said = {key: value.strip('"') for key, value in re.findall(r'(\w+)=("[^"]*"|\S*)', line)}
    for kind in Entry.__args__:
        if word == kind.WORD:
            return kind(**{field.name: _read(field.type, said.get(field.name)) for field in fields(kind)})
    return None


def _read(type_of_value: object, text: str | None) -> object:
    if text is None or type_of_value in (str, str | None, int | str, int | str | None):
        return text
    return text == "1" if type_of_value in (bool, bool | None) else int(text)


def _replace(path: Path, lines: list[str]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(temporary, path)
