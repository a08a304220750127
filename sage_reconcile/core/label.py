"""The label that a process carries in its environment: who it is, what was written, what was resolved."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sage_reconcile.core.identity import EngineId, engine_id
from sage_reconcile.core.resolved import Resolved, parse_resolved, resolved_json
from sage_reconcile.core.spec import canonical_json

PROJECT, SOURCE, ENGINE, SPEC, PLACEMENT = "SAGE_PROJECT", "SAGE_SOURCE", "SAGE_ENGINE", "SAGE_SPEC", "SAGE_PLACEMENT"
# The gate: the process waits for one line, which is its own identity, and becomes the engine. If sage dies before it
# writes that line, the gate reads end-of-file and exits; so nothing ever runs that was not written down first.
GATE = (
    "/bin/sh", "-c", 'read -r SAGE_LEADER || exit 111; export SAGE_LEADER; exec "$@" </dev/null', "sage-gate",
)  # fmt: skip

# "PID:START_TICKS:NAMESPACE" of the engine's first process; the last is the inode of its pid namespace. The
# gate exports it when it is released, so every process of the
# engine names the one leader, and a child that makes a session of its own is not taken for a second engine.
LEADER = "SAGE_LEADER"


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A whole label. `leader` is (pid, start ticks, pid namespace) of the engine's first process."""

    engine: EngineId
    source: str
    written: str
    resolved: Resolved
    leader: tuple[int, int, int]


def variables(*, engine: EngineId, source: str, written: str, resolved: Resolved) -> dict[str, str]:
    """The label as environment variables, all but the leader, which only the gate can know."""
    return {
        PROJECT: engine.project,
        SOURCE: source,
        ENGINE: str(engine),
        SPEC: written,
        PLACEMENT: resolved_json(resolved),
    }


def parse_label(environment: Mapping[str, str], *, gate: tuple[int, int, int] | None = None) -> Label | None:
    """The label in an environment; None when a part is missing or makes no sense: then the process is not ours.

    `gate` is (pid, start ticks, pid namespace) of a process that leads its session: before the engine's program runs in
    it, it is the gate, which cannot name itself yet, and is its own leader.
    """
    parts = [environment.get(name, "") for name in (PROJECT, SOURCE, ENGINE, SPEC, PLACEMENT)]
    leader = _leader(environment[LEADER]) if LEADER in environment else gate
    if not all(parts) or leader is None:
        return None
    project, source, engine, spec, placement = parts
    the_id = engine_id(project, engine)
    resolved = parse_resolved(placement)
    written = _json_object(spec)
    if the_id is None or resolved is None or written is None:
        return None
    return Label(engine=the_id, source=source, written=canonical_json(written), resolved=resolved, leader=leader)


def leader_text(pid: int, start_ticks: int, namespace: int) -> str:
    """The value of SAGE_LEADER."""
    return f"{pid}:{start_ticks}:{namespace}"


def _leader(text: str) -> tuple[int, int, int] | None:
    parts = text.split(":")
    if len(parts) != 3 or not all(_is_number(part) for part in parts):
        return None
    return int(parts[0]), int(parts[1]), int(parts[2])


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
        canonical_json(value)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
