"""What was done: the entries of a journal, their lines, and what can be read from them. Values only."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from sage_reconcile.core.facts import AppliedFact
from sage_reconcile.core.identity import EngineId
from sage_reconcile.core.seal import sealed, unsealed

# The version of the entries below. A journal that says a higher one was written by a newer sage.
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalBegun:
    """The first entry of every journal file."""

    format: int = FORMAT
    entry: Literal["journal_begun"] = "journal_begun"


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


Entry = JournalBegun | PlanBegun | ActBegun | ActDone | ActFailed | RestoreBegun | PlanEnded

_ENTRY: TypeAdapter[Entry] = TypeAdapter(Annotated[Entry, Field(discriminator="entry")])


def entry_json(entry: Entry) -> str:
    """One line of a journal, sealed."""
    return sealed(_ENTRY.dump_json(entry).decode())


def parse_entry(line: str | bytes) -> Entry | None:
    """What `entry_json` wrote; None for anything else."""
    try:
        return _ENTRY.validate_python(unsealed(line))
    except ValidationError:
        return None


def is_newer(line: bytes) -> bool:
    """Whether the line begins a journal of a later format than this one."""
    if b'"journal_begun"' not in line:
        return False
    fields = unsealed(line) or {}
    number = fields.get("format")
    return fields.get("entry") == "journal_begun" and isinstance(number, int) and number > FORMAT


# What was left half done because it was asked for is still what should run.
_APPLIED = ("converged", "halted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Revisions:
    """What a journal told so far: the plan that is under way, and the newest revision that was applied before it."""

    begun: PlanBegun | None = None
    applied: tuple[AppliedFact, ...] = ()

    def followed_by(self, entry: Entry) -> "Revisions":
        if isinstance(entry, PlanBegun):
            return replace(self, begun=entry)
        if not isinstance(entry, PlanEnded):
            return self
        if self.begun is None or entry.outcome not in _APPLIED:
            return replace(self, begun=None)
        revision = self.begun.revision
        applied = tuple(AppliedFact(engine=engine, written=written, at=entry.at) for engine, written in revision)
        return Revisions(applied=applied)


def may_tell_of_revisions(line: bytes) -> bool:
    """Whether a line can matter to Revisions; most do not, and need not be parsed for them."""
    return b'"plan_' in line


def last_applied(entries: tuple[Entry, ...]) -> tuple[AppliedFact, ...]:
    """The engines of the newest revision that was applied, and not put back."""
    found = Revisions()
    for entry in entries:
        found = found.followed_by(entry)
    return found.applied


def shortened(entries: tuple[Entry, ...], longest_bytes: int) -> tuple[Entry, ...]:
    """The newest whole plans that fit into so many bytes, and before them the last one that was applied.

    What is left out is history; what should run is never lost with it.
    """
    plans: list[list[Entry]] = []
    for entry in entries:
        if isinstance(entry, PlanBegun):
            plans.append([])
        if plans:
            plans[-1].append(entry)
    kept: list[list[Entry]] = []
    for plan in reversed(plans):
        longest_bytes -= sum(len(entry_json(entry)) + 1 for entry in plan)
        if longest_bytes < 0 and kept:
            break
        kept.insert(0, plan)
    if not any(_was_applied(plan) for plan in kept):
        kept = [plan for plan in plans if _was_applied(plan)][-1:] + kept
    return tuple(entry for plan in kept for entry in plan)


def _was_applied(plan: list[Entry]) -> bool:
    return any(isinstance(entry, PlanEnded) and entry.outcome in _APPLIED for entry in plan)
