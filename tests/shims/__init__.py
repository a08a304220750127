"""Faults from outside: a disk that fails, power that is cut, and a wall clock that jumps, for any CPython process.

In: where to build the two libraries, and what is to go wrong. Out: the environment that makes it so for a process,
the trace of what it did to the disk, and every directory that a power cut could have left. Knows nothing of sage.
"""

import errno
import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

_SOURCES = Path(__file__).parent


def disk_library(directory: Path) -> Path:
    """The library of `disk_faults`, built into the directory if it is not there."""
    return _built("disk", directory)


def wallclock_library(directory: Path) -> Path:
    """The library of `clock`, built into the directory if it is not there."""
    return _built("wallclock", directory)


def _built(name: str, directory: Path) -> Path:
    library = directory / f"{name}.so"
    if not library.exists():
        # Under another name first: two workers may build at once, and nobody may load a half of it.
        with tempfile.TemporaryDirectory(dir=directory) as temporary:
            made = Path(temporary) / library.name
            flags = ("-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-pthread")
            subprocess.run(["gcc", *flags, _SOURCES / f"{name}.c", "-o", made], check=True)
            made.replace(library)
    return library


def disk_faults(
    library: Path,
    under: Path,
    *,
    fail_at: int | None = None,
    fail_from: int | None = None,
    kill_at: int | None = None,
    error: int = errno.EIO,
    trace: Path | None = None,
) -> dict[str, str]:
    """The environment that counts what a process changes below `under`, from 1, and lets some of it fail.

    `fail_at`: only that operation fails. `fail_from`: that one and all later ones. `kill_at`: the process dies just
    before it. None: never. `trace`: the file for `read_trace`. Forked children are not counted.
    """
    wanted = {"SHIM_FAIL_AT": fail_at, "SHIM_FAIL_FROM": fail_from, "SHIM_KILL_AT": kill_at, "SHIM_TRACE": trace}
    return {
        "LD_PRELOAD": str(library),
        # The library compares with what the kernel calls a path.
        "SHIM_UNDER": str(under.resolve()),
        "SHIM_ERRNO": str(error),
        **{name: str(value) for name, value in wanted.items() if value is not None},
    }


def short_write(
    library: Path, under: Path, *, at: int | None = None, every_from: int | None = None, trace: Path | None = None
) -> dict[str, str]:
    """The environment in which writes do half of what they are asked; a write of one byte fails with EIO.

    The numbers count all operations, as in `disk_faults`; those that are not writes are let through.
    """
    return disk_faults(library, under, fail_at=at, fail_from=every_from, error=0, trace=trace)


def clock(library: Path, *, seconds: int = 0, file: Path | None = None) -> dict[str, str]:
    """The environment in which the wall clock is off by `seconds`, and by what `set_clock` last put into `file`."""
    offset = {"LD_PRELOAD": str(library), "SHIM_CLOCK_SECONDS": str(seconds)}
    return offset if file is None else {**offset, "SHIM_CLOCK_FILE": str(file)}


def set_clock(file: Path, seconds: int) -> None:
    """Move the clock of every process that reads the file; they see the old offset or the new, nothing between."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    temporary.write_text(f"{seconds}\n", encoding="ascii")
    temporary.replace(file)


def together(*environments: Mapping[str, str]) -> dict[str, str]:
    """One environment with the faults of all."""
    merged = {name: value for environment in environments for name, value in environment.items()}
    return {**merged, "LD_PRELOAD": ":".join(environment["LD_PRELOAD"] for environment in environments)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One line of a trace. Paths are as the kernel tells them, so they hold no symlink but the last part of a name."""

    number: int  # counted from 1 in each process
    pid: int
    # open, write, truncate, fallocate, fsync, fdatasync, rename, link, unlink, rmdir, mkdir; fallocate-mode and
    # rename-flags for what only C programs ask
    name: str
    path: Path | None  # None: its directory does not exist; "... (deleted)" for a descriptor that lost its name
    to: Path | None  # where a rename or a link leads; None for the others
    offset: int | None  # where a write begins; None for the others
    size: int | None  # of the file after truncate or fallocate; None for the others
    inode: int | None  # of what the descriptor leads to; None where there is none
    mode: int | None  # permissions of what open or mkdir made; None where nothing was made
    created: bool  # the open made the file
    truncated: bool  # the open had O_TRUNC
    written: bytes
    result: int  # what the system call returned
    error: int  # an errno; 0 for what was done


def read_trace(path: Path) -> tuple[Operation, ...]:
    """What was done, in its order; nothing where the file is missing.

    Of two processes that write one trace, the order between them is that of the lines, not promised to be exact.
    """
    if not path.exists():
        return ()
    # Not splitlines: a name may hold what is a line's end only to Unicode.
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    return tuple(_operation(line) for line in lines if line)


def _operation(line: str) -> Operation:
    read = json.loads(line)
    return Operation(
        number=read["n"],
        pid=read["pid"],
        name=read["op"],
        path=Path(read["path"]) if read["path"] else None,
        to=Path(read["to"]) if read["to"] else None,
        offset=read["offset"],
        size=read["size"],
        inode=read["inode"],
        mode=read["mode"],
        created=read["created"],
        truncated=read["truncated"],
        written=bytes.fromhex(read["data"]),
        result=read["result"],
        error=read["errno"],
    )


def crash_states(
    operations: Sequence[Operation], under: Path, into: Path, *, before: Path | None = None
) -> Iterator[tuple[str, Path]]:
    """Every directory that a power cut could leave, as ("after 17 of 40, unsynced lost", a new directory in `into`).

    After each operation, and before the first:
      "all kept": everything that was done is there.
      "unsynced lost": only what a sync of the file or of its directory covers is there.
      "last write torn": all is kept, but of the last write that no sync covers only half.
      "renamed before synced": all is kept, but renamed files hold what was last synced of them: often nothing.
    A state that equals an earlier one after the same operation is left out. `before` is what `under` held at first,
    all of it on the disk; None: nothing. A directory lives until the next is asked for.

    As on ext4, the first sync of a new file or directory also keeps its name, and those of the new directories above.
    Hard links come out as files of their own. Raises ValueError for a trace that cannot be followed.
    """
    under = under.resolve()
    disk = _Disk(under, before)
    for done in range(len(operations) + 1):
        if done:
            disk.do(done - 1, operations[done - 1])
        trees = {"all kept": disk.kept(), "unsynced lost": disk.lost()}
        if (torn := disk.last_unsynced_write()) is not None:
            trees["last write torn"] = _kept_but_torn(operations[:done], torn, under, before)
        trees["renamed before synced"] = disk.renamed_before_synced()
        given: list[_Tree] = []
        for what, tree in trees.items():
            if tree in given:
                continue
            given.append(tree)
            made = into / f"{done:04}-{what.replace(' ', '-')}"
            _build(tree, made)
            try:
                yield f"after {done} of {len(operations)}, {what}", made
            finally:
                shutil.rmtree(made, ignore_errors=True)


# Path below the root, "" for the root itself -> (permissions, content; None for a directory).
_Tree = dict[str, tuple[int, bytes | None]]


def _kept_but_torn(operations: Sequence[Operation], torn: int, under: Path, before: Path | None) -> _Tree:
    disk = _Disk(under, before)
    for position, operation in enumerate(operations):
        half = operation.written[: len(operation.written) // 2]
        disk.do(position, replace(operation, written=half) if position == torn else operation)
    return disk.kept()


def _build(tree: _Tree, root: Path) -> None:
    for name, (_, content) in tree.items():
        if content is None:
            (root / name).mkdir(parents=name == "")
        else:
            (root / name).write_bytes(content)
    # At the end and from below: a directory may be closed to writers.
    for name, (mode, _) in reversed(tree.items()):
        (root / name).chmod(mode)


@dataclass(eq=False, slots=True)
class _File:
    mode: int
    content: bytes = b""
    synced: bytes = b""  # what of it is on the disk for sure
    known: bool = False  # whether the disk has had a name for it
    renamed: bool = False
    unsynced_write: int | None = None  # the position of the last write since the last sync; None: there is none


@dataclass(eq=False, slots=True)
class _Directory:
    mode: int
    entries: "dict[str, _Node]"
    synced: "dict[str, _Node]"
    known: bool = False


_Node = _File | _Directory

# A directory, a name in it, and what the name leads to from now on; None: nothing.
_Entry = tuple[_Directory, str, _Node | None]


class _Disk:
    """A small file system that knows of everything whether it would outlive a power cut."""

    def __init__(self, under: Path, before: Path | None) -> None:
        self._under = under
        self._root = _Directory(0o700, {}, {}, known=True) if before is None else _loaded_directory(before)
        # Changes of names that are not on the disk yet, in their order. Each gets there as a whole, or not at all.
        self._pending: list[tuple[_Entry, ...]] = []
        # What descriptors lead to, by the inode's number; a path is not enough where the file lost the name.
        self._opened: dict[int, _Node] = {}

    def do(self, position: int, op: Operation) -> None:
        if op.result < 0:
            return
        if op.name in ("mkdir", "unlink", "rmdir", "link", "rename") or op.created:
            self._do_to_names(op)
        else:
            self._do_to_content(position, op)

    def _do_to_names(self, op: Operation) -> None:
        match op.name:
            case "open":
                made = _File(op.mode or 0)
                self._opened[op.inode or 0] = made
                self._change(self._entry(op, op.path, made))
            case "mkdir" if op.path == self._under:
                self._root.mode = op.mode or 0
            case "mkdir":
                self._change(self._entry(op, op.path, _Directory(op.mode or 0, {}, {})))
            case "unlink" | "rmdir":
                self._change(self._entry(op, op.path, None))
            case "link":
                self._change(self._entry(op, op.to, self._node(op)))
            case "rename":
                self._rename(op)

    def _do_to_content(self, position: int, op: Operation) -> None:
        match op.name:
            case "open" if op.truncated:
                self._resize(op, 0)
            case "open":
                pass
            case "write":
                self._write(position, op)
            case "truncate" | "fallocate":
                self._resize(op, op.size or 0)
            case "fsync" | "fdatasync":
                self._sync(op)
            case _:
                raise ValueError(f"cannot follow operation {op.number}: {op.name} is not known here")

    def kept(self) -> _Tree:
        return _tree(self._root, lambda directory: directory.entries, lambda file: file.content)

    def lost(self) -> _Tree:
        return _tree(self._root, lambda directory: directory.synced, lambda file: file.synced)

    def renamed_before_synced(self) -> _Tree:
        return _tree(
            self._root, lambda directory: directory.entries, lambda file: file.synced if file.renamed else file.content
        )

    def last_unsynced_write(self) -> int | None:
        """The position of the last write to a file that still has a name, if no sync came after it."""
        positions = [f.unsynced_write for f in _files(self._root) if f.unsynced_write is not None]
        return max(positions, default=None)

    def _write(self, position: int, op: Operation) -> None:
        file = self._file(op)
        start = op.offset or 0
        filled = file.content.ljust(start, b"\0")
        file.content = filled[:start] + op.written + filled[start + len(op.written) :]
        file.unsynced_write = position

    def _resize(self, op: Operation, size: int) -> None:
        file = self._file(op)
        file.content = file.content[:size].ljust(size, b"\0")

    def _rename(self, op: Operation) -> None:
        node = self._node(op)
        gone = self._entry(op, op.path, None)
        if op.to is None or not op.to.is_relative_to(self._under):
            self._change(gone)
            return
        there = self._entry(op, op.to, node)
        if there[0].entries.get(there[1]) is node:
            return  # Two names of one file: rename leaves both.
        if isinstance(node, _File):
            node.renamed = True
        self._change(gone, there)

    def _sync(self, op: Operation) -> None:
        """Put a file's content or a directory's names on the disk, with those names of new things that lead there."""
        node = self._of_descriptor(op)
        if isinstance(node, _File):
            node.synced = node.content
            node.unsynced_write = None
        way = [] if _is_nameless(op) else self._way(op, op.path)
        new = [step for step in way if not step.known]
        self._settle(lambda entry: entry[2] in new or entry[0] is node)

    def _change(self, *entries: _Entry) -> None:
        for directory, name, node in entries:
            _set(directory.entries, name, node)
        self._pending.append(entries)

    def _settle(self, wanted: Callable[[_Entry], bool]) -> None:
        """Put the wanted changes of names on the disk, and what was done to the same names before them."""
        settled: list[tuple[_Entry, ...]] = []
        waiting: list[tuple[_Entry, ...]] = []
        names: set[tuple[int, str]] = set()
        for change in reversed(self._pending):
            touched = {(id(directory), name) for directory, name, _ in change}
            if touched & names or any(wanted(entry) for entry in change):
                settled.append(change)
                names |= touched
            else:
                waiting.append(change)
        self._pending = waiting[::-1]
        for directory, name, node in (entry for change in reversed(settled) for entry in change):
            _set(directory.synced, name, node)
            if node is not None:
                node.known = True

    def _file(self, op: Operation) -> _File:
        node = self._of_descriptor(op)
        if not isinstance(node, _File):
            raise ValueError(f"cannot follow operation {op.number}: {op.path} is a directory here")
        return node

    def _of_descriptor(self, op: Operation) -> _Node:
        inode = op.inode or 0
        if not _is_nameless(op):
            self._opened[inode] = self._node(op)
        elif inode not in self._opened or op.path == self._under / f"#{inode} (deleted)":
            self._opened[inode] = _File(0)  # Never had a name, or lost it before it was written to: nobody will see it.
        return self._opened[inode]

    def _node(self, op: Operation) -> _Node:
        return self._way(op, op.path)[-1]

    def _entry(self, op: Operation, path: Path | None, node: _Node | None) -> _Entry:
        parent = self._way(op, path.parent if path else None)[-1]
        if path is None or not isinstance(parent, _Directory):
            raise ValueError(f"cannot follow operation {op.number}: {path} is in no directory here")
        return (parent, path.name, node)

    def _way(self, op: Operation, path: Path | None) -> list[_Node]:
        """The directories from the root to a path, and what is there."""
        way: list[_Node] = [self._root]
        if path is None or not path.is_relative_to(self._under):
            raise ValueError(f"cannot follow operation {op.number}, {op.name}: {path} is not below {self._under}")
        for name in path.relative_to(self._under).parts:
            parent = way[-1]
            if not isinstance(parent, _Directory) or name not in parent.entries:
                raise ValueError(f"cannot follow operation {op.number}, {op.name}: nothing made {path}")
            way.append(parent.entries[name])
        return way


def _is_nameless(op: Operation) -> bool:
    # So the kernel calls a file that is open and lost the name that it was opened by.
    return str(op.path).endswith(" (deleted)")


def _set(entries: dict[str, _Node], name: str, node: _Node | None) -> None:
    if node is None:
        entries.pop(name, None)
    else:
        entries[name] = node


def _loaded_directory(path: Path) -> _Directory:
    entries = {child.name: _loaded(child) for child in sorted(path.iterdir())}
    return _Directory(stat.S_IMODE(path.stat().st_mode), entries, dict(entries), known=True)


def _loaded(path: Path) -> _Node:
    found = path.lstat()
    if stat.S_ISDIR(found.st_mode):
        return _loaded_directory(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"cannot begin with {path}: it is neither a file nor a directory")
    content = path.read_bytes()
    return _File(stat.S_IMODE(found.st_mode), content, content, known=True)


def _tree(
    directory: _Directory,
    entries: Callable[[_Directory], dict[str, _Node]],
    content: Callable[[_File], bytes],
    path: str = "",
) -> _Tree:
    tree: _Tree = {path: (directory.mode, None)}
    for name, node in sorted(entries(directory).items()):
        below = f"{path}/{name}" if path else name
        if isinstance(node, _Directory):
            tree |= _tree(node, entries, content, below)
        else:
            tree[below] = (node.mode, content(node))
    return tree


def _files(directory: _Directory) -> Iterator[_File]:
    for node in directory.entries.values():
        if isinstance(node, _Directory):
            yield from _files(node)
        else:
            yield node
