"""Manifests: paths in, what should run out, or every mistake in them at once with its place.

Nothing of a manifest is trusted or guessed: what cannot be read, or would have no effect, is a problem, because an
engine that drops out of the manifests in silence would be stopped. Must not know: what runs.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sage_reconcile.core.desired import DesiredState, Wanted
from sage_reconcile.core.identity import EngineId
from sage_reconcile.core.quantities import bytes_of
from sage_reconcile.core.spec import (
    NAME_PATTERN,
    EngineSpec,
    ProjectSettings,
    Stack,
    canonical_engine,
    not_served_yet,
    settings_not_served_yet,
    with_absolute_model,
)
from sage_reconcile.world.manifest_fields import (
    OLDER_SPELLINGS,
    Fields,
    default_fields,
    engine_fields,
    paths_of,
    top_fields,
    validated,
)
from sage_reconcile.world.manifest_files import SETTINGS_NAMES, Reading, digest, read
from sage_reconcile.world.manifest_problems import TOP, Mark, Problem, ProblemsFound, Source, cut, shown
from sage_reconcile.world.manifest_rules import (
    NOT_SERVED_HINT,
    Entry,
    engine_problems,
    not_served_problems,
    project_problems,
    secret_problems,
)
from sage_reconcile.world.yaml_scan import MOST_PROBLEMS, Document, Path, scan

__all__ = ["Problem", "ProblemsFound", "load"]

# The most that a stack may hold; the rest of a longer list is not looked at.
_MOST_ENGINES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class _StackRead:
    """One stack file: what of it is valid, and what is not."""

    document: Document
    # None when the file does not say it.
    name: str | None
    entries: tuple[Entry, ...] = ()
    # Ids of all its engines, also of those that are not valid.
    ids: frozenset[str] = frozenset()
    problems: tuple[Problem, ...] = ()


def load(paths: tuple[str, ...], *, project: str | None, home: str, directory: str | None = None) -> DesiredState:
    """What the manifests at `paths` ask for: directories, or single files, all of one project.

    `project` is the name that the command line gives, None for none; `home` is what `~/` means in a model's path.
    `directory` is the real path of the directory on another machine that the files are for, None for where they lie.
    Raises ProblemsFound with every mistake in every file.
    """
    reading = read(paths)
    if directory is not None:
        reading = replace(reading, directory=directory)
    documents = {one.name: scan(one.file, one.content) for one in reading.files}
    settings_documents = [documents[name] for name in SETTINGS_NAMES if name in documents]
    stacks = tuple(_stack(document) for name, document in documents.items() if name not in SETTINGS_NAMES)
    problems = list(reading.problems)
    settings, settings_problems = _settings(settings_documents)
    problems += settings_problems
    problems += (problem for stack in stacks for problem in stack.problems)
    problems += _stack_names_twice(stacks)
    complete = not reading.problems and all(document.top is not None for document in documents.values())
    problems += project_problems(
        tuple(entry for stack in stacks for entry in stack.entries),
        settings.router,
        frozenset(one for stack in stacks for one in stack.ids),
        complete=complete,
        whole=reading.whole,
    )
    name = ""
    # What could not be read may be what names the project.
    if not reading.problems and not settings_problems:
        name, name_problems = _project_name(paths[0], reading, settings, settings_documents, project)
        problems += name_problems
    if problems:
        raise ProblemsFound(_in_order(problems))
    return _desired(reading, stacks, settings, project=name, home=home)


def _desired(
    reading: Reading, stacks: tuple[_StackRead, ...], settings: ProjectSettings, *, project: str, home: str
) -> DesiredState:
    wanted = [
        one
        for stack in stacks
        for entry in stack.entries
        for one in _wanted(entry, project=project, directory=reading.directory, home=home)
    ]
    return DesiredState(
        project=project,
        source=reading.directory,
        wanted=tuple(sorted(wanted, key=lambda one: one.id)),
        ports=settings.ports,
        router=settings.router,
        ask_hub=settings.ask_hub,
        reserve_bytes=bytes_of(settings.device_reserve) if settings.device_reserve is not None else 0,
        prune_stacks=None if reading.whole else tuple(sorted({entry.stack for s in stacks for entry in s.entries})),
        digest=digest(reading.files),
    )


def _wanted(entry: Entry, *, project: str, directory: str, home: str) -> Iterator[Wanted]:
    fields = entry.fields
    first = Wanted(
        id=EngineId(project=project, stack=entry.stack, name=entry.spec.name),
        spec=with_absolute_model(entry.spec, directory=directory, home=home),
        depends_on=entry.dependencies(),
        directory=directory,
        at=fields.at(()),
        fields_at=tuple(sorted((".".join(map(str, path)), fields.at(path)) for path in paths_of(fields.values))),
    )
    for replica in range(entry.spec.replicas):
        yield replace(first, id=replace(first.id, replica=replica))


def _settings(documents: list[Document]) -> tuple[ProjectSettings, tuple[Problem, ...]]:
    """The project's settings, the defaults where there are none or they are not valid."""
    if not documents:
        return ProjectSettings(), ()
    problems = [problem for document in documents for problem in document.problems]
    if len(documents) > 1:
        hint = "keep one of them"
        problems.append(documents[1].source.problem(TOP, "sage.yaml and sage.yml both hold the settings", hint))
    document = documents[0]
    if document.top is None:
        return ProjectSettings(), tuple(problems)
    fields = top_fields(document)
    refused = settings_not_served_yet(document.top)
    problems += (fields.problem(path, sentence, NOT_SERVED_HINT) for path, sentence in refused)
    settings, mistakes = validated(ProjectSettings, fields)
    told = {(problem.line, problem.column) for problem in problems}
    problems += (mistake for mistake in mistakes if (mistake.line, mistake.column) not in told)
    return settings or ProjectSettings(), tuple(problems)


def _stack(document: Document) -> _StackRead:
    if document.top is None:
        return _StackRead(document=document, name=None, problems=document.problems)
    top = document.top
    name = top["name"] if isinstance(top.get("name"), str) else None
    engines = top.get("engines")
    written: list[Any] = engines if isinstance(engines, list) else []
    # The engines are validated one by one below; here they only have to be there.
    placeholder = EngineSpec(name="x", model="x")
    head = replace(top_fields(document), values={**top, "engines": [placeholder] * len(written)} if written else top)
    problems = [*document.problems, *validated(Stack, head)[1]]
    defaults, default_problems = _defaults(document, top)
    problems += default_problems
    entries: list[Entry] = []
    for index, engine in enumerate(written[:_MOST_ENGINES]):
        if len(problems) > MOST_PROBLEMS:
            mark = document.mark(("engines", index))
            problems.append(document.source.problem(mark, f"more than {MOST_PROBLEMS} mistakes up to here"))
            break
        entry, mistakes = _engine(document, name or "", index, engine, defaults)
        entries += () if entry is None else (entry,)
        problems += mistakes
    names = [engine.get("name") if isinstance(engine, Mapping) else None for engine in written]
    problems += _names_twice(document, names)
    return _StackRead(
        document=document,
        name=name,
        entries=tuple(entries),
        ids=frozenset(f"{name or ''}/{one}" for one in names if isinstance(one, str)),
        problems=tuple(problems),
    )


def _defaults(document: Document, top: Mapping[str, Any]) -> tuple[Mapping[str, Any], tuple[Problem, ...]]:
    defaults = top.get("defaults")
    if not isinstance(defaults, Mapping):
        return {}, ()
    fields = default_fields(document, defaults)
    problems = list(_field_problems(fields, validated(EngineSpec, fields)[1]))
    if "name" in defaults:
        problems.append(fields.problem(("name",), "name cannot have a default", "give each engine its own name"))
    return defaults, tuple(problems)


def _field_problems(fields: Fields, mistakes: tuple[Problem, ...]) -> Iterator[Problem]:
    """What is wrong with an engine's fields one by one; a field that is not served yet gets no second problem."""
    refused = {path for path, _ in not_served_yet(fields.values)}
    told = {fields.mark(path) for path in paths_of(fields.values) if path[:1] in refused}
    yield from not_served_problems(fields)
    yield from secret_problems(fields)
    for mistake in mistakes:
        if Mark(mistake.line, mistake.column) not in told:
            yield mistake


def _engine(
    document: Document, stack: str, index: int, engine: Any, defaults: Mapping[str, Any]
) -> tuple[Entry | None, tuple[Problem, ...]]:
    """One engine, valid by itself, or None and its problems."""
    if not isinstance(engine, Mapping):
        fields = replace(top_fields(document), origins={(): ("engines", index)})
        message = f"an engine must be a mapping, not {shown(engine)}"
        return None, (fields.problem((), message, "write `- name: ...`, and its fields below"),)
    fields = engine_fields(document, index, engine, defaults)
    spec, mistakes = validated(EngineSpec, fields)
    problems = (*_field_problems(fields, mistakes), *_spelled_twice(fields))
    # With mistakes in the YAML there may be gaps in the values, which no rule could judge.
    if spec is None or document.problems or any(_spelled_twice(fields)):
        return None, problems
    canonical = _canonical(fields)
    spec, mistakes = validated(EngineSpec, canonical)
    if spec is None:
        return None, (*problems, *mistakes)
    entry = Entry(stack=stack, fields=canonical, spec=spec)
    return entry, (*problems, *engine_problems(entry))


def _spelled_twice(fields: Fields) -> Iterator[Problem]:
    for name, older in OLDER_SPELLINGS.items():
        if fields.values.get(older) is not None and name in fields.values:
            yield fields.problem((older,), f"{name} and {older} are the same field", f"write {name} alone")


def _canonical(fields: Fields) -> Fields:
    origins = dict(fields.origins)
    for name, older in OLDER_SPELLINGS.items():
        if fields.values.get(older) is not None:
            origins[(name,)] = fields.origin((older,))
    return Fields(document=fields.document, values=canonical_engine(fields.values), origins=origins)


def _names_twice(document: Document, names: list[Any]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        if isinstance(name, str) and first.setdefault(name, index) != index:
            where = document.source.at(document.mark(("engines", first[name], "name")))
            message = f'two engines are called "{cut(name)}"; the first is at {where}'
            yield document.source.problem(document.mark(("engines", index, "name")), message, "rename one of them")


def _stack_names_twice(stacks: tuple[_StackRead, ...]) -> Iterator[Problem]:
    first: dict[str, Document] = {}
    path: Path = ("name",)
    for stack in stacks:
        if stack.name is None:
            continue
        other = first.setdefault(stack.name, stack.document)
        if other is not stack.document:
            where = other.source.at(other.mark(path))
            message = f'two stacks are called "{cut(stack.name)}"; the first is at {where}'
            yield stack.document.source.problem(stack.document.mark(path), message, "rename one of them")


def _project_name(
    first_path: str, reading: Reading, settings: ProjectSettings, documents: list[Document], given: str | None
) -> tuple[str, tuple[Problem, ...]]:
    """The settings' name, else the one given, else the directory's (the parent's when it is called manifests)."""
    here = Source(file=first_path)
    if given is not None and not re.fullmatch(NAME_PATTERN.removesuffix("$"), given):
        return given, (here.problem(TOP, f'"{cut(given)}" is not a name that a project can have', _NAME_HINT),)
    if settings.project is not None:
        if given is None or given == settings.project:
            return settings.project, ()
        message = f'the project is "{settings.project}" here, and "{given}" on the command line'
        mark = documents[0].mark(("project",))
        return settings.project, (documents[0].source.problem(mark, message, "leave one of them out"),)
    if given is not None:
        return given, ()
    directory = reading.directory
    own = os.path.basename(directory)
    name = os.path.basename(os.path.dirname(directory)) if own == "manifests" else own
    if re.fullmatch(NAME_PATTERN.removesuffix("$"), name):
        return name, ()
    message = f'the directory\'s name "{cut(name)}" cannot name a project'
    return name, (here.problem(TOP, message, f"write `project: ...` into sage.yaml; {_NAME_HINT}"),)


_NAME_HINT = 'a name is letters, digits, ".", "_" and "-", and starts with a letter or digit'


def _in_order(problems: list[Problem]) -> tuple[Problem, ...]:
    """By file and place; a mistake in a default is told once, not for every engine."""
    once = dict.fromkeys(problems)
    return tuple(sorted(once, key=lambda one: (one.file, one.line, one.column, one.message)))
