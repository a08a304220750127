"""What is counted from a config.json alone, for models of as many families as people serve.

tests/footprints/architectures.jsonl holds a model of the hub a line: the keys of its config.json that say how large it
is, under the names that it gives them; the parameters that its model card tells; and what a further token of a long
text takes, by hand: 2 x layers that keep all x heads of keys x numbers of a head x bytes, or for latent attention
layers x numbers of the latent vector x bytes. Both were written down from what is public, not fetched; where a card
rounds, so does the table.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest

from sage_reconcile.core.footprint import Serving, footprint
from sage_reconcile.core.model_shape import shape_of_config
from sage_reconcile.core.shape import ModelShape
from sage_reconcile.core.spec import Kind, RuntimeName

TABLE = Path(__file__).resolve().parent.parent / "footprints" / "architectures.jsonl"
ROWS = tuple(json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines())


def shape(row: Mapping[str, Any], **changes: Any) -> ModelShape:
    found = shape_of_config({**row["config"], **changes})
    assert isinstance(found, ModelShape), found
    return found


def of(model: str) -> Mapping[str, Any]:
    return next(row for row in ROWS if row["model"] == model)


def named(row: Mapping[str, Any]) -> str:
    return row["model"] + (f" ({row['note']})" if "note" in row else "")


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_parameters_are_those_of_the_model_card(row: Mapping[str, Any]) -> None:
    assert shape(row).disk_bytes / 2 == pytest.approx(row["parameters"], rel=0.001)
    # So that no margin is put on what was compared.
    assert shape(row).known


@pytest.mark.parametrize("row", [row for row in ROWS if "kv" in row], ids=named)
def test_a_further_token_takes_what_its_layers_keep(row: Mapping[str, Any]) -> None:
    told = footprint(shape(row), Serving(max_model_len=8192))

    assert told.kv_bytes_per_token == prod(row["kv"])


@pytest.mark.parametrize(
    ("model", "layers", "numbers"),
    [
        # Mamba: a convolution of 4 that keeps 3, and 16 numbers for each of twice the width. The others attend.
        ("ai21labs/Jamba-v0.1", 28, 8192 * 3 * 2 + 8192 * 16 * 2),
        # Mamba 2 beside attention, in every layer: 24 heads of 128, and a state of 256 in one group.
        ("tiiuae/Falcon-H1-7B-Instruct", 44, (3072 + 2 * 256) * 3 * 2 + 3072 * 256 * 2),
        ("ibm-granite/granite-4.0-h-small", 36, (8192 + 2 * 128) * 3 * 2 + 8192 * 128 * 2),
        # Lightning attention: a square for each head.
        ("MiniMaxAI/MiniMax-M1-80k", 70, 64 * 128 * 128 * 2),
        # Kimi delta attention: the same in 32 bits, and convolutions of queries, keys and values.
        ("moonshotai/Kimi-Linear-48B-A3B-Instruct", 20, 3 * 4096 * 3 * 2 + 32 * 128 * 128 * 4),
        # A short convolution of 3 that keeps 2.
        ("LiquidAI/LFM2-1.2B", 10, 2048 * 2 * 2),
        # Windows of 512 tokens, and a batch of 2,048: 16 of the 20 layers that do not share what others keep.
        ("google/gemma-3n-E4B-it", 16, (512 + 2048) * 2 * 2 * 256 * 2),
    ],
)
def test_states_and_windows_are_kept_once_for_a_sequence(model: str, layers: int, numbers: int) -> None:
    told = footprint(shape(of(model)), Serving(max_model_len=32768))

    assert told.kv_bytes_per_sequence == layers * numbers


def test_a_config_may_tell_each_layer_a_width_and_heads_of_its_own() -> None:
    llama = of("meta-llama/Llama-2-7b-hf")
    even = shape(llama, num_key_value_heads=16)
    uneven = shape(llama, num_key_value_heads=[8] * 16 + [24] * 16, intermediate_size=[11008] * 31 + [1008])

    told = [footprint(each, Serving(max_model_len=4096)).kv_bytes_per_token for each in (even, uneven)]
    assert told == [2 * 32 * 16 * 128 * 2] * 2
    assert even.bytes_of("rest") - uneven.bytes_of("rest") == 3 * 4096 * 10_000 * 2


def test_a_matrix_in_place_of_attention_keeps_nothing_and_is_counted() -> None:
    """As Llama-3.1-Nemotron-51B has it (replace_with_linear)."""
    plain = {"attention": {"n_heads_in_group": 8}, "ffn": {"ffn_mult": 5.25}}
    replaced = {"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}}
    llama = {**of("meta-llama/Llama-3.1-70B"), "note": ""}
    one = shape(llama, model_type="nemotron-nas", block_configs=[plain])
    two = shape(llama, model_type="nemotron-nas", block_configs=[plain, replaced])

    told = [footprint(each, Serving(max_model_len=4096)).kv_bytes_per_token for each in (one, two)]
    assert told == [2 * 8 * 128 * 2] * 2
    assert two.bytes_of("rest") - one.bytes_of("rest") == pytest.approx(2 * 8192 * 8192 * 2, rel=0.001)


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({}, 4096),
        # Command R: 8,192 positions, and texts of 131,072.
        ({"model_max_length": 131072}, 131072),
        # LongChat and vicuna-16k: positions four times as close.
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 8192),
        # Qwen2.5 with yarn as its model card has it; DeepSeek and gpt-oss count it in already.
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 163840,
                "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
            },
            163840,
        ),
        # Llama 3.1 and Phi 3 count it in; Qwen2-VL scales nothing.
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}}, 4096),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 48}}, 4096),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, 4096),
        ({"rope_scaling": {"factor": None, "type": "video_rope"}}, 4096),
    ],
)
def test_the_longest_text_is_the_one_that_vllm_takes_unless_told(changes: Mapping[str, Any], longest: int) -> None:
    """Its get_and_verify_max_len: model_max_length goes first, and rotary scaling makes it longer."""
    found = shape(of("meta-llama/Llama-2-7b-hf"), **changes)

    told = footprint(found, Serving())
    assert found.max_positions == longest
    assert told.bytes_of("kv_cache") == longest * 2 * 32 * 32 * 128 * 2


def test_gemma_3_counts_its_scaling_in() -> None:
    assert shape(of("google/gemma-3-4b-it")).max_positions == 131072


@pytest.mark.parametrize("runtime", ["vllm", "infinity", "tei"])
def test_a_server_of_vectors_loads_no_output(runtime: RuntimeName) -> None:
    """Qwen3-Embedding-8B: its model card tells 7,567,295,488 parameters, 0.62 billion less than with an output."""
    qwen = shape(of("Qwen/Qwen3-14B"), hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
                 num_attention_heads=32, vocab_size=151665)  # fmt: skip
    kinds: tuple[Kind, ...] = ("llm", "embedding")
    speaks, embeds = (
        footprint(qwen, Serving(kind=kind, runtime=runtime, max_model_len=1024)).bytes_of("weights") for kind in kinds
    )
    assert speaks - embeds == qwen.bytes_of("lm_head") == 151665 * 4096 * 2
    assert (qwen.disk_bytes - qwen.bytes_of("lm_head")) / 2 == pytest.approx(7_567_295_488, rel=0.0001)


def test_an_output_that_may_not_be_in_the_files_is_not_taken_off_their_size() -> None:
    found = shape_of_config(of("Qwen/Qwen3-14B")["config"], total_bytes=20 * 10**9)

    assert isinstance(found, ModelShape)
    told = footprint(found, Serving(kind="embedding", runtime="infinity", max_model_len=1024))
    assert told.bytes_of("weights") == pytest.approx(20 * 10**9, abs=10)


LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
GROUPS = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 128, "strategy": "group"}


@pytest.mark.parametrize(
    ("quantised", "gigabytes"),
    [
        # hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4: 5.73 GB of files.
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, 5.73),
        # RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8: 9.08 GB of files. The same numbers by others' words.
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}, 9.08),
        (
            {
                "quant_method": "quark",
                "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}},
                "exclude": ["lm_head"],
            },
            9.08,
        ),
        # Symmetric groups of 128 have no zero points.
        ({"quant_method": "compressed-tensors", "format": "pack-quantized",
          "config_groups": {"group_0": {"weights": GROUPS}}, "ignore": ["lm_head"]}, 5.70),
        # 6,979,321,856 linear weights by 4 bits, with 8 bits of scale for 32; and with 20 bits for 64.
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32}}}, 5.81),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}, 5.86),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_quantised_checkpoint_is_as_large_as_its_files(quantised: Mapping[str, Any], gigabytes: float) -> None:
    found = shape_of_config({**LLAMA_8B, "quantization_config": quantised})

    assert isinstance(found, ModelShape)
    assert found.disk_bytes / 1e9 == pytest.approx(gigabytes, rel=0.003)


def test_what_is_said_of_the_text_model_alone_counts() -> None:
    """Kimi K2.5 keeps its quantization_config in text_config."""
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128}
    inside = shape_of_config({"model_type": "llava", "text_config": {**LLAMA_8B, "quantization_config": awq}})
    plain = shape_of_config({**LLAMA_8B, "quantization_config": awq})

    assert isinstance(inside, ModelShape)
    assert isinstance(plain, ModelShape)
    assert (inside.quantisation, inside.disk_bytes) == ("awq", plain.disk_bytes)
