"""How far a plan has come, and what to do next. Pure: the clock and the world come in as values.

An act is done over several looks at the world; each look yields orders, the smallest things a host can do at once.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from sage_reconcile.core.identity import EngineId, ProcessIdentity
from sage_reconcile.core.observed import Engine, ObservedState
from sage_reconcile.core.orders import Kill, Mark, Order, Prove, Relabel, Spawn, Spawned, Terminate
from sage_reconcile.core.plan import Act, Awaited, Plan, RelabelEngine, StartEngine, StopEngine
from sage_reconcile.core.settling import Reading, may_start, not_back, orphaned, readings

# vLLM swallows a SIGTERM that comes while its workers start (measured: 3 of 3 ended by a second one), so the request
# to end is repeated this often within the grace.
_TERMS_PER_GRACE = 4

# After SIGKILL only the kernel can keep a process alive. A driver that frees device memory takes seconds; when this
# long has passed, a person must look.
STUCK_AFTER_SECONDS = 30.0

# SIGKILL is repeated, because a member may have forked between the look and the signal.
_KILL_AGAIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ActProgress:
    """How far one act has come."""

    # waiting | draining | terminating | killing | freeing | settling | starting | done | failed
    phase: str = "waiting"
    # When the act began, in seconds of the host's monotonic clock.
    begun_at: float = 0.0
    # When the phase began, on the same clock.
    since: float = 0.0
    # When the last signal was sent, on the same clock.
    signalled_at: float = 0.0
    # The process that a start made; None for other acts, and before there is one.
    leader: ProcessIdentity | None = None
    # Why it failed.
    why: str = ""
    # Whether it failed because the machine does not let sage work, as with a full disk.
    environment: bool = False
    # Whether it failed because what it needs cannot be seen.
    unseen: bool = False
    # What nobody held of each device when a stop began, by UUID.
    orphaned: tuple[tuple[str, int], ...] = ()
    # What a start waits for, in a sentence; empty when it waits for nothing but its engine.
    waits_for: str = ""

    @property
    def ended(self) -> bool:
        return self.phase in ("done", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a plan has come. The entries stand for the plan's acts, then for the engines that are awaited."""

    entries: tuple[ActProgress, ...]
    # Whether acts that do not wait for a failed one still begin.
    keep_going: bool = False
    # Why something could not be written down, after which no act begins any more; empty as long as all could.
    unwritten: str = ""
    # What the devices used at the last looks.
    readings: tuple[Reading, ...] = ()

    @property
    def begins_no_more(self) -> bool:
        """Whether nothing new is begun: a failure comes first, or something could not be written down."""
        return bool(self.unwritten or (self.failures and not self.keep_going))

    @property
    def failures(self) -> tuple[int, ...]:
        return tuple(index for index, entry in enumerate(self.entries) if entry.phase == "failed")

    @property
    def all_done(self) -> bool:
        return all(entry.phase == "done" for entry in self.entries)


def begin(plan: Plan, *, keep_going: bool = False) -> Progress:
    """The progress of a plan of which nothing has been done."""
    return Progress(entries=(ActProgress(),) * (len(plan.acts) + len(plan.awaited)), keep_going=keep_going)


def finished(plan: Plan, progress: Progress) -> bool:
    """Whether nothing is left to do or to wait for.

    After a failure, or when something could not be written down, no act begins any more and starting engines are not
    waited for: what to do with them is for the next plan. A stop that was begun is seen through.
    """
    if progress.begins_no_more:
        return not any(entry.phase in ("draining", "terminating", "killing", "freeing") for entry in progress.entries)
    return all(entry.ended or _cannot_begin(plan, progress, index) for index, entry in enumerate(progress.entries))


def failed(progress: Progress, index: int, why: str, *, environment: bool = False, unseen: bool = False) -> Progress:
    """The progress after an order could not be carried out; `environment` and `unseen` as in ActProgress."""
    entry = replace(progress.entries[index], phase="failed", why=why, environment=environment, unseen=unseen)
    return _with(progress, index, entry)


def unwritable(progress: Progress, why: str, begun: Collection[int] = ()) -> Progress:
    """The progress after something could not be written down; `why` is empty when it could.

    The acts in `begun` would have begun with it, and have not.
    """
    entries = tuple(ActProgress() if index in begun else entry for index, entry in enumerate(progress.entries))
    return replace(progress, entries=entries, unwritten=progress.unwritten or why)


def spawned(progress: Progress, index: int, result: Spawned) -> Progress:
    """The progress after a Spawn was carried out."""
    entry = progress.entries[index]
    if result.leader is None:
        return failed(progress, index, result.why, unseen=result.unseen)
    return _with(progress, index, replace(entry, leader=result.leader))


def advance(
    plan: Plan, progress: Progress, observed: ObservedState, now: float
) -> tuple[Progress, tuple[tuple[int, Order], ...]]:
    """The progress that the world shows, and the orders to give now, each with the index of its act."""
    tasks: tuple[Act | Awaited, ...] = (*plan.acts, *plan.awaited)
    orders: list[tuple[int, Order]] = []
    progress = replace(progress, readings=readings(progress.readings, observed, now))
    leaving = {act.leader for act in plan.acts if isinstance(act, StopEngine)}
    for index, task in enumerate(tasks):
        entry = progress.entries[index]
        if entry.ended or (entry.phase == "waiting" and not _may_begin(plan, progress, index, observed)):
            continue
        if entry.phase == "settling" and progress.begins_no_more:
            continue  # Nothing of it runs yet.
        match task:
            case StopEngine():
                entry, given = _stopping(task, entry, observed, now)
            case StartEngine():
                entry, given = _starting(task, entry, observed, now, progress.readings, leaving)
            case RelabelEngine():
                entry, given = replace(entry, phase="done"), (Relabel(act=task),)
            case Awaited():
                entry, given = _awaiting(task, entry, observed, now)
        progress = _with(progress, index, entry)
        orders += [(index, order) for order in given]
    return progress, tuple(orders)


def _with(progress: Progress, index: int, entry: ActProgress) -> Progress:
    return replace(progress, entries=(*progress.entries[:index], entry, *progress.entries[index + 1 :]))


def _may_begin(plan: Plan, progress: Progress, index: int, observed: ObservedState) -> bool:
    if index >= len(plan.acts):
        return True
    act = plan.acts[index]
    needs = act.needs if isinstance(act, StartEngine) else ()
    ready = {engine.leader for engine in observed.engines if engine.state == "ready"}
    if not ready.issuperset(needs):
        return False
    if progress.begins_no_more:
        return False
    if not all(
        progress.entries[earlier].ended or _cannot_begin(plan, progress, earlier)
        for earlier in getattr(act, "behind", ())
    ):
        return False
    return all(progress.entries[earlier].phase == "done" for earlier in act.after)


def _cannot_begin(plan: Plan, progress: Progress, index: int) -> bool:
    """Whether the act waits for one that failed, directly or through others, or for an engine that was given up."""
    if index >= len(plan.acts) or progress.entries[index].phase != "waiting":
        return False
    act = plan.acts[index]
    given_up = {
        task.leader
        for number, task in enumerate(plan.awaited, start=len(plan.acts))
        if progress.entries[number].phase == "failed"
    }
    if isinstance(act, StartEngine) and given_up & set(act.needs):
        return True
    return any(
        progress.entries[earlier].phase == "failed" or _cannot_begin(plan, progress, earlier)
        for earlier in plan.acts[index].after
    )


# --- stopping ---------------------------------------------------------------------------------------------------------


def _stopping(
    act: StopEngine, entry: ActProgress, observed: ObservedState, now: float
) -> tuple[ActProgress, tuple[Order, ...]]:
    """The ladder: drain, ask, ask again, kill, and wait until every member is gone and its memory is back."""
    engine = _engine(observed, act.leader)
    if engine is None:
        return _freeing(act, entry, observed, now)
    if entry.phase == "waiting":
        entry = replace(entry, phase="draining", begun_at=now, since=now, orphaned=orphaned(act, observed))
        mark = Mark(engine=act.engine, leader=act.leader, phase="draining")
        if not _drained(act, observed):
            return entry, (mark,)
    if entry.phase == "draining":
        if not _drained(act, observed) and now - entry.since < act.drain_seconds:
            return entry, ()
        mark = Mark(engine=act.engine, leader=act.leader, phase="stopping")
        return replace(entry, phase="terminating", since=now, signalled_at=now), (mark, _terminate(engine))
    if entry.phase == "terminating" and now - entry.since < act.grace_seconds:
        if now - entry.signalled_at < act.grace_seconds / _TERMS_PER_GRACE:
            return entry, ()
        return replace(entry, signalled_at=now), (_terminate(engine),)
    if entry.phase == "terminating":
        return replace(entry, phase="killing", since=now, signalled_at=now), (_kill(engine),)
    if now - entry.since >= STUCK_AFTER_SECONDS:
        pids = ", ".join(str(process.pid) for process in engine.members)
        mark = Mark(engine=act.engine, leader=act.leader, phase="stuck")
        return replace(entry, phase="failed", why=f"stuck: SIGKILL does not end pid {pids}"), (mark,)
    if now - entry.signalled_at < _KILL_AGAIN_SECONDS:
        return entry, ()
    return replace(entry, signalled_at=now), (_kill(engine),)


def _freeing(
    act: StopEngine, entry: ActProgress, observed: ObservedState, now: float
) -> tuple[ActProgress, tuple[Order, ...]]:
    """Every member is gone; a driver takes a while to free what they held."""
    missing = not_back(act, entry.orphaned, observed)
    if not missing:
        return replace(entry, phase="done"), ()
    if entry.phase != "freeing":
        return replace(entry, phase="freeing", since=now, waits_for=missing), ()
    if now - entry.since < STUCK_AFTER_SECONDS:
        return replace(entry, waits_for=missing), ()
    mark = Mark(engine=act.engine, leader=act.leader, phase="stuck")
    unseen = not {uuid for uuid, _ in entry.orphaned} <= {device.uuid for device in observed.devices}
    return replace(entry, phase="failed", why=f"stuck: it ended, and {missing}", unseen=unseen), (mark,)


def _engine(observed: ObservedState, leader: ProcessIdentity) -> Engine | None:
    return next((engine for engine in observed.engines if engine.leader == leader), None)


def _drained(act: StopEngine, observed: ObservedState) -> bool:
    """Whether every live router has seen that the engine drains, and counts no request of it."""
    return all(
        act.leader in router.drained_from and not dict(router.in_flight).get(act.leader, 0)
        for router in observed.routers
    )


def _terminate(engine: Engine) -> Terminate:
    """The leader is asked, since it shuts its workers down in order; without it, all that is left."""
    processes = (engine.leader,) if engine.leader_alive else engine.members
    return Terminate(engine=engine.id, leader=engine.leader, processes=processes)


def _kill(engine: Engine) -> Kill:
    return Kill(engine=engine.id, leader=engine.leader, processes=engine.members)


# --- starting ---------------------------------------------------------------------------------------------------------


def _starting(
    act: StartEngine,
    entry: ActProgress,
    observed: ObservedState,
    now: float,
    read: tuple[Reading, ...],
    leaving: Collection[ProcessIdentity],
) -> tuple[ActProgress, tuple[Order, ...]]:
    if entry.phase == "waiting":
        entry = replace(entry, phase="settling", begun_at=now, since=now)
    if entry.phase == "settling":
        waited_seconds = now - entry.since
        verdict = may_start(act, read, observed, now=now, waited_seconds=waited_seconds, leaving=leaving)
        if verdict.answer == "wait":
            return replace(entry, waits_for=verdict.why), ()
        if verdict.answer == "fail":
            marks = tuple(Mark(engine=act.engine, leader=leader, phase="stuck") for leader in verdict.stuck)
            return replace(entry, phase="failed", why=verdict.why, unseen=verdict.unseen), marks
        return replace(entry, phase="starting", since=now, waits_for=""), (Spawn(act=act),)
    assert entry.leader is not None
    if not act.waits and _failure(act.engine, entry.leader, _engine(observed, entry.leader), observed) == "":
        return replace(entry, phase="done"), ()
    place = act.resolved.placement
    awaited = Awaited(
        engine=act.engine,
        leader=entry.leader,
        kind=act.kind,
        model=act.model,
        host=place.host,
        port=place.port,
        health_path=act.health_path,
        ready_seconds=act.ready_seconds,
    )
    return _awaiting(awaited, entry, observed, now)


def _awaiting(
    task: Awaited, entry: ActProgress, observed: ObservedState, now: float
) -> tuple[ActProgress, tuple[Order, ...]]:
    """Until the engine is ready: an exit ends the wait at once, and so does the end of its time."""
    if entry.phase == "waiting":
        entry = replace(entry, phase="starting", begun_at=now, since=now, leader=task.leader)
    engine = _engine(observed, task.leader)
    failure = _failure(task.engine, task.leader, engine, observed)
    if failure:
        return replace(entry, phase="failed", why=failure), ()
    assert engine is not None
    if engine.state == "ready":
        return replace(entry, phase="done"), ()
    if now - entry.since >= task.ready_seconds:
        why = f"not ready after {task.ready_seconds:g} s: {engine.reason}"
        return replace(entry, phase="failed", why=why), ()
    prove = proof_order(engine, task.kind, task.model)
    return entry, () if prove is None else (prove,)


def _failure(the_id: EngineId, leader: ProcessIdentity, engine: Engine | None, observed: ObservedState) -> str:
    """Why the engine will never be ready; empty while it may."""
    exit_fact = next((fact for fact in observed.exits if (fact.engine, fact.leader) == (the_id, leader)), None)
    if exit_fact is not None:
        return f"{ended_how(exit_fact.code)} before it was ready"
    if engine is None:
        return f"pid {leader.pid} was gone before it was ready"
    if not engine.leader_alive:
        return f"its first process, pid {leader.pid}, was gone before it was ready"
    if engine.misplaced:
        return engine.misplaced
    return ""


# What the gate's shell ends with when it cannot become the program (POSIX.1-2017, Shell Command Language 2.8.2).
_NOT_STARTED = {126: ", as where a program cannot be executed here", 127: ", as where a program is not found"}


def ended_how(code: int) -> str:
    """How a process ended, from its exit code; negative is minus a signal's number."""
    if code < 0:
        return f"was ended by signal {-code}"
    return f"exited with code {code}{_NOT_STARTED.get(code, '')}"


def proof_order(engine: Engine, kind: str, model: str) -> Prove | None:
    """The request that would prove a healthy engine; None when it has been proved, or cannot be asked yet."""
    place = engine.resolved.placement
    if engine.proved or engine.intruder or engine.health != "ok" or place.port not in engine.listens_on:
        return None
    return Prove(engine=engine.id, leader=engine.leader, kind=kind, model=model, host=place.host, port=place.port)
