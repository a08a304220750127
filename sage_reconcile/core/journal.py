"""What was done: the entries of a journal, and what can be read from them. Values only."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from sage_reconcile.core.facts import AppliedFact
from sage_reconcile.core.identity import EngineId


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanBegun:
    """An apply began. `at` is in epoch seconds, here and below."""

    at: float
    pid: int
    source: str
    digest: str
    # One sentence for each act, by index.
    acts: tuple[str, ...]
    # (id, canonical JSON of the spec) of all that shall run afterwards.
    revision: tuple[tuple[EngineId, str], ...]
    entry: Literal["plan_begun"] = "plan_begun"


@dataclass(frozen=True, slots=True, kw_only=True)
class ActBegun:
    at: float
    act: int
    entry: Literal["act_begun"] = "act_begun"


@dataclass(frozen=True, slots=True, kw_only=True)
class ActDone:
    at: float
    act: int
    entry: Literal["act_done"] = "act_done"


@dataclass(frozen=True, slots=True, kw_only=True)
class ActFailed:
    at: float
    act: int
    why: str
    entry: Literal["act_failed"] = "act_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreBegun:
    """The apply failed, and what ran before is being put back; the acts that follow are those of that plan."""

    at: float
    acts: tuple[str, ...]
    entry: Literal["restore_begun"] = "restore_begun"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEnded:
    """The end of an apply: converged | restored | stuck | halted | interrupted."""

    at: float
    outcome: str
    entry: Literal["plan_ended"] = "plan_ended"


Entry = PlanBegun | ActBegun | ActDone | ActFailed | RestoreBegun | PlanEnded

_ENTRY: TypeAdapter[Entry] = TypeAdapter(Annotated[Entry, Field(discriminator="entry")])


def entry_json(entry: Entry) -> str:
    """One line of a journal."""
    return _ENTRY.dump_json(entry).decode()


def parse_entry(line: str | bytes) -> Entry | None:
    """What `entry_json` wrote; None for anything else."""
    try:
        return _ENTRY.validate_json(line)
    except ValidationError:
        return None


def last_applied(entries: tuple[Entry, ...]) -> tuple[AppliedFact, ...]:
    """The engines of the newest revision that was applied, and not put back."""
    begun: PlanBegun | None = None
    applied: tuple[AppliedFact, ...] = ()
    for entry in entries:
        if isinstance(entry, PlanBegun):
            begun = entry
        elif isinstance(entry, PlanEnded):
            # What was left half done because it was asked for is still what should run.
            if begun is not None and entry.outcome in ("converged", "halted"):
                applied = tuple(
                    AppliedFact(engine=engine, written=written, at=entry.at) for engine, written in begun.revision
                )
            begun = None
    return applied
