"""Predictions against published logs: `python -m tests.core.test_footprint` prints the errors of every family.

Each row of tests/footprints/table.jsonl has its source; `left_out` says why a figure of it is not compared, `serving`
what the row does not say and its version's defaults do.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from sage_reconcile.core.activations import GIB
from sage_reconcile.core.footprint import Footprint, Serving, by_name, footprint
from sage_reconcile.core.model_shape import shape_of_config
from sage_reconcile.core.shape import ModelShape

FOLDER = Path(__file__).resolve().parent.parent / "footprints"
CONFIGS: dict[str, dict[str, Any]] = json.loads((FOLDER / "models.json").read_text(encoding="utf-8"))
ROWS = tuple(json.loads(line) for line in (FOLDER / "table.jsonl").read_text(encoding="utf-8").splitlines())
# |relative error| in percent: median, and nine rows of ten.
BOUNDS = {"weights": (1.0, 6.0), "kv": (0.5, 2.0), "non_kv": (6.0, 20.0)}
RUNTIMES = {"ik_llama.cpp": "llama.cpp", "vllm-ascend": "vllm"}


def shape_of(name: str, total_bytes: int = 0, **changes: Any) -> ModelShape:
    shape = shape_of_config({**CONFIGS[name], **changes}, total_bytes=total_bytes)
    assert isinstance(shape, ModelShape)
    return shape


def predicted(row: dict[str, Any]) -> Footprint:
    runtime = RUNTIMES.get(row["engine"], row["engine"])
    settings: dict[str, Any] = {
        "runtime": runtime,
        "tensor_parallel": row["tp"],
        "pipeline_parallel": row["pp"],
        "max_model_len": row.get("max_model_len"),
        "max_num_seqs": row.get("max_num_seqs", 1 if runtime == "llama.cpp" else 256),
        "max_num_batched_tokens": 512 if runtime == "llama.cpp" else 2048,
        "kv_dtype": row["kv_cache_dtype"],
    }
    shape = shape_of(row["config"], round(row.get("disk_gib", 0) * GIB))
    return footprint(shape, Serving(**{**settings, **row.get("serving", {})}))


def error(row: dict[str, Any], figure: str) -> float:
    """Predicted against published, in percent."""
    found = predicted(row)
    if figure == "kv":
        kept = row.get("whole_kv_gib", row["kv_gib_per_gpu"])
        return 100 * (found.kv_bytes_per_token / (kept * GIB / row["kv_tokens"]) - 1)
    if figure == "weights":
        return 100 * (found.bytes_of("weights") / GIB / row["weights_gib_per_gpu"] - 1)
    if row["engine"] == "tei":
        return 100 * (found.total_bytes / GIB / row["total_used_gib"] - 1)
    published = row["weights_gib_per_gpu"] + row["activation_peak_gib"] + row.get("non_torch_gib", 0.0)
    return 100 * (found.bytes_of("weights", "activations", "non_torch") / GIB / published - 1)


def compared(figure: str) -> list[dict[str, Any]]:
    return [row for row in ROWS if figure not in row.get("left_out", {})]


def ninth_tenth(errors: Iterable[float]) -> float:
    return statistics.quantiles(errors, n=10, method="inclusive")[-1]


@pytest.mark.parametrize("figure", sorted(BOUNDS))
def test_predictions_stay_within_their_bounds(figure: str) -> None:
    errors = [abs(error(row, figure)) for row in compared(figure)]

    median, most = BOUNDS[figure]
    assert len(errors) >= 15
    assert statistics.median(errors) < median
    assert ninth_tenth(errors) < most


@pytest.mark.parametrize(("name", "billions"), [("mixtral-8x7b", 46.70), ("qwen3-30b-a3b", 30.53)])
def test_every_expert_counts_though_few_work(name: str, billions: float) -> None:
    assert shape_of(name).disk_bytes / 2e9 == pytest.approx(billions, rel=0.001)


def test_fewer_kv_heads_than_devices_are_kept_once_on_each() -> None:
    kept = [footprint(shape_of("qwen2-7b"), Serving(tensor_parallel=n)).kv_bytes_per_token for n in (1, 2, 4, 8)]

    assert kept == [57344, 28672, 14336, 14336]


def test_a_latent_cache_is_the_same_on_every_device() -> None:
    kept = {footprint(shape_of("deepseek-v3"), Serving(tensor_parallel=n)).kv_bytes_per_token for n in (1, 8)}

    assert kept == {61 * 576 * 2}


def test_a_window_stops_growing() -> None:
    short, long = (footprint(shape_of("gemma-3-27b-text"), Serving(max_model_len=n)) for n in (32768, 65536))

    # Ten layers of 62 see everything.
    assert short.kv_bytes_per_token == 10 * 2 * 16 * 128 * 2
    assert short.kv_bytes_per_sequence == long.kv_bytes_per_sequence > 0


def test_windows_and_batches_are_kept_once() -> None:
    """Row l16, an Ollama log: 2 x (18 layers of 131,072 tokens + 18 layers of 1,280) took 9.088 GiB."""
    (row,) = [row for row in ROWS if row["id"] == "l16"]

    assert predicted(row).bytes_of("kv_cache") / GIB == pytest.approx(row["kv_gib_per_gpu"], rel=0.001)


def test_tied_embeddings_are_loaded_once() -> None:
    tied, untied = (footprint(shape_of("llama-3.2-1b", tie_word_embeddings=flag), Serving()) for flag in (True, False))

    assert untied.bytes_of("weights") - tied.bytes_of("weights") == 128256 * 2048 * 2


def test_quantisation_leaves_embeddings_at_16_bits() -> None:
    plain, eight = shape_of("llama-3.1-8b"), shape_of("llama-3.1-8b-fp8")

    assert eight.bytes_of("rest") * 2 == plain.bytes_of("rest")
    assert eight.bytes_of("embeddings", "lm_head") == plain.bytes_of("embeddings", "lm_head")


@pytest.mark.parametrize(
    ("model", "devices", "gib"),
    [("Qwen/Qwen2.5-7B", 1, 22.0), ("llama3.1-70b", 8, 24.0), ("mixtral-8x7b", 3, 25.33), ("a-13B", 1, 36.5),
     ("tiny-0.1b", 1, 8.0), ("bge-m3", 1, 20.0)],
)  # fmt: skip
def test_a_name_alone_gives_the_old_estimate(model: str, devices: int, gib: float) -> None:
    assert by_name(model, devices, 1) == round(gib * GIB)


def main() -> None:
    """By family in percent: rows, median, nine of ten, the largest with its sign and row."""
    for figure in BOUNDS:
        families = defaultdict(list)
        for row in compared(figure):
            for family in ("all", shape_of(row["config"]).family):
                families[family].append((error(row, figure), row["id"]))
        for family, errors in families.items():
            sizes = [abs(size) for size, _ in errors]
            most = ninth_tenth(sizes) if len(sizes) > 1 else sizes[0]
            worst, name = max(errors, key=lambda found: abs(found[0]))
            print(f"{figure:8}{family:20}{len(sizes):3}{statistics.median(sizes):7.2f}{most:7.2f}{worst:+7.2f} {name}")


if __name__ == "__main__":
    main()
