"""What engines were measured to take: what is kept of it, and what the next start is given."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sage_reconcile.core.facts import FootprintFact, Gap, ModelFact, ProgramFact
from sage_reconcile.core.footprint import footprint
from sage_reconcile.core.measuring import MOST_KEPT, kept, measurable, measurement
from sage_reconcile.core.model_shape import shape_of_config
from sage_reconcile.core.needs import Claim, footprint_key, need_of
from sage_reconcile.core.observed import Device, Engine, ObservedState
from sage_reconcile.core.plan import PlanOptions
from sage_reconcile.core.planner import make_plan
from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes import runtime_of
from sage_reconcile.core.runtimes.startup_log import LoggedFootprint
from sage_reconcile.core.shape import ModelShape
from sage_reconcile.core.spec import EngineSpec
from tests.builders import NODE, desired, record, running, spec, wanted, world

MIB, GIB = 1024**2, 1024**3
H100 = Device(node=NODE, index=0, uuid="GPU-0", name="H100", total_bytes=80 * GIB, reserved_bytes=GIB)
A100 = replace(H100, index=1, uuid="GPU-1", name="A100")
MODELS = json.loads((Path(__file__).parent.parent / "footprints" / "models.json").read_text(encoding="utf-8"))
SHAPE = shape_of_config(MODELS["llama-3.1-8b"])
assert isinstance(SHAPE, ModelShape)

# Engines of the three sorts: one that fills what it is told, one that is told and does not, one that cannot be told.
VLLM: dict[str, Any] = {"model": "org/llama", "runtime": "vllm", "max_model_len": 8192}
LLAMA_CPP: dict[str, Any] = {"model": "/models/llama.gguf", "max_model_len": 8192}
COMMAND: dict[str, Any] = {"model": "org/llama", "runtime": "command", "command": ["engine"], "gpu_memory": "24GiB"}


def the_spec(**fields: Any) -> EngineSpec:
    return spec("chat", **{"use_gpu": True, **fields})


def machine(*footprints: FootprintFact, version: str = "1", **fields: Any) -> ObservedState:
    """An H100 and an A100, with the programs and models of the three engines."""
    programs = [ProgramFact(name=name, argv=(f"/usr/bin/{name}",), version=version) for name in PROGRAMS]
    models = [ModelFact(model=str(one["model"]), shape=SHAPE) for one in (VLLM, LLAMA_CPP)]
    seen = world(devices=(H100, A100), models=tuple(models), footprints=footprints, **fields)
    return replace(seen, programs=tuple(programs))


PROGRAMS = ("vllm", "llama-server", "engine")


def seen(fields: dict[str, Any], **figures: Any) -> FootprintFact:
    the_one = the_spec(**fields)
    key = footprint_key(the_one, told=runtime_of(the_one).tells(the_one, SHAPE))
    return FootprintFact(**{"key": key, "device_name": "H100", "version": "1", **figures})


def claim(fields: dict[str, Any], *footprints: FootprintFact, on: str = "GPU-0", version: str = "1") -> Claim:
    return need_of(the_spec(**fields), machine(*footprints, version=version)).on(on)


# --- what a start is given --------------------------------------------------------------------------------------------


def test_an_engine_that_cannot_be_told_needs_what_it_was_measured_to_take() -> None:
    found = claim(COMMAND, seen(COMMAND, peak_bytes=9 * GIB))

    assert (found.memory_bytes, found.context_bytes, found.source) == (9 * GIB, 0, "measured")
    assert claim(COMMAND).source == "declared"


def test_another_figure_in_the_manifest_of_an_engine_that_cannot_be_told_changes_nothing() -> None:
    """2026-11-25: with gpu_memory: 30.0GiB written it was given that, took 55.7, and the apply ended out of memory."""
    fact = seen(COMMAND, peak_bytes=57000 * MIB)

    for written in ("30GiB", "57000MiB", 0.1):
        found = claim(COMMAND | {"gpu_memory": written}, fact)
        assert (found.memory_bytes, found.source) == (57000 * MIB, "measured")
    told = VLLM | {"gpu_memory": "30GiB"}
    assert claim(told | {"gpu_memory": "20GiB"}, seen(told, peak_bytes=31 * GIB, beyond_bytes=GIB)).context_bytes < GIB


def test_another_device_another_program_and_another_spec_were_not_measured() -> None:
    fact = seen(COMMAND, peak_bytes=9 * GIB)

    assert claim(COMMAND, fact, on="GPU-1").source == "declared"
    assert claim(COMMAND, fact, version="2").source == "declared"
    assert claim(COMMAND | {"args": ["--more"]}, fact).source == "declared"
    assert claim(COMMAND | {"port": 8001}, fact).source == "measured"


def test_llama_cpp_with_no_limit_needs_what_it_was_measured_to_take_and_is_told_all_its_layers() -> None:
    """Computed layers would not all fit what was measured, and it would be measured with fewer each time."""
    found = claim(LLAMA_CPP, seen(LLAMA_CPP, peak_bytes=5 * GIB, beyond_bytes=0))
    place = Placement(node=NODE, host="h", port=1, devices=("GPU-0",), memory_bytes_per_device=found.memory_bytes)
    argv = runtime_of(the_spec(**LLAMA_CPP)).argv(the_spec(**LLAMA_CPP), ("llama-server",), place, SHAPE)

    assert (found.memory_bytes, found.source) == (5 * GIB, "measured")
    assert argv[argv.index("--n-gpu-layers") + 1] == "999"


def test_llama_cpp_with_a_limit_keeps_it_and_what_it_took_beyond_is_added() -> None:
    fields = LLAMA_CPP | {"gpu_memory": "6GiB"}
    found = claim(fields, seen(fields, peak_bytes=7 * GIB, beyond_bytes=GIB))

    assert (found.memory_bytes, found.context_bytes, found.source) == (6 * GIB, GIB, "declared")


def test_an_engine_that_fills_what_it_is_told_is_told_no_more_for_having_filled_it() -> None:
    fact = seen(VLLM, peak_bytes=70 * GIB, beyond_bytes=GIB // 4)
    found, before = claim(VLLM, fact), claim(VLLM)

    assert (found.memory_bytes, found.context_bytes) == (before.memory_bytes, GIB // 4)
    assert (found.source, before.source) == ("computed", "computed")


def test_what_a_log_says_takes_the_place_of_what_was_computed_besides_the_cache() -> None:
    fact = seen(VLLM, peak_bytes=70 * GIB, beyond_bytes=GIB // 2, non_kv_bytes=20 * GIB, weights_bytes=15 * GIB)
    cache = footprint(SHAPE, runtime_of(the_spec(**VLLM)).serving(the_spec(**VLLM))).bytes_of("kv_cache")
    found = claim(VLLM, fact)

    assert found.memory_bytes == 20 * GIB + cache + 128 * MIB
    assert (found.context_bytes, found.source) == (GIB // 2, "measured")
    assert claim(VLLM | {"gpu_memory": "30GiB"}, fact).source == "declared"


@pytest.mark.parametrize("larger", [{"peak_bytes": 71 * GIB}, {"beyond_bytes": 2 * GIB}, {"non_kv_bytes": 21 * GIB}])
def test_of_what_two_projects_measured_the_largest_counts_whichever_comes_first(larger: dict[str, int]) -> None:
    """2026-11-25: two that differed in what was taken beyond gave two plans, by the order of the projects."""
    fact = seen(VLLM, peak_bytes=70 * GIB, beyond_bytes=GIB, non_kv_bytes=20 * GIB, weights_bytes=15 * GIB)
    both = (replace(fact, **larger), fact)
    want = desired(wanted("lab/chat", use_gpu=True, devices=[0], **VLLM))

    plans = [make_plan(want, machine(*order)) for order in (both, both[::-1])]

    assert plans[0] == plans[1] == make_plan(want, machine(both[0]))


@pytest.mark.parametrize("order", [1, -1])
def test_an_engine_that_two_projects_measured_is_planned_with_the_larger_figure(order: int) -> None:
    facts = (seen(COMMAND, peak_bytes=9 * GIB), seen(COMMAND, peak_bytes=12 * GIB))[::order]
    want = desired(wanted("lab/chat", use_gpu=True, devices=[0], **COMMAND))

    (step,) = make_plan(want, machine(*facts)).steps

    assert step.placement is not None
    assert (step.placement.memory_bytes_per_device, step.placement.memory_source) == (12 * GIB, "measured")


@pytest.mark.parametrize("needs_gib", [14, 16])
def test_what_is_told_comes_to_rest_and_never_climbs(needs_gib: int) -> None:
    """vLLM takes a little less than it is told, since CUDA counts a device smaller than NVML does; then the context."""
    fact, told = None, []
    for _ in range(12):
        found = claim(VLLM, *([fact] if fact is not None else []))
        told.append(found.memory_bytes)
        takes = int(found.fraction * H100.total_bytes * 0.994)
        cache = max(takes - needs_gib * GIB, 0)
        engine = of_vllm(found, used=takes + 600 * MIB)
        log = LoggedFootprint(weights_bytes=13 * GIB, kv_cache_bytes=cache)
        now = measurement(engine, machine(records=(record(engine, program_version="1"),)), log)
        assert now is not None
        (fact,) = kept((fact,) if fact is not None else (), (now,)) or (fact,)
    assert max(told[1:]) - min(told[1:]) < 64 * MIB
    assert told[-1] == told[-2]
    assert needs_gib * GIB + GIB <= told[-1] < needs_gib * GIB + 1.5 * GIB


def of_vllm(given: Claim, used: int) -> Engine:
    engine = running("lab/chat", 8001, 100, use_gpu=True, **VLLM)
    place = replace(
        engine.resolved.placement,
        devices=("GPU-0",),
        device_indexes=(0,),
        memory_bytes_per_device=given.memory_bytes,
        context_bytes_per_device=given.context_bytes,
        memory_fraction=given.fraction,
        memory_source=given.source,
        memory_told=True,
    )
    resolved = replace(engine.resolved, placement=place, runtime="vllm")
    return replace(engine, resolved=resolved, measured_bytes=(("GPU-0", used),))


# --- what is measured -------------------------------------------------------------------------------------------------


def of_command(used: int, given: int = 24 * GIB, **changes: Any) -> Engine:
    engine = running("lab/chat", 8001, 100, use_gpu=True, **COMMAND)
    place = replace(
        engine.resolved.placement,
        devices=("GPU-0",),
        device_indexes=(0,),
        memory_bytes_per_device=given,
        memory_fraction=0.3,
        memory_source="declared",
    )
    resolved = replace(engine.resolved, placement=place, runtime="command", argv=("/usr/bin/engine",))
    return replace(engine, resolved=resolved, measured_bytes=(("GPU-0", used),), **changes)


def test_what_is_measured_says_what_it_was_measured_of() -> None:
    engine = of_command(9 * GIB)
    found = measurement(engine, machine(records=(record(engine, program_version="7"),)), None)

    assert found == replace(seen(COMMAND, peak_bytes=9 * GIB), version="7")


def test_of_several_devices_the_one_that_holds_most_counts() -> None:
    engine = of_command(9 * GIB)
    place = replace(engine.resolved.placement, devices=("GPU-0", "GPU-1"), device_indexes=(0, 1))
    engine = replace(engine, resolved=replace(engine.resolved, placement=place))
    engine = replace(engine, measured_bytes=(("GPU-0", GIB), ("GPU-1", 2 * GIB)))
    found = measurement(engine, machine(records=(record(engine, program_version="1"),)), None)

    assert found is not None
    assert (found.device_name, found.peak_bytes) == ("A100", 2 * GIB)


def test_nothing_is_measured_of_what_is_not_ready_or_not_told_by_the_driver() -> None:
    untold = Gap(what="device memory", why="the driver does not tell", subject="GPU-0")

    assert measurable(of_command(GIB), machine())
    assert not measurable(of_command(GIB, state="starting"), machine())
    assert not measurable(of_command(0), machine())
    assert not measurable(of_command(GIB), machine(gaps=(untold,)))


def test_a_process_of_which_nobody_wrote_down_the_program_is_not_measured() -> None:
    """Its program may have been replaced since it was started."""
    engine = of_command(GIB)

    assert measurement(engine, machine(records=(record(engine),)), None) is None
    assert measurement(engine, machine(), None) is None


def test_a_log_that_makes_no_sense_beside_what_was_told_is_not_used() -> None:
    engine = of_vllm(claim(VLLM), used=20 * GIB)
    seen_with = machine(records=(record(engine, program_version="1"),))
    told = engine.resolved.placement.memory_bytes_per_device
    for log in (
        LoggedFootprint(weights_bytes=15 * GIB),
        LoggedFootprint(weights_bytes=15 * GIB, kv_cache_bytes=told),
        LoggedFootprint(weights_bytes=15 * GIB, kv_cache_bytes=90 * GIB),
        LoggedFootprint(weights_bytes=told, kv_cache_bytes=GIB),
    ):
        found = measurement(engine, seen_with, log)
        assert found is not None
        assert found.non_kv_bytes == 0


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_only_what_grew_by_more_than_a_hundredth_or_64_mib_is_written() -> None:
    fact = seen(COMMAND, peak_bytes=20 * GIB)

    assert kept((), (fact,)) == (fact,)
    assert kept((fact,), (fact,)) is None
    assert kept((fact,), (replace(fact, peak_bytes=20 * GIB + 60 * MIB),)) is None
    assert kept((fact,), (replace(fact, peak_bytes=10 * GIB),)) is None
    more = replace(fact, peak_bytes=20 * GIB + 65 * MIB)
    assert kept((fact,), (more,)) == (more,)
    small = replace(fact, peak_bytes=GIB)
    assert kept((small,), (replace(small, peak_bytes=GIB + 11 * MIB),)) is not None


def test_of_all_runs_the_most_counts_and_the_log_that_left_most_without_a_cache() -> None:
    first = seen(VLLM, peak_bytes=30 * GIB, beyond_bytes=GIB, non_kv_bytes=17 * GIB, weights_bytes=15 * GIB)
    second = replace(first, peak_bytes=22 * GIB, beyond_bytes=2 * GIB, non_kv_bytes=16 * GIB, weights_bytes=14 * GIB)

    assert kept((first,), (second,)) == (replace(first, beyond_bytes=2 * GIB),)


def test_what_was_used_last_is_kept_and_the_rest_forgotten() -> None:
    facts = tuple(replace(seen(COMMAND, peak_bytes=GIB), key=f"{number:016x}") for number in range(MOST_KEPT))
    new = seen(COMMAND, peak_bytes=GIB)

    # Used again, it moves away from the end at which entries are forgotten; but not at every use.
    moved = kept(facts, (facts[0],))
    assert moved is not None and moved[-1] == facts[0] and kept(moved, (facts[0],)) is None
    now = kept(moved, (new,))
    assert now is not None and len(now) == MOST_KEPT
    assert facts[1] not in now and facts[0] in now and new in now


# --- at rest ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "told"),
    [
        (9 * GIB, "lab/chat was given 24.0 GiB of gpu0; a start would now be given 9.0, measured"),
        (30 * GIB, "lab/chat was given 24.0 GiB of gpu0; a start would now be given 30.0, measured"),
        (23 * GIB, ""),
    ],
)
def test_a_better_figure_is_a_note_and_no_step(used: int, told: str) -> None:
    engine = of_command(used)
    now = machine(seen(COMMAND, peak_bytes=used))
    now = replace(now, engines=(engine,), listeners=world(engine).listeners)

    plan = make_plan(desired(wanted("lab/chat", use_gpu=True, **COMMAND)), now, PlanOptions())

    assert plan.acts == () and plan.blocked == ()
    assert [note for note in plan.notes if "measured" in note] == ([told] if told else [])
