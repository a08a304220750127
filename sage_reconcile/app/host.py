"""This machine as a Host: the doors of world behind the Protocols of drive."""

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from sage_reconcile.app.interrupts import Interrupts
from sage_reconcile.app.measured import Measured
from sage_reconcile.core.facts import (
    DeviceFact,
    Facts,
    Gap,
    HealthFact,
    KnownEngine,
    ProcessFact,
    RecordFact,
)
from sage_reconcile.core.identity import ProcessIdentity
from sage_reconcile.core.label import LEADER, leader_text, variables
from sage_reconcile.core.ledger import ledger
from sage_reconcile.core.lookup import Lookup
from sage_reconcile.core.observed import Engine, ObservedState, pids_not_given_back, spec_of
from sage_reconcile.core.orders import Kill, Mark, Order, Prove, Relabel, Spawn, Spawned, Terminate
from sage_reconcile.core.plan import StartEngine
from sage_reconcile.core.runtimes import is_served, program_of
from sage_reconcile.core.settling import trouble_on
from sage_reconcile.core.spec import EngineSpec, parse_written
from sage_reconcile.drive.observer import observe
from sage_reconcile.errors import Environment
from sage_reconcile.world import processes, sockets
from sage_reconcile.world.clock import WatchedClock
from sage_reconcile.world.failpoints import failpoint
from sage_reconcile.world.gpus import Gpus
from sage_reconcile.world.journal_file import AppliedRevisions
from sage_reconcile.world.logs import cut_long_log, log_path, new_log
from sage_reconcile.world.models import Models
from sage_reconcile.world.probes import Prober, Question
from sage_reconcile.world.programs import Versions, programs
from sage_reconcile.world.records import Records
from sage_reconcile.world.router_files import read_routers

# How long after a request of its kind an engine that did not answer it is asked again, at first and at most.
_FIRST_PROOF_PAUSE_SECONDS = 0.5
_LONGEST_PROOF_PAUSE_SECONDS = 30.0


@dataclass(slots=True, kw_only=True)
class LocalHost:
    """One machine, looked at and acted on from inside.

    `answer_seconds` is how long a look waits for engines that have been asked something: a command that looks once
    waits long, a loop looks again soon. A loop also keeps the logs of engines from growing for ever: `cuts_logs`.
    """

    root: Path
    lookup: Lookup = field(default_factory=Lookup)
    answer_seconds: float = 2.5
    cuts_logs: bool = False
    boot: str = field(default_factory=processes.boot_id)
    node: str = field(default_factory=processes.node_name)
    _prober: Prober = field(default_factory=Prober)
    _gpus: Gpus = field(default_factory=Gpus)
    _versions: Versions = field(default_factory=Versions)
    _children: processes.Children = field(default_factory=processes.Children)
    _holds: dict[ProcessIdentity, processes.Gated] = field(default_factory=dict)

    # What engines were seen to take of their devices.
    measured: Measured = field(init=False)
    _applied: AppliedRevisions = field(init=False)
    _models: Models = field(default_factory=Models)
    # The last look's facts and what they mean.
    _facts: Facts | None = None
    _observed: ObservedState | None = None
    # What the last look saw: a process stays its engine's own, also when its environment can no longer be read.
    _known: dict[ProcessIdentity, KnownEngine] = field(default_factory=dict)
    # When each engine was last asked a request of its kind, and how long to wait until the next.
    _asked: dict[ProcessIdentity, tuple[float, float]] = field(default_factory=dict)
    _interrupts: Interrupts = field(default_factory=Interrupts)
    _clock: WatchedClock = field(default_factory=WatchedClock)

    def __post_init__(self) -> None:
        self._applied = AppliedRevisions(self.root)
        self.measured = Measured(root=self.root)

    # --- looking ---

    def look(self) -> ObservedState:
        observed = self._observed = observe(self)
        self._take_proofs(observed)
        self._let_go_of_ports(observed)
        self.measured.take(observed)
        self._known = {engine.leader: self._remembered(engine) for engine in observed.engines}
        if self.cuts_logs:
            for engine in observed.engines:
                cut_long_log(log_path(self.root, engine.id))
        return observed

    def _take_proofs(self, observed: ObservedState) -> None:
        """Write down what came of the requests that were asked, for the next look to see.

        Not of an engine that is gone, and not when somebody else may have answered: then it is asked again.
        """
        asked = {engine.leader: engine for engine in observed.engines if not engine.intruder}
        for proof in self._prober.proofs():
            if proof.leader in asked:
                Records(self.root).write_proof(proof.engine, proof.leader, failure=proof.failure)

    def _remembered(self, engine: Engine) -> KnownEngine:
        label = variables(engine=engine.id, source=engine.source, written=engine.written, resolved=engine.resolved)
        earlier = self._known.get(engine.leader)
        members = set(engine.members) | set(earlier.members if earlier else ())
        return KnownEngine(
            leader=engine.leader,
            label=_whole_label(label, engine.leader),
            members=tuple(sorted(members)),
            proved=engine.proved or engine.state == "ready",
        )

    def facts(self) -> Facts:
        found, process_gaps = processes.processes(node=self.node, boot=self.boot, logs=str(self.root))
        # After the processes were listed: whose memory it is, is known of each but the newest.
        devices, device_gaps = self._gpus.look()
        listeners, socket_gaps = sockets.listeners(fact.identity.pid for fact in found if fact.alive)
        found = processes.without_the_dead(found)
        # After the processes were listed: one that is not among them has ended, and its end is known.
        exits = self._children.reap()
        records, newer = Records(self.root).look()
        newer += (*self._applied.newer(), *self.measured.files.newer())
        self._facts = Facts(
            taken_at=time.time(),
            node=self.node,
            boot_id=self.boot,
            uid=os.getuid(),
            namespace=processes.pid_namespace(),
            processes=found,
            own_pids=processes.own_pids(),
            listeners=listeners,
            devices=devices,
            lowest_port=sockets.lowest_port(),
            client_ports=sockets.client_ports(),
            busy_ports=sockets.busy_ports(self.lookup.ports),
            programs=programs(self.lookup.programs, self._versions),
            models=tuple(map(self._models.fact, self.lookup.models)),
            records=records,
            known=tuple(self._known.values()),
            routers=read_routers(self.root),
            exits=exits,
            applied=self._applied.read(),
            footprints=self.measured.files.read(),
            gaps=(*process_gaps, *socket_gaps, *device_gaps, *map(_newer, newer)),
        )
        return self._facts

    def healths(self, engines: tuple[Engine, ...]) -> tuple[HealthFact, ...]:
        questions = [_question(engine) for engine in engines]
        return self._prober.healths(questions, wait_seconds=self.answer_seconds)

    def _let_go_of_ports(self, observed: ObservedState) -> None:
        """Once an engine listens, or is gone, its port need not be held for it."""
        held = {
            engine.leader
            for engine in observed.engines
            if engine.leader in self._holds and engine.resolved.placement.port not in engine.listens_on
        }
        for leader in [leader for leader in self._holds if leader not in held]:
            hold = self._holds.pop(leader).hold
            if hold is not None:
                hold.close()

    # --- doing ---

    def do(self, order: Order) -> Spawned | None:
        match order:
            case Spawn(act=act):
                return self._spawn(act)
            case Mark():
                self._mark(order)
            case Terminate(processes=targets):
                self._signal(targets, signal.SIGTERM)
            case Kill(processes=targets):
                self._signal(targets, signal.SIGKILL)
            case Prove():
                self._prove(order)
            case Relabel(act=act):
                records = Records(self.root)
                record = records.of(act.engine, act.leader)
                records.write(replace(record, policy=act.written, source=act.source, phase=""))
        return None

    def _mark(self, order: Mark) -> None:
        """A record that is new, because the state was lost, gets the label too: it tells whose memory is not back."""
        records = Records(self.root)
        record = records.of(order.engine, order.leader)
        known = self._known.get(order.leader)
        label = record.label or (known.label if known is not None else ())
        records.write(replace(record, phase=order.phase, label=label))

    def _spawn(self, act: StartEngine) -> Spawned:
        """Gate, record, look once more at the port, release: no engine runs that was not written down.

        Raises Environment when it cannot be written down.
        """
        label = variables(engine=act.engine, source=act.source, written=act.written, resolved=act.resolved)
        log = log_path(self.root, act.engine)
        log_fd = new_log(log)
        try:
            gated = processes.spawn(
                act.resolved.placement,
                act.resolved.argv,
                {**dict(act.env), **label},
                directory=act.resolved.directory,
                log_fd=log_fd,
                boot=self.boot,
                hold=act.hold,
            )
        except processes.CannotSpawn as error:
            return Spawned(leader=None, why=str(error))
        finally:
            os.close(log_fd)
        released = False
        try:
            whole_label = _whole_label(label, gated.identity)
            earlier = self._write_down(act, gated.identity, whole_label, log)
            failpoint("gate.recorded")
            if sockets.is_listened_on(act.resolved.placement.port):
                return Spawned(leader=None, why=f"port {act.resolved.placement.port} was taken while it was started")
            trouble = self._device_trouble(act)
            if trouble is not None:
                return trouble
            gated.release()
            released = True
        except processes.CannotSpawn as error:
            return Spawned(leader=None, why=str(error))
        finally:
            if not released:
                gated.abandon()
                # What never ran has not crashed. A record that stays all the same only hints at a process that is gone.
                with contextlib.suppress(Environment):
                    Records(self.root).forget(act.engine, gated.identity)
        self._children.add(act.engine, gated)
        self._known[gated.identity] = KnownEngine(leader=gated.identity, label=whole_label, members=(gated.identity,))
        self._holds[gated.identity] = gated
        for record in earlier:
            # As long as its memory is not back, a record tells whose that is, and keeps the device closed.
            if record.leader.pid not in self._holding():
                with contextlib.suppress(Environment):
                    Records(self.root).forget(record.engine, record.leader)
        return Spawned(leader=gated.identity)

    def _orphaned(self, act: StartEngine) -> tuple[tuple[str, int], ...]:
        """What nobody held of the devices of a start at the last look, where there was anything."""
        devices = self._observed.devices if self._observed is not None else ()
        mine = [device for device in devices if device.uuid in act.resolved.placement.devices]
        return tuple((device.uuid, device.orphaned_bytes) for device in mine if device.orphaned_bytes)

    def _holding(self) -> set[int]:
        """The pids of dead engines whose memory was not back at the last look."""
        devices = self._observed.devices if self._observed is not None else ()
        return pids_not_given_back(devices)

    def _device_trouble(self, act: StartEngine) -> Spawned | None:
        """What comes of a start whose devices are not as planned, right before the program runs; None when they are.

        Others may have taken memory since the last look, or the driver may have gone.
        """
        wanted = set(act.resolved.placement.devices)
        if not wanted:
            return None
        devices, gaps = self._gpus.look()
        assert self._facts is not None
        if not self._trouble_on(act, devices, self._facts.processes):
            return None
        # Told once more with the processes of now: whoever holds the memory may have come since the last look.
        found, _ = processes.processes(node=self.node, boot=self.boot, logs=str(self.root))
        why = self._trouble_on(act, devices, found)
        if not why:
            return None
        unseen = not wanted <= {device.uuid for device in devices}
        return Spawned(leader=None, why=f"{why}: {gaps[0].why}" if unseen and gaps else why, unseen=unseen)

    def _trouble_on(self, act: StartEngine, devices: tuple[DeviceFact, ...], found: tuple[ProcessFact, ...]) -> str:
        assert self._facts is not None and self._observed is not None
        alive = {fact.identity.pid: fact for fact in found if fact.alive}
        now = ledger(replace(self._facts, devices=devices), self._observed.engines, alive)
        return trouble_on(act, now, self._observed.engines)

    def _write_down(
        self, act: StartEngine, leader: ProcessIdentity, label: tuple[tuple[str, str], ...], log: Path
    ) -> tuple[RecordFact, ...]:
        """Write the record of a new process; the records of the engine's earlier ones, which it replaces."""
        records = Records(self.root)
        earlier = tuple(record for record in records.read() if record.engine == act.engine and record.leader != leader)
        records.write(
            RecordFact(
                engine=act.engine,
                leader=leader,
                port=act.resolved.placement.port,
                from_start=True,
                label=label,
                started_at=time.time(),
                orphaned=self._orphaned(act),
                restarts=_restarts(earlier),
                log=str(log),
                program_version=self._version_of(act),
            )
        )
        return earlier

    def _version_of(self, act: StartEngine) -> str | None:
        """The version of its program, if this sage was asked to look for that."""
        spec = parse_written(act.written)
        programs = self._facts.programs if self._facts is not None else ()
        if spec is None or not is_served(spec):
            return None
        return next((program.version for program in programs if program.name == program_of(spec)), None)

    def _prove(self, order: Prove) -> None:
        """Ask, but an engine that answers wrongly is asked less and less often: a request costs it work."""
        asked_at, pause = self._asked.get(order.leader, (0.0, _FIRST_PROOF_PAUSE_SECONDS))
        if time.monotonic() - asked_at < pause:
            return
        self._asked[order.leader] = (time.monotonic(), min(2 * pause, _LONGEST_PROOF_PAUSE_SECONDS))
        self._prober.prove(order.engine, order.leader, order.kind, order.model, order.host, order.port)

    def _signal(self, targets: Iterable[ProcessIdentity], number: signal.Signals) -> None:
        for target in targets:
            processes.send_signal(target, number, boot=self.boot)

    # --- time and signals ---

    def now(self) -> float:
        return self._clock.now()

    def wall_clock(self) -> float:
        return time.time()

    def wait(self, seconds: float) -> None:
        """Ends sooner when an engine that this sage started ends."""
        pidfds = []
        for leader in self._children.running:
            try:
                pidfds.append(os.pidfd_open(leader.pid))
            except ProcessLookupError:
                continue
        try:
            select.select(pidfds, [], [], seconds)
        finally:
            for pidfd in pidfds:
                os.close(pidfd)

    def stop_signal(self) -> int:
        return self._interrupts.number

    def interruptible(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the first SIGINT or SIGTERM asks for an end between two acts; the second does what it did before."""
        return self._interrupts.heard()


def _newer(path: Path) -> Gap:
    return Gap(what="state", why=f"{path} was written by a newer sage")


def _question(engine: Engine) -> Question:
    spec = spec_of(engine) or EngineSpec(name="unreadable", model="unreadable")
    place = engine.resolved.placement
    return Question(
        leader=engine.leader,
        host=place.host,
        port=place.port,
        path=spec.ready.path,
        ask_models=not engine.has_record,
    )


def _whole_label(label: Mapping[str, str], leader: ProcessIdentity) -> tuple[tuple[str, str], ...]:
    """A label with the part that only the gate is told."""
    named = {LEADER: leader_text(leader.pid, leader.start_ticks, processes.pid_namespace())}
    return tuple(sorted({**label, **named}.items()))


def _restarts(earlier: tuple[RecordFact, ...]) -> int:
    """How often an engine was started again without having been asked to stop."""
    crashed: Mapping[str, RecordFact] = {record.phase: record for record in earlier}
    return crashed[""].restarts + 1 if "" in crashed else 0
