"""What devices and sizes are called in texts."""

_GIB = 1024**3
# Enough of a UUID to tell the slices of one GPU from each other.
_TAIL = 4


def device_name(index: int, uuid: str) -> str:
    """gpu0; slices have the index of their GPU, so theirs has the end of its UUID, too."""
    return f"gpu{index} MIG-..{uuid[-_TAIL:]}" if uuid.startswith("MIG-") else f"gpu{index}"


def gib(size: int) -> str:
    """Bytes as GiB, without the unit."""
    return f"{size / _GIB:.1f}"
