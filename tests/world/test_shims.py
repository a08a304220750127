"""The shims do what they say: what a fault test builds on must not be a guess. Small scripts, in processes of their
own, that change files below a directory or ask for the time."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import shims
from tests.shims import Operation, crash_states, disk_faults, read_trace, short_write

# Each changes something in the directory that the script stands in, which has what the fixture `under` has.
CHANGES = """
import ctypes, errno, json, os
C = ctypes.CDLL(None, use_errno=True)
def c(call, *arguments):
    if call(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "C")
def changes():
    here = os.getcwd()
    at = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
    fd = os.open("full", os.O_RDWR)
    return {
        "open": lambda: open(here + "/new", "w"),
        "openat": lambda: os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=at),
        "C open": lambda: c(C.open, b"new", os.O_CREAT | os.O_WRONLY, 0o600),
        "C openat": lambda: c(C.openat, at, b"new", os.O_CREAT | os.O_WRONLY, 0o600),
        "write": lambda: os.write(fd, b"new"),
        "writev": lambda: os.writev(fd, [b"n", b"ew"]),
        "pwrite": lambda: os.pwrite(fd, b"new", 1),
        "C pwrite": lambda: c(C.pwrite, fd, b"new", 3, ctypes.c_long(1)),
        "truncate": lambda: os.ftruncate(fd, 1),
        "C truncate": lambda: c(C.ftruncate, fd, ctypes.c_long(1)),
        "allocate": lambda: os.posix_fallocate(fd, 0, 9),
        "C allocate": lambda: c(C.fallocate, fd, 0, ctypes.c_long(0), ctypes.c_long(9)),
        "C allocate 64": lambda: c(C.fallocate64, fd, 0, ctypes.c_long(0), ctypes.c_long(9)),
        "fsync": lambda: os.fsync(fd),
        "fsync of the directory": lambda: os.fsync(at),
        "fdatasync": lambda: os.fdatasync(fd),
        "rename": lambda: os.rename("full", here + "/new"),
        "replace": lambda: os.replace("full", "name"),
        "renameat": lambda: os.rename("full", "new", src_dir_fd=at, dst_dir_fd=at),
        "C renameat2": lambda: c(C.renameat2, at, b"full", at, b"new", 1),
        "link": lambda: os.link("full", "new"),
        "linkat": lambda: os.link("full", "new", src_dir_fd=at, dst_dir_fd=at),
        "unlink": lambda: os.unlink("full"),
        "unlinkat": lambda: os.unlink("full", dir_fd=at),
        "rmdir": lambda: os.rmdir("empty"),
        "rmdir at": lambda: os.rmdir("empty", dir_fd=at),
        "mkdir": lambda: os.mkdir("new"),
        "mkdirat": lambda: os.mkdir("new", dir_fd=at),
    }
"""

# A file that is whole or not there, as careful programs write it.
CAREFUL = """
import os
fd = os.open("tmp", os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
os.write(fd, b"new content")
os.fsync(fd)
os.close(fd)
os.rename("tmp", "name")
fd = os.open(".", os.O_RDONLY)
os.fsync(fd)
"""
CARELESS = CAREFUL.replace("os.fsync(fd)\n", "")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shims.disk_library(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def wallclock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shims.wallclock_library(tmp_path_factory.mktemp("wallclock"))


@pytest.fixture
def under(tmp_path: Path) -> Path:
    """A directory with two files and an empty directory."""
    made = tmp_path / "under"
    (made / "empty").mkdir(parents=True)
    (made / "full").write_bytes(b"old")
    (made / "name").write_bytes(b"another")
    return made


def run(script: str, faults: Mapping[str, str], directory: Path, returns: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-ISc", script], env={**os.environ, **faults}, cwd=directory, capture_output=True, text=True
    )
    assert done.returncode == returns, done.stderr
    return done.stdout


def traced(script: str, disk: Path, under: Path) -> tuple[Operation, ...]:
    trace = under.parent / "trace"
    run(script, disk_faults(disk, under, trace=trace), under)
    return read_trace(trace)


def tree(root: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))
    }


def states(script: str, disk: Path, under: Path, before: bool = False) -> dict[str, dict[str, bytes | None]]:
    """What a script in a directory, that is empty or has a `name`, could leave; {"after 1 of 4, all kept": tree}."""
    under.mkdir()
    (under.parent / "before").mkdir()
    if before:
        for root in (under, under.parent / "before"):
            (root / "name").write_bytes(b"old content")
    operations = traced(script, disk, under)
    found = crash_states(operations, under, under.parent / "states", before=under.parent / "before")
    return {what: tree(state) for what, state in found}


def test_every_change_fails_with_the_error_asked_for_and_changes_nothing(disk: Path, under: Path) -> None:
    script = f"""{CHANGES}
found = {{}}
for name, change in changes().items():
    try:
        change()
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
print(json.dumps([list(changes()), found]))
"""
    before = tree(under)

    names, found = json.loads(run(script, disk_faults(disk, under, fail_from=1, error=errno.ENOSPC), under))

    assert found == dict.fromkeys(names, "ENOSPC")
    assert tree(under) == before


def test_every_change_is_done_and_traced_when_it_is_let_through(disk: Path, under: Path) -> None:
    script = f"""{CHANGES}
for name in changes():
    os.makedirs(name + "/empty")
    os.chdir(name)
    for file in ("full", "name"):
        with open(file, "w") as opened:
            opened.write("old")
    changes()[name]()
    os.chdir("..")
"""
    operations = traced(script, disk, under)

    assert {(operation.result < 0, operation.error) for operation in operations} == {(False, 0)}
    assert [operation.number for operation in operations] == list(range(1, len(operations) + 1))
    # Six to make two directories and two files with their content, then the one.
    assert [operation.name for operation in operations[6::7]] == (
        ["open"] * 4 + ["write"] * 4 + ["truncate"] * 2 + ["fallocate"] * 3 + ["fsync"] * 2 + ["fdatasync"]
        + ["rename"] * 4 + ["link"] * 2 + ["unlink"] * 2 + ["rmdir"] * 2 + ["mkdir"] * 2
    )  # fmt: skip


def test_only_the_operation_of_that_number_fails(disk: Path, under: Path) -> None:
    script = """
import os
fd = os.open("full", os.O_WRONLY | os.O_APPEND)
for line in (b"1", b"2", b"3"):
    try:
        os.write(fd, line)
    except OSError as error:
        print(error.errno)
"""
    assert run(script, disk_faults(disk, under, fail_at=2, error=errno.EDQUOT), under) == f"{errno.EDQUOT}\n"
    assert (under / "full").read_bytes() == b"old13"


def test_a_short_write_does_half_and_says_so(disk: Path, under: Path) -> None:
    script = """
import os
fd = os.open("full", os.O_WRONLY)
print(os.write(fd, b"abcde"), os.writev(fd, [b"f", b"ghijk"]), os.pwrite(fd, b"xyz", 9), os.write(fd, b""))
os.rename("full", "name")
try:
    os.write(fd, b"z")
except OSError as error:
    print(error.errno)
"""
    trace = under.parent / "trace"
    said = run(script, short_write(disk, under, every_from=1, trace=trace), under)

    assert said == f"2 3 1 0\n{errno.EIO}\n"
    assert (under / "name").read_bytes() == b"abfgh\0\0\0\0x"
    written = [(op.offset, op.written, op.result, op.error) for op in read_trace(trace) if op.name == "write"]
    assert written == [(0, b"ab", 2, 0), (2, b"fgh", 3, 0), (9, b"x", 1, 0), (5, b"", 0, 0), (5, b"", -1, errno.EIO)]


def test_python_goes_on_after_a_short_write(disk: Path, under: Path) -> None:
    run("open('full', 'w').write('abcdef')", short_write(disk, under, at=2), under)
    assert (under / "full").read_bytes() == b"abcdef"


def test_the_process_is_killed_before_the_operation_of_that_number(disk: Path, under: Path) -> None:
    trace = under.parent / "trace"
    run(CAREFUL, disk_faults(disk, under, kill_at=4, trace=trace), under, returns=-signal.SIGKILL)
    assert tree(under) == {"empty": None, "full": b"old", "name": b"another", "tmp": b"new content"}
    assert [operation.name for operation in read_trace(trace)] == ["open", "write", "fsync"]


def test_what_is_elsewhere_is_not_counted(disk: Path, under: Path) -> None:
    """Nor is a neighbour whose name begins the same, nor a FIFO, nor what is only read."""
    script = """
import os, threading
open("../under-not", "w").write("x")
os.mkfifo("fifo")
reader = threading.Thread(target=lambda: open("fifo").read())
reader.start()
open("fifo", "w").write("x")
reader.join()
open("full").read()
print("done")
"""
    trace = under.parent / "trace"
    assert run(script, disk_faults(disk, under, fail_from=1, trace=trace), under) == "done\n"
    assert read_trace(trace) == ()


def test_a_path_counts_however_it_is_written(disk: Path, under: Path) -> None:
    (under.parent / "way").symlink_to(under)
    script = "import os\nfor name in ('a', '../under/b', '../way/c', 'empty/../d/', '../under//e'): os.mkdir(name)"
    operations = traced(script, disk, under.parent / "way")
    assert [operation.path for operation in operations] == [under / name for name in "abcde"]


def test_the_trace_tells_what_a_crash_state_needs(disk: Path, under: Path) -> None:
    script = r"""
import os
fd = os.open("full", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(fd, b"\0\xff")
os.pwrite(fd, b"appended all the same", 0)
fd = os.open('odd "\\\n\u00fc\u2028\udcff', os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o640)
os.ftruncate(fd, 7)
os.lseek(fd, 3, os.SEEK_SET)
os.write(fd, b"ab")
os.rename("full", "empty/full")
try:
    os.rmdir("empty")
except OSError:
    pass
"""
    odd = under / 'odd "\\\nü\u2028\udcff'
    operations = traced(script, disk, under)

    told = [(op.name, op.path, op.to, op.offset, op.size, op.mode, op.written) for op in operations]
    assert told == [
        ("open", under / "full", None, None, None, None, b""),
        ("write", under / "full", None, 3, None, None, b"\0\xff"),
        ("write", under / "full", None, 5, None, None, b"appended all the same"),
        ("open", odd, None, None, None, 0o640, b""),
        ("truncate", odd, None, None, 7, None, b""),
        ("write", odd, None, 3, None, None, b"ab"),
        ("rename", under / "full", under / "empty" / "full", None, None, None, b""),
        ("rmdir", under / "empty", None, None, None, None, b""),
    ]
    assert [(op.created, op.truncated) for op in operations if op.name == "open"] == [(False, False), (True, True)]
    assert (operations[-1].result, operations[-1].error) == (-1, errno.ENOTEMPTY)


def test_threads_take_turns(disk: Path, under: Path) -> None:
    """Appends tell the size before, so the offsets show that no other write came between a look and its line."""
    script = """
import os, threading
def work():
    fd = os.open("full", os.O_WRONLY | os.O_APPEND)
    for _ in range(50):
        os.write(fd, b"12345")
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    operations = traced(script, disk, under)
    assert [(op.number, op.offset) for op in operations] == [(n + 1, 3 + 5 * n) for n in range(400)]


def test_children_are_not_counted_and_change_no_count(disk: Path, under: Path) -> None:
    script = """
import os, subprocess, sys
clean = {name: value for name, value in os.environ.items() if not name.startswith(("SHIM_", "LD_"))}
open("full", "w").close()
for options in ({}, {"start_new_session": True}, {"preexec_fn": lambda: open("full", "a").write("child ")}):
    with open("full", "a") as log:
        subprocess.run(["/bin/sh", "-c", "echo hello; echo > name"], stdout=log, env=clean, check=True, **options)
try:
    subprocess.run(["./missing"], env=clean)
except FileNotFoundError:
    pass
if not (child := os.fork()):
    open("full", "a").write("child ")
    os._exit(0)
os.waitpid(child, 0)
open("full", "w").close()
"""
    operations = traced(script, disk, under)
    assert [(op.number, op.name, op.path) for op in operations] == [(n, "open", under / "full") for n in range(1, 6)]


def test_a_library_that_two_build_at_once_is_whole(tmp_path: Path) -> None:
    built: list[Path] = []
    builders = [threading.Thread(target=lambda: built.append(shims.wallclock_library(tmp_path))) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert built == [tmp_path / "wallclock.so"] * 2
    assert list(tmp_path.iterdir()) == [tmp_path / "wallclock.so"]


TIMES = """
import ctypes, datetime, time
C = ctypes.CDLL(None)
pair = (ctypes.c_long * 2)()
C.time.restype = ctypes.c_long
C.gettimeofday(pair, None)
wall = [time.time(), time.time_ns() / 1e9, datetime.datetime.now().timestamp(), pair[0] + pair[1] / 1e6, C.time(None),
        time.clock_gettime(time.CLOCK_REALTIME), time.clock_gettime(5), time.mktime(time.localtime())]
print([round(w - {0}) for w in wall], time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME))
"""


@pytest.mark.parametrize("seconds", [315_576_000, -315_576_000, 0])
def test_the_wall_clock_is_off_and_the_monotonic_ones_are_not(wallclock: Path, tmp_path: Path, seconds: int) -> None:
    began, booted = time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME)
    said = run(TIMES.replace("{0}", str(time.time() + seconds)), shims.clock(wallclock, seconds=seconds), tmp_path)
    off, _, rest = said.partition("] ")
    monotonic, boot = (float(word) for word in rest.split())
    assert all(abs(int(one)) <= 5 for one in off.strip("[").split(","))
    assert began <= monotonic <= time.monotonic()
    assert booted <= boot <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_the_clock_of_a_process_that_runs_follows_the_file(wallclock: Path, tmp_path: Path) -> None:
    file = tmp_path / "clock"
    script = "import time\nwhile input() != 'end': print(round(time.time()), flush=True)"
    environment = {**os.environ, **shims.clock(wallclock, seconds=1000, file=file)}
    process = subprocess.Popen(
        [sys.executable, "-ISc", script], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout
    off = []
    for seconds in (None, 5000, -9000, 0):
        if seconds is not None:
            shims.set_clock(file, seconds)
        process.stdin.write("\n")
        process.stdin.flush()
        off.append(round((int(process.stdout.readline()) - time.time()) / 1000) * 1000)
    file.write_text("")
    process.communicate("\nend\n", timeout=10)
    assert off == [1000, 6000, -8000, 1000]


def test_clock_and_disk_go_together(wallclock: Path, disk: Path, under: Path) -> None:
    faults = shims.together(disk_faults(disk, under, fail_at=1), shims.clock(wallclock, seconds=-(10**9)))
    script = "import os, time\ntry: os.mkdir('new')\nexcept OSError: print(time.time() < 1.5e9)"
    assert run(script, faults, under) == "True\n"


def test_a_write_without_a_sync_is_lost(disk: Path, tmp_path: Path) -> None:
    found = states("open('name', 'r+').write('new')", disk, tmp_path / "under", before=True)
    assert found == {
        "after 0 of 1, all kept": {"name": b"old content"},
        "after 1 of 1, all kept": {"name": b"new content"},
        "after 1 of 1, unsynced lost": {"name": b"old content"},
        "after 1 of 1, last write torn": {"name": b"nld content"},
    }


def test_a_file_that_is_synced_before_its_rename_is_never_torn(disk: Path, tmp_path: Path) -> None:
    found = states(CAREFUL, disk, tmp_path / "under", before=True)
    assert {state["name"] for state in found.values()} == {b"old content", b"new content"}
    assert found["after 4 of 5, unsynced lost"] == {"name": b"old content", "tmp": b"new content"}
    assert "after 5 of 5, unsynced lost" not in found
    assert found["after 5 of 5, all kept"] == {"name": b"new content"}


def test_a_file_that_is_renamed_before_its_sync_may_be_empty_or_torn(disk: Path, tmp_path: Path) -> None:
    found = states(CARELESS, disk, tmp_path / "under", before=True)
    after = {what: state for what, state in found.items() if what.startswith("after 3 of 3")}
    assert after == {
        "after 3 of 3, all kept": {"name": b"new content"},
        "after 3 of 3, unsynced lost": {"name": b"old content"},
        "after 3 of 3, last write torn": {"name": b"new c"},
        "after 3 of 3, renamed before synced": {"name": b""},
    }


def test_a_line_that_was_synced_survives_what_comes_after_it(disk: Path, tmp_path: Path) -> None:
    script = """
import os
os.mkdir("logs")
fd = os.open("logs/journal", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
os.write(fd, b"one\\n")
os.fdatasync(fd)
os.write(fd, b"two\\n")
"""
    found = states(script, disk, tmp_path / "under")
    assert found["after 3 of 5, unsynced lost"] == {}
    assert found["after 4 of 5, all kept"] == {"logs": None, "logs/journal": b"one\n"}
    assert found["after 5 of 5, all kept"] == {"logs": None, "logs/journal": b"one\ntwo\n"}
    assert found["after 5 of 5, last write torn"] == {"logs": None, "logs/journal": b"one\ntw"}
    assert found["after 5 of 5, unsynced lost"] == {"logs": None, "logs/journal": b"one\n"}


def test_what_was_deleted_is_back_until_its_directory_is_synced(disk: Path, tmp_path: Path) -> None:
    script = "import os\nos.unlink('name')\nos.mkdir('name')\nos.fsync(os.open('.', os.O_RDONLY))"
    found = states(script, disk, tmp_path / "under", before=True)
    assert found["after 1 of 3, unsynced lost"] == {"name": b"old content"}
    assert found["after 2 of 3, unsynced lost"] == {"name": b"old content"}
    assert found["after 3 of 3, all kept"] == {"name": None}
    assert "after 3 of 3, unsynced lost" not in found


def test_a_name_that_was_given_anew_stays_with_the_new_file(disk: Path, tmp_path: Path) -> None:
    script = """
import os
os.unlink("name")
os.fsync(os.open("name", os.O_CREAT | os.O_WRONLY))
os.fsync(os.open(".", os.O_RDONLY))
"""
    found = states(script, disk, tmp_path / "under", before=True)
    assert found["after 2 of 4, unsynced lost"] == {"name": b"old content"}
    assert found["after 3 of 4, all kept"] == {"name": b""}
    assert found["after 4 of 4, all kept"] == {"name": b""}
    assert "after 4 of 4, unsynced lost" not in found


def test_a_sync_of_an_old_file_does_not_keep_its_new_name(disk: Path, tmp_path: Path) -> None:
    script = "import os\nos.rename('name', 'other')\nos.fsync(os.open('other', os.O_RDONLY))"
    found = states(script, disk, tmp_path / "under", before=True)
    assert found["after 2 of 2, all kept"] == {"other": b"old content"}
    assert found["after 2 of 2, unsynced lost"] == {"name": b"old content"}


def test_a_write_by_a_name_that_is_gone_is_found_by_the_other(disk: Path, tmp_path: Path) -> None:
    script = """
import os
fd = os.open("first", os.O_CREAT | os.O_WRONLY)
os.link("first", "second")
os.unlink("first")
os.write(fd, b"text")
"""
    found = states(script, disk, tmp_path / "under")
    assert found["after 4 of 4, all kept"] == {"second": b"text"}


def test_a_move_between_directories_is_kept_or_lost_as_a_whole(disk: Path, tmp_path: Path) -> None:
    script = """
import os
os.mkdir("a")
os.mkdir("b")
fd = os.open("a/name", os.O_CREAT | os.O_WRONLY)
os.fsync(fd)
os.rename("a/name", "b/name")
os.fsync(os.open("b", os.O_RDONLY))
os.fsync(os.open("a", os.O_RDONLY))
"""
    found = states(script, disk, tmp_path / "under")
    assert found["after 5 of 7, unsynced lost"] == {"a": None, "a/name": b""}
    assert found["after 6 of 7, all kept"] == {"a": None, "b": None, "b/name": b""}
    assert "after 6 of 7, unsynced lost" not in found
    assert "after 7 of 7, unsynced lost" not in found


def test_a_state_has_the_permissions_of_the_files_and_is_gone_with_the_next(disk: Path, tmp_path: Path) -> None:
    script = "import os\nos.umask(0)\nos.mkdir('d', 0o750)\nos.open('d/f', os.O_CREAT, 0o640)"
    (tmp_path / "under").mkdir()
    operations = traced(script, disk, tmp_path / "under")
    found = {}
    for what, state in crash_states(operations, tmp_path / "under", tmp_path / "states"):
        assert list((tmp_path / "states").iterdir()) == [state]
        found[what] = [path.stat().st_mode & 0o7777 for path in (state, *sorted(state.rglob("*")))]
    assert found["after 2 of 2, all kept"] == [0o700, 0o750, 0o640]
    assert list((tmp_path / "states").iterdir()) == []


def test_a_trace_that_cannot_be_followed_is_refused(disk: Path, under: Path) -> None:
    operations = traced("open('full', 'a').write('x')", disk, under)
    with pytest.raises(ValueError, match=r"cannot follow operation 2, write: nothing made .*/full"):
        list(crash_states(operations, under, under.parent / "states"))


@pytest.mark.parametrize("seed", range(3))
def test_the_state_with_all_kept_is_what_the_disk_holds(disk: Path, tmp_path: Path, seed: int) -> None:
    script = f"""
import os, random
choose = random.Random({seed})
names = [f"{{way}}{{name}}" for way in ("", "d/", "d/e/") for name in "abc"]
os.makedirs("d/e")
opened = []
for _ in range(80):
    name, other, text = choose.choice(names), choose.choice(names), bytes(choose.randbytes(choose.randrange(1, 9)))
    try:
        match choose.randrange(10):
            case 0: opened.append(os.open(name, os.O_CREAT | os.O_RDWR | choose.choice((0, os.O_APPEND, os.O_TRUNC))))
            case 1: os.rename(name, other)
            case 2: os.unlink(name)
            case 3: os.link(name, other)
            case 4: os.rename("d/e", "e") or os.rename("e", "d/e")
            case 5: os.ftruncate(choose.choice(opened), choose.randrange(12))
            case 6: os.pwrite(choose.choice(opened), text, choose.randrange(12))
            case 7: os.fsync(choose.choice([*opened, os.open(choose.choice((".", "d", "d/e")), os.O_RDONLY)]))
            case 8: os.posix_fallocate(choose.choice(opened), 0, choose.randrange(1, 12))
            case 9: os.write(choose.choice(opened), text)
    except (OSError, IndexError):
        pass
"""
    under = tmp_path / "under"
    under.mkdir()
    operations = traced(script, disk, under)
    total = len(operations)
    assert total > 25
    last = {what: tree(state) for what, state in crash_states(operations, under, tmp_path / "states")}
    assert last[f"after {total} of {total}, all kept"] == tree(under)
