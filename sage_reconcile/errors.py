"""What can go wrong for a user, and the exit code that each kind of trouble has.

    SageError                    1   our own mistake, when nothing below fits
    ├── InvalidManifests         3   what was written down cannot be read or contradicts itself
    │   └── NewerState               ... and it is sage's own state, written by a newer sage
    ├── Infeasible               4   it cannot be done here and now: memory, devices, ports, a program or a model
    ├── ApplyRestored            5   the apply failed; what ran before runs again
    ├── ApplyStuck               6   the apply failed and not everything could be put back
    ├── PlanStale                7   the world moved on since the plan was made
    ├── Locked                   8   another sage works on this host
    ├── TimedOut                 9   waited, and it did not come
    ├── Refused                 10   sage will not do this without being told more
    ├── ObservationIncomplete   11   something that matters could not be seen
    ├── Environment             12   the machine does not let sage work: state not writable, disk full
    ├── Usage                   64   the command line makes no sense
    └── Interrupted            130   Ctrl-C came, and the work ended between two acts (SIGTERM: 143)

Also used, without a class: 0 done or no change; 2 changes pending (only when asked for).
"""


class SageError(Exception):
    """One sentence for a person, and a cure.

    `message` starts with what could not be done; `hint` is the cure, or None when there is none to offer.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def report(self) -> str:
        """The text that a terminal shows: `error: ...`, then the hint on a line of its own."""
        lines = [f"error: {self.message}"]
        if self.hint is not None:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


class InvalidManifests(SageError):
    exit_code = 3


class NewerState(InvalidManifests):
    pass


class Infeasible(SageError):
    exit_code = 4


class ApplyRestored(SageError):
    exit_code = 5


class ApplyStuck(SageError):
    exit_code = 6


class PlanStale(SageError):
    exit_code = 7


class Locked(SageError):
    exit_code = 8


class TimedOut(SageError):
    exit_code = 9


class Refused(SageError):
    exit_code = 10


class ObservationIncomplete(SageError):
    exit_code = 11


class Environment(SageError):
    exit_code = 12


class Usage(SageError):
    exit_code = 64


class Interrupted(SageError):
    """`signal_number` is the signal that asked for the end."""

    def __init__(self, message: str, *, signal_number: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + signal_number
