"""Fakes that keep the contract and record what was asked of them."""

from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace

from sage_reconcile.core.facts import ExitFact
from sage_reconcile.core.identity import ProcessIdentity
from sage_reconcile.core.journal import Entry
from sage_reconcile.core.observed import Device, Engine, Lingering, ObservedState
from sage_reconcile.core.orders import Kill, Mark, Order, Prove, Relabel, Spawn, Spawned, Terminate
from sage_reconcile.core.plan import StartEngine, StopEngine, after
from sage_reconcile.errors import Environment


@dataclass
class MemoryJournal:
    """A journal that is lost with the test, and refuses the lines with these numbers; the first is 1."""

    refuses: Container[int] = ()
    entries: list[Entry] = field(default_factory=list)
    asked: int = 0

    def append(self, entry: Entry) -> None:
        self.asked += 1
        if self.asked in self.refuses:
            raise Environment("cannot write /journal: No space left on device")
        self.entries.append(entry)


@dataclass
class FakeHost:
    """A machine in memory with a clock of its own.

    A spawned engine is healthy `load_seconds` later and proved when asked. `fails` says of each start, by its number
    from 0, how it fails: "refused" (nothing is spawned), "exits" (gone at the next look), "hangs" (never healthy).
    `deaf` engines survive SIGTERM; `undead` ones survive SIGKILL too.

    An engine takes half of the memory that it was given when it starts, and the rest when it is ready. What an ended
    one held comes back `late_seconds` later, and until then nobody holds it; so does what lingers at first.
    """

    world: ObservedState
    fails: Callable[[int, StartEngine], str] = lambda number, act: ""
    deaf: frozenset[str] = frozenset()
    undead: frozenset[str] = frozenset()
    load_seconds: float = 1.0
    late_seconds: float = 0.0
    time: float = 0.0
    starts: int = 0
    orders: list[Order] = field(default_factory=list)
    doomed: dict[ProcessIdentity, str] = field(default_factory=dict)
    healthy_at: dict[ProcessIdentity, float] = field(default_factory=dict)
    # The world and the number of orders before the last pause, and for how many looks they have been the same.
    _seen: tuple[ObservedState, int] | None = None
    _idle_looks: int = 0
    # The signal that has come so far, asked before each round of orders.
    stop: Callable[["FakeHost"], int] = lambda host: 0
    # Called at every look with the world, so that a test can watch each prefix.
    on_look: Callable[[ObservedState], None] = lambda world: None
    # What the dead have not given back: when it comes back, on which device, and whose it was.
    returning: list[tuple[float, str, Lingering]] = field(default_factory=list)
    _bare: tuple[Device, ...] = ()

    def __post_init__(self) -> None:
        self.returning = [
            (self.late_seconds, device.uuid, entry) for device in self.world.devices for entry in device.lingering
        ]
        # What is there apart from our engines and the dead.
        self._bare = tuple(_without_the_dead(device) for device in self.world.devices)
        for engine in self.world.engines:
            if engine.state == "starting":
                self.healthy_at[engine.leader] = self.load_seconds

    def look(self) -> ObservedState:
        for leader in [leader for leader, how in self.doomed.items() if how == "exits"]:
            engine = self._engine(leader)
            self._remove(leader)
            self.world = replace(
                self.world, exits=(*self.world.exits, ExitFact(engine=engine.id, leader=leader, code=1))
            )
            del self.doomed[leader]
        for leader in [leader for leader, at in self.healthy_at.items() if at <= self.time]:
            del self.healthy_at[leader]
            if self._alive(leader):
                place = self._engine(leader).resolved.placement
                used = tuple((uuid, place.counted_bytes_per_device) for uuid in sorted(place.devices))
                self._change(leader, health="ok", listens_on=(place.port,), measured_bytes=used)
        if self._bare:
            self._count_memory()
        self.on_look(self.world)
        return self.world

    def do(self, order: Order) -> Spawned | None:
        self.orders.append(order)
        match order:
            case Spawn(act=act):
                return self._spawn(act)
            case Mark(leader=leader, phase=phase):
                self._change(leader, phase=phase, state=phase)
            case Terminate(leader=leader, processes=processes):
                if self._name(leader) not in self.deaf | self.undead:
                    self._end(leader, processes)
            case Kill(leader=leader, processes=processes):
                if self._name(leader) not in self.undead:
                    self._end(leader, processes)
            case Prove(leader=leader):
                self._change(leader, proved=True, state="ready")
            case Relabel(act=act):
                self.world = after(act, self.world)
        return None

    def now(self) -> float:
        return self.time

    def wall_clock(self) -> float:
        return 1_000_000.0 + self.time

    def stop_signal(self) -> int:
        return self.stop(self)

    def wait(self, seconds: float) -> None:
        # Longer pauses than asked for keep thousands of simulated applies quick: half a second, and when nothing has
        # happened for ten, which is longer than any grace or drain here, ever longer ones.
        is_idle = self._seen is not None and self._seen[0] is self.world and self._seen[1] == len(self.orders)
        self._seen = (self.world, len(self.orders))
        self._idle_looks = self._idle_looks + 1 if is_idle else 0
        self.time += max(seconds, min(0.5 * 2 ** max(0, self._idle_looks - 20), 30.0))

    def _spawn(self, act: StartEngine) -> Spawned:
        number, self.starts = self.starts, self.starts + 1
        how = self.fails(number, act)
        if how == "refused":
            return Spawned(leader=None, why="the port was taken at the last moment")
        leader = self._born(after(act, self.world))
        place = act.resolved.placement
        used = tuple((uuid, place.memory_bytes_per_device // 2) for uuid in sorted(place.devices))
        self._change(leader, state="starting", proved=False, health="refused", measured_bytes=used)
        if how == "exits":
            self.doomed[leader] = how
        elif how != "hangs":
            self.healthy_at[leader] = self.time + self.load_seconds
        return Spawned(leader=leader)

    def _born(self, world: ObservedState) -> ProcessIdentity:
        """Take the world with one engine more, whose identity no process of this host ever had or will have."""
        simulated = world.engines[-1].leader
        leader = replace(simulated, pid=20_000 + self.starts, start_ticks=1_000_000 + self.starts)
        born = replace(world.engines[-1], leader=leader, members=(leader,))
        socket = replace(world.listeners[-1], pids=(leader.pid,))
        self.world = replace(world, engines=(*world.engines[:-1], born), listeners=(*world.listeners[:-1], socket))
        return leader

    def _end(self, leader: ProcessIdentity, processes: tuple[ProcessIdentity, ...]) -> None:
        assert set(processes) <= set(self._engine(leader).members)
        self._remove(leader)

    def _remove(self, leader: ProcessIdentity) -> None:
        engine = self._engine(leader)
        self.returning += [
            (self.time + self.late_seconds, uuid, Lingering(engine=engine.id, pid=leader.pid, held_bytes=size))
            for uuid, size in engine.measured_bytes
        ]
        self.world = after(
            StopEngine(step=0, after=(), engine=engine.id, leader=leader, port=0, drain_seconds=0, grace_seconds=0),
            self.world,
        )

    def _count_memory(self) -> None:
        self.returning = [entry for entry in self.returning if entry[0] > self.time]
        self.world = replace(self.world, devices=tuple(self._counted(device) for device in self._bare))

    def _counted(self, bare: Device) -> Device:
        lingering = tuple(entry for _, uuid, entry in self.returning if uuid == bare.uuid)
        dead = sum(entry.held_bytes for entry in lingering)
        ours = sum(dict(engine.measured_bytes).get(bare.uuid, 0) for engine in self.world.engines)
        return replace(
            bare,
            used_bytes=bare.foreign_bytes + dead + ours,
            foreign_bytes=bare.foreign_bytes + dead,
            orphaned_bytes=bare.orphaned_bytes + dead,
            lingering=lingering,
        )

    def _engine(self, leader: ProcessIdentity) -> Engine:
        return next(engine for engine in self.world.engines if engine.leader == leader)

    def _alive(self, leader: ProcessIdentity) -> bool:
        return any(engine.leader == leader for engine in self.world.engines)

    def _name(self, leader: ProcessIdentity) -> str:
        return str(self._engine(leader).id)

    def _change(self, leader: ProcessIdentity, **fields: object) -> None:
        engines = tuple(
            replace(engine, **fields) if engine.leader == leader else engine  # type: ignore[arg-type]
            for engine in self.world.engines
        )
        self.world = replace(self.world, engines=engines)


def _without_the_dead(device: Device) -> Device:
    dead = sum(entry.held_bytes for entry in device.lingering)
    return replace(
        device,
        foreign_bytes=device.foreign_bytes - dead,
        orphaned_bytes=device.orphaned_bytes - dead,
        lingering=(),
    )
