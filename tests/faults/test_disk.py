"""Disk, clock and state go wrong: a disk that is full or fails, files that are cut, damaged or of a later sage, a clock
that jumps, power that is cut between two writes. Engines that run go on, and what is not whole is not believed."""

import errno
import fcntl
import http.client
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import sage_reconcile
from sage_reconcile.core.facts import RecordFact, RouterFact
from sage_reconcile.core.journal import (
    ActBegun,
    ActDone,
    ActFailed,
    Entry,
    JournalBegun,
    PlanBegun,
    PlanEnded,
    entry_json,
    last_applied,
    parse_entry,
)
from sage_reconcile.core.label import ENGINE, LEADER, PLACEMENT
from sage_reconcile.core.seal import sealed, unsealed
from sage_reconcile.errors import NewerState
from sage_reconcile.world.journal_file import AppliedRevisions, JournalFile, read_journal
from sage_reconcile.world.records import Records
from sage_reconcile.world.router_files import RouterFile, read_routers
from tests import shims
from tests.builders import identity, the_id
from tests.e2e import Place, fake, kill, place_in, stranger, until
from tests.namespaces import inside, mount
from tests.oracle import Ran, alive, environment, labelled, run_sage, stat_fields, unrecorded

CHAOS = os.environ.get("CHAOS") == "1"

# What the loops over all operations take when nothing is left out.
LONG = pytest.mark.timeout(1800 if CHAOS else 120)

DAY, TEN_YEARS = 86_400, 315_576_000


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shims.disk_library(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def wallclock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shims.wallclock_library(tmp_path_factory.mktemp("wallclock"))


# --- the deeds that are disturbed, and what is on the disk ------------------------------------------------------------

DEEDS = ("first start", "replacement", "down")


def ready_for(deed: str, place: Place, turn: int) -> tuple[str, ...]:
    """Brings about the world before a deed, and gives the words of the command that does it.

    In each turn a replacement is another one.
    """
    if deed == "first start":
        forget_all(place)
        place.write(fake("chat"))
        return ("apply", str(place.manifests), "-y")
    if not place.pids():
        place.write(fake("chat"))
        place.apply()
    if deed == "down":
        return ("down", str(place.manifests), "-y")
    place.write(fake("chat", "--tokens", str(turn)))
    return ("apply", str(place.manifests), "-y")


def forget_all(place: Place) -> None:
    """As if nothing had ever been started here."""
    for pid in place.pids().values():
        kill(pid)
    shutil.rmtree(place.state, ignore_errors=True)


def disturbed(place: Place, words: tuple[str, ...], faults: Mapping[str, str]) -> Ran:
    """A command that may end with any exit code."""
    ran = run_sage(place.state, *words, more_environment=faults)
    place.said.append(ran.stderr)
    return ran


def contents(root: Path) -> dict[str, bytes | None]:
    """Every file and directory below a root, by its path, but for what engines write themselves."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
        if path.suffix != ".log" and path.name != "filler"
    }


def journal_path(place: Place) -> Path:
    return place.state / place.project / "journal.jsonl"


def the_file(place: Place, ending: str) -> Path:
    """The one file of the records of this place with this ending: json or proof."""
    (path,) = (place.state / place.project / "engines").glob(f"*.{ending}")
    return path


def set_aside(place: Place) -> dict[str, bytes]:
    """What was set aside, by the name that it had. Sparse giants are not read."""
    found = (place.state / place.project / "damaged").glob("*")
    return {
        path.name.partition("-")[2]: path.read_bytes() if path.stat().st_size < 1_000_000 else b""
        for path in sorted(found, key=lambda path: int(path.name.partition("-")[0]))
    }


# --- D1: no room ------------------------------------------------------------------------------------------------------

KIB = 1024


def test_d1_full_file_system_refuses_an_apply_and_leaves_what_runs_and_what_is_written(tmp_path: Path) -> None:
    """A real tmpfs, in a mount namespace."""
    inside(("mount",), on_a_small_file_system, str(tmp_path))


def on_a_small_file_system(root: str) -> None:
    with place_in(Path(root)) as place:
        place.state.mkdir(mode=0o700)
        mount("-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(place.state))
        place.write(fake("chat"))
        refused_for_want_of_room(place, "apply")
        assert place.pids() == {}

        # Another one above it: in a user namespace a tmpfs cannot be made larger.
        mount("-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", str(place.state))
        place.apply()
        pids = place.pids()
        place.write(fake("chat", "--tokens", "3"), fake("other"))
        filler = place.state / "filler"
        for left in (0, 4, 16, 64, 256, 900) if CHAOS else (0, 900):
            fill(filler, left * KIB)
            refused_for_want_of_room(place, "apply")
            assert place.pids() == pids
        refused_for_want_of_room(place, "down")
        assert place.pids() == pids
        assert [row["state"] for row in place.status()["engines"]] == ["ready"]

        filler.unlink()
        place.apply()
        assert set(place.pids()) == {"lab/chat", "lab/other"}
        place.assert_at_rest()


def refused_for_want_of_room(place: Place, command: str) -> None:
    before = contents(place.state)
    ran = place.sage(command, str(place.manifests), "-y", expect=12)
    assert "No space left on device" in ran.stderr and "hint: " in ran.stderr
    made = {name for name, content in contents(place.state).items() if content is None} - set(before)
    assert contents(place.state) == before | dict.fromkeys(made), "only empty directories may have come"


def fill(filler: Path, left_bytes: int) -> None:
    """Leave so much room on the file system of the filler, and no more."""
    filler.unlink(missing_ok=True)
    found = os.statvfs(filler.parent)
    with filler.open("wb") as file:
        file.write(b"x" * (found.f_bavail * found.f_frsize - left_bytes))


@LONG
@pytest.mark.parametrize(
    ("deed", "sample"),
    # Where room is proved, a record and a line of the journal written, and a record removed.
    [
        pytest.param("first start", (5, 22, 35), marks=pytest.mark.chaos),
        ("replacement", (8, 28)),
        pytest.param("down", (11, 18, 24), marks=pytest.mark.chaos),
    ],
    ids=DEEDS,
)
def test_d1_disk_that_is_full_from_any_write_on_starts_nothing_unrecorded_and_one_apply_heals_it(
    place: Place, disk: Path, deed: str, sample: tuple[int, ...]
) -> None:
    trace = place.root / "trace"
    for number in numbers(sample):
        words = ready_for(deed, place, number)
        faults = shims.disk_faults(disk, place.state, fail_from=number, error=errno.ENOSPC, trace=trace)
        if not disturbed_and_healed(place, words, faults, number, "No space left on device"):
            break


def numbers(sample: tuple[int, ...]) -> Iterator[int]:
    """The numbers of the operations that shall fail: all, as long as there are any, or a sample."""
    return iter(range(1, 1000)) if CHAOS else iter(sample)


def disturbed_and_healed(
    place: Place, words: tuple[str, ...], faults: Mapping[str, str], number: int, strerror: str
) -> bool:
    """A command whose writes to the state fail, then one that has a disk again. Whether it reached the failing one."""
    journal, pids = read(journal_path(place)), place.pids()

    ran = disturbed(place, words, faults)

    trace = Path(faults["SHIM_TRACE"])
    reached = [op for op in shims.read_trace(trace) if op.number == number]
    trace.unlink()
    # Nothing but writes to the state went wrong, so they are the cause of whatever was not done.
    assert ran.code in (0, 12), f"operation {number}: {ran.code}\n{ran.stderr}"
    assert ran.code == 0 or (reached and strerror in ran.stderr and "hint: " in ran.stderr), ran.stderr
    assert unrecorded(place.state) == (), f"operation {number}"
    if read(journal_path(place)) == journal:
        assert place.pids() == pids, f"operation {number}: what is in no journal was done"
    place.apply()
    place.assert_at_rest()
    return bool(reached)


def read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


@pytest.mark.parametrize("command", ["apply", "down"])
def test_d1_engine_whose_stop_cannot_be_written_down_goes_on_running(place: Place, command: str) -> None:
    """The disk has room for the journal's line and none for the record's mark: the stop has failed before it began."""
    place.write(fake("chat"))
    place.apply()
    pids = place.pids()
    place.write(fake("chat", "--tokens", "3"))

    place.sage(command, str(place.manifests), "-y", expect=12, **place.failing("record.begin=ENOSPC"))

    assert place.pids() == pids


# An apply that replaces one engine: the lines of the journal after that of the plan, in order.
STOP_BEGINS, STOP_DONE, START_BEGINS, START_DONE, PLAN_ENDED = range(2, 7)


def journal_fails(place: Place, *numbers: int) -> dict[str, str]:
    return place.failing(*(f"journal.opened@{number}=ENOSPC" for number in numbers))


def replacing(place: Place) -> dict[str, int]:
    """Two engines run, and the manifests ask for another `chat`; the pids of those that run."""
    place.write(fake("chat", "--tokens", "2"), fake("other"))
    place.apply()
    place.write(fake("chat", "--tokens", "3"), fake("other"))
    return place.pids()


def tokens_of(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").split("\0")
    return words[words.index("--tokens") + 1]


@pytest.mark.parametrize("number", [pytest.param(STOP_BEGINS, marks=pytest.mark.chaos), STOP_DONE, START_BEGINS])
def test_d1_line_that_does_not_fit_once_ends_in_putting_back_what_ran(place: Place, number: int) -> None:
    pids = replacing(place)

    ran = place.apply(expect=12, **journal_fails(place, number))

    assert "what ran before runs again" in ran.stderr and "journal.jsonl: No space left on device" in ran.stderr
    assert "hint: " in ran.stderr and " down" not in ran.stderr
    assert place.pids().keys() == pids.keys() and place.pids()["lab/other"] == pids["lab/other"]
    assert (place.pids()["lab/chat"] == pids["lab/chat"]) == (number == STOP_BEGINS)
    assert tokens_of(place.pids()["lab/chat"]) == "2"
    healed(place)


@pytest.mark.parametrize("number", [STOP_DONE, START_BEGINS])
def test_d1_disk_that_stays_full_between_a_stop_and_a_start_is_told_with_what_is_down(
    place: Place, number: int
) -> None:
    pids = replacing(place)

    ran = place.apply(expect=12, **journal_fails(place, *range(number, 30)))

    assert "not everything could be put back" in ran.stderr and "No space left on device" in ran.stderr
    assert "down now: lab/chat\n" in ran.stderr and "lab/other" not in ran.stderr
    assert "hint: " in ran.stderr and "the next sage apply starts what is down" in ran.stderr
    assert place.pids() == {"lab/other": pids["lab/other"]} and unrecorded(place.state) == ()
    # Once there is room.
    planned = json.loads(place.sage("plan", str(place.manifests), "-o", "json", "--detailed-exitcode", expect=2).stdout)
    assert [(step["action"], step["engine"]) for step in planned["steps"]] == [("start", "lab/chat")]
    healed(place)


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param((START_DONE,), marks=pytest.mark.chaos),
        pytest.param((PLAN_ENDED,), marks=pytest.mark.chaos),
        (START_DONE, PLAN_ENDED),
    ],
)
def test_d1_apply_that_is_done_and_cannot_be_written_down_says_that_it_is_done(
    place: Place, numbers: tuple[int, ...]
) -> None:
    replacing(place)

    ran = place.apply(expect=12, **journal_fails(place, *numbers))

    assert "applied, but not all of it could be written down" in ran.stderr and "hint: " in ran.stderr
    assert tokens_of(place.pids()["lab/chat"]) == "3"
    pids = place.pids()
    healed(place)
    assert place.pids() == pids


def test_d1_proof_that_does_not_fit_once_ends_in_putting_back_what_ran(place: Place) -> None:
    replacing(place)

    ran = place.apply(expect=12, **place.failing("proof.begin=ENOSPC"))

    assert "what ran before runs again" in ran.stderr and ".proof: No space left on device" in ran.stderr
    assert tokens_of(place.pids()["lab/chat"]) == "2"
    healed(place)


def test_d1_apply_that_is_done_says_so_although_an_old_record_cannot_be_removed(place: Place) -> None:
    place.write(fake("chat"), fake("old"))
    place.apply()
    place.write(fake("chat", "--tokens", "3"))

    ran = place.apply(expect=12, **place.failing("forget.half@2=EIO"))

    assert "applied, but not all of it could be written down" in ran.stderr and "Input/output error" in ran.stderr
    healed(place)


def test_d1_stop_that_was_asked_for_is_told_apart_from_what_the_next_apply_starts(place: Place) -> None:
    place.write(fake("chat"), fake("old"))
    place.apply()
    place.write(fake("chat", "--tokens", "3"))

    # The begins and the ends of both stops fit.
    ran = place.apply(expect=12, **journal_fails(place, *range(6, 30)))

    assert "down now: lab/chat; stopped, as asked for: lab/old\n" in ran.stderr
    assert place.pids() == {}
    healed(place)


def healed(place: Place) -> None:
    """One apply makes it so, and tokens are again what was asked for."""
    place.apply()
    assert tokens_of(place.pids()["lab/chat"]) == "3"
    place.assert_at_rest()


# --- D2: read-only ----------------------------------------------------------------------------------------------------


def test_d2_read_only_state_can_be_looked_at_and_nothing_is_done(tmp_path: Path) -> None:
    """A real read-only mount, in a mount namespace."""
    inside(("mount",), on_a_read_only_mount, str(tmp_path))


def on_a_read_only_mount(root: str) -> None:
    with place_in(Path(root)) as place:
        place.write(fake("chat"))
        place.apply()
        mount("--bind", str(place.state), str(place.state))
        mount("-o", "remount,bind,ro", str(place.state))

        with pytest.raises(OSError, match="Read-only"):
            (place.state / "probe").touch()
        only_looked_at(place, {})

        mount("-o", "remount,bind,rw", str(place.state))


def test_d2_state_whose_every_write_is_refused_can_be_looked_at_and_nothing_is_done(place: Place, disk: Path) -> None:
    """The same by the shim, for users who may make no namespaces; it also shows that a look writes nothing."""
    place.write(fake("chat"))
    place.apply()
    trace = place.root / "trace"
    only_looked_at(place, shims.disk_faults(disk, place.state, fail_from=1, error=errno.EROFS, trace=trace))

    assert {op.path for op in shims.read_trace(trace)} == {place.state / place.project / "engines" / ".writable"}


def only_looked_at(place: Place, faults: Mapping[str, str]) -> None:
    """Looks succeed, deeds are refused, and the engine that runs goes on. The manifests ask for another one then."""
    pids, before = place.pids(), contents(place.state)
    place.write(fake("chat", "--tokens", "3"))

    rows = json.loads(place.sage("status", "-p", place.project, "-o", "json", **faults).stdout)["engines"]
    planned = place.sage("plan", str(place.manifests), "-o", "json", "--detailed-exitcode", expect=2, **faults).stdout
    refused = [place.sage(command, str(place.manifests), "-y", expect=12, **faults) for command in ("apply", "down")]

    assert [(row["id"], row["state"]) for row in rows] == [("lab/chat", "ready")]
    assert [step["action"] for step in json.loads(planned)["steps"]] == ["recreate"]
    assert all("Read-only file system" in ran.stderr and "hint: " in ran.stderr for ran in refused)
    assert (place.pids(), contents(place.state)) == (pids, before)


# --- D3: one operation that fails, or does half -----------------------------------------------------------------------


@LONG
def test_d3_single_operation_that_fails_starts_nothing_unrecorded_and_one_apply_heals_it(
    place: Place, disk: Path
) -> None:
    trace = place.root / "trace"
    # The sync of a directory, the move of the log before, the sync of a line of the journal.
    for deed, sample in zip(DEEDS, [(25,), (24,), (20,)], strict=True):
        for number in numbers(sample):
            words = ready_for(deed, place, number)
            faults = shims.disk_faults(disk, place.state, fail_at=number, error=errno.EIO, trace=trace)
            if not disturbed_and_healed(place, words, faults, number, "Input/output error"):
                break


@pytest.mark.parametrize("longest", [0, 500, 800, 1000] if CHAOS else [800])
def test_d3_file_that_may_not_grow_starts_nothing_unrecorded_and_one_apply_heals_it(place: Place, longest: int) -> None:
    """A real limit (RLIMIT_FSIZE): the write that crosses it does a part, the next one fails with EFBIG."""
    place.write(fake("chat"))

    ran = place.sage(
        *("apply", str(place.manifests), "-y"),
        expect=12,
        before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (longest, longest)),
    )

    assert "File too large" in ran.stderr and "hint: " in ran.stderr
    assert unrecorded(place.state) == () and place.pids() == {}
    place.apply()
    place.assert_at_rest()


def compiled(root: Path) -> list[Path]:
    return sorted(root.glob("sage_reconcile/**/*.pyc"))


def commands_of_a_copy(root: Path, **how: Any) -> Ran:
    """`sage schema` from a copy of the program that no command ran from before: Python compiles its modules."""
    return run_sage(root / "state", "schema", directory=root, more_environment={"PYTHONPATH": str(root)}, **how)


def copy_of_the_program(root: Path) -> None:
    shutil.copytree(
        Path(sage_reconcile.__file__).parent, root / "sage_reconcile", ignore=shutil.ignore_patterns("__pycache__")
    )


@pytest.mark.parametrize("longest", [1024, 6000])
def test_d3_program_that_is_first_run_under_a_limit_runs_afterwards(tmp_path: Path, longest: int) -> None:
    """Python itself keeps what it could write of a compiled module, and fails on it ever after."""
    copy_of_the_program(tmp_path)

    commands_of_a_copy(tmp_path, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (longest, longest)))

    assert commands_of_a_copy(tmp_path).code == 0
    assert len(compiled(tmp_path)) > 10, "with room, modules are compiled once"


def test_d1_program_that_is_first_run_on_a_full_disk_runs_afterwards(tmp_path: Path) -> None:
    """A real tmpfs, in a mount namespace."""
    inside(("mount",), on_a_disk_without_room, str(tmp_path))


def on_a_disk_without_room(root: str) -> None:
    place = Path(root) / "place"
    place.mkdir()
    mount("-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", str(place))
    copy_of_the_program(place)
    # Half of a module fits: which room makes that so depends on the modules.
    for pages in range(6, 10):
        for directory in place.glob("**/__pycache__"):
            shutil.rmtree(directory)
        (place / "filler").unlink(missing_ok=True)
        (place / "filler").write_bytes(bytes(free_bytes(place) - pages * 4096))

        assert [commands_of_a_copy(place).code for _ in range(2)] == [0, 0]


def free_bytes(path: Path) -> int:
    file_system = os.statvfs(path)
    return file_system.f_bavail * file_system.f_frsize


@LONG
def test_d3_write_that_takes_half_at_first_damages_nothing(place: Place, disk: Path) -> None:
    """A short write is no error: the rest is written by another."""
    trace = place.root / "trace"
    # A record, a plan in the journal, a mark in a record.
    for deed, sample in zip(DEEDS, [(22,), (8,), (14,)], strict=True):
        for number in numbers(sample):
            words = ready_for(deed, place, number)
            place.sage(*words, **shims.short_write(disk, place.state, at=number, trace=trace))

            operations = shims.read_trace(trace)
            trace.unlink()
            journal_is_whole(journal_path(place))
            if deed != "down":
                place.assert_at_rest()
            if len(operations) < number:
                break
            assert CHAOS or operations[number - 1].name == "write", "the sample is meant to name writes"


def journal_is_whole(path: Path) -> None:
    assert [line for line in path.read_bytes().splitlines() if parse_entry(line) is None] == []


# --- D4: cut ----------------------------------------------------------------------------------------------------------

CHAT = the_id("lab/chat")
BEGUN = PlanBegun(at=1.0, pid=1, source="/s", digest="d", acts=("start lab/chat",), revision=((CHAT, "{}"),))
ENTRIES: tuple[Entry, ...] = (
    BEGUN,
    ActDone(at=3.0, act=0),
    PlanEnded(at=4.0, outcome="converged"),
    ActFailed(at=5.0, act=0, why="it did"),
)
RECORD = RecordFact(
    engine=CHAT, leader=identity(100), from_start=True, port=8001, phase="draining", log="/l", label=(("SAGE_X", "1"),)
)


def journal_bytes(*entries: Entry) -> bytes:
    return "".join(f"{entry_json(entry)}\n" for entry in (JournalBegun(), *entries)).encode()


def test_d4_journal_that_was_cut_anywhere_keeps_its_beginning_and_is_kept_as_it_was(tmp_path: Path) -> None:
    """Every offset, in this process."""
    whole = journal_bytes(*ENTRIES)
    for end in range(len(whole) + 1):
        root = tmp_path / str(end)
        path = root / "lab" / "journal.jsonl"
        journal = JournalFile(root, "lab")
        path.write_bytes(whole[:end])
        found = read_journal(path)
        assert found == ENTRIES[: len(found)]
        applied = AppliedRevisions(root).read()
        assert applied == last_applied(found)

        told = journal.mend()

        damaged = [one.read_bytes() for one in (root / "lab").glob("damaged/*")]
        is_cut = parse_entry(whole[:end].splitlines()[-1]) is None if end else False
        assert damaged == ([whole[:end]] if is_cut else []), end
        assert bool(told) == is_cut
        assert read_journal(path) == found
        journal.append(ENTRIES[1])
        assert read_journal(path) == (*found, ENTRIES[1])
        journal_is_whole(path)
        shutil.rmtree(root)


def test_d4_record_and_proof_that_were_cut_anywhere_say_nothing_and_are_kept_as_they_were(tmp_path: Path) -> None:
    """Every offset, in this process."""
    for ending in ("json", "proof"):
        for end in range(len(written_record(tmp_path / "whole", ending).read_bytes())):
            root = tmp_path / f"{ending}-{end}"
            path = written_record(root, ending)
            cut = path.read_bytes()[:end]
            path.write_bytes(cut)
            # Without the line's end it still says all that it said.
            says_nothing = unsealed(cut) is None
            without = () if ending == "json" else (RECORD,)
            assert Records(root).read() == (without if says_nothing else (replace(RECORD, proved=True),))

            told = Records(root).mend("lab")

            assert bool(told) == says_nothing, (ending, end)
            assert [one.read_bytes() for one in root.glob("lab/damaged/*")] == ([cut] if says_nothing else [])
            assert Records(root).mend("lab") == ()
            shutil.rmtree(root)


def written_record(root: Path, ending: str) -> Path:
    records = Records(root)
    records.write(RECORD)
    records.write_proof(CHAT, RECORD.leader, failure="")
    (path,) = root.glob(f"lab/engines/*.{ending}")
    return path


@LONG
def test_d4_apply_sets_a_cut_file_aside_and_leaves_its_engine_alone(place: Place) -> None:
    place.write(fake("chat"))
    place.apply()
    pids = place.pids()
    paths = (journal_path(place), the_file(place, "json"), the_file(place, "proof"))
    for part in (0.0, 0.1, 0.5, 0.9, 1.0) if CHAOS else (0.0, 0.5, 1.0):
        for several in [paths, *([path] for path in paths if CHAOS)]:
            whole = {path: path.read_bytes() for path in several}
            # All of it is less the end of the last line, and the letter before.
            cut = {path: text[: int(part * (len(text) - 2))] for path, text in whole.items()}
            for path, text in cut.items():
                path.write_bytes(text)

            place.apply()

            assert place.pids() == pids
            for path, text in cut.items():
                # A journal of no lines is one that was not begun yet.
                assert set_aside(place).get(path.name, b"") == text
                path.write_bytes(whole[path])
    place.assert_at_rest()


# --- D5: damaged ------------------------------------------------------------------------------------------------------


def test_d5_journal_with_any_byte_changed_tells_nothing_that_was_not_written(tmp_path: Path) -> None:
    """Every byte, in this process: one bit of it, and all of it."""
    whole = journal_bytes(*ENTRIES)
    path = tmp_path / "lab" / "journal.jsonl"
    path.parent.mkdir()
    for damaged in with_a_byte_changed(whole):
        path.write_bytes(damaged)
        found = read_journal(path)
        # A line break that is gone, or came, takes two lines with it.
        assert len(ENTRIES) - 2 <= len(found) <= len(ENTRIES)
        assert all(entry in ENTRIES for entry in found)
        AppliedRevisions(tmp_path).read()


def test_d5_record_with_any_byte_changed_says_nothing_that_was_not_written(tmp_path: Path) -> None:
    """Every byte, in this process: one bit of it, and all of it."""
    for ending in ("json", "proof"):
        path = written_record(tmp_path / ending, ending)
        said = (replace(RECORD, proved=True),) if ending == "json" else (RECORD, replace(RECORD, proved=True))
        for damaged in with_a_byte_changed(path.read_bytes()):
            path.write_bytes(damaged)
            assert all(record in said for record in Records(tmp_path / ending).read())
            assert Records(tmp_path / ending).newer() == ()


def test_d5_router_file_with_any_byte_changed_hides_no_router(tmp_path: Path) -> None:
    """Every byte, in this process: one bit of it, and all of it."""
    mine = RouterFile(tmp_path)
    mine.write(RouterFact(pid=os.getpid(), drained_from=(identity(100),), in_flight=((identity(100), 2),)))
    try:
        (path,) = (tmp_path / "routers").glob("*.json")
        for damaged in with_a_byte_changed(path.read_bytes()):
            path.write_bytes(damaged)
            assert len(read_routers(tmp_path)) == 1
    finally:
        mine.close()


def with_a_byte_changed(whole: bytes) -> Iterator[bytes]:
    for position, byte in enumerate(whole):
        for change in range(1, 256) if CHAOS else (1 << position % 8, 0xFF):
            yield whole[:position] + bytes([byte ^ change]) + whole[position + 1 :]


GIB = 1024**3
MOST_KIB = 300 * KIB


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(path.suffix).randbytes(5000))


def zeros(path: Path) -> None:
    path.write_bytes(bytes(max(1, path.stat().st_size)))


def sparse(path: Path) -> None:
    os.truncate(path, GIB)


def one_letter(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + b"?" + whole[len(whole) // 2 + 1 :])


@LONG
def test_d5_files_that_were_damaged_stop_no_command_and_no_engine(place: Place) -> None:
    """Journal, record, proof, the lock and the file of a live router, at once; with CHAOS each by itself as well."""
    place.write(fake("chat"))
    place.apply()
    pids = place.pids()
    with live_router(place) as router:
        lock = place.state.with_name("lock")
        every = [journal_path(place), the_file(place, "json"), the_file(place, "proof"), lock, router]
        whole = {path: path.read_bytes() for path in every}
        for damage in (garbage, zeros, sparse, *((one_letter,) if CHAOS else ())):
            for paths in [every, *([path] for path in every if CHAOS)]:
                for path in paths:
                    if (path, damage) != (router, sparse):  # See below.
                        damage(path)

                cheap_and_fine(place, "status")
                cheap_and_fine(place, "plan", str(place.manifests))
                cheap_and_fine(place, "apply", str(place.manifests), "-y")

                assert place.pids() == pids
                # A router writes its file anew, and a lock is only a name.
                assert {path.name for path in paths} - set(set_aside(place)) <= {lock.name, router.name}
                shutil.rmtree(place.state / place.project / "damaged", ignore_errors=True)
                for path in paths:
                    path.write_bytes(whole[path])
    place.assert_at_rest()


def test_d5_giant_file_of_a_live_router_costs_no_memory(place: Place) -> None:
    with live_router(place) as router:
        sparse(router)

        cheap_and_fine(place, "status")


@contextmanager
def live_router(place: Place) -> Iterator[Path]:
    """The file of a router that holds its lock, as this process does meanwhile."""
    path = place.state / "routers" / f"{os.getpid()}.json"
    path.parent.mkdir(mode=0o700, parents=True)
    path.write_text(json.dumps({"pid": os.getpid()}), encoding="utf-8")
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path
    shutil.rmtree(path.parent)


def cheap_and_fine(place: Place, *words: str) -> None:
    """A command that ends with 0, soon, and without much memory."""
    weighed = weigh(place, *words)
    assert weighed.code == 0, f"{words[0]}: {weighed.said}"
    assert weighed.most_kib < MOST_KIB, f"{words[0]} took {weighed.most_kib} KiB"
    assert weighed.seconds < 10, f"{words[0]} took {weighed.seconds:.0f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """A command that has ended, and the most memory that it had."""

    code: int
    said: str
    most_kib: int
    seconds: float


# The most that a process had is kept when it becomes another program, and at its start it shares the memory of the one
# that starts it. A worker of pytest may have had a lot: so a small process starts the command, and tells.
_SCALES = """
import os, sys
_, status, usage = os.wait4(os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, *sys.argv[1:]]), 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status) % 256)
"""


def weigh(place: Place, *words: str) -> Weighed:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-ISc", _SCALES, "-m", "sage_reconcile", *words],
        cwd=place.root,
        env=environment(place.state),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    place.said.append(done.stderr)
    seconds = time.monotonic() - began
    most_kib = int(done.stdout.splitlines()[-1])
    return Weighed(code=done.returncode, said=done.stderr, most_kib=most_kib, seconds=seconds)


# --- D6: of a newer sage ----------------------------------------------------------------------------------------------


def make_newer(path: Path) -> None:
    """What a later version would write there, in the form that all versions share."""
    if path.name == "journal.jsonl":
        first = '{"entry":"journal_begun","format":2,"of_the_future":true}'
        rest = path.read_text(encoding="utf-8").partition("\n")[2]
        path.write_text(f"{sealed(first)}\n{rest}", encoding="utf-8")
        return
    fields = unsealed(path.read_bytes().strip())
    assert fields is not None
    path.write_text(sealed(json.dumps(fields | {"format": 2, "of_the_future": True})) + "\n", encoding="utf-8")


def test_d6_state_of_a_newer_sage_is_refused_left_as_it_is_and_told_by_status(place: Place) -> None:
    place.write(fake("chat"))
    place.apply()
    pids = place.pids()
    place.write(fake("chat", "--tokens", "3"))
    for path in (journal_path(place), the_file(place, "json"), the_file(place, "proof")):
        whole = path.read_bytes()
        make_newer(path)
        before = contents(place.state)

        verbs = (("apply", "-y"), ("plan",), ("down", "-y"))
        refused = [
            place.sage(*words, str(place.manifests), expect=3)
            for words in (verbs if CHAOS or path.suffix == ".json" else verbs[:1])
        ]
        told = place.status()

        for ran in refused:
            assert str(path) in ran.stderr and "newer" in ran.stderr and "hint: " in ran.stderr
        assert [row["pid"] for row in told["engines"]] == list(pids.values())
        if path != journal_path(place):  # See below.
            assert [gap["why"] for gap in told["gaps"] if str(path) in gap["why"]] != []
        assert contents(place.state) == before
        assert place.pids() == pids
        path.write_bytes(whole)


def test_d6_status_says_that_it_could_not_read_the_journal_of_a_newer_sage(place: Place) -> None:
    JournalFile(place.state, place.project).append(BEGUN)
    make_newer(journal_path(place))

    told = place.status()

    journal_path(place).unlink()
    assert [gap["why"] for gap in told["gaps"] if str(journal_path(place)) in gap["why"]] != []


def test_d6_nothing_is_mended_beside_the_file_of_a_newer_sage(place: Place) -> None:
    place.write(fake("chat"))
    JournalFile(place.state, place.project).append(BEGUN)
    make_newer(journal_path(place))
    damaged = place.state / place.project / "engines" / "lab@chat@0@1-1.json"
    damaged.parent.mkdir(mode=0o700)
    damaged.write_bytes(b"garbage")

    ran = place.apply(expect=3)

    is_there = damaged.exists()
    journal_path(place).unlink()
    assert str(place.state) in ran.stderr
    assert is_there


def test_d6_mending_refuses_what_a_newer_sage_wrote(tmp_path: Path) -> None:
    for ending in ("json", "proof"):
        make_newer(written_record(tmp_path / ending, ending))
        with pytest.raises(NewerState):
            Records(tmp_path / ending).mend("lab")
    path = tmp_path / "lab" / "journal.jsonl"
    journal = JournalFile(tmp_path, "lab")
    path.write_bytes(journal_bytes(*ENTRIES))
    make_newer(path)
    before = path.read_bytes()
    with pytest.raises(NewerState):
        journal.mend()
    assert path.read_bytes() == before


# --- D7: the wall clock -----------------------------------------------------------------------------------------------


def test_d7_wall_clock_that_is_wrong_restarts_nothing_and_is_told_as_it_is(place: Place, wallclock: Path) -> None:
    place.write(fake("chat"))
    place.apply()
    pids = place.pids()
    (uptime,) = [row["uptime_seconds"] for row in place.status()["engines"]]

    for seconds in (DAY, -DAY, TEN_YEARS, -TEN_YEARS):
        wrong = shims.clock(wallclock, seconds=seconds)
        planned = place.sage("plan", str(place.manifests), "-o", "json", "--detailed-exitcode", **wrong).stdout
        assert json.loads(planned)["steps"] == []
        if CHAOS or abs(seconds) == TEN_YEARS:
            place.apply(**wrong)
            told = json.loads(place.sage("status", "-p", place.project, "-o", "json", **wrong).stdout)
            (row,) = told["engines"]
            assert row["state"] == "ready" and uptime <= row["uptime_seconds"] < uptime + 60
            assert abs(int(told["observed_at"][:4]) - time.gmtime(time.time() + seconds).tm_year) <= 1
    (line,) = place.sage("status", "-p", place.project, "--color", "never", **wrong).stdout.splitlines()[1:2]

    assert line.split()[:2] == ["lab/chat", "ready"]
    assert place.pids() == pids
    place.assert_at_rest()


@pytest.mark.parametrize("seconds", [TEN_YEARS, -TEN_YEARS] if CHAOS else [TEN_YEARS])
def test_d7_engine_that_was_started_under_a_wrong_clock_is_as_any_other_once_it_is_right(
    place: Place, wallclock: Path, seconds: int
) -> None:
    place.write(fake("chat"))
    place.apply(**shims.clock(wallclock, seconds=seconds))
    pids = place.pids()

    (row,) = place.status()["engines"]
    place.apply()

    assert row["state"] == "ready" and 0 <= row["uptime_seconds"] < 60
    assert place.pids() == pids
    kill(pids["lab/chat"])
    (row,) = place.status()["engines"]
    assert (row["state"], row["reason"]) == ("missing", f"pid {pids['lab/chat']} is gone")
    place.apply()
    assert place.engines()["lab/chat"]["restarts"] == 1


def test_d7_clock_that_jumps_while_an_engine_is_waited_for_ends_the_wait_neither_early_nor_late(
    place: Place, wallclock: Path
) -> None:
    place.write(fake("chat", "--ready-after", "1"))
    clock = place.root / "clock"
    wrong = shims.clock(wallclock, file=clock)
    with place.started("apply", str(place.manifests), "-y", "--timeout", "30s", **wrong) as process:
        until(place.pids, "the engine is started")
        shims.set_clock(clock, TEN_YEARS)
        time_to_see_it(place)
        shims.set_clock(clock, -TEN_YEARS)
        assert process.wait(20) == 0, process.communicate()[1]
    place.assert_at_rest()


def test_d7_clock_that_is_set_back_while_an_engine_is_waited_for_in_vain_does_not_make_it_wait_on(
    place: Place, wallclock: Path
) -> None:
    place.write(fake("chat", "--never-ready"))
    clock = place.root / "clock"
    wrong = shims.clock(wallclock, file=clock)
    with place.started("apply", str(place.manifests), "-y", "--timeout", "1s", **wrong) as process:
        until(place.pids, "the engine is started")
        shims.set_clock(clock, -TEN_YEARS)
        assert process.wait(15) == 5
        assert "not ready after 1 s" in process.communicate()[1]
    assert place.pids() == {}


def time_to_see_it(place: Place) -> None:
    """Until the engine was looked at a few times more."""
    (pid,) = place.pids().values()
    port = place.homes()["lab/chat"]

    def requests() -> int:
        return int(asked(port)["requests"])

    assert alive(pid)
    first = until(requests, "the engine is asked")
    until(lambda: requests() > first + 1, "the engine is asked again")


def asked(port: int) -> dict[str, Any]:
    """What the engine on a port says that it has seen; nothing as long as it does not listen."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/fake/state")
        found: dict[str, Any] = json.loads(connection.getresponse().read())
    except OSError:
        return {"requests": 0}
    finally:
        connection.close()
    return found


# --- D8: not ours alone -----------------------------------------------------------------------------------------------

NOBODY = 65534
EVERY_VERB = (("status",), ("plan",), ("apply", "-y"), ("down", "-y"))


def test_d8_state_that_is_not_ours_alone_is_refused_and_makes_nobody_an_engine(place: Place) -> None:
    """Somebody else's is, for an ordinary user, a directory of root's."""
    place.write(fake("chat"))
    place.apply()
    pids = place.pids()
    with stranger("/bin/sleep", "60") as innocent:
        planted = plant(place, innocent.pid, place.state / place.project)
        assert innocent.pid in {row["pid"] for row in place.status()["engines"]}, "the plant would be believed"
        for spoilt, why in (
            (open_to_all, "others may write"),
            (a_symlink, "not a directory of yours"),
            (of_somebody_else, "not a directory of yours"),
        ):
            with spoilt(place) as root:
                for words in EVERY_VERB if CHAOS or spoilt is open_to_all else EVERY_VERB[-2:]:
                    paths = () if words[0] == "status" else (str(place.manifests),)
                    ran = place.sage(*words, *paths, expect=12, SAGE_STATE_DIR=str(root))
                    assert f"cannot use {root}: " in ran.stderr and why in ran.stderr
        assert innocent.poll() is None
        planted.unlink()
    assert place.pids() == pids


@contextmanager
def open_to_all(place: Place) -> Iterator[Path]:
    place.state.chmod(0o777)
    yield place.state
    place.state.chmod(0o700)


@contextmanager
def a_symlink(place: Place) -> Iterator[Path]:
    away = place.state.with_name("away")
    place.state.rename(away)
    place.state.symlink_to(away)
    yield place.state
    place.state.unlink()
    away.rename(place.state)


@contextmanager
def of_somebody_else(place: Place) -> Iterator[Path]:
    if os.getuid() != 0:
        yield Path("/")
        return
    os.chown(place.state, NOBODY, NOBODY)
    yield place.state
    os.chown(place.state, 0, 0)


def plant(place: Place, pid: int, project: Path) -> Path:
    """A record, below a project's directory, that says of a process that it is an engine of this place."""
    (true,) = [record for record in Records(place.state).read() if record.engine.project == place.project]
    ticks = int(stat_fields(pid)[19])
    label = dict(true.label)
    _, _, namespace = label[LEADER].split(":")
    resolved = json.loads(label[PLACEMENT])
    resolved["placement"]["port"] = place.spare[0]
    label |= {LEADER: f"{pid}:{ticks}:{namespace}", ENGINE: "lab/planted", PLACEMENT: json.dumps(resolved)}
    record = replace(
        true,
        engine=replace(true.engine, name="planted"),
        leader=replace(true.leader, pid=pid, start_ticks=ticks),
        label=tuple(sorted(label.items())),
    )
    Records(place.root / "made").write(record)
    (made,) = (place.root / "made").glob("*/engines/*.json")
    (project / "engines").mkdir(parents=True, exist_ok=True)
    return made.rename(project / "engines" / made.name)


def test_d8_record_in_a_directory_below_that_others_may_write_to_makes_nobody_an_engine(place: Place) -> None:
    """The root may be looked into and is closed to writers; the directory of another project in it is open to all."""
    place.write(fake("chat"))
    place.apply()
    place.state.chmod(0o755)
    opened = place.state / "opened"
    with stranger("/bin/sleep", "60") as innocent:
        plant(place, innocent.pid, opened)
        opened.chmod(0o777)

        disturbed(place, ("down", str(place.manifests), "-y"), {})

        shutil.rmtree(opened)
        assert innocent.poll() is None


# --- D9: power that is cut --------------------------------------------------------------------------------------------


@LONG
def test_d9_every_state_that_a_power_cut_could_leave_is_sound(place: Place, disk: Path, tmp_path: Path) -> None:
    """Simulated from the trace of a real first start, a replacement and a stop.

    What was synced is there, what was put in place whole is whole, and a process that was released, or marked to be
    stopped, has its act in the journal.
    """
    trace, before = tmp_path / "trace", tmp_path / "before"
    for turn, deed in enumerate(DEEDS, start=2):
        words = ready_for(deed, place, turn)
        begin_from(place, before)
        place.sage(*words, **shims.disk_faults(disk, place.state, trace=trace))
        operations = shims.read_trace(trace)
        assert len(operations) > 20

        story = Story(place, before, operations)
        states = shims.crash_states(operations, place.state, tmp_path / "states", before=before)
        seen = 0
        for what, state in states:
            seen += 1
            story.check(int(what.split()[1]), state, f"{deed}, {what}")
        assert seen > len(operations)
        trace.unlink()


class Story:
    """What a command did to the journal and to the records, and what may be found of that after each operation."""

    def __init__(self, place: Place, before: Path, operations: tuple[shims.Operation, ...]) -> None:
        self._under = place.state.resolve()
        self._journal = f"{place.project}/journal.jsonl"
        # By the path below the root: what was put there as a whole, and from the end of which operation on it may be.
        self._versions: dict[str, list[tuple[int, bytes]]] = {
            str(path.relative_to(before)): [(-1, path.read_bytes())]
            for path in before.rglob("*")
            if path.parent.name == "engines"
        }
        # By the path below the root: from where on an earlier version than the one put there last is wrong.
        self._kept: dict[str, list[tuple[int, int]]] = {name: [(-1, -1)] for name in self._versions}
        self._forgotten: dict[str, int] = {}
        # From where on the journal begins so.
        self._promised: list[tuple[int, bytes]] = [(-1, read(before / self._journal))]
        self._follow(operations)

    def _follow(self, operations: tuple[shims.Operation, ...]) -> None:
        written: dict[str, bytes] = {self._journal: self._promised[0][1]}
        for position, op in enumerate(operations):
            name = str(op.path.relative_to(self._under)) if op.path else ""
            if op.result < 0:
                continue
            match op.name:
                case "open" if op.created or op.truncated:
                    written[name] = b""
                case "write":
                    written[name] = written.get(name, b"") + op.written
                case "fdatasync" if name == self._journal:
                    self._promised.append((position, written[name]))
                case "rename" if op.to is not None and op.to.parent.name == "engines":
                    put = str(op.to.relative_to(self._under))
                    self._versions.setdefault(put, []).append((position, written[name]))
                    if put.endswith(".proof"):  # What answered had been released, so its record had to be there.
                        record = put.removesuffix("proof") + "json"
                        self._kept.setdefault(record, []).append((position, self._versions[record][-1][0]))
                case "fsync" if op.path is not None and op.path.name == "engines":
                    for put, versions in self._versions.items():
                        self._kept.setdefault(put, []).append((position, versions[-1][0]))
                case "unlink" if name in self._versions:
                    self._forgotten[name] = position

    def check(self, done: int, state: Path, what: str) -> None:
        """All that must hold in a state after so many operations."""
        records = Records(state).read()
        entries = read_journal(state / self._journal)
        AppliedRevisions(state).read()
        assert Records(state).newer() == (), what
        assert len({record.leader for record in records}) == len(records), what
        promised = [text for position, text in self._promised if position < done][-1]
        assert read(state / self._journal).startswith(promised), f"{what}: lines that were synced are lost"
        self._check_records(done, state, what)
        self._check_acts(done, records, entries, what)

    def _check_records(self, done: int, state: Path, what: str) -> None:
        there = {str(path.relative_to(state)) for path in state.rglob("engines/*") if not path.name.startswith(".")}
        for name in there | set(self._versions):
            oldest = max((put for position, put in self._kept.get(name, []) if position < done), default=None)
            possible = [text for put, text in self._versions[name] if put < done and (oldest is None or put >= oldest)]
            if name in there:
                assert (state / name).read_bytes() in possible, f"{what}: {name} is torn, or an older one"
            elif oldest is not None:
                assert self._forgotten.get(name, done) < done, f"{what}: {name} was in place, and is lost"

    def _check_acts(self, done: int, records: tuple[RecordFact, ...], entries: tuple[Entry, ...], what: str) -> None:
        """No process without its start, no mark without its stop."""
        begun: set[str] = set()
        acts: tuple[str, ...] = ()
        for entry in entries:
            if isinstance(entry, PlanBegun):
                acts = entry.acts
            elif isinstance(entry, ActBegun):
                begun.add(" ".join(acts[entry.act].split()[:2]))
        for record in records:
            assert f"start {record.engine}" in begun, f"{what}: {record.engine} is on record and was never begun"
            if record.phase:
                assert f"stop {record.engine}" in begun, f"{what}: {record.engine} is {record.phase} for no act"


@LONG
@pytest.mark.parametrize(
    ("deed", "sample"),
    # Before the gate opens, and once it was opened; with a mark in place, and before another gate opens; after a stop.
    [("first start", (25, 27)), pytest.param("replacement", (18, 31), marks=pytest.mark.chaos), ("down", (21,))],
    ids=DEEDS,
)
def test_d9_apply_converges_from_what_a_power_cut_could_leave(
    place: Place, disk: Path, tmp_path: Path, deed: str, sample: tuple[int, ...]
) -> None:
    """sage dies before an operation; then its state is made one that a power cut could have left at that moment.

    What runs is what really ran then, or nothing, as after a cut; only the boot is the same one.
    """
    trace, before = tmp_path / "trace", tmp_path / "before"
    for number in range(1, 1000, 2) if CHAOS else sample:
        words = ready_for(deed, place, number)
        begin_from(place, before)
        ran = disturbed(place, words, shims.disk_faults(disk, place.state, kill_at=number, trace=trace))
        if ran.code >= 0:
            assert ran.code == 0 and CHAOS, "the sample is meant to name operations that there are"
            break
        until(lambda: not at_the_gate(place), "the gate is closed")
        if number % 4 == 1:
            for pid in place.pids().values():
                kill(pid)
        pids = place.pids()
        cut_power(place, shims.read_trace(trace), before, tmp_path / "states", choice=number // 4)

        place.apply()

        place.assert_at_rest()
        if deed == "first start" and pids:
            assert place.pids() == pids
        trace.unlink(missing_ok=True)


def begin_from(place: Place, before: Path) -> None:
    """Keep what the disk holds before a command."""
    shutil.rmtree(before, ignore_errors=True)
    if place.state.exists():
        shutil.copytree(place.state, before)
    else:
        before.mkdir(mode=0o700)


def at_the_gate(place: Place) -> bool:
    return any(process.leader == "" for process in labelled(place.root))


def cut_power(place: Place, operations: tuple[shims.Operation, ...], before: Path, into: Path, *, choice: int) -> None:
    """Put one of the states in place that a cut after the last of the operations could leave."""
    possible = [
        shutil.copytree(state, into.with_name(f"possible-{done}"))
        for done, state in enumerate(
            state
            for what, state in shims.crash_states(operations, place.state, into, before=before)
            if int(what.split()[1]) == len(operations)
        )
    ]
    shutil.rmtree(place.state, ignore_errors=True)
    possible[choice % len(possible)].rename(place.state)
    for left in possible:
        shutil.rmtree(left, ignore_errors=True)
