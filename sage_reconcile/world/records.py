"""Records: what a label cannot hold about one engine process. Hints, that count only for the same process.

`<state>/<project>/engines/`: a file for each process, and a `.proof` beside it once it was asked a request of its kind.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sage_reconcile.core.facts import RecordFact
from sage_reconcile.core.identity import EngineId, ProcessIdentity
from sage_reconcile.core.spec import parse_written
from sage_reconcile.world.state import matches, read_object, write_whole

FORMAT = 1

_RECORD = TypeAdapter(RecordFact)


class Records:
    """The records of all projects below one state root."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self) -> tuple[RecordFact, ...]:
        """Every record that can be read. What cannot be read says nothing, and stops nobody."""
        found = [self._read(path) for path in matches(self._root, "*/engines/*.json")]
        return tuple(record for record in found if record is not None)

    def write(self, record: RecordFact) -> None:
        """Put a record in place of the earlier one of the same process. Raises Environment."""
        fields: dict[str, Any] = _RECORD.dump_python(record, mode="json")
        # The proof has a file of its own, because routers write it while an apply writes the rest.
        del fields["proved"], fields["proof_failure"]
        path = self._path(record.engine, record.leader)
        write_whole(path, _RECORD_FILE.dump_json({"format": FORMAT, **fields}, indent=1).decode())

    def write_proof(self, engine: EngineId, leader: ProcessIdentity, *, failure: str) -> None:
        """Remember that the process answered a request of its kind, or what came instead. Raises Environment."""
        if self._read(self._path(engine, leader)) is None:
            self.write(RecordFact(engine=engine, leader=leader))
        path = self._path(engine, leader).with_suffix(".proof")
        write_whole(path, _RECORD_FILE.dump_json({"format": FORMAT, "failure": failure}).decode())

    def of(self, engine: EngineId, leader: ProcessIdentity) -> RecordFact:
        """The record of a process; an empty one when there is none."""
        return self._read(self._path(engine, leader)) or RecordFact(engine=engine, leader=leader)

    def forget(self, engine: EngineId, leader: ProcessIdentity) -> None:
        """Remove the record of a process that is gone."""
        path = self._path(engine, leader)
        path.unlink(missing_ok=True)
        path.with_suffix(".proof").unlink(missing_ok=True)

    def _path(self, engine: EngineId, leader: ProcessIdentity) -> Path:
        # "@" cannot stand in a name, so two engines never share a file.
        name = f"{engine.stack}@{engine.name}@{engine.replica}@{leader.pid}-{leader.start_ticks}.json"
        return self._root / engine.project / "engines" / name

    def _read(self, path: Path) -> RecordFact | None:
        fields = read_object(path)
        if fields is None or fields.pop("format", None) != FORMAT:
            return None
        try:
            record = _RECORD.validate_python(fields)
        except ValidationError:
            return None
        if record.policy is not None and parse_written(record.policy) is None:
            return None
        proof = read_object(path.with_suffix(".proof"))
        if proof is None or proof.get("format") != FORMAT:
            return record
        failure = str(proof.get("failure", ""))
        return replace(record, proved=not failure, proof_failure=failure)


_RECORD_FILE = TypeAdapter(dict[str, Any])
