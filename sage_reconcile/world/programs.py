"""Programs that are on this machine, and what tells one version of them from another without running them."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sage_reconcile.core.facts import ProgramFact
from sage_reconcile.world.state import matches

_ELF = b"\x7fELF"

# llama.cpp's own server is used when it is installed; else the launcher, which takes the same flags.
_LAUNCHERS = {"llama-server": ("xllamacpp", "sage_reconcile.launchers.llama_cpp")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """The versions that were found so far: looked up again only when the program's file has changed.

    A look comes ten times a second, and a version may take many files to find.
    """

    _found: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def of(self, path: str, look_up: Callable[[os.stat_result], str]) -> str:
        """The version of the program at a path; empty when nothing tells."""
        try:
            status = os.stat(path)
        except OSError:
            return ""
        key = (path, status.st_mtime_ns, status.st_size)
        if key not in self._found:
            self._found[key] = look_up(status)
        return self._found[key]


def programs(names: Iterable[tuple[str, str]], versions: Versions) -> tuple[ProgramFact, ...]:
    """Where each program is. A name comes with the directory that a relative path is relative to."""
    return tuple(_program(name, directory, versions) for name, directory in sorted(set(names)))


def _program(name: str, directory: str, versions: Versions) -> ProgramFact:
    found = shutil.which(os.path.join(directory, os.path.expanduser(name)) if "/" in name else name)
    if found is not None:
        path = os.path.abspath(found)
        trouble = _why_not_executable(path)
        if trouble:
            return ProgramFact(name=name, argv=(), why=trouble)
        version = versions.of(path, lambda status: _installed_version(path) or _file_version(status))
        return ProgramFact(name=name, argv=(path,), version=version)
    if name in _LAUNCHERS:
        package, module = _LAUNCHERS[name]
        spec = importlib.util.find_spec(package)
        if spec is not None:
            origin = Path(spec.origin or "")
            version = versions.of(
                str(origin), lambda _status: _packages(origin.parent.parent, f"{package}-*.dist-info")
            )
            return ProgramFact(name=name, argv=(sys.executable, "-m", module), version=version)
    where = "is not an executable file" if "/" in name else "is not on PATH"
    return ProgramFact(name=name, argv=(), why=f"{name} {where}")


def _installed_version(path: str) -> str:
    """The version of the package that a script in `bin` of an environment is of; empty when there is none beside it.

    An installer writes the script anew whenever it changes the package.
    """
    script = Path(os.path.realpath(path))
    name = script.name.replace("-", "_").lower()
    # Of a name with characters that mean something in a pattern there is no package.
    if not name.replace("_", "a").replace(".", "a").isalnum():
        return ""
    return _packages(script.parent.parent, f"lib/python3*/site-packages/{name}-*.dist-info")


def _packages(root: Path, pattern: str) -> str:
    """The versions in the names of `NAME-VERSION.dist-info` (PyPA, recording installed packages)."""
    names = {path.name.removesuffix(".dist-info") for path in matches(root, pattern)}
    return " ".join(sorted(name.partition("-")[2] for name in names))


def _file_version(status: os.stat_result) -> str:
    """Not a version, but it differs when the file was replaced."""
    return f"{status.st_size} bytes of {status.st_mtime_ns}"


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
