"""What is on the disk: whole or not there, ours alone, and only ever a hint."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sage_reconcile.core.facts import RecordFact, RouterFact
from sage_reconcile.core.journal import ActDone, Entry, PlanBegun, PlanEnded, last_applied
from sage_reconcile.core.seal import sealed
from sage_reconcile.errors import Environment, Locked
from sage_reconcile.world.journal_file import AppliedRevisions, JournalFile, read_journal
from sage_reconcile.world.lock import lock_paths, locked
from sage_reconcile.world.records import Records
from sage_reconcile.world.router_files import RouterFile, read_routers
from sage_reconcile.world.state import private_directory, state_root
from tests.builders import identity, the_id
from tests.e2e import until
from tests.oracle import stat_fields
from tests.world.test_models import read_bytes

CHAT = the_id("lab/chat")
RECORD = RecordFact(engine=CHAT, leader=identity(100), from_start=True, port=8001, phase="draining", log="/l")


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.write(RECORD)
    assert records.read() == (RECORD,)
    records.write_proof(CHAT, identity(100), failure="")
    assert records.read()[0].proved
    records.write_proof(CHAT, identity(100), failure="answers 404")
    assert (records.read()[0].proved, records.read()[0].proof_failure) == (False, "answers 404")
    records.forget(CHAT, identity(100))
    assert records.read() == ()
    assert list((tmp_path / "lab" / "engines").iterdir()) == []


def test_a_proof_counts_where_the_record_was_lost(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.write_proof(CHAT, identity(100), failure="")
    (record,) = records.read()
    assert (record.proved, record.from_start) == (True, False)


def test_a_damaged_record_says_nothing_and_stops_nobody(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.write(RECORD)
    (path,) = (tmp_path / "lab" / "engines").glob("*.json")
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert records.read() in ((), (RECORD,))
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + b"\xff" + whole[position + 1 :])
        records.read()


def test_files_and_directories_are_closed_to_others(tmp_path: Path) -> None:
    os.umask(0o000)
    try:
        Records(tmp_path / "state").write(RECORD)
    finally:
        os.umask(0o022)
    for path in (tmp_path / "state").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(Environment, match="others may write"):
        private_directory(tmp_path / "open")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(Environment, match="not a directory of yours"):
        private_directory(tmp_path / "link")


def test_the_state_root_follows_the_environment(tmp_path: Path) -> None:
    assert state_root({"SAGE_STATE_DIR": "/s", "XDG_STATE_HOME": "/x", "HOME": "/h"}) == Path("/s")
    assert state_root({"XDG_STATE_HOME": "/x", "HOME": "/h"}) == Path("/x/sage")
    assert state_root({"HOME": "/h"}) == Path("/h/.local/state/sage")


# --- journal ----------------------------------------------------------------------------------------------------------

BEGUN = PlanBegun(at=1.0, pid=1, source="/s", digest="d", acts=("start lab/chat",), revision=((CHAT, "{}"),))
ENTRIES: tuple[Entry, ...] = (BEGUN, ActDone(at=2.0, act=0), PlanEnded(at=3.0, outcome="converged"))


def test_a_journal_that_was_cut_anywhere_gives_a_prefix_and_takes_the_next_entry(tmp_path: Path) -> None:
    journal = JournalFile(tmp_path, "lab")
    for entry in ENTRIES:
        journal.append(entry)
    path = tmp_path / "lab" / "journal.jsonl"
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        journal.append(ENTRIES[0])
        found = journal.entries()
        assert found[-1] == ENTRIES[0]
        assert found[:-1] == ENTRIES[: len(found) - 1]


def test_an_end_whose_beginning_was_lost_applies_nothing(tmp_path: Path) -> None:
    older = PlanBegun(at=0.0, pid=1, source="/s", digest="d", acts=(), revision=())
    ended = PlanEnded(at=3.0, outcome="converged")
    assert last_applied((older, ended, ended)) == ()
    assert [fact.engine for fact in last_applied((older, ended, *ENTRIES, ended))] == [CHAT]


def test_garbage_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(os.urandom(4096) + b"\n{}\n[1]\nnull\n")
    assert read_journal(tmp_path / "j") == ()


def test_what_was_read_of_a_journal_is_not_read_again(tmp_path: Path) -> None:
    """2026-11-25: each look of an apply parsed all that ever happened: a thousand applies later, four times as long."""
    journal, reader = JournalFile(tmp_path, "lab"), AppliedRevisions(tmp_path)
    for number in range(300):
        for entry in (replace(BEGUN, at=float(number)), *ENTRIES[1:]):
            journal.append(entry)
    assert [fact.engine for fact in reader.read()] == [CHAT]
    size = (tmp_path / "lab" / "journal.jsonl").stat().st_size

    for _ in range(10):
        journal.append(ENTRIES[1])
        before = read_bytes()
        assert [fact.engine for fact in reader.read()] == [CHAT]
        assert read_bytes() - before < size / 10


def test_a_reader_that_goes_on_tells_what_one_that_begins_does(tmp_path: Path) -> None:
    """Whatever happens in between: it grows, is cut, written over, put in place anew, or is of a newer sage."""
    path = tmp_path / "lab" / "journal.jsonl"
    journal = JournalFile(tmp_path, "lab")
    other = replace(BEGUN, revision=((the_id("lab/other"), "{}"),))
    choices = (
        BEGUN,
        other,
        ActDone(at=2.0, act=0),
        PlanEnded(at=3.0, outcome="converged"),
        PlanEnded(at=4.0, outcome="stuck"),
    )
    for seed in range(40):
        rng = random.Random(seed)
        reader = AppliedRevisions(tmp_path)
        for _ in range(30):
            whole = path.read_bytes() if path.exists() else b""
            match rng.randrange(12):
                case 0:
                    path.write_bytes(whole[: rng.randrange(len(whole) + 1)])
                case 1 if whole:
                    place = rng.randrange(max(len(whole) - 100, 0), len(whole))
                    path.write_bytes(whole[:place] + bytes([rng.randrange(256)]) + whole[place + 1 :])
                case 2:
                    path.with_name("new").write_bytes(whole[len(whole) // 2 :])
                    path.with_name("new").replace(path)
                case 3:
                    path.unlink(missing_ok=True)
                case 4 if rng.random() < 0.2:
                    with path.open("ab") as file:
                        file.write(sealed('{"format":99,"entry":"journal_begun"}').encode() + b"\n")
                case _:
                    for _ in range(rng.randrange(1, 4)):
                        journal.append(rng.choice(choices))
            fresh = AppliedRevisions(tmp_path)
            assert (reader.read(), reader.newer()) == (fresh.read(), fresh.newer()), f"seed {seed}"
        path.unlink(missing_ok=True)


# --- lock -------------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from sage_reconcile.world.lock import locked
with locked((Path(sys.argv[1]),), purpose="test"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_held_lock_names_its_holder_and_is_free_when_it_dies(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    began = time.monotonic()
    with pytest.raises(Locked, match=f"pid {holder.pid} "), locked((path,), purpose="mine"):
        pass
    assert time.monotonic() - began < 1
    holder.kill()
    holder.wait()
    with locked((path,), purpose="mine"):
        assert str(os.getpid()) in path.read_text()


def test_a_process_that_was_started_under_the_lock_does_not_hold_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked((path,), purpose="mine"):
        child = subprocess.Popen(["/bin/sleep", "60"])
    try:
        with locked((path,), purpose="again"):
            pass
    finally:
        child.kill()
        child.wait()


def test_a_lock_file_that_was_removed_under_its_holder_excludes_nobody_twice(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked((path,), purpose="one"):
        path.unlink()
        with locked((path,), purpose="two"), pytest.raises(Locked), locked((path,), purpose="three"):
            pass


def test_a_lock_file_that_was_replaced_between_the_open_and_the_lock_is_nobody_s(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    trace = str(tmp_path / "trace")
    wishes = {"SAGE_TEST": "1", "SAGE_FAILPOINTS": "lock.opened@1=stop", "SAGE_FAILPOINT_TRACE": trace}
    late = subprocess.Popen(
        [sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | wishes
    )
    try:
        until(lambda: stat_fields(late.pid)[:1] == ["T"], "it has opened the file, and stands still")
        path.unlink()
        with locked((path,), purpose="one"):
            late.send_signal(signal.SIGCONT)
            said, why = late.communicate(timeout=20)
            assert (said, f"pid {os.getpid()} " in why.decode()) == (b"", True)
    finally:
        late.kill()
        late.wait()


def test_a_login_and_cron_exclude_each_other(tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    login, cron = lock_paths({"XDG_RUNTIME_DIR": str(runtime)}), lock_paths({})
    assert set(cron) <= set(login)
    assert lock_paths({"SAGE_LOCK_FILE": "/x", "XDG_RUNTIME_DIR": str(runtime)}) == (Path("/x"),)


# --- routers ----------------------------------------------------------------------------------------------------------


def test_a_live_router_is_heard_and_a_dead_one_is_not(tmp_path: Path) -> None:
    fact = RouterFact(pid=os.getpid(), drained_from=(identity(100),), in_flight=((identity(100), 2),))
    mine = RouterFile(tmp_path)
    mine.write(fact)
    assert read_routers(tmp_path) == (fact,)
    mine.close()
    assert read_routers(tmp_path) == ()
    (tmp_path / "routers" / "99.lock").touch()
    (tmp_path / "routers" / "x.lock").touch()
    assert read_routers(tmp_path) == ()


def test_a_router_whose_directory_was_deleted_says_it_again(tmp_path: Path) -> None:
    mine = RouterFile(tmp_path)
    mine.write(RouterFact(pid=os.getpid()))
    for path in (tmp_path / "routers").iterdir():
        path.unlink()
    (tmp_path / "routers").rmdir()
    mine.write(RouterFact(pid=os.getpid()))
    assert read_routers(tmp_path) == (RouterFact(pid=os.getpid()),)
    mine.close()
