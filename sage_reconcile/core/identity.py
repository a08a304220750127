"""Who is meant: an engine by its id, a process by more than its pid."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class EngineId:
    """The name of one replica; `project` is part of it, and left out where only one project is meant."""

    project: str
    stack: str
    name: str
    replica: int = 0

    def __str__(self) -> str:
        """`stack/name`, and `stack/name#1` from the second replica on."""
        return f"{self.stack}/{self.name}" + (f"#{self.replica}" if self.replica else "")

    @property
    def full(self) -> str:
        """The id with its project: `project:stack/name`."""
        return f"{self.project}:{self}"

    @property
    def first(self) -> "EngineId":
        """The id of its first replica, `stack/name`, which also stands for all replicas."""
        return replace(self, replica=0)


def in_stack(written: str, stack: str) -> str:
    """The `stack/name` that a manifest means: within its own stack a name is enough."""
    return written if "/" in written else f"{stack}/{written}"


def engine_id(project: str, text: str) -> EngineId | None:
    """The id that `stack/name` or `stack/name#1` spells; None when it spells none."""
    stack, slash, rest = text.partition("/")
    name, hash_sign, number = rest.partition("#")
    if not (stack and slash and name) or "/" in name:
        return None
    if hash_sign and not (number.isascii() and number.isdigit() and 0 < int(number) < 1000):
        return None
    return EngineId(project=project, stack=stack, name=name, replica=int(number) if hash_sign else 0)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ProcessIdentity:
    """One process, never mistaken for a later one with its pid: pids return, start times in ticks since boot do not."""

    node: str
    boot_id: str
    pid: int
    # Field 22 of /proc/PID/stat, in clock ticks since boot (proc(5)): it does not move with the wall clock.
    start_ticks: int
