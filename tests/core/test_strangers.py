"""Random machines full of strangers: whatever they carry, whatever they listen on, they are never signalled.

From raw facts to orders: assembled, planned, audited and carried out, with engines that only SIGKILL ends.
"""

import os
import random
from dataclasses import replace

from sage_reconcile.core.assembly import assemble
from sage_reconcile.core.audit import audit
from sage_reconcile.core.facts import Facts, ListenerFact, ProcessFact
from sage_reconcile.core.identity import ProcessIdentity
from sage_reconcile.core.label import ENGINE, LEADER, PLACEMENT, PROJECT, SOURCE, SPEC, leader_text, variables
from sage_reconcile.core.observed import ObservedState
from sage_reconcile.core.orders import Kill, Terminate
from sage_reconcile.core.planner import make_plan
from sage_reconcile.drive.executor import execute
from tests.builders import BOOT, NODE, PROGRAMS, desired, running, the_id, wanted
from tests.builders import PROJECT as OURS
from tests.builders import SOURCE as FROM
from tests.fakes import FakeHost, MemoryJournal

WORLDS = int(os.environ.get("WORLDS", "1500"))

UID, NAMESPACE = 1000, 4026531836
PORTS = (8001, 8901, 8002, 8900, 8902, 8903)
NAMES = ("lab/a", "lab/b", "lab/c", "lab/d")


class Machine:
    """Facts in the making. `strangers` are the pids that nothing may ever be sent to."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.next_pid = 100
        self.ports = rng.sample(PORTS, len(PORTS))
        self.processes: list[ProcessFact] = []
        self.listeners: list[ListenerFact] = []
        self.strangers: set[int] = set()
        self.ours: set[int] = set()

    def process(self, label: dict[str, str], *, port: int | None = None, uid: int = UID, session: int = 0) -> int:
        pid = self.next_pid
        self.next_pid += self.rng.choice((1, 1, 7))
        self.processes.append(
            ProcessFact(
                identity=ProcessIdentity(node=NODE, boot_id=BOOT, pid=pid, start_ticks=pid * 10),
                parent_pid=1,
                session=session or pid,
                uid=uid,
                user=str(uid),
                status="S",
                argv=self.rng.choice((("/usr/bin/llama-server", "--port", str(port or 1)), ("python3", "x.py"))),
                label=tuple(sorted(label.items())),
            )
        )
        if port is not None:
            self.listeners.append(ListenerFact(address="127.0.0.1", port=port, uid=uid, pids=(pid,)))
        return pid

    def label(self, name: str, port: int, *, project: str = OURS, pid: int | None = None) -> dict[str, str]:
        """The whole label of an engine whose first process is the next one, or has this pid."""
        engine = running(name, port, 1, project=project)
        leader = self.next_pid if pid is None else pid
        label = variables(engine=the_id(name, project), source=FROM, written=engine.written, resolved=engine.resolved)
        return label | {LEADER: leader_text(leader, leader * 10, NAMESPACE)}

    def engine(self, name: str, *, project: str = OURS) -> None:
        port = self.ports.pop()
        leader = self.process(self.label(name, port, project=project), port=port)
        pids = {leader}
        for _ in range(self.rng.randrange(3)):
            child = self.label(name, port, project=project, pid=leader) if self.rng.random() < 0.7 else {}
            pids.add(self.process(child, session=leader if not child or self.rng.random() < 0.5 else 0))
        (self.ours if project == OURS else self.strangers).update(pids)

    def stranger(self) -> None:
        """A process that looks like one of ours, and lacks at least one thing that would prove it."""
        rng = self.rng
        name = rng.choice(NAMES)
        port = self.ports.pop() if self.ports and rng.random() < 0.5 else None
        label = self.label(name, port or 8001)
        uid = UID
        match rng.randrange(7):
            case 0:
                label = {}
            case 1:
                # Without its leader a label is believed only of a process that leads its session: the gate.
                for missing in rng.sample((PROJECT, SOURCE, ENGINE, SPEC, PLACEMENT), rng.randrange(1, 5)):
                    del label[missing]
            case 2:
                label[rng.choice((SPEC, PLACEMENT, LEADER))] = rng.choice(("", "{}x", "[1]", "1:2", "null", "{" * 3000))
            case 3:
                label[LEADER] = leader_text(self.next_pid, self.next_pid * 10, NAMESPACE + 1)
            case 4:
                uid = UID + 1
            case 5:
                label[ENGINE] = rng.choice(("lab", "lab/a/b", "/", "lab/a#0", "lab/a#-1", ""))
            case 6:
                label = label | {PROJECT: "elsewhere"}
        self.strangers.add(self.process(label, port=port, uid=uid))

    def facts(self) -> Facts:
        order = self.rng.sample(self.processes, len(self.processes))
        return Facts(
            taken_at=1000.0,
            node=NODE,
            boot_id=BOOT,
            uid=UID,
            namespace=NAMESPACE,
            processes=tuple(order),
            own_pids=(1, 2),
            listeners=tuple(self.listeners),
            programs=PROGRAMS,
        )


def machine(seed: int) -> tuple[Machine, ObservedState]:
    rng = random.Random(seed)
    one = Machine(rng)
    for name in rng.sample(NAMES, rng.randrange(1, len(NAMES))):
        one.engine(name)
        if rng.random() < 0.7:
            one.stranger()
    if rng.random() < 0.5 and one.ports:
        one.engine(rng.choice(NAMES), project="elsewhere")
    one.stranger()
    return one, assemble(one.facts())


def test_no_stranger_becomes_a_member_of_an_engine_of_this_project() -> None:
    for seed in range(WORLDS):
        one, now = machine(seed)
        mine = {process.pid for engine in now.engines if engine.id.project == OURS for process in engine.members}
        assert mine == one.ours, f"seed {seed}"


def test_no_stranger_is_ever_sent_a_signal() -> None:
    signalled = 0
    for seed in range(WORLDS):
        one, now = machine(seed)
        rng = random.Random(seed)
        want = desired(*(wanted(name, max_model_len=512) for name in sorted(rng.sample(NAMES, rng.randrange(3)))))
        plan = make_plan(want, now)
        assert audit(plan, want, now) == (), f"seed {seed}"
        host = FakeHost(world=now, deaf=frozenset(NAMES))

        execute(plan, host, MemoryJournal())

        sent = {p.pid for order in host.orders if isinstance(order, Terminate | Kill) for p in order.processes}
        assert not sent & one.strangers, f"seed {seed}"
        assert {engine.leader.pid for engine in now.engines if engine.id.project == "elsewhere"} <= {
            engine.leader.pid for engine in host.world.engines
        }, f"seed {seed}"
        signalled += len(sent)
    assert signalled > WORLDS


def test_the_machines_are_not_all_alike() -> None:
    """Strangers that are taken for nothing at all would prove nothing: some carry whole labels, of other projects."""
    seen = [machine(seed)[1] for seed in range(200)]
    assert any(engine.id.project == "elsewhere" for now in seen for engine in now.engines)
    assert any(now.foreign for now in seen)
    crowded = [replace(now, engines=()) for now in seen if len(now.listeners) > 4]
    assert crowded
