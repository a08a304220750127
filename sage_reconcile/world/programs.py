"""Programs that are on this machine."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable

from sage_reconcile.core.facts import ProgramFact

_ELF = b"\x7fELF"

# llama.cpp's own server is used when it is installed; else the launcher, which takes the same flags.
_LAUNCHERS = {"llama-server": ("xllamacpp", "sage_reconcile.launchers.llama_cpp")}


def programs(names: Iterable[tuple[str, str]]) -> tuple[ProgramFact, ...]:
    """Where each program is. A name comes with the directory that a relative path is relative to."""
    return tuple(_program(name, directory) for name, directory in sorted(set(names)))


def _program(name: str, directory: str) -> ProgramFact:
    found = shutil.which(os.path.join(directory, os.path.expanduser(name)) if "/" in name else name)
    if found is not None:
        path = os.path.abspath(found)
        trouble = _why_not_executable(path)
        return ProgramFact(name=name, argv=() if trouble else (path,), why=trouble)
    if name in _LAUNCHERS:
        package, module = _LAUNCHERS[name]
        if importlib.util.find_spec(package) is not None:
            return ProgramFact(name=name, argv=(sys.executable, "-m", module))
    where = "is not an executable file" if "/" in name else "is not on PATH"
    return ProgramFact(name=name, argv=(), why=f"{name} {where}")


def _why_not_executable(path: str) -> str:
    """Why the kernel would not run a file; empty when it would, as far as can be told.

    The shell of the gate would take what the kernel refuses for a script, and each of its lines for a command.
    """
    head, own = _head(path), _head(sys.executable)
    if head[:2] == b"#!" or _runs_other_formats():
        return ""
    if head[:4] != _ELF:
        return f"{path} is not a program: it is no binary, and does not begin with #!"
    # elf(5): the class is byte 4, e_machine bytes 18 and 19.
    if own[:4] == _ELF and (head[4:5], head[18:20]) != (own[4:5], own[18:20]):
        return f"{path} is a program for another architecture"
    return ""


def _head(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(20)
    except OSError:
        return _ELF  # It may be executed and not be read: then the kernel is the one to say.


def _runs_other_formats() -> bool:
    """Whether the kernel has been told of further formats, as of other machines' binaries (binfmt_misc)."""
    try:
        return bool(set(os.listdir("/proc/sys/fs/binfmt_misc")) - {"register", "status"})
    except OSError:
        return False
