"""Footprints against what people published of running engines. `python -m tests.core.test_footprint` prints the errors.

tests/footprints/table.jsonl holds the published rows with their sources and quotes, and for each the model's config in
tests/footprints/models.json, how it was served, what had to be assumed, and which of its figures are left out and why.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from sage_reconcile.core.activations import GIB
from sage_reconcile.core.footprint import Footprint, Serving, by_name, footprint
from sage_reconcile.core.model_shape import shape_of_config
from sage_reconcile.core.shape import ModelShape, UnknownShape, WeightPart

HERE = Path(__file__).resolve().parent.parent / "footprints"
RUNTIMES = {"ik_llama.cpp": "llama.cpp", "vllm-ascend": "vllm"}

# Numbers of the Hugging Face hub's parameter counts, in billions (tensors of model cards as of 2026).
PUBLISHED_BILLIONS = {
    "llama-3-8b": 8.0303, "llama-3.2-1b": 1.2358, "llama-3.2-3b": 3.2127, "llama-3.3-70b": 70.5537, "qwen2-7b": 7.6156,
    "qwen2.5-32b": 32.7639, "qwen2.5-vl-32b": 33.4527, "qwen3-0.6b": 0.5960, "qwen3-4b": 4.0225, "qwen3-8b": 8.1907,
    "qwen3-30b-a3b": 30.5321, "qwen3-235b": 235.0936, "qwen3-next-80b": 79.6744, "mixtral-8x7b": 46.7028,
    "mixtral-8x22b": 140.6206, "phi-4-mini": 3.8360, "deepseek-v3": 671.0264, "minimax-m2-fp8": 228.7,
    "gemma-3-27b": 27.4324, "embeddinggemma-300m": 0.3029, "bge-small-en": 0.0334, "bge-m3": 0.5677,
    "yi-1.5-34b": 34.3889, "ministral-8b": 8.0198, "mistral-small-24b": 23.5724, "gemma-4-26b-a4b": 25.8,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One figure of one row: what was measured and what the formulas say."""

    row: str
    family: str
    figure: str
    measured: float
    computed: float

    @property
    def error(self) -> float:
        return self.computed / self.measured - 1


@cache
def models() -> Mapping[str, Any]:
    loaded: Mapping[str, Any] = json.loads((HERE / "models.json").read_text(encoding="utf-8"))
    return loaded


@cache
def rows() -> tuple[Mapping[str, Any], ...]:
    return tuple(json.loads(line) for line in (HERE / "table.jsonl").read_text(encoding="utf-8").splitlines())


def shape(model: str, **facts: Any) -> ModelShape:
    found = shape_of_config(models()[model], **facts)
    assert isinstance(found, ModelShape)
    return found


def row_shape(row: Mapping[str, Any]) -> ModelShape:
    found = shape(row["config"], total_bytes=row.get("disk_bytes", 0))
    parts = tuple(WeightPart(role=role, storage=kind, disk_bytes=size) for role, kind, size in row.get("parts", ()))
    return replace(found, parts=parts, basis="tensors") if parts else found


def row_footprint(row: Mapping[str, Any]) -> Footprint:
    runtime = RUNTIMES.get(row["engine"], row["engine"])
    serving = Serving(
        kind="embedding" if row["engine"] == "tei" else "llm",
        runtime=runtime,
        tensor_parallel=row["tp"],
        pipeline_parallel=row["pp"],
        max_model_len=row.get("max_model_len"),
        max_num_batched_tokens=512 if runtime == "llama.cpp" else 2048,
        kv_dtype=row["kv_cache_dtype"],
        dtype=row["dtype"],
    )
    return footprint(row_shape(row), replace(serving, **row.get("serving", {})))


@cache
def compared() -> tuple[Compared, ...]:
    """Every figure that was published and is not left out."""
    found = []
    for row in rows():
        if "config" in row:
            told = row_footprint(row)
            family = row_shape(row).family + (" " + row["quantization"] if "quantization" in row else "")
            for figure, figures in FIGURES.items():
                pair = figures(row, told)
                if pair is not None and figure not in row.get("left_out", {}):
                    measured, computed = pair
                    found.append(
                        Compared(row=row["id"], family=family, figure=figure, measured=measured, computed=computed)
                    )
    return tuple(found)


def _weights(row: Mapping[str, Any], told: Footprint) -> tuple[float, float] | None:
    measured = row.get("weights_gib_per_gpu")
    return None if measured is None else (measured, told.bytes_of("weights") / GIB)


def _kv(row: Mapping[str, Any], told: Footprint) -> tuple[float, float] | None:
    """Bytes per token; where windows are part of it, those of the whole cache."""
    size, tokens = row.get("kv_gib", row.get("kv_gib_per_gpu", 0)), row.get("kv_tokens", 0)
    if size <= 0 or not tokens:
        return None
    return size * GIB / tokens, told.bytes_of("kv_cache") / tokens if "kv_whole" in row else told.kv_bytes_per_token


def _non_kv(row: Mapping[str, Any], told: Footprint) -> tuple[float, float] | None:
    """Everything but the cache, as far as the row tells it; an embedding server's whole process."""
    if row["engine"] == "tei" and "total_used_gib" in row:
        return row["total_used_gib"], told.total_bytes / GIB
    weights, activations = row.get("weights_gib_per_gpu"), row.get("activation_peak_gib")
    if weights is None or activations is None or "weights" in row.get("left_out", {}):
        return None
    outside = row.get("non_torch_gib")
    if outside is None or "non_torch" in row.get("left_out", {}):
        return weights + activations, told.bytes_of("weights", "activations") / GIB
    return weights + activations + outside, told.bytes_of("weights", "activations", "non_torch") / GIB


FIGURES = {"weights": _weights, "kv": _kv, "non_kv": _non_kv}


def errors(figure: str) -> list[float]:
    return sorted(abs(entry.error) for entry in compared() if entry.figure == figure)


def percentile_90(values: Sequence[float]) -> float:
    """The smallest value that nine tenths do not exceed."""
    return values[min(len(values) - 1, -(-9 * len(values) // 10) - 1)]


@pytest.mark.parametrize(
    ("figure", "fewest", "middle", "most"),
    [("weights", 35, 0.01, 0.06), ("kv", 20, 0.005, 0.02), ("non_kv", 15, 0.06, 0.20)],
)
def test_published_figures_are_met(figure: str, fewest: int, middle: float, most: float) -> None:
    found = errors(figure)

    assert len(found) >= fewest
    assert median(found) < middle
    assert percentile_90(found) < most


def test_quantised_weights_are_met_on_their_own() -> None:
    quantised = {row["id"] for row in rows() if "quantization" in row}
    found = sorted(abs(entry.error) for entry in compared() if entry.figure == "weights" and entry.row in quantised)

    assert len(found) >= 12
    assert median(found) < 0.01
    assert percentile_90(found) < 0.06


def test_every_row_has_its_source_and_every_missing_figure_its_reason() -> None:
    assert len(rows()) == len({row["id"] for row in rows()}) == 62
    for row in rows():
        assert row["source"], row["id"]
        assert row["quote"], row["id"]
        assert set(row.get("left_out", {})) <= {*FIGURES, "non_torch"}
        assert all(row.get("left_out", {}).values())
        judged = {entry.figure for entry in compared() if entry.row == row["id"]}
        for figure, key in (("weights", "weights_gib_per_gpu"), ("non_kv", "activation_peak_gib")):
            told = figure in judged or figure in row.get("left_out", {}) or "weights" in row.get("left_out", {})
            assert told or key not in row, (row["id"], figure)


@pytest.mark.parametrize("model", sorted(PUBLISHED_BILLIONS))
def test_parameters_counted_from_a_config_are_those_that_were_published(model: str) -> None:
    config = {key: value for key, value in models()[model].items() if key != "quantization_config"}
    found = shape_of_config(config)

    assert isinstance(found, ModelShape)
    assert found.disk_bytes / 2 / 1e9 == pytest.approx(PUBLISHED_BILLIONS[model], rel=0.002)


def kv_bytes(model: str, **serving: Any) -> int:
    return footprint(shape(model), Serving(**{"max_model_len": 4096, **serving})).kv_bytes_per_token


def test_kv_heads_are_dealt_out_and_never_less_than_one_is_on_a_device() -> None:
    whole = kv_bytes("qwen3-30b-a3b")

    assert whole == 2 * 48 * 4 * 128 * 2
    assert [kv_bytes("qwen3-30b-a3b", tensor_parallel=n) for n in (2, 4, 8)] == [whole // 2, whole // 4, whole // 4]
    assert kv_bytes("qwen3-30b-a3b", pipeline_parallel=2) == whole // 2


def test_a_latent_vector_is_whole_on_every_device() -> None:
    assert kv_bytes("deepseek-v3") == kv_bytes("deepseek-v3", tensor_parallel=8) == 61 * 576 * 2
    assert kv_bytes("glm-5-nvfp4", tensor_parallel=8) == 78 * (576 * 2 + 132)
    assert kv_bytes("glm-5-nvfp4", kv_dtype="fp8") == 78 * (656 + 132)


def test_the_type_of_the_cache_decides_its_bytes() -> None:
    whole = kv_bytes("llama-3-8b")

    assert kv_bytes("llama-3-8b", kv_dtype="fp8") == whole // 2
    assert kv_bytes("llama-3-8b", runtime="llama.cpp", kv_dtype="q8_0") == whole * 34 // 64
    assert kv_bytes("llama-3-8b", runtime="llama.cpp", kv_dtype="q8_0", value_dtype="f16") == whole * 98 // 128
    assert kv_bytes("llama-3-8b", kv_dtype="turbo3") == whole
    told = footprint(shape("llama-3-8b"), Serving(kv_dtype="turbo3"))
    assert '"turbo3" is not known here' in next(term.why for term in told.terms if term.name == "kv_cache")


def test_windows_and_states_do_not_grow_with_the_context() -> None:
    gemma = [footprint(shape("gemma-3-27b"), Serving(max_model_len=n)) for n in (8192, 131072)]
    assert gemma[0].kv_bytes_per_token == gemma[1].kv_bytes_per_token == 2 * 10 * 16 * 128 * 2
    assert gemma[0].kv_bytes_per_sequence == gemma[1].kv_bytes_per_sequence == (1024 + 2048) * 2 * 52 * 16 * 128 * 2

    short = footprint(shape("gemma-3-27b"), Serving(max_model_len=512))
    assert short.bytes_of("kv_cache") == 512 * 2 * 62 * 16 * 128 * 2

    following = footprint(shape("qwen3-next-80b"), Serving(max_model_len=262144, tensor_parallel=2))
    assert following.kv_bytes_per_token == 2 * 12 * 1 * 256 * 2
    assert following.kv_bytes_per_sequence == 36 * (32 * 128 * 128 * 2 + 8192 * 3 * 2) // 2


def test_encoders_keep_nothing_and_embedding_servers_have_no_budget() -> None:
    told = footprint(shape("bge-m3"), Serving(kind="embedding", runtime="infinity", max_num_batched_tokens=16384))

    assert (told.kv_bytes_per_token, told.bytes_of("kv_cache"), told.bytes_of("cuda_graphs")) == (0, 0, 0)
    assert told.bytes_of("cuda_context") > 0
    assert footprint(shape("bge-m3"), Serving(kind="embedding", runtime="infinity", dtype="float32")).bytes_of(
        "weights"
    ) == 2 * told.bytes_of("weights")


def test_of_a_pipeline_the_stage_that_holds_most_counts() -> None:
    llama = shape("llama-3-8b")
    halves = footprint(llama, Serving(pipeline_parallel=2)).bytes_of("weights")
    table = llama.max_positions * 128 * 2

    assert halves - table == llama.bytes_of("rest", "whole") // 2 + llama.bytes_of("lm_head")
    tied = shape("qwen3-4b")
    assert footprint(tied, Serving(pipeline_parallel=2)).bytes_of("weights") > tied.bytes_of("rest", "whole") // 2


def test_weights_quantised_while_loading_keep_embeddings_at_16_bits() -> None:
    llama = shape("llama-3-8b")
    table = llama.max_positions * 128 * 2
    eight = footprint(llama, Serving(quantization="fp8")).bytes_of("weights")

    assert eight - table == llama.disk_bytes - llama.bytes_of("rest") // 2
    checkpoint = shape("llama-3.3-70b-fp8")
    assert footprint(checkpoint, Serving(quantization="fp8")) == footprint(checkpoint, Serving())


def test_every_term_says_why_and_the_budget_is_all_but_the_context() -> None:
    told = footprint(shape("gpt-oss-120b"), Serving(tensor_parallel=8, max_model_len=131072))

    assert [term.name for term in told.terms] == [
        "weights", "kv_cache", "activations", "non_torch", "cuda_graphs", "cuda_context", "margin", "slack",
    ]  # fmt: skip
    assert all(term.why and term.memory_bytes > 0 for term in told.terms)
    assert told.budget_bytes == told.total_bytes - told.bytes_of("cuda_context")
    assert told.bytes_of("margin") / told.bytes_of("weights") == pytest.approx(0.17)


def test_an_engine_whose_cache_is_cut_to_fit_gets_slack_for_the_rest() -> None:
    """The budget holds one whole sequence even if all but the cache takes 5% more than the formulas say."""
    for runtime, share in (("vllm", 0.05), ("sglang", 0.05), ("llama.cpp", 0.0), ("infinity", 0.0)):
        told = footprint(shape("llama-3-8b"), Serving(runtime=runtime, max_model_len=8192))
        rest = told.bytes_of("weights", "activations", "non_torch")
        assert told.bytes_of("slack") == pytest.approx(share * rest, abs=1)


def test_a_family_that_nobody_compared_gets_a_margin_unless_its_tensors_are_known() -> None:
    config = {**models()["llama-3-8b"], "model_type": "brand_new"}
    counted = shape_of_config(config)
    read = shape_of_config(config, tensors=(("lm_head.weight", "BF16", 1 << 30),))

    assert isinstance(counted, ModelShape)
    assert isinstance(read, ModelShape)
    assert footprint(counted, Serving()).bytes_of("margin") > 0
    assert footprint(read, Serving()).bytes_of("margin") == 0
    assert isinstance(shape_of_config({"model_type": "brand_new"}), UnknownShape)


def test_modules_that_a_checkpoint_leaves_at_16_bits_are_counted_so() -> None:
    """The ways in which published checkpoints write them: names, names with "*", and regular expressions."""
    plain = models()["qwen3-8b"]
    attention = 36 * (4096 * (32 + 8 + 8) * 128 + 32 * 128 * 4096)

    def rest(*ignored: str) -> int:
        config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": list(ignored)}
        found = shape_of_config({**plain, "quantization_config": config})
        assert isinstance(found, ModelShape)
        return found.bytes_of("rest")

    everything = rest("lm_head")
    left = everything + attention * 2 - attention * 9 // 16
    for ignored in (
        ["model.layers.*.self_attn*"],
        ["model.layers.*.self_attn"],
        ["re:.*self_attn.*"],
        ["re:.*\\.self_attn\\..*"],
        ["re:.*self_attn.(q|k|v|o)_proj"],
        ["self_attn"],
        [f"model.layers.{layer}.self_attn.o_proj" for layer in range(36)],
        ["model.language_model.layers.*.self_attn*"],
    ):
        assert rest(*ignored) == left, ignored
    for ignored in (["re:(a+)+$"], ["re:" + "(a|b)" * 100], ["re:["], ["x" * 10_000], ["re:.*mlp.gate$"]):
        assert rest(*ignored) == everything, ignored


@pytest.mark.parametrize(
    ("model", "tensor", "pipeline", "gib"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 1, 1, 10.0),
        ("Qwen/Qwen2.5-7B-Instruct", 1, 1, 22.0),
        ("Qwen/Qwen2.5-7B-Instruct", 2, 1, 13.0),
        ("Qwen/Qwen2.5-14B-Instruct", 1, 1, 40.0),
        ("Qwen/Qwen2.5-72B-Instruct-AWQ", 1, 1, 184.0),
        ("meta-llama/Llama-3.1-70B", 4, 1, 47.75),
        ("llama3.1-70b", 2, 2, 44.0),
        ("Mixtral-8x7B-Instruct", 2, 1, 36.0),
        ("BAAI/bge-m3", 1, 1, 20.0),
        ("Qwen/Qwen3-0.6B", 1, 1, 8.0),
        ("Qwen/Qwen3-30B-A3B", 1, 1, 79.0),
        ("tiny-4bit", 1, 1, 14.0),
        ("unknown", 1, 1, 20.0),
        ("9" * 2000 + "b", 1, 1, 20.0),
        ("", 0, -1, 20.0),
    ],
)
def test_a_name_alone_tells_what_the_replaced_tool_told(model: str, tensor: int, pipeline: int, gib: float) -> None:
    """The values that it printed, from a run of it."""
    assert by_name(model, tensor, pipeline) == round(gib * GIB)


def print_errors() -> None:
    """A line for each family and figure, and one for each figure that is far off."""
    by_family: dict[tuple[str, str], list[Compared]] = defaultdict(list)
    for entry in compared():
        by_family[(entry.figure, entry.family)].append(entry)
    for figure in FIGURES:
        found = errors(figure)
        print(
            f"{figure}: n={len(found)}, median {median(found):.2%}, p90 {percentile_90(found):.2%}, max {found[-1]:.2%}"
        )
        for (of, family), entries in sorted(by_family.items()):
            if of == figure:
                each = ", ".join(f"{entry.row} {entry.error:+.2%}" for entry in entries)
                print(f"  {family:<28} n={len(entries)}  {each}")
    for row in rows():
        for figure, why in sorted(row.get("left_out", {}).items()):
            print(f"left out: {row['id']} {figure}: {why}")


if __name__ == "__main__":
    print_errors()
