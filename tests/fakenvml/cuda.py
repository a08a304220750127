"""What CUDA makes of the fake GPUs: which of them a program sees, by its environment.

https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#cuda-environment-variables and, for slices,
https://docs.nvidia.com/datacenter/tesla/mig-user-guide/#cuda-visible-devices. Standard library only.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from . import Gpu, Mig, entries


def visible(state: Path, variables: Mapping[str, str]) -> tuple[str, ...]:
    """The UUIDs of the GPUs that a program with these environment variables sees, in its order.

    1. A GPU is named by its number, or by its UUID or the beginning of it; a slice by its UUID.
    2. The numbers are in PCI order if CUDA_DEVICE_ORDER says so, else the fastest comes first.
    3. Nothing is seen from the first name on that nothing has. No CUDA_VISIBLE_DEVICES: all are seen.
    4. A sliced GPU stands for its first slice, and a program sees one slice only, and then nothing else.
    """
    machine = entries(state)
    gpus = [entry for entry in machine if isinstance(entry, Gpu)]
    slices = [entry for entry in machine if isinstance(entry, Mig)]
    in_pci_order = variables.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    gpus.sort(key=_bus if in_pci_order else _slowness)
    names = variables.get("CUDA_VISIBLE_DEVICES")
    seen: list[Gpu | Mig] = []
    for name in names.split(",") if names is not None else map(str, range(len(gpus))):
        device = _called(name.strip(), gpus, slices)
        if device is None:
            break
        seen.append(device)
    first = next((device for device in seen if isinstance(device, Mig)), None)
    return (first.uuid,) if first else tuple(device.uuid for device in seen)


def _bus(gpu: Gpu) -> tuple[int, ...]:
    domain, bus, rest = gpu.bus.split(":")
    return int(domain, 16), int(bus, 16), int(rest.partition(".")[0], 16)


def _slowness(gpu: Gpu) -> tuple[object, ...]:
    """CUDA does not tell how it measures; between equal GPUs it goes by PCI."""
    return -float(gpu.capability), -(gpu.total_mib or 0), _bus(gpu)


def _called(name: str, gpus: Sequence[Gpu], slices: Sequence[Mig]) -> Gpu | Mig | None:
    if name.startswith("MIG-"):
        return next((part for part in slices if part.uuid == name), None)
    if name.startswith("GPU-"):
        found = [gpu for gpu in gpus if gpu.uuid.startswith(name)]
        gpu = found[0] if len(found) == 1 else None
    else:
        gpu = gpus[int(name)] if name.isdecimal() and int(name) < len(gpus) else None
    if gpu is None or not gpu.mig:
        return gpu
    mine = (str(gpu.index), gpu.uuid, gpu.bus)
    return min((part for part in slices if str(part.gpu) in mine), key=lambda part: part.index, default=None)
