"""Why an engine has no place here and now: what is missing, by how much, who holds it, and what would help."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortfall:
    """One device, as a refused engine finds it."""

    index: int
    uuid: str
    total_bytes: int
    # Free for this engine once everything else of the plan is done; below 0 on a device that is over-full.
    free_bytes: int
    # How much is missing; 0 on a device where it fits.
    short_bytes: int
    # Who holds the rest: "lab/embed (6.9)", "foreign pid 4242 python (35.0)", with GiB.
    held_by: tuple[str, ...] = ()
    # Why the device is out of the question whatever is free, as when it is closed; empty when it is not.
    why_not: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why an engine has no place."""

    reason: str
    why: str
    would_help: tuple[str, ...] = ()
    devices: tuple[Shortfall, ...] = ()
