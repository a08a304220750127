"""Engines that are not ours, as their command lines tell. Pure; nothing here is ever signalled."""

from sage_reconcile.core.facts import ListenerFact, ProcessFact
from sage_reconcile.core.observed import Engine, Foreign, model_of, spec_of
from sage_reconcile.core.runtimes import recognise
from sage_reconcile.core.runtimes.base import Recognised
from sage_reconcile.core.words import shown

# The longest name of a program or a model that is shown.
_LONGEST = 200


def foreign(
    processes: tuple[ProcessFact, ...],
    not_foreign: set[int],
    listeners: tuple[ListenerFact, ...],
    engines: tuple[Engine, ...],
) -> tuple[Foreign, ...]:
    """Engines started by somebody else, and what engines of ours left behind that is no longer provably theirs.

    A wrapper and its child, or a server and its workers, are one engine: shown is the process that listens, else the
    one that was started last.
    """
    seen = {
        fact.identity.pid: recognise(fact.argv) or _twin(fact.argv, engines)
        for fact in processes
        if fact.identity.pid not in not_foreign
    }
    parents = {fact.identity.pid: fact.parent_pid for fact in processes}
    families: dict[int, list[ProcessFact]] = {}
    for fact in processes:
        root = fact.identity.pid
        if seen.get(root) is None:
            continue
        while seen.get(parents[root]) == seen[root]:
            root = parents[root]
        families.setdefault(root, []).append(fact)
    listening = {pid for fact in listeners for pid in fact.pids}
    of_families = [
        max(family, key=lambda fact: (fact.identity.pid in listening, fact.identity.start_ticks))
        for family in families.values()
    ]
    recognised = [
        Foreign(
            pid=fact.identity.pid,
            name=program_name(fact.argv),
            user=fact.user,
            kind=engine.kind,
            model=shown(engine.model, _LONGEST),
            port=engine.port,
        )
        for fact in of_families
        if (engine := seen[fact.identity.pid]) is not None
    ]
    left_behind = [
        Foreign(
            pid=fact.identity.pid,
            name=program_name(fact.argv),
            user=fact.user,
            kind="?",
            model="?",
            port=min((socket.port for socket in listeners if fact.identity.pid in socket.pids), default=None),
            note=f"its output goes to {fact.output[0]}, and nothing else proves that it is an engine's",
        )
        for fact in processes
        if fact.output and fact.identity.pid in seen and seen[fact.identity.pid] is None
    ]
    return tuple(sorted([*recognised, *left_behind], key=lambda foreign: foreign.pid))


def _twin(argv: tuple[str, ...], engines: tuple[Engine, ...]) -> Recognised | None:
    """What a process is that runs the very command of one of our engines, on whatever port."""
    for engine in engines:
        ours, port = engine.resolved.argv, str(engine.resolved.placement.port)
        if len(argv) != len(ours) or argv[0] != ours[0]:
            continue
        found = [_other_port(word, our_word, port) for word, our_word in zip(argv, ours, strict=True)]
        spec = spec_of(engine)
        if all(found) and spec is not None:
            ports = [number for number in found if number and number != "same"]
            return Recognised(
                runtime=engine.resolved.runtime,
                kind=spec.kind,
                model=model_of(engine),
                port=int(ports[0]) if ports else None,
            )
    return None


def _other_port(word: str, ours: str, port: str) -> str:
    """The number that a word has in place of the port; "same" for a word without one, "" for a word that differs."""
    before, is_there, after = ours.partition(port)
    if not is_there:
        return "same" if word == ours else ""
    number = word.removeprefix(before).removesuffix(after)
    fits = word == f"{before}{number}{after}" and number.isascii() and number.isdigit() and len(number) < 6
    return number if fits else ""


def program_name(argv: tuple[str, ...]) -> str:
    return shown(argv[0].rsplit("/", 1)[-1], _LONGEST) if argv and argv[0] else "?"
