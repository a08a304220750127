"""What every runtime file answers: how to start the program, and how to recognise one that was started by hand."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from sage_reconcile.core.footprint import Serving
from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes.startup_log import LoggedFootprint
from sage_reconcile.core.shape import ModelShape
from sage_reconcile.core.spec import EngineSpec, needs_gpu

# -m, behind other letters of Python's (`-um`).
_RUNS_MODULE = re.compile(r"-[A-Za-z]*m", re.ASCII)
# How options begin that have no value.
_FLAGS_BEGIN = ("--enable-", "--disable-", "--no-", "--trust-", "--enforce-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recognised:
    """What a command line says of an engine."""

    runtime: str
    kind: str
    model: str
    # None when the command line names none and the program has no fixed default.
    port: int | None


def share_of_device(_argv: tuple[str, ...], placement: Placement) -> str:
    """For a program that is told a share of each device."""
    return f"{placement.memory_fraction} of the device"


def no_remarks(_spec: EngineSpec, _shape: ModelShape | None, _memory_bytes: int) -> tuple[str, ...]:
    """For a program of whose budget there is nothing to say."""
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """One program behind engines, as plain functions."""

    name: str
    # The program that world/programs looks for; empty when the manifest names it.
    program: str
    # How to get the program, for a person who lacks it.
    install_hint: str
    # (spec, the words that start the program, placement, the model's shape if it is known) -> the whole command line.
    argv: Callable[[EngineSpec, tuple[str, ...], Placement, ModelShape | None], tuple[str, ...]]
    # Further environment variables that it needs.
    env: Callable[[EngineSpec, Placement], dict[str, str]]
    # Why this runtime cannot run this spec: sentences, each with the field that it is about.
    complaints: Callable[[EngineSpec], tuple[tuple[str, str], ...]]
    recognise: Callable[[tuple[str, ...]], Recognised | None]
    # How it serves a spec's model, with what its arguments say: all that its memory depends on.
    serving: Callable[[EngineSpec], Serving]
    # Whether it can be told how much memory to use, for a model of this shape.
    tells: Callable[[EngineSpec, ModelShape | None], bool]
    # What its command line tells it of its memory there, in words.
    told: Callable[[tuple[str, ...], Placement], str] = share_of_device
    # (spec, shape, the memory that it is given) -> what a reader of a plan should know of that: sentences on "it".
    remarks: Callable[[EngineSpec, ModelShape | None, int], tuple[str, ...]] = no_remarks
    # What the lines of its log say that it took; None when they do not.
    measured_log: Callable[[Iterable[str]], LoggedFootprint | None]
    # Whether, told how much to use, it takes all of that: then what it takes says nothing of what it needs.
    fills: bool = True
    # Whether it takes all that it is told and keeps its CUDA context beside it.
    budgeted: bool = False
    # (spec, shape, what it is given) -> the part of that which its fraction is about, where that is a share of what is
    # free when it starts; None where it is a share of the whole device.
    static_bytes: Callable[[EngineSpec, ModelShape | None, int], int] | None = None
    # How CUDA_VISIBLE_DEVICES names its devices.
    device_names: Literal["uuid", "index"] = "uuid"
    # Whether tensor_parallel must divide the attention heads, and each stage of a pipeline have a layer.
    splits_heads: bool = False
    # Whether it runs on a slice of a GPU (MIG).
    takes_slices: bool = True
    # Whether a bound, non-listening socket of ours keeps its port free for it: it must set SO_REUSEADDR or REUSEPORT.
    hold: bool = True


def no_env(_spec: EngineSpec, _placement: Placement) -> dict[str, str]:
    """For a program that needs no variables of its own."""
    return {}


def unsupported(spec: EngineSpec, fields: tuple[str, ...], why: str) -> tuple[tuple[str, str], ...]:
    """A complaint for each of the fields that is written."""
    return tuple((field, f"{field}: {why}") for field in fields if field in spec.model_fields_set)


def option(argv: tuple[str, ...], *names: str) -> str | None:
    """The last value of an option, written `--name value` or `--name=value`; None when it is not there."""
    values = list(_values(argv, names))
    return values[-1] if values else None


def _values(argv: tuple[str, ...], names: tuple[str, ...]) -> Iterator[str]:
    for index, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if word in names and index + 1 < len(argv):
            yield argv[index + 1]
        elif equals and name in names:
            yield value


def port_option(argv: tuple[str, ...], *names: str, default: int | None) -> int | None:
    """The port that a command line names, or the program's default."""
    value = option(argv, *names)
    if value is None:
        return default
    return int(value) if value.isascii() and value.isdigit() and len(value) < 6 else None


def base_name(word: str) -> str:
    return word.rsplit("/", 1)[-1]


def program_index(argv: tuple[str, ...], program: str) -> int | None:
    """Where a program stands on a command line: as its first word, or as the script of an interpreter or wrapper."""
    return next((index for index, word in enumerate(argv[:4]) if base_name(word) == program), None)


def module_index(argv: tuple[str, ...], module: str) -> int | None:
    """Where `-m module` has the module's name, after other letters too (`-um`); None when it is not there."""
    pairs = enumerate(zip(argv, argv[1:], strict=False), start=1)
    return next((index for index, (flag, name) in pairs if name == module and _RUNS_MODULE.fullmatch(flag)), None)


def words_of_a_server(argv: tuple[str, ...], program: str, *, server: str, cli: str = "") -> tuple[str, ...] | None:
    """What stands behind `PROGRAM serve`, `python -m CLI serve` or `python -m SERVER`; None when none of them does."""
    alone = module_index(argv, server)
    if alone is not None:
        return argv[alone + 1 :]
    index = module_index(argv, cli) if cli else None
    index = program_index(argv, program) if index is None else index
    if index is None or argv[index + 1 : index + 2] != ("serve",):
        return None
    words = argv[index + 2 :]
    # `grep vllm serve`: the words alone, behind another program, start nothing.
    return words if words or index == 0 or base_name(argv[0]).startswith("python") else None


def positional(words: tuple[str, ...]) -> str | None:
    """The first word that is neither an option nor the value of one, as far as their names tell; None without one."""
    before = ("", *words)
    return next((word for option, word in zip(before, words, strict=False) if _stands_alone(option, word)), None)


def _stands_alone(before: str, word: str) -> bool:
    takes_it = before.startswith("-") and "=" not in before and not before.startswith(_FLAGS_BEGIN)
    return not word.startswith("-") and not takes_it


def device_env(spec: EngineSpec, placement: Placement, numbers: tuple[int, ...] | None = None) -> dict[str, str]:
    """The variables that say which GPUs a process sees: exactly its planned devices, or none.

    `numbers` are those of its devices in PCI order, for a program that knows them so; None names them by UUID. Without
    PCI order a faster GPU may be counted first (CUDA programming guide, CUDA_DEVICE_ORDER).
    """
    assert bool(placement.devices) == needs_gpu(spec)
    chosen = placement.devices if numbers is None else tuple(map(str, numbers))
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(chosen)}


def never_told(_spec: EngineSpec, _shape: ModelShape | None) -> bool:
    """For a program that has no way to be told how much memory to use."""
    return False


def whole_number(words: tuple[str, ...], *names: str, default: int) -> int:
    """The number that an option has on a command line; the default where it has none, or no number."""
    value = option(words, *names)
    return int(value) if value is not None and value.isascii() and value.isdigit() and len(value) < 10 else default


def sequences_at_once(spec: EngineSpec, most: int) -> int:
    """The sequences of full length for which a cache is made: as many as are written to be let through at once.

    Where nobody wrote it, one: with that an engine starts, and others wait for their turn or are short.
    """
    if spec.kind != "llm" or "max_concurrent_requests" not in spec.model_fields_set:
        return 1
    return min(spec.max_concurrent_requests, most)


def told_by_sage(spec: EngineSpec, options: tuple[str, ...], instead: str) -> tuple[tuple[str, str], ...]:
    """A complaint for each option in `args` that sage alone may tell."""
    # Parsers of Python programs take --max_model_len for --max-model-len.
    written = _written(spec) | {_dashed(word) for word in _written(spec)}
    return tuple(("args", f"args: {name} is told by sage; {instead}") for name in options if name in written)


def told_by_fields(spec: EngineSpec, told: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """As told_by_sage, for options with what to write instead of each."""
    return tuple(entry for name, instead in told.items() for entry in told_by_sage(spec, (name,), instead))


def abbreviated(spec: EngineSpec, options: Iterable[str], *, whole: Iterable[str] = ()) -> tuple[tuple[str, str], ...]:
    """A complaint for each word in `args` that argparse takes for one of these options, written shorter.

    It takes any beginning of an option, and the value of one with a single letter may follow at once: -qfp8. `whole`
    are further options of the program, which such a word may be in full.
    """
    names = tuple(options)
    short = {word: _dashed(word) for word in sorted(_written(spec)) if word.strip("-") and word.startswith("-")}
    return tuple(
        ("args", f"args: {word} is short for {name}; write options in full")
        for word, dashed in short.items()
        if dashed not in {*names, *whole}
        for name in names
        if name.startswith(dashed) or (len(name) == 2 and not word.startswith("--") and word.startswith(name))
    )


def uncounted(spec: EngineSpec, numbers: Iterable[str], *, others: Iterable[str] = ()) -> tuple[tuple[str, str], ...]:
    """A complaint for each of these options in `args` without a value that counts; that of `others` is any word."""
    plain, written = tuple(numbers), tuple(_options(spec, (*numbers, *others)))
    return tuple(
        ("args", f"args: {name} {why}")
        for name, value in written
        if (why := _no_value(value) or (_no_number(value) if name in plain else ""))
    )


def one_word(spec: EngineSpec, options: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """A complaint for each of these options in `args` that stands in one word with its value, and is none so."""
    names = set(options)
    heads = ((word, word.partition("=")[0].split()) for word in spec.args)
    return tuple(
        ("args", f'args: "{word}" is one word; write {head[0]} and its value as two, or with = between them')
        for word, head in heads
        if len(head) > 1 and _dashed(head[0]) in names
    )


def _options(spec: EngineSpec, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each of the options in `args`, in the order of the names, with its value; empty when it has none."""
    words = tuple(map(_dashed, spec.args))
    for name in names:
        for index, word in enumerate(words):
            head, equals, value = word.partition("=")
            if head == name:
                yield name, value if equals else "".join(words[index + 1 : index + 2])


def _no_value(value: str) -> str:
    return "has no value" if not value or value.startswith("--") else ""


def _no_number(value: str) -> str:
    plain = value.isascii() and value.isdigit() and len(value) < 10 and int(value) > 0
    return "" if plain else f"{value} cannot be counted; write a whole number from 1 on"


def _written(spec: EngineSpec) -> set[str]:
    """The options in `args`, without values, those too that stand in one word with theirs."""
    return {"".join(word.partition("=")[0].split()[:1]) for word in spec.args}


def _dashed(word: str) -> str:
    return word.replace("_", "-") if word.startswith("--") else word
