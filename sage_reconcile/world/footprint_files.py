"""Measured footprints: `<state>/<project>/footprints.json`, the last used at the end. Hints, as all records are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sage_reconcile.core.facts import FootprintFact
from sage_reconcile.core.seal import sealed, unsealed
from sage_reconcile.core.spec import canonical_json
from sage_reconcile.world.damaged import set_aside
from sage_reconcile.world.records import newer_state
from sage_reconcile.world.state import trusted_matches, write_whole

FORMAT = 1

_NAME = "footprints.json"

# As many as are kept take a tenth of it.
_LONGEST_BYTES = 1024 * 1024

_FOOTPRINTS = TypeAdapter(tuple[FootprintFact, ...])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contents:
    """What came of reading a file. `state` is "read", "damaged", "newer", "not there" or "unreadable"."""

    state: str
    footprints: tuple[FootprintFact, ...] = ()


class FootprintFiles:
    """The measured footprints of all projects below one state root; a file is read again only when it has changed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        # By path, with the time and size that a file had when it was read.
        self._seen: dict[Path, tuple[tuple[int, int], _Contents]] = {}

    def read(self) -> tuple[FootprintFact, ...]:
        """All that can be read. What cannot be read says nothing, and stops nobody."""
        return tuple(fact for _, contents in self._look() for fact in contents.footprints)

    def newer(self) -> tuple[Path, ...]:
        """The files that a newer sage wrote."""
        return tuple(path for path, contents in self._look() if contents.state == "newer")

    def of(self, project: str) -> tuple[FootprintFact, ...]:
        """What is kept of a project. Raises NewerState: then nothing may be put in its place."""
        contents = _contents(self._path(project))
        if contents.state == "newer":
            raise newer_state(self._path(project))
        return contents.footprints

    def mend(self, project: str) -> tuple[str, ...]:
        """Set aside what cannot be read, and tell what that was. Raises Environment, and NewerState."""
        path = self._path(project)
        state = _contents(path).state
        if state == "newer":
            raise newer_state(path)
        if state == "damaged":
            return (f"{path} cannot be read, and was set aside as {set_aside(path, path.parent)}",)
        return ()

    def write(self, project: str, footprints: tuple[FootprintFact, ...]) -> None:
        """Put them in place of the earlier ones. Raises Environment."""
        fields = _FOOTPRINTS.dump_python(footprints, mode="json")
        text = sealed(canonical_json({"format": FORMAT, "footprints": fields})) + "\n"
        write_whole(self._path(project), text, what="footprints")

    def _path(self, project: str) -> Path:
        return self._root / project / _NAME

    def _look(self) -> list[tuple[Path, _Contents]]:
        seen: dict[Path, tuple[tuple[int, int], _Contents]] = {}
        for path in trusted_matches(self._root, f"*/{_NAME}"):
            try:
                status = path.stat()
            except OSError:
                continue
            version = (status.st_mtime_ns, status.st_size)
            before = self._seen.get(path)
            unchanged = before is not None and before[0] == version
            seen[path] = before if before is not None and unchanged else (version, _contents(path))
        self._seen = seen
        return [(path, contents) for path, (_, contents) in sorted(seen.items())]


def _contents(path: Path) -> _Contents:
    try:
        with path.open("rb") as file:
            text = file.read(_LONGEST_BYTES)
    except FileNotFoundError:
        return _Contents(state="not there")
    except OSError:
        return _Contents(state="unreadable")
    fields: dict[str, Any] = unsealed(text.strip()) or {}
    number = fields.get("format")
    if isinstance(number, int) and number > FORMAT:
        return _Contents(state="newer")
    try:
        return _Contents(state="read", footprints=_FOOTPRINTS.validate_python(fields.get("footprints")))
    except ValidationError:
        return _Contents(state="damaged")
