"""The file of a snapshot, from a disk or a pipe. Must not know: what stands in it."""

import os
import stat

# A look at a machine with a thousand engines takes some 3 MB; models by the thousand would be as much again.
_LARGEST_BYTES = 64 * 1024 * 1024


def snapshot_bytes(file: str) -> bytes:
    """All of it. Raises ValueError with a sentence when there is none, or more than any machine has to tell."""
    try:
        if stat.S_ISDIR(os.stat(file).st_mode):
            raise ValueError("it is a directory")
        with open(file, "rb") as opened:
            content = opened.read(_LARGEST_BYTES + 1)
    except OSError as error:
        raise ValueError(
            "there is no such file" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
        ) from error
    if len(content) > _LARGEST_BYTES:
        raise ValueError(f"it is larger than {_LARGEST_BYTES // 1024**2} MiB, which no snapshot is")
    return content
