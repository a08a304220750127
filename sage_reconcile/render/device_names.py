"""What devices are called in texts."""

# Enough of a UUID to tell the slices of one GPU from each other.
_TAIL = 4


def device_name(index: int, uuid: str) -> str:
    """gpu0; slices have the index of their GPU, so theirs has the end of its UUID, too."""
    return f"gpu{index} MIG-..{uuid[-_TAIL:]}" if uuid.startswith("MIG-") else f"gpu{index}"
