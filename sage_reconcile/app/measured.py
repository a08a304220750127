"""Measured footprints: taken at every look, kept by the commands that hold the lock."""

from dataclasses import dataclass, field
from pathlib import Path

from sage_reconcile.core.facts import FootprintFact
from sage_reconcile.core.identity import ProcessIdentity
from sage_reconcile.core.measuring import kept, measurable, measurement, merged
from sage_reconcile.core.observed import Engine, ObservedState, spec_of
from sage_reconcile.core.runtimes import is_served, runtime_of
from sage_reconcile.core.runtimes.startup_log import LoggedFootprint
from sage_reconcile.errors import Environment, NewerState
from sage_reconcile.world.footprint_files import FootprintFiles
from sage_reconcile.world.logs import first_lines, log_path


@dataclass(slots=True, kw_only=True)
class Measured:
    """What the looks of this sage have seen engines take, beside what is on the disk.

    A look writes nothing. The peak that `serve` sees and nobody keeps is seen again by the next apply or down: what an
    engine has taken it holds until it ends.
    """

    root: Path
    # Whether this sage holds the lock, or held it and will once more: then it will keep what it sees.
    keeps: bool = False
    files: FootprintFiles = field(init=False)
    # The most that was seen of each engine process, with its project.
    _taken: dict[ProcessIdentity, tuple[str, FootprintFact]] = field(default_factory=dict)
    # What each used when it was last measured: most looks see the same.
    _used: dict[ProcessIdentity, tuple[tuple[str, int], ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.files = FootprintFiles(self.root)

    def take(self, observed: ObservedState) -> None:
        """Remember what each engine uses, where that is more than before."""
        for engine in observed.engines if self.keeps else ():
            if not engine.resolved.placement.devices or self._used.get(engine.leader) == engine.measured_bytes:
                continue
            if measurable(engine, observed):
                self._used[engine.leader] = engine.measured_bytes
                self._take(engine, observed)

    def _take(self, engine: Engine, observed: ObservedState) -> None:
        _, before = self._taken.get(engine.leader, ("", None))
        logged = None if before is not None else self._logged(engine)
        found = measurement(engine, observed, logged)
        if found is not None:
            self._taken[engine.leader] = (engine.id.project, found if before is None else merged(before, found))

    def _logged(self, engine: Engine) -> LoggedFootprint | None:
        spec = spec_of(engine)
        if spec is None or not is_served(spec):
            return None
        return runtime_of(spec).measured_log(first_lines(log_path(self.root, engine.id)))

    def keep(self, project: str) -> str:
        """Write down what says more than what is on the disk; a sentence when it could not be, else empty.

        Only for whoever holds the lock. A measurement is a hint: that it is lost is no failure.
        """
        found = [fact for name, fact in self._taken.values() if name == project]
        try:
            now = kept(self.files.of(project), found)
            if now is not None:
                self.files.write(project, now)
        except (Environment, NewerState) as error:
            return f"what the engines of {project} take of their devices was not kept: {error.message}"
        return ""
