"""One world, and sage killed in the middle of changing it: what must be true right after, and after one more apply.

The world swings between two sets of manifests, so that every apply keeps, replaces, stops and starts an engine; a third
set has an engine that never comes up, so that an apply of it puts back what ran.
"""

from dataclasses import dataclass, field

from sage_reconcile.world.failpoints import traced
from tests.e2e import Place, fake, until
from tests.forks import Command, Forks
from tests.oracle import Ran, alive, labelled, leaks, unrecorded

_QUICK = {"update": {"grace": "0.3s", "drain": "1s"}}


@dataclass(kw_only=True)
class Campaign:
    """`swings` is how often the manifests were changed so far."""

    place: Place
    forks: Forks
    swings: int = 0
    said: list[str] = field(default_factory=list)

    def swing(self) -> None:
        """Write the other set of manifests."""
        self.swings += 1
        odd = self.swings % 2
        self.place.write(
            fake("kept", **_QUICK),
            fake("changed", "--tokens", str(3 + odd), depends_on=["kept"], **_QUICK),
            fake("odd" if odd else "even", "--fork-child", "--child-ignore-term", **_QUICK),
        )

    def mend(self) -> None:
        """Write the manifests of the last swing anew."""
        self.swings -= 1
        self.swing()

    def break_one(self) -> None:
        """Write manifests whose apply fails after it has replaced an engine, and puts back what ran."""
        self.place.write(
            fake("kept", **_QUICK),
            fake("changed", "--tokens", "9", depends_on=["kept"], **_QUICK),
            fake("bad", "--exit-code", "1", depends_on=["changed"], **_QUICK),
        )

    def start(self, *words: str, **environment: str) -> Command:
        return self.forks.start(self.place.state, *words, more_environment=environment)

    def run(self, *words: str, **environment: str) -> Ran:
        ran = self.start(*words, **environment).wait()
        self.said += (ran.stdout, ran.stderr)
        return ran

    @property
    def apply(self) -> tuple[str, ...]:
        return ("apply", str(self.place.manifests), "-y")

    @property
    def down(self) -> tuple[str, ...]:
        return ("down", str(self.place.manifests), "-y")

    def reached(self) -> tuple[tuple[str, int], ...]:
        """Each failpoint of the last traced command, with how often it had been reached by then."""
        seen: dict[str, int] = {}
        places = []
        for name in traced(self.place.trace):
            seen[name] = seen.get(name, 0) + 1
            places.append((name, seen[name]))
        return tuple(places)

    def assert_sound_after_a_kill(self, when: str) -> None:
        """Whatever runs is on record and runs once. A gate without its sage needs a moment to see that it is alone."""
        place = self.place
        until(lambda: all(process.leader for process in labelled(place.root)), f"{when}: the gates close")
        assert unrecorded(place.state) == (), when
        leaders = {(process.engine, process.leader) for process in labelled(place.root)}
        running = [engine for engine, leader in leaders if alive(int(leader.partition(":")[0]))]
        assert len(running) == len(set(running)), f"{when}: an engine runs twice: {leaders}"

    def assert_converges(self, when: str) -> None:
        """One apply puts it right, and the oracle has nothing to say."""
        ran = self.run(*self.apply)
        assert ran.code == 0, f"{when}: the next apply ends with {ran.code}: {ran.stderr}"
        self.assert_at_rest(when)

    def assert_at_rest(self, when: str) -> None:
        place = self.place
        found = (
            *leaks(place.state, place.manifests, place.ports, self.said, again=False, run=self.forks.run),
            *unrecorded(place.state),
        )
        assert found == (), f"{when}: {found}"
        self.said.clear()
