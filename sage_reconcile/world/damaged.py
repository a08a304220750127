"""What cannot be read is set aside, never thrown away and never in the way: `<state>/<project>/damaged/`."""

import contextlib
from pathlib import Path

from sage_reconcile.errors import Environment
from sage_reconcile.world.failpoints import failpoint
from sage_reconcile.world.state import keep_as, matches, private_directory

# So many are kept; a disk that damages files again and again must not be filled with them.
_MOST_KEPT = 8


def set_aside(path: Path, project: Path, *, keep: bool = False) -> Path:
    """Move a damaged file away and return where it is now. Raises Environment.

    `keep` leaves it where it is too, until another is put in its place.
    """
    directory = private_directory(project / "damaged")
    target = _free_name(directory, path.name)
    failpoint("damaged.begin")
    try:
        if keep:
            keep_as(path, target)
        else:
            path.rename(target)
    except OSError as error:
        raise Environment(f"cannot set {path} aside as {target}: {error.strerror}") from error
    failpoint("damaged.done")
    for old in sorted(matches(directory, "*"), key=_number)[:-_MOST_KEPT]:
        with contextlib.suppress(OSError):
            old.unlink()
    return target


def _free_name(directory: Path, name: str) -> Path:
    """`NUMBER-NAME`, with a number higher than any before."""
    highest = max((_number(path) for path in matches(directory, "*")), default=0)
    return directory / f"{highest + 1}-{name}"


def _number(path: Path) -> int:
    number = path.name.partition("-")[0]
    return int(number) if number.isascii() and number.isdigit() else 0
