"""sage: a declarative reconciler for inference engines. The rooms of the house are told in docs/design.md."""

import os
import resource
import sys

__version__ = "0.1.0"

_ROOM_FOR_MODULES = 64 << 20


def _keep_modules_whole() -> None:
    """Do not let Python write compiled modules where they may not fit.

    Python before 3.13.1 takes a compiled module that was cut short by a full disk for a whole one: every later
    command would end with `EOFError: marshal data too short` (https://github.com/python/cpython/issues/126606).
    """
    longest, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        disk = os.statvfs(sys.pycache_prefix or os.path.dirname(__file__))
        room = disk.f_bavail * disk.f_frsize
    except OSError:
        room = 0
    if room < _ROOM_FOR_MODULES or longest != resource.RLIM_INFINITY:
        sys.dont_write_bytecode = True


_keep_modules_whole()
