"""Programs and model files that are on this machine."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from sage_reconcile.core.facts import ModelFact, ProgramFact

# llama.cpp's own server is used when it is installed; else the launcher, which takes the same flags.
_LAUNCHERS = {"llama-server": ("xllamacpp", "sage_reconcile.launchers.llama_cpp")}


def programs(names: Iterable[tuple[str, str]]) -> tuple[ProgramFact, ...]:
    """Where each program is. A name comes with the directory that a relative path is relative to."""
    return tuple(_program(name, directory) for name, directory in sorted(set(names)))


def _program(name: str, directory: str) -> ProgramFact:
    found = shutil.which(os.path.join(directory, os.path.expanduser(name)) if "/" in name else name)
    if found is not None:
        return ProgramFact(name=name, argv=(os.path.abspath(found),))
    if name in _LAUNCHERS:
        package, module = _LAUNCHERS[name]
        if importlib.util.find_spec(package) is not None:
            return ProgramFact(name=name, argv=(sys.executable, "-m", module))
    where = "is not an executable file" if "/" in name else "is not on PATH"
    return ProgramFact(name=name, argv=(), why=f"{name} {where}")


def models(paths: Iterable[str]) -> tuple[ModelFact, ...]:
    """Whether each model path can be read."""
    return tuple(ModelFact(model=path, why=_why_unusable(Path(path))) for path in sorted(set(paths)))


def _why_unusable(path: Path) -> str:
    try:
        path.stat()
    except OSError as error:
        return f"there is no {path}" if isinstance(error, FileNotFoundError) else f"{path}: {error.strerror}"
    if not os.access(path, os.R_OK):
        return f"{path} cannot be read"
    if path.is_file() and path.stat().st_size == 0:
        return f"{path} is empty"
    return ""
