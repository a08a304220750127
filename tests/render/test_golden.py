"""What a terminal of 80 columns shows of GPUs, of plans on them, of `sage why` and of `sage status`: with and without
colour.

SNAP_UPDATE=1 writes golden/ anew; the diff is what a reviewer reads.
"""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sage_reconcile.core.desired import DesiredState
from sage_reconcile.core.facts import AppliedFact, Gap
from sage_reconcile.core.observed import Foreign, Lingering, ObservedState
from sage_reconcile.core.plan import PlanOptions
from sage_reconcile.core.planner import make_plan
from sage_reconcile.core.spec import canonical_json, written_fields
from sage_reconcile.core.why import device_why, engine_why
from sage_reconcile.render.gpu_text import gpu_text
from sage_reconcile.render.paint import Paint
from sage_reconcile.render.plan_text import plan_text
from sage_reconcile.render.status_text import status_text
from sage_reconcile.render.why_text import why_text
from tests.builders import the_id
from tests.gpu_worlds import GIB, LLAMA_8B, LLAMA_70B, MIB, MODELS, desired, h100, holder, machine, on_gpu, uuid, wants

HERE = Path(__file__).resolve().parent / "golden"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")

Text = Callable[[Paint], str]


# --- sage gpu ---------------------------------------------------------------------------------------------------------


def idle() -> ObservedState:
    return machine(h100(0), h100(1))


def busy() -> ObservedState:
    """An engine that loads, one that is ready, two foreign processes, and memory that nobody holds."""
    loading = on_gpu(
        "chat/llama-70b", 8001, 23517, 0, 1, gib=73.4, uses=12.7, state="starting", reason="does not listen yet"
    )
    ready = on_gpu("lab/embed", 8090, 4711, 2, gib=6.9, uses=6.2)
    return machine(
        h100(0, utilization_percent=3, temperature_celsius=52, power_watts=341.7),
        h100(1, utilization_percent=2, temperature_celsius=51, power_watts=338.2),
        h100(
            2,
            holders=(holder(4242, 35.0), holder(31337, 1.4, name="jupyter-notebook", user="svc-notebooks")),
            orphaned_bytes=round(2.5 * GIB),
        ),
        engines=(loading, ready),
    )


def over_full() -> ObservedState:
    greedy = on_gpu("chat/llama-8b", 8001, 4711, 0, gib=40.0, uses=46.3)
    return machine(h100(0, holders=(holder(4242, 38.2),)), engines=(greedy,))


def closed() -> ObservedState:
    dead = Lingering(engine=the_id("chat/llama-70b"), pid=23517, held_bytes=71 * GIB)
    return machine(
        h100(
            0,
            orphaned_bytes=71 * GIB,
            lingering=(dead,),
            closed="chat/llama-70b (pid 23517) ended, and 71.0 GiB did not come back",
            troubles=("a page of its memory could not be remapped: it needs service (remapped rows: failure)",),
        )
    )


def sliced() -> ObservedState:
    gpu = h100(0, name="NVIDIA H100 80GB HBM3 MIG 3g.40gb", total_bytes=40448 * MIB, reserved_bytes=0, parent=uuid(0))
    other = replace(gpu, uuid="MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f")
    mine = replace(gpu, uuid="MIG-0f7a1b2c-8b6e-5d0a-a3a5-6a2c5a1d9e42")
    engine = on_gpu("lab/embed", 8090, 4711, 0, gib=6.9)
    place = replace(engine.resolved.placement, devices=(mine.uuid,))
    engine = replace(
        engine,
        resolved=replace(engine.resolved, placement=place),
        measured_bytes=((mine.uuid, round(6.2 * GIB)),),
    )
    return machine(mine, other, h100(1), engines=(engine,))


def half_blind() -> ObservedState:
    """A GPU that the driver has lost with an engine on it, and one that does not tell memory by process."""
    stranded = on_gpu("chat/llama-8b", 8001, 4711, 3, gib=24.0, uses=0, state="unready", reason="its GPU is lost")
    stranded = replace(stranded, lost_devices=(uuid(3),), reason="the driver has lost gpu3, where it runs")
    here = on_gpu("lab/embed", 8090, 4712, 0, gib=6.9, uses=0)
    return machine(
        h100(0, holders=()),
        engines=(stranded, here),
        gaps=(
            Gap(
                what="device memory",
                why="the driver does not tell which process uses what of gpu0: what our engines were not given counts "
                "as foreign",
                subject=uuid(0),
            ),
            Gap(what="lost device", why="gpu3 is lost to the driver: GPU is lost", subject=uuid(3)),
        ),
    )


def no_driver() -> ObservedState:
    return machine(gaps=(Gap(what="devices", why="the NVIDIA driver did not answer in 5 s"),))


GPUS = {
    "gpu-idle": idle, "gpu-busy": busy, "gpu-over-full": over_full, "gpu-closed": closed, "gpu-mig": sliced,
    "gpu-none": machine, "gpu-gaps": half_blind, "gpu-no-driver": no_driver,
}  # fmt: skip


# --- sage plan --------------------------------------------------------------------------------------------------------


def plan_of(want: DesiredState, observed: ObservedState, *, moves: bool = False) -> Text:
    plan = make_plan(want, observed, PlanOptions(allow_moves=moves))
    return lambda paint: plan_text(plan, observed, paint)


def starts() -> Text:
    """Two devices for one engine, a guess, an engine that is kept, and one that goes."""
    observed = machine(h100(0), h100(1), h100(2), engines=(on_gpu("lab/old", 8902, 4711, 2, gib=30.0),))
    return plan_of(
        desired(
            wants("chat/llama-70b", model=LLAMA_70B, tensor_parallel=2, max_model_len=8192, label="Llama 3.3, for all"),
            wants("chat/mistral", at="manifests/chat.yaml:31:5", model="mistralai/Mistral-7B-v0.3"),
        ),
        observed,
    )


def told_otherwise() -> Text:
    """Engines that are told something else of their memory than a share of the device, and one that is told nothing."""
    gguf = "/srv/models/llama-8b-f16.gguf"
    models = (*MODELS, replace(next(fact for fact in MODELS if fact.model == LLAMA_8B), model=gguf))
    observed = machine(h100(0), h100(1), h100(2), models=models)
    return plan_of(
        desired(
            wants("chat/partly", model=gguf, gpu_memory="9GiB", max_model_len=8192),
            wants("chat/sglang", runtime="sglang", gpu_memory="40GiB", max_model_len=8192),
            wants("chat/whole", model=gguf, gpu_memory="30GiB", max_model_len=8192),
            wants("lab/bytes", runtime="command", command=["vllm", "{memory_bytes}"], gpu_memory="4GiB"),
            wants("lab/tiny", model=gguf, gpu_memory="1GiB", max_model_len=8192),
            wants("lab/untold", runtime="command", command=["vllm"], gpu_memory="4GiB"),
        ),
        observed,
    )


def recreates() -> Text:
    running = on_gpu("chat/llama-8b", 8001, 4711, 0, gib=26.0, max_model_len=8192, gpu_memory="25.5GiB")
    changed = wants("chat/llama-8b", max_model_len=32768, gpu_memory="40GiB", args=["--enable-prefix-caching"])
    at = (("max_model_len", "manifests/chat.yaml:19:7"), ("gpu_memory", "manifests/chat.yaml:20:7"))
    return plan_of(desired(replace(changed, fields_at=at)), machine(h100(0), engines=(running,)))


def changed_words() -> Text:
    """Long lists and long texts that differ in little."""
    command = ["vllm", "/opt/engines/2026-11-25/chat-with-a-long-name/serve.py", "--port", "{port}", "--tokens"]
    script = "set -e; cd /srv/chat; . ./environment-of-the-chat-engine; exec ./serve --port {port} --tokens "
    path = "/opt/engines/2026-11-25/lib:/opt/engines/2026-11-25/lib64:/opt/cuda-12."
    fields = {"runtime": "command", "gpu_memory": "20GiB"}
    old = on_gpu(
        "lab/chat", 8001, 4711, 0, gib=20, command=[*command, "1", "-v"], env={"PATH": f"{path}6/lib"}, **fields
    )
    shell = on_gpu("lab/shell", 8901, 4712, 1, gib=20, command=["vllm", "-c", f"{script}1"], **fields)
    return plan_of(
        desired(
            wants(
                "lab/chat", command=[*command, "2", "--log", "/var/log/chat", "-v"], env={"PATH": f"{path}8/lib"},
                **fields
            ),
            wants("lab/shell", command=["vllm", "-c", f"{script}2"], **fields),
        ),
        machine(h100(0), h100(1), engines=(old, shell)),
    )  # fmt: skip


def moves() -> Text:
    small = on_gpu("chat/llama-8b", 8001, 4711, 0, gib=26.0, max_model_len=8192, gpu_memory="25.5GiB")
    return plan_of(
        desired(
            wants("chat/llama-8b", max_model_len=8192, gpu_memory="25.5GiB"),
            wants("chat/llama-70b", model=LLAMA_70B, gpu_memory="70GiB", max_model_len=4096),
        ),
        machine(h100(0), h100(1, holders=(holder(4242, 48.0),)), engines=(small,)),
        moves=True,
    )


def refused() -> tuple[DesiredState, ObservedState]:
    return (
        desired(
            wants("chat/llama-70b", model=LLAMA_70B, tensor_parallel=2, max_model_len=8192),
            wants("lab/app", at="manifests/lab.yaml:4:5", depends_on=["chat/llama-70b"], use_gpu=False,
                  model="/srv/models/smollm2-135m-instruct-q4_1.gguf"),
            wants("lab/embed", at="manifests/lab.yaml:9:5", kind="embedding", use_gpu=True, gpu_memory="6.4GiB",
                  runtime="vllm"),
        ),
        machine(
            h100(0, holders=(holder(4242, 35.0), holder(31337, 1.4, name="jupyter-notebook"))),
            h100(1),
            engines=(
                on_gpu("lab/embed", 8090, 4711, 0, gib=6.9, kind="embedding", use_gpu=True, gpu_memory="6.4GiB",
                       runtime="vllm"),
                on_gpu("demo/old", 8901, 4712, 1, gib=9.5, project="other-team-s-sandbox"),
            ),
        ),
    )  # fmt: skip


PLANS = {"plan-starts": starts, "plan-told": told_otherwise, "plan-recreate": recreates, "plan-moves": moves,
         "plan-words": changed_words,
         "plan-refusal": lambda: plan_of(*refused())}  # fmt: skip


# --- sage why ---------------------------------------------------------------------------------------------------------


def why(name: str, want: DesiredState | None, observed: ObservedState, project: str = "lab") -> Text:
    plan = make_plan(want, observed) if want is not None else None
    found = engine_why(the_id(name, project), want, observed, plan)
    return lambda paint: why_text((found,), (), observed, paint)


def why_gpu(index: int, want: DesiredState | None, observed: ObservedState) -> Text:
    plan = make_plan(want, observed) if want is not None else None
    found = device_why(index, want, observed, plan)
    return lambda paint: why_text((), found, observed, paint)


def will_start() -> Text:
    big = wants("chat/llama-70b", model=LLAMA_70B, tensor_parallel=2, max_model_len=8192, depends_on=["lab/embed"])
    embed = on_gpu("lab/embed", 8090, 4711, 2, gib=6.9, state="starting", reason="has not been asked yet")
    want = desired(big, prune_stacks=("chat",))
    return why("chat/llama-70b", want, machine(h100(0), h100(1), h100(2), engines=(embed,)))


def runs() -> Text:
    """It is as its manifest says, and was given less than it uses."""
    fields = {"max_model_len": 8192, "gpu_memory": "25.5GiB", "devices": [0]}
    running = on_gpu("chat/llama-8b", 8001, 4711, 0, gib=26.0, uses=27.9, **fields)
    return why(
        "chat/llama-8b", desired(wants("chat/llama-8b", **fields)), machine(h100(0), h100(1), engines=(running,))
    )


def stray() -> Text:
    """Of another project, and in no manifest that was read."""
    engine = on_gpu("demo/old", 8901, 4712, 1, gib=19.5, project="other-team-s-sandbox", max_model_len=8192)
    return why("demo/old", None, machine(h100(0), h100(1), engines=(engine,)), "other-team-s-sandbox")


def was_applied() -> Text:
    spec = wants("chat/mistral", model="mistralai/Mistral-7B-v0.3").spec
    fact = AppliedFact(engine=the_id("chat/mistral"), written=canonical_json(written_fields(spec)), at=1.0)
    return why("chat/mistral", None, machine(h100(0, holders=(holder(4242, 70.0),)), applied=(fact,)))


def on_the_cpu() -> Text:
    fields = {"model": "/srv/models/smollm2-135m-instruct-q4_1.gguf", "use_gpu": False}
    return why("lab/small", desired(wants("lab/small", **fields)), machine())


def beside_slices() -> Text:
    """Of the devices of this machine vLLM can be given one: the other GPU is cut into slices."""
    return why("chat/llama-8b", desired(wants("chat/llama-8b", max_model_len=8192)), sliced())


def pinned_to_slices() -> Text:
    return why("chat/llama-8b", desired(wants("chat/llama-8b", devices=[0], gpu_memory="8GiB")), sliced())


def pinned_elsewhere() -> Text:
    """It runs on GPU 0, and its manifest has another now, which has no room."""
    running = on_gpu("chat/llama-8b", 8001, 4711, 0, gib=26.0, gpu_memory="25.5GiB")
    observed = machine(h100(0), h100(1, holders=(holder(4242, 70.0),)), engines=(running,))
    return why("chat/llama-8b", desired(wants("chat/llama-8b", gpu_memory="25.5GiB", devices=[1])), observed)


def one_too_many() -> Text:
    fields = {"gpu_memory": "25.5GiB", "replicas": 1}
    running = tuple(on_gpu(name, 8001 + at, 4711 + at, at, gib=26.0, **fields) for at, name in enumerate(REPLICAS))
    return why(REPLICAS[1], desired(wants(REPLICAS[0], **fields)), machine(h100(0), h100(1), engines=running))


REPLICAS = ("chat/llama-8b", "chat/llama-8b#1")

WHYS = {
    "why-beside-slices": beside_slices, "why-pinned-to-slices": pinned_to_slices,
    "why-pinned-elsewhere": pinned_elsewhere, "why-one-too-many": one_too_many,
    "why-will-start": will_start, "why-runs": runs, "why-stray": stray, "why-was-applied": was_applied,
    "why-on-the-cpu": on_the_cpu, "why-refused": lambda: why("chat/llama-70b", *refused()),
    "why-gpu": lambda: why_gpu(2, desired(wants("chat/new", gpu_memory="20GiB"), reserve_bytes=2 * GIB), busy()),
    "why-gpu-lost": lambda: why_gpu(3, None, half_blind()), "why-gpu-closed": lambda: why_gpu(0, None, closed()),
}  # fmt: skip


# --- sage status ------------------------------------------------------------------------------------------------------


def applied(text: str, model: str) -> AppliedFact:
    spec = wants(text, model=model).spec
    return AppliedFact(engine=the_id(text), written=canonical_json(written_fields(spec)), at=1.0)


def status(observed: ObservedState, *missing: AppliedFact) -> Text:
    uptimes = {engine.leader.pid: 7.0 * engine.leader.pid for engine in observed.engines}
    observed = replace(observed, applied=missing)
    gone = tuple((fact, None) for fact in missing)
    return lambda paint: status_text(observed.engines, gone, observed, uptimes, paint)


def mixed() -> ObservedState:
    """Short models: one that starts, one that is ready, a foreign engine, and what is not seen."""
    starting = on_gpu(
        "lab/chat", 8001, 4711, 0, gib=30.0, model="./chat.gguf", state="starting",
        reason="POST /v1/chat/completions answers 404, and goes on to do so as long as nobody changes that",
    )  # fmt: skip
    ready = on_gpu("lab/embed", 8090, 4712, 1, gib=6.9, model="bge-m3", kind="embedding", use_gpu=True, runtime="vllm")
    foreign = Foreign(pid=99, name="vllm", user="bob", kind="llm", model="org/his-model", port=8400)
    gap = Gap(
        what="device memory", why="the driver does not tell which process uses what of gpu0: it counts as foreign"
    )
    seen = machine(h100(0), h100(1), engines=(starting, ready), gaps=(gap,))
    return replace(seen, foreign=(foreign,))


STATUSES = {
    "status-short": lambda: status(mixed(), applied("lab/tiny", "tiny")),
    "status-hub-ids": lambda: status(busy(), applied("chat/mistral", "mistralai/Mistral-7B-v0.3")),
    "status-nothing": lambda: status(machine()),
}


def texts() -> dict[str, Text]:
    found: dict[str, Text] = {}
    for name, world in GPUS.items():
        found[name] = lambda paint, observed=world(): gpu_text(observed, paint)
    return found | {name: make() for name, make in {**PLANS, **WHYS, **STATUSES}.items()}


TEXTS = texts()


@pytest.mark.parametrize("name", TEXTS)
def test_it_is_the_one_that_was_reviewed_and_fits_80_columns(name: str) -> None:
    plain, coloured = TEXTS[name](Paint(False)), TEXTS[name](Paint(True))
    for text, ending in ((plain, "txt"), (coloured, "colour.txt")):
        golden = HERE / f"{name}.{ending}"
        if os.environ.get("SNAP_UPDATE"):
            golden.write_text(text + "\n", encoding="utf-8")
        assert text + "\n" == golden.read_text(encoding="utf-8")
    assert COLOUR.sub("", coloured) == plain
    assert [line for line in plain.splitlines() if len(line) > 80] == []
    assert [line for line in plain.splitlines() if line != line.rstrip()] == []


# --- names of any length ----------------------------------------------------------------------------------------------

LONG = f"{'stack-of-engines-' * 3}x/{'chat-with-a-name-' * 3}of-63"
MODEL = f"some-organisation-with-a-name/{'A-Model-With-A-Name-' * 4}70B"


def crowded() -> ObservedState:
    """Eight GPUs, each with an engine of a long name and a foreign process of a long name."""
    engines = (
        on_gpu(f"{LONG}{index}", 8901 + index, 4711 + index, index, gib=30.0, model=MODEL, state="unready",
               reason=f"POST /v1/chat/completions answers 404: {'no such path, ' * 8}")
        for index in range(8)
    )  # fmt: skip
    return machine(
        *(h100(index, holders=(holder(99 - index, 20.0, name="python-of-somebody" * 4),)) for index in range(8)),
        engines=tuple(engines),
        gaps=(Gap(what="device memory", why=f"the driver does not tell {'which process uses what ' * 8}"),),
    )


def wide_texts() -> dict[str, str]:
    observed = crowded()
    kept = [wants(f"{LONG}{index}", model=MODEL, gpu_memory="29.5GiB") for index in range(1, 8)]
    big = wants(f"{LONG}-big", model=MODEL, gpu_memory="60GiB", tensor_parallel=2, depends_on=[f"{LONG}1"])
    pinned = wants(f"{LONG}-pinned", model=MODEL, gpu_memory="60GiB", devices=["GPU-0"])
    changed = wants(f"{LONG}0", model=f"{MODEL}-Instruct", gpu_memory="28GiB", env={"A_LONG_NAME" * 8: "b" * 70})
    want = desired(*kept, big, pinned, changed)
    plan = make_plan(want, observed)
    names = [one.id for one in (big, pinned, changed, kept[0])]
    return {
        "plan": plan_text(plan, observed),
        "gpu": gpu_text(observed),
        "why": why_text(tuple(engine_why(name, want, observed, plan) for name in names), (), observed),
        "status": status(observed, applied(f"{LONG}-gone", MODEL))(Paint(False)),
        "why gpu": why_text((), device_why(0, want, observed, plan), observed),
    }


@pytest.mark.parametrize("name", ["plan", "gpu", "why", "why gpu", "status"])
def test_only_what_cannot_be_broken_is_wider_than_80_columns(name: str) -> None:
    text = wide_texts()[name]
    assert [line for line in text.splitlines() if len(line) > 80 and len(line.split()) > 1] == [], text
