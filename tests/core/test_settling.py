"""When a device is ready for a start: its memory at rest, its dead gone, nothing about it changed since the plan."""

from dataclasses import replace

from sage_reconcile.core.observed import Device, Lingering, ObservedState
from sage_reconcile.core.plan import StartEngine
from sage_reconcile.core.planner import make_plan
from sage_reconcile.core.settling import LONGEST_WAIT_SECONDS, may_start, readings, trouble_on
from tests.builders import NODE, desired, record, running, the_id, wanted, world

GIB = 1024**3
GPU = Device(node=NODE, index=0, uuid="GPU-a", name="L4", total_bytes=24 * GIB)


def of(*devices: Device) -> ObservedState:
    return world(devices=devices)


def start() -> StartEngine:
    (act,) = make_plan(desired(wanted("lab/chat", use_gpu=True, gpu_memory="2GiB")), of(GPU)).acts
    assert isinstance(act, StartEngine)
    return act


def answers(*used_gib: int) -> list[str]:
    """What a start is told at looks a fifth of a second apart, at which so much was used."""
    read, told = readings((), of(), 0.0), []
    for number, used in enumerate(used_gib):
        observed = of(replace(GPU, used_bytes=used * GIB, foreign_bytes=used * GIB))
        read = readings(read, observed, number / 5)
        told.append(may_start(start(), read, observed, now=number / 5, waited_seconds=number / 5).answer)
    return told


def test_memory_that_moves_is_waited_for_until_it_rests() -> None:
    assert answers(1, 2, 3, 3, 3) == ["wait", "wait", "wait", "wait", "go"]


def test_memory_that_never_rests_is_not_waited_for_for_ever() -> None:
    moving = readings((), of(GPU), LONGEST_WAIT_SECONDS)
    act = start()
    assert may_start(act, moving, of(GPU), now=LONGEST_WAIT_SECONDS, waited_seconds=LONGEST_WAIT_SECONDS).answer == "go"


def test_memory_of_another_dead_engine_is_waited_for_and_then_lived_with_where_there_is_room() -> None:
    other = Lingering(engine=the_id("lab/other"), pid=7, held_bytes=4 * GIB)
    observed = of(replace(GPU, used_bytes=4 * GIB, foreign_bytes=4 * GIB, orphaned_bytes=4 * GIB, lingering=(other,)))
    read = readings((), observed, 0.0)
    waiting = may_start(start(), read, observed, now=1.0, waited_seconds=1.0)
    later = may_start(start(), read, observed, now=31.0, waited_seconds=31.0)
    assert (waiting.answer, later.answer) == ("wait", "go")
    assert waiting.why == "4.0 GiB of gpu0 are still held by lab/other, which ended as pid 7"


def test_memory_of_its_own_last_process_that_does_not_come_back_ends_the_start_and_names_the_process() -> None:
    dead = running("lab/chat", 8001, 7)
    own = Lingering(engine=dead.id, pid=7, held_bytes=4 * GIB)
    device = replace(GPU, used_bytes=4 * GIB, foreign_bytes=4 * GIB, orphaned_bytes=4 * GIB, lingering=(own,))
    observed = world(devices=(device,), records=(record(dead),))
    verdict = may_start(start(), readings((), observed, 0.0), observed, now=31.0, waited_seconds=31.0)
    assert (verdict.answer, verdict.stuck) == ("fail", (dead.leader,))


def test_device_that_was_closed_since_the_plan_is_not_started_on() -> None:
    closed = replace(GPU, closed="lab/old (pid 7) ended, and 4.0 GiB did not come back")
    assert trouble_on(start(), (closed,), ()) == f"gpu0 is closed: {closed.closed}"
    assert trouble_on(start(), (GPU,), ()) == ""


def test_device_that_is_closed_and_has_room_ends_a_start_at_once() -> None:
    """2026-11-25: room enough counted as memory that comes back, and such a start waited for half a minute."""
    closed = of(replace(GPU, closed="the driver asks for a reset of this GPU"))
    verdict = may_start(start(), readings((), closed, 0.0), closed, now=1.0, waited_seconds=1.0)
    assert (verdict.answer, verdict.why) == ("fail", "gpu0 is closed: the driver asks for a reset of this GPU")
