"""Records: what a label cannot hold about one engine process. Hints, that count only for the same process.

`<state>/<project>/engines/`: a file for each process, and a `.proof` beside it once it was asked a request of its kind.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from sage_reconcile.core.facts import RecordFact
from sage_reconcile.core.identity import EngineId, ProcessIdentity
from sage_reconcile.core.seal import sealed, unsealed
from sage_reconcile.core.spec import canonical_json, parse_written
from sage_reconcile.errors import NewerState
from sage_reconcile.world.damaged import set_aside
from sage_reconcile.world.failpoints import failpoint
from sage_reconcile.world.state import cannot_write, matches, trusted_matches, write_whole

FORMAT = 1

# No record is longer: the longest label that the kernel takes fits many times.
_LONGEST_BYTES = 4 * 1024 * 1024

_RECORD = TypeAdapter(RecordFact)


class _Contents(NamedTuple):
    """What came of reading a file, and its fields if it was read.

    `state` is "read", "damaged", "newer", "not there" or "unreadable".
    """

    state: str
    fields: dict[str, Any] = {}


_NOTHING = _Contents("not there")


class Records:
    """The records of all projects below one state root."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self) -> tuple[RecordFact, ...]:
        """Every record that can be read. What cannot be read says nothing, and stops nobody."""
        return self.look()[0]

    def newer(self) -> tuple[Path, ...]:
        """The files that a newer sage wrote."""
        return self.look()[1]

    def look(self) -> tuple[tuple[RecordFact, ...], tuple[Path, ...]]:
        """What `read` and `newer` tell, with every file read once: a look at the world asks for both."""
        paths = [path for ending in ("json", "proof") for path in trusted_matches(self._root, f"*/engines/*.{ending}")]
        contents = {path: _contents(path) for path in paths}
        records = [
            _record(found, contents.get(path.with_suffix(".proof"), _NOTHING))
            for path, found in contents.items()
            if path.suffix == ".json"
        ]
        newer = tuple(path for path, found in contents.items() if found.state == "newer")
        return tuple(record for record in records if record is not None), newer

    def mend(self, project: str) -> tuple[str, ...]:
        """Set aside what cannot be read, and tell what that was. Raises Environment, and NewerState."""
        directory = self._root / project
        told = []
        for ending in ("json", "proof"):
            for path in matches(directory, f"engines/*.{ending}"):
                state = _contents(path).state
                if state == "newer":
                    raise newer_state(path)
                makes_no_sense = state == "read" and ending == "json" and self._read(path) is None
                if state == "damaged" or makes_no_sense:
                    told.append(f"{path} cannot be read, and was set aside as {set_aside(path, directory)}")
        return tuple(told)

    def write(self, record: RecordFact) -> None:
        """Put a record in place of the earlier one of the same process. Raises Environment."""
        fields: dict[str, Any] = _RECORD.dump_python(record, mode="json")
        # The proof has a file of its own, because routers write it while an apply writes the rest.
        del fields["proved"], fields["proof_failure"]
        write_whole(self._path(record.engine, record.leader), _text(fields), what="record")

    def write_proof(self, engine: EngineId, leader: ProcessIdentity, *, failure: str) -> None:
        """Remember that the process answered a request of its kind, or what came instead. Raises Environment."""
        if self._read(self._path(engine, leader)) is None:
            self.write(RecordFact(engine=engine, leader=leader))
        path = self._path(engine, leader).with_suffix(".proof")
        write_whole(path, _text({"failure": failure}), what="proof")

    def of(self, engine: EngineId, leader: ProcessIdentity) -> RecordFact:
        """The record of a process; an empty one when there is none."""
        return self._read(self._path(engine, leader)) or RecordFact(engine=engine, leader=leader)

    def forget(self, engine: EngineId, leader: ProcessIdentity) -> None:
        """Remove the record of a process that is gone, and its proof first. Raises Environment."""
        path = self._path(engine, leader)
        failpoint("forget.begin")
        try:
            path.with_suffix(".proof").unlink(missing_ok=True)
            failpoint("forget.half")
            path.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(path.parent, error) from error
        failpoint("forget.done")

    def _path(self, engine: EngineId, leader: ProcessIdentity) -> Path:
        # "@" cannot stand in a name, so two engines never share a file.
        name = f"{engine.stack}@{engine.name}@{engine.replica}@{leader.pid}-{leader.start_ticks}.json"
        return self._root / engine.project / "engines" / name

    def _read(self, path: Path) -> RecordFact | None:
        return _record(_contents(path), _contents(path.with_suffix(".proof")))


def _record(contents: _Contents, proof: _Contents) -> RecordFact | None:
    """The record that a file and the proof beside it make; None when the file makes no sense."""
    if contents.state != "read":
        return None
    try:
        record = _RECORD.validate_python(contents.fields)
    except ValidationError:
        return None
    if record.policy is not None and parse_written(record.policy) is None:
        return None
    if proof.state != "read":
        return record
    failure = str(proof.fields.get("failure", ""))
    return replace(record, proved=not failure, proof_failure=failure)


def newer_state(path: Path) -> NewerState:
    """The error for a file of a later format."""
    return NewerState(
        f"cannot use {path}: a newer sage wrote it, and this one does not know its format",
        hint="use that version, or set SAGE_STATE_DIR to another directory",
    )


def _text(fields: dict[str, Any]) -> str:
    return sealed(canonical_json({"format": FORMAT, **fields})) + "\n"


def _contents(path: Path) -> _Contents:
    try:
        with path.open("rb") as file:
            text = file.read(_LONGEST_BYTES)
    except FileNotFoundError:
        return _NOTHING
    except OSError:
        return _Contents("unreadable")
    fields = unsealed(text.strip()) or {}
    number = fields.pop("format", None)
    if isinstance(number, int) and number > FORMAT:
        return _Contents("newer")
    return _Contents("read", fields) if number == FORMAT else _Contents("damaged")
