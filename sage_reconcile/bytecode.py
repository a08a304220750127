"""Whether Python may write compiled modules. It is read before all else, and never written compiled itself.

Python before 3.12.8 and 3.13.1 takes a compiled module that was cut short by a full disk for a whole one: every later
command would end with `EOFError: marshal data too short` (https://github.com/python/cpython/issues/126606).
"""

import os
import resource
import sys

_ROOM_FOR_MODULES = 64 << 20


def modules_fit() -> bool:
    """Whether there is room for them, and no limit that a file could come up to."""
    longest, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        disk = os.statvfs(sys.pycache_prefix or os.path.dirname(__file__))
    except OSError:
        return False
    return longest == resource.RLIM_INFINITY and disk.f_bavail * disk.f_frsize >= _ROOM_FOR_MODULES
