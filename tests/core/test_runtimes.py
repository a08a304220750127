"""Command lines, by the documented options of each program."""

from typing import Any

import pytest

from sage_reconcile.core.resolved import Placement
from sage_reconcile.core.runtimes import program_of, recognise, runtime_of
from sage_reconcile.core.runtimes.base import device_env
from sage_reconcile.core.spec import EngineSpec
from tests.builders import NODE, spec

PLACE = Placement(node=NODE, host="127.0.0.1", port=8001)


def argv(**fields: Any) -> tuple[str, ...]:
    the_spec = EngineSpec.model_validate({"name": "x", **fields})
    return runtime_of(the_spec).argv(the_spec, ("program",), PLACE, None)


def test_llama_cpp_chat() -> None:
    assert argv(model="/m/a.gguf", use_gpu=False, max_model_len=512, args=["--threads", "1"]) == (
        "program", "--model", "/m/a.gguf", "--host", "127.0.0.1", "--port", "8001", "--alias", "a", "--metrics",
        "--ctx-size", "512", "--n-gpu-layers", "0", "--threads", "1",
    )  # fmt: skip


def test_llama_cpp_embedding() -> None:
    assert "--embedding" in argv(model="/m/a.gguf", kind="embedding")


def test_vllm() -> None:
    """https://docs.vllm.ai/en/latest/cli/serve/"""
    assert argv(
        model="org/m", tensor_parallel=2, pipeline_parallel=3, max_model_len=4096, dtype="bfloat16", quantization="awq"
    ) == (
        "program", "serve", "org/m", "--host", "127.0.0.1", "--port", "8001", "--served-model-name", "org/m",
        "--tensor-parallel-size", "2", "--pipeline-parallel-size", "3", "--max-model-len", "4096",
        "--dtype", "bfloat16", "--quantization", "awq",
    )  # fmt: skip


def test_vllm_embedding() -> None:
    words = argv(model="org/e", kind="embedding", runtime="vllm")
    assert words[words.index("--runner") + 1] == "pooling"


def test_infinity() -> None:
    """https://michaelfeil.github.io/infinity/; infinity-emb 0.0.78 was started with these words and answered."""
    assert argv(model="org/e", kind="embedding") == (
        "program", "v2", "--model-id", "org/e", "--served-model-name", "org/e", "--host", "127.0.0.1", "--port", "8001",
        "--url-prefix", "/v1", "--device", "cpu",
    )  # fmt: skip


def test_infinity_with_a_gpu_and_a_number_format() -> None:
    words = argv(model="org/e", kind="embedding", use_gpu=True, dtype="float16")
    assert words[-4:] == ("--device", "cuda", "--dtype", "float16")


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"tensor_parallel": 1, "dtype": "float16"}, []),
        ({"tensor_parallel": 2, "pipeline_parallel": 2}, ["tensor_parallel", "pipeline_parallel"]),
        ({"kind": "llm", "runtime": "infinity", "max_model_len": 512}, ["kind", "max_model_len"]),
    ],
)
def test_what_infinity_cannot_do(fields: dict[str, Any], refused: list[str]) -> None:
    the_spec = EngineSpec.model_validate({"name": "x", "model": "org/e", "kind": "embedding", **fields})
    assert [field for field, _ in runtime_of(the_spec).complaints(the_spec)] == refused


@pytest.mark.parametrize(
    ("words", "model"),
    [
        (("infinity_emb",), "?"),
        (("python3", "/x/infinity_emb", "v2"), "?"),
        (("python3", "/x/infinity_emb", "v2", "--model-id", "/a/b/c"), "b/c"),
        (("python3", "/x/infinity_emb", "--model-id=org/e", "--served-model-name", "e"), "e"),
    ],
)
def test_an_infinity_that_was_started_by_hand(words: tuple[str, ...], model: str) -> None:
    seen = recognise(words)
    assert seen is not None
    assert (seen.runtime, seen.model, seen.port) == ("infinity", model, 7997)


@pytest.mark.parametrize("words", [("grep", "infinity_emb"), ("python3", "/x/pip", "install", "infinity_emb")])
def test_the_word_infinity_emb_alone_starts_nothing(words: tuple[str, ...]) -> None:
    assert recognise(words) is None


def test_command_fills_in_what_it_knows_and_leaves_the_rest_as_it_stands() -> None:
    words = argv(
        model="org/m", runtime="command", command=["./run", "{port}", "--at={host}:{port}", "{{port}}", "$(rm -rf /)"]
    )
    assert words == ("program", "8001", "--at=127.0.0.1:8001", "{port}", "$(rm -rf /)")


def test_a_value_that_looks_like_a_placeholder_is_not_filled_in_again() -> None:
    assert argv(model="{port}", runtime="command", command=["run", "{model}"]) == ("program", "{port}")


@pytest.mark.parametrize(
    ("fields", "runtime", "program"),
    [
        ({"model": "/m/a.gguf"}, "llama.cpp", "llama-server"),
        ({"model": "org/m"}, "vllm", "vllm"),
        ({"model": "org/e", "kind": "embedding"}, "infinity", "infinity_emb"),
        ({"model": "org/m", "runtime": "command", "command": ["./run"]}, "command", "./run"),
    ],
)
def test_auto_chooses_by_model_and_kind(fields: dict[str, Any], runtime: str, program: str) -> None:
    the_spec = EngineSpec.model_validate({"name": "x", **fields})
    assert (runtime_of(the_spec).name, program_of(the_spec)) == (runtime, program)


@pytest.mark.parametrize(
    "fields", [{"model": "/m/a.gguf"}, {"model": "org/m"}, {"model": "org/e", "kind": "embedding"}]
)
def test_what_sage_starts_it_would_recognise(fields: dict[str, Any]) -> None:
    the_spec = EngineSpec.model_validate({"name": "x", "served_name": "served", **fields})
    runtime = runtime_of(the_spec)
    seen = recognise(runtime.argv(the_spec, (f"/usr/bin/{runtime.program}",), PLACE, None))
    assert seen is not None
    assert (seen.runtime, seen.kind, seen.model, seen.port) == (runtime.name, the_spec.kind, "served", 8001)


def test_an_engine_sees_exactly_its_planned_devices() -> None:
    placed = Placement(node=NODE, host="127.0.0.1", port=1, devices=("GPU-b", "GPU-a"), device_indexes=(1, 0))
    assert device_env(spec(use_gpu=True), placed)["CUDA_VISIBLE_DEVICES"] == "GPU-b,GPU-a"
    assert device_env(spec(use_gpu=False), PLACE)["CUDA_VISIBLE_DEVICES"] == ""


def test_a_gpu_engine_without_devices_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        device_env(spec(use_gpu=True), PLACE)
