"""Rules that one field cannot know: names and ports used twice, dependencies, commands, secrets, GPUs.

Goes in: every engine that is valid by itself. Comes out: problems. Must not know: files, YAML, or what runs.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice

from sage_reconcile.core.identity import in_stack
from sage_reconcile.core.quantities import bytes_of, size_text
from sage_reconcile.core.runtimes import is_served, runtime_of
from sage_reconcile.core.spec import (
    LONGEST_SPEC_BYTES,
    EngineSpec,
    RouterSettings,
    canonical_json,
    needs_gpu,
    not_served_yet,
    served_model,
    served_values,
    written_fields,
)
from sage_reconcile.world.manifest_fields import Fields, device_index
from sage_reconcile.world.manifest_problems import Problem, cut
from sage_reconcile.world.yaml_scan import MOST_PROBLEMS, Path

NOT_SERVED_HINT = "remove it: this version of sage would not act on it"
_PLACEHOLDERS = ("port", "host", "model", "devices", "memory_bytes", "memory_fraction")
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
# A CUDA context alone takes more, on any GPU.
_LEAST_BYTES = 64 * 1024**2
_LEAST_SHARE = 0.001
_SECRET_NAMES = ("TOKEN", "KEY", "SECRET", "PASSWORD")
# What stands in a secret's place without being one: paths, references, and the words that servers take for "none".
_NOT_SECRET = re.compile(r"(?:/|\./|\.\./|~/|\$).*|(?:empty|none|null|dummy|true|false|[0-9]{1,3})?", re.I | re.S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One engine as it stands in a manifest, valid by itself."""

    stack: str
    fields: Fields
    spec: EngineSpec

    @property
    def id(self) -> str:
        return f"{self.stack}/{self.spec.name}"

    def dependencies(self) -> tuple[str, ...]:
        """Ids of the engines it depends on, as "stack/name", each once."""
        return tuple(dict.fromkeys(self.dependency(written) for written in self.spec.depends_on))

    def dependency(self, written: str) -> str:
        return in_stack(written, self.stack)


def engine_problems(entry: Entry) -> Iterator[Problem]:
    """What is wrong with one engine, whatever the others are."""
    yield from _command_problems(entry)
    yield from _gpu_problems(entry)
    yield from _runtime_problems(entry)
    spec_bytes = len(canonical_json(written_fields(entry.spec)).encode("utf-8"))
    if spec_bytes > LONGEST_SPEC_BYTES:
        message = f"the engine takes {spec_bytes} bytes when written out: more than {LONGEST_SPEC_BYTES}"
        yield entry.fields.problem((), message, "shorten args, env or metadata: the engine's process carries them")


def not_served_problems(fields: Fields) -> Iterator[Problem]:
    """The parts of an engine that this version does not act on."""
    for path, sentence in not_served_yet(fields.values):
        others = served_values(path)
        yield fields.problem(path, sentence, f"write {_or(others)}" if others else NOT_SERVED_HINT)


def project_problems(
    entries: tuple[Entry, ...], router: RouterSettings, known: frozenset[str], *, complete: bool, whole: bool
) -> Iterator[Problem]:
    """What is wrong between the engines.

    `known` are the ids that stand in the files, also those of engines that are not valid. `complete` says that every
    file could be read, so that an id which is not known does not exist; `whole` that all files were asked for.
    Of each rule, at most MOST_PROBLEMS are told.
    """
    unknown = (_unknown_dependencies(entry, known, complete=complete, whole=whole) for entry in entries)
    yield from islice(_port_problems(entries, router), MOST_PROBLEMS)
    yield from islice(_model_name_problems(entries), MOST_PROBLEMS)
    yield from islice(chain.from_iterable(unknown), MOST_PROBLEMS)
    yield from islice(_cycles({entry.id: entry for entry in entries}), MOST_PROBLEMS)


def _command_problems(entry: Entry) -> Iterator[Problem]:
    spec, fields = entry.spec, entry.fields
    if spec.runtime == "command" and spec.command is None:
        yield fields.problem(("runtime",), "runtime: command needs a command", "write `command: [program, argument]`")
    if spec.command is None:
        return
    if spec.runtime != "command":
        yield fields.problem(("command",), "command has no effect without runtime: command", "set runtime: command")
    elif not spec.command or not spec.command[0].strip():
        yield fields.problem(("command",), "command is empty", "write `command: [program, argument]`")
    elif spec.port == "auto" and _placeholders((*spec.command, *spec.args)) <= set(_PLACEHOLDERS) - {"port"}:
        message = "the program cannot know its port: sage chooses one, and no word of the command is {port}"
        hint = "write {port} where the program takes it, or `port: N` when it listens on N by itself"
        yield fields.problem(("command",), message, hint)
    yield from _placeholder_problems(spec.command, fields)


def _placeholders(words: tuple[str, ...]) -> set[str]:
    """What stands in braces, right or wrong; doubled braces do not count."""
    return {found[1] for word in words for found in _BRACES.finditer(word) if found[1] is not None}


def _placeholder_problems(command: tuple[str, ...], fields: Fields) -> Iterator[Problem]:
    for index, argument in enumerate(command):
        for found in _BRACES.finditer(argument):
            if found[0] in ("{{", "}}") or found[1] in _PLACEHOLDERS:
                continue
            hint = f"known are {', '.join('{' + name + '}' for name in _PLACEHOLDERS)}; write {{{{ or }}}} for a brace"
            what = f'unknown placeholder "{cut(found[0])}"' if found[1] is not None else f'a lone "{found[0]}"'
            yield fields.problem(("command", index), f"{what} in the command", hint)
            break  # one per argument is enough to look at it again


def _gpu_problems(entry: Entry) -> Iterator[Problem]:
    spec, fields = entry.spec, entry.fields
    for index, device in enumerate(spec.devices or ()):
        if isinstance(device, int) and device < 0:
            yield fields.problem(("devices", index), f"{device} is not the index of a GPU", "indexes start at 0")
        if isinstance(device, str) and (number := device_index(device)):
            message = f'"{cut(device)}" is not the UUID of a GPU'
            yield fields.problem(("devices", index), message, f"write {number} without quotes for the index of one")
        if device in (spec.devices or ())[:index]:
            yield fields.problem(("devices", index), f"the device {device} is named twice", "name it once")
    if needs_gpu(spec):
        yield from _memory_problems(entry)
        return
    without_effect = {
        "devices": spec.devices is not None,
        "gpu_memory": spec.gpu_memory != "auto",
        "tensor_parallel": spec.tensor_parallel > 1,
        "pipeline_parallel": spec.pipeline_parallel > 1,
    }
    for name in (name for name, written in without_effect.items() if written):
        message = f"{fields.name((name,))} has no effect on an engine without a GPU"
        yield fields.problem((name,), message, "set use_gpu: true")


def _memory_problems(entry: Entry) -> Iterator[Problem]:
    """A budget that no model could be served with: a slip, such as 24MiB for 24GiB."""
    wish = entry.spec.gpu_memory
    if wish == "auto" or not is_served(entry.spec) or not runtime_of(entry.spec).budgeted:
        return
    if wish < _LEAST_SHARE if isinstance(wish, float) else bytes_of(wish) < _LEAST_BYTES:
        size = f"{wish:g} of a GPU" if isinstance(wish, float) else size_text(bytes_of(wish))
        message = f"{size} is too little for any model, with its cache and all that it computes"
        yield entry.fields.problem(("gpu_memory",), message, 'write as much as it needs, such as "24GiB", or auto')


def _runtime_problems(entry: Entry) -> Iterator[Problem]:
    """What the program behind the engine could not do with it; a wish that is not served yet is told as that alone."""
    if is_served(entry.spec) and not not_served_yet(entry.fields.values):
        for field, sentence in runtime_of(entry.spec).complaints(entry.spec):
            cure = f"write kind: {_or(_kinds_of_its_runtime(entry.spec))}" if field == "kind" else "remove it"
            yield entry.fields.problem((field,), sentence, f"{cure}, or choose another runtime")


def _kinds_of_its_runtime(spec: EngineSpec) -> tuple[str, ...]:
    """What the program behind it could serve."""
    complaints = runtime_of(spec).complaints
    asked = {kind: complaints(spec.model_copy(update={"kind": kind})) for kind in served_values(("kind",))}
    return tuple(kind for kind, found in asked.items() if all(field != "kind" for field, _ in found))


def _or(words: tuple[str, ...]) -> str:
    return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def secret_problems(fields: Fields) -> Iterator[Problem]:
    """Secrets in an engine's environment, which may not be valid otherwise."""
    env = fields.values.get("env")
    for name, value in env.items() if isinstance(env, Mapping) else ():
        if not isinstance(value, str):
            continue
        named = name.upper().endswith(_SECRET_NAMES) and not _NOT_SECRET.fullmatch(value)
        if named or value.startswith(("hf_", "sk-")):
            message = f"a secret must not stand in a manifest: env.{cut(name)} holds one"
            yield fields.problem(("env", name), message, "keep it out of the manifest")


def _port_problems(entries: tuple[Entry, ...], router: RouterSettings) -> Iterator[Problem]:
    first: dict[int, Entry] = {}
    for entry in entries:
        port = entry.spec.port
        if port == "auto":
            continue
        if entry.spec.replicas > 1:
            message = f"{entry.spec.replicas} replicas cannot share port {port}"
            yield entry.fields.problem(("port",), message, "write port: auto, or an engine per port")
        if port == router.port:
            hint = "choose another port, or set router: {port: ...} in sage.yaml"
            yield entry.fields.problem(("port",), f"port {port} is the router's", hint)
        other = first.setdefault(port, entry)
        if other is not entry:
            message = (
                f"{entry.id} and {other.id} both ask for port {port}; the other is at {other.fields.at(('port',))}"
            )
            yield entry.fields.problem(("port",), message, "write port: auto for one of them")


def _model_name_problems(entries: tuple[Entry, ...]) -> Iterator[Problem]:
    first: dict[str, Entry] = {}
    for entry in entries:
        spec = entry.spec
        own: Path = ("served_name",) if spec.served_name is not None else ("model",)
        names = [(served_model(spec), own), *((alias, ("aliases", i)) for i, alias in enumerate(spec.aliases))]
        for name, path in names:
            other = first.setdefault(name, entry)
            if other.spec.kind != spec.kind:
                message = (
                    f'clients ask for "{cut(name)}" of {entry.id} ({spec.kind}) and of {other.id} '
                    f"({other.spec.kind}, at {other.fields.at(())}): one name cannot serve two kinds"
                )
                yield entry.fields.problem(path, message, "give one of them another served_name or alias")
                break  # the others of its names clash with the same engine, most likely


def _unknown_dependencies(entry: Entry, known: frozenset[str], *, complete: bool, whole: bool) -> Iterator[Problem]:
    for index, written in enumerate(entry.spec.depends_on):
        wanted = entry.dependency(written)
        elsewhere = not wanted.startswith(f"{entry.stack}/")
        if wanted in known or (elsewhere and not complete):
            continue
        close = difflib.get_close_matches(wanted[:128], sorted(known - {entry.id}), n=1, cutoff=0.6)
        hint = "write NAME for an engine of this stack, or STACK/NAME"
        if close:
            hint = f'did you mean "{close[0].removeprefix(entry.stack + "/")}"?'
        elif elsewhere and not whole:
            hint = "give sage the directory, so that it reads the other stacks too"
        message = f'{entry.id} depends on "{cut(written)}", which no manifest holds'
        yield entry.fields.problem(("depends_on", index), message, hint)


def _cycles(entries: Mapping[str, Entry]) -> Iterator[Problem]:
    """Each cycle once, told at its first engine.

    1. Engines that wait for nobody who is left are taken away, until none is.
    2. From any engine that is left, following dependencies must come round: that is a cycle.
    3. Without the cycle's engines, begin again.
    """
    waits = {name: [one for one in entry.dependencies() if one in entries] for name, entry in sorted(entries.items())}
    while True:
        waits = _without_satisfied(waits)
        if not waits:
            return
        seen: list[str] = [next(iter(waits))]
        while (following := waits[seen[-1]][0]) not in seen:
            seen.append(following)
        cycle = seen[seen.index(following) :]
        start = cycle.index(min(cycle))
        cycle = cycle[start:] + cycle[:start]
        yield _cycle_problem(entries, [*cycle, cycle[0]])
        waits = {
            name: [one for one in waited if one not in cycle] for name, waited in waits.items() if name not in cycle
        }


def _without_satisfied(waits: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """What is left when everyone who waits for nobody is taken away, again and again."""
    waiting_for: dict[str, list[str]] = {}
    for name, waited in waits.items():
        for one in waited:
            waiting_for.setdefault(one, []).append(name)
    open_count = {name: len(waited) for name, waited in waits.items()}
    free = [name for name, count in open_count.items() if count == 0]
    while free:
        done = free.pop()
        del open_count[done]
        for name in waiting_for.get(done, ()):
            open_count[name] -= 1
            if open_count[name] == 0:
                free.append(name)
    return {name: [one for one in waited if one in open_count] for name, waited in waits.items() if name in open_count}


def _cycle_problem(entries: Mapping[str, Entry], cycle: list[str]) -> Problem:
    entry = entries[cycle[0]]
    index = next(i for i, one in enumerate(entry.spec.depends_on) if entry.dependency(one) == cycle[1])
    message = f"engines wait for each other: {' -> '.join(_short_ids(cycle))}"
    return entry.fields.problem(("depends_on", index), message, "remove one of these dependencies")


def _short_ids(ids: Iterable[str]) -> list[str]:
    """The ids without their stack, where it is one stack."""
    pairs = [one.split("/", 1) for one in ids]
    one_stack = len({stack for stack, _ in pairs}) == 1
    return [name if one_stack else f"{stack}/{name}" for stack, name in pairs]
