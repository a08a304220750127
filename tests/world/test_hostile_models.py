"""Models on disk that are hostile: whatever a file holds, the answer is a sentence, at once and in little memory."""

import contextlib
import json
import os
import resource
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sage_reconcile.core.config_dialects import DIALECTS
from sage_reconcile.core.footprint import Serving, footprint
from sage_reconcile.core.model_shape import shape_of_config
from sage_reconcile.core.shape import ModelShape
from sage_reconcile.world.header_files import BadFile, HeaderFile
from sage_reconcile.world.safetensors_headers import tensors_of
from tests.world.test_models import LLAMA, a_model, gguf, look, seen, why, with_header


def test_a_header_cut_at_any_byte_is_a_sentence(tmp_path: Path) -> None:
    """Every cut of a small header, and every cut of the weights behind it."""
    whole = gguf({"general.architecture": "llama", "llama.block_count": 1, "llama.attention.head_count": (1, 2)})
    path = tmp_path / "cut.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert why(path)
    path.write_bytes(whole)
    assert seen(path)

    model = a_model(tmp_path / "m", tensors={"lm_head.weight": ("BF16", (8, 4))})
    whole = (model / "model.safetensors").read_bytes()
    for length in range(len(whole)):
        (model / "model.safetensors").write_bytes(whole[:length])
        assert why(model)


def test_no_single_changed_byte_of_a_header_raises(tmp_path: Path) -> None:
    whole = gguf({"general.architecture": "llama", "llama.block_count": 1, "llama.attention.head_count": (1, 2)})
    header = len(whole) - 2 * 8 * 16 * 4
    path = tmp_path / "changed.gguf"
    model = a_model(tmp_path / "m", tensors={"lm_head.weight": ("BF16", (8, 4))})
    tensors = (model / "model.safetensors").read_bytes()
    for change in (0x01, 0x80, 0xFF):
        for position in range(header):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ change]) + whole[position + 1 :])
            look(path)
        for position in range(len(tensors)):
            changed = tensors[:position] + bytes([tensors[position] ^ change]) + tensors[position + 1 :]
            (model / "model.safetensors").write_bytes(changed)
            look(model)


HUGE = struct.pack("<Q", 2**63)
LIES: dict[str, bytes] = {
    "nothing": b"",
    "another format": b"PK\x03\x04" + bytes(100),
    "version 1": b"GGUF" + struct.pack("<III", 1, 0, 0) + bytes(64),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "many tensors": b"GGUF" + struct.pack("<I", 3) + HUGE + struct.pack("<Q", 0) + bytes(64),
    "many values": b"GGUF" + struct.pack("<IQ", 3, 0) + HUGE + bytes(64),
    "long key": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + HUGE + bytes(64),
    "long text": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 8) + HUGE + bytes(64),
    "long list": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<II", 9, 4) + HUGE + bytes(64),
    "many texts": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<II", 9, 8) + HUGE + bytes(64),
    "list of lists": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 1) + bytes(64),
    "unknown type": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 77) + bytes(64),
    "many dimensions": b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<I", 2**31) + bytes(64),
    "large tensor": b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQQIQ", 2, 2**63, 2**63, 0, 0),
    "no architecture": gguf({"x": 1}),
    "an architecture that is a number": gguf({"general.architecture": 7}),
    "no layers": gguf({"general.architecture": "llama"}),
    "too many layers for its tensors": gguf({"general.architecture": "llama", "llama.nextn_predict_layers": 4**15}),
}


@pytest.mark.parametrize("lie", sorted(LIES))
def test_a_gguf_file_that_lies_is_a_sentence(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "lie.gguf"
    path.write_bytes(LIES[lie])

    assert str(path) in why(path)


def one(entry: Any, name: str = "w") -> bytes:
    return with_header(json.dumps({name: entry}).encode()) + bytes(16)


HEADERS: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": bytes(7),
    "length 2^63": HUGE + b"{}",
    "length 100 MB": with_header(b"{}", 100_000_000),
    "length 101 MB": with_header(b"{}", 101_000_000),
    "not JSON": with_header(b"hello"),
    "not UTF-8": with_header(b'{"\xff":1}'),
    "a list": with_header(b"[]"),
    "deep lists": with_header(b'{"a":' + b"[" * 100_000),
    "deep objects": with_header(b'{"a":' * 100_000),
    "two million lists": with_header(b'{"a":[' + b"[]," * 2_000_000 + b"[]]}"),
    "a number of many digits": with_header(b'{"a":' + b"9" * 100_000 + b"}"),
    "an entry that is a list": one([]),
    "no dtype": one({"shape": [1], "data_offsets": [0, 4]}),
    "a dtype that is a number": one({"dtype": 5, "shape": [1], "data_offsets": [0, 4]}),
    "a long dtype": one({"dtype": "F" * 99, "shape": [1], "data_offsets": [0, 4]}),
    "no offsets": one({"dtype": "F32", "shape": [1]}),
    "three offsets": one({"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}),
    "offsets that are texts": one({"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}),
    "offsets that are true": one({"dtype": "F32", "shape": [1], "data_offsets": [False, True]}),
    "offsets backwards": one({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}),
    "offsets below zero": one({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}),
    "offsets beyond the end": one({"dtype": "F32", "shape": [1], "data_offsets": [0, 10**30]}),
    "a long name": one({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "n" * 5000),
}


@pytest.mark.parametrize("header", sorted(HEADERS))
def test_a_safetensors_file_that_lies_is_a_sentence(tmp_path: Path, header: str) -> None:
    model = a_model(tmp_path / "m")
    (model / "model.safetensors").write_bytes(HEADERS[header])

    assert "model.safetensors" in why(model)


CONFIGS: dict[str, bytes] = {
    "empty": b"",
    "a text": b'"hello"',
    "null": b"null",
    "deep": b'{"a":' * 100_000,
    "9 MB": b'{"a":"' + b"x" * 9_000_000 + b'"}',
    "not UTF-8": b'{"a":"\xff"}',
    "an escape cut short": b'{"a":"\\ud8',
}


@pytest.mark.parametrize("config", sorted(CONFIGS))
def test_a_config_that_is_none_is_a_sentence(tmp_path: Path, config: str) -> None:
    model = a_model(tmp_path / "m")
    (model / "config.json").write_bytes(CONFIGS[config])

    assert "config.json" in why(model)


def wrong(value: Any) -> Iterator[dict[str, Any]]:
    """Configs of which one value is wrong."""
    keys = [
        *LLAMA, "head_dim", "layer_types", "sliding_window", "num_local_experts", "num_experts_per_tok", "kv_lora_rank",
        "moe_intermediate_size", "text_config", "vision_config", "audio_config", "quantization_config", "dtype",
        "tie_word_embeddings", "block_configs", "hybrid_override_pattern", "compress_ratios", "mlp_layer_types",
        "rope_parameters", "partial_rotary_factor", "moe_layer_freq", "num_kv_shared_layers", "vision_feature_layer",
    ]  # fmt: skip
    for key in keys:
        yield {**LLAMA, key: value}
    for key in ("quant_method", "bits", "group_size", "ignore", "config_groups", "format", "modules_to_not_convert"):
        yield {**LLAMA, "quantization_config": {"quant_method": "compressed-tensors", key: value}}


VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 10**400, "", "x" * 10_000, [], [None], [[]], ["re:(a+)+$"] * 50, {}, {"a": {}}, "M*-E",
    {"hidden_size": "a"}, {"depth": 10**8, "hidden_size": 10**8}, [{"attention": 3, "ffn": []}], [10**9] * 100, "*",
)  # fmt: skip


@pytest.mark.parametrize("value", (*VALUES, 1e-300, [0] * 2, [1, 2]), ids=range(len(VALUES) + 3))
def test_no_value_of_a_key_that_only_one_family_knows_raises(value: Any) -> None:
    """Each family with a dialect, and every key that a dialect, a tower or a recurrent layer reads."""
    keys = (
        "attn_config", "ffn_config", "expansion_ratio", "multi_query", "num_kv_heads", "attn_type_list", "n_head_kv",
        "attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset", "attn_layer_indices",
        "linear_attn_config", "full_attn_idxs", "block_multiple_of", "block_ff_dim", "block_ffn_dim_multiplier",
        "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "sliding_window_pattern", "num_heads",
        "head_dim", "mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_d_conv", "mamba_dt_rank", "mamba_expand",
        "state_size", "conv_L_cache", "hidden_dim", "kv_lora_rank", "num_kv_shared_layers", "intermediate_size",
        "num_hidden_layers", "hidden_size", "num_attention_heads", "altup_num_inputs", "laurel_rank", "layer_types",
    )  # fmt: skip
    vision: dict[str, Any] = {"model_type": "mllama_vision_model", "hidden_size": 64, "num_hidden_layers": 2}
    configs = [{**LLAMA, "model_type": family, key: value} for family in sorted(DIALECTS) for key in keys]
    for key in ("image_size", "patch_size", "max_num_tiles", "supported_aspect_ratios", "architecture"):
        configs.append({**LLAMA, "vision_config": {**vision, key: value}})
    configs.append({**LLAMA, "vision_config": vision, "downsample_ratio": value})
    configs.append({**LLAMA, "audio_config": {"hidden_size": 64, "conf_num_hidden_layers": value}})
    for config in configs:
        found = shape_of_config(config)
        if isinstance(found, ModelShape):
            assert footprint(found, Serving(max_model_len=1000)).total_bytes > 0, config


def test_a_config_of_a_million_keys_is_not_copied_for_each_layer() -> None:
    config: dict[str, Any] = {**LLAMA, "num_hidden_layers": 2000, "intermediate_size": [128] * 2000}
    begun = time.process_time()
    found = shape_of_config(config | {str(number): 0 for number in range(300_000)})

    assert isinstance(found, ModelShape)
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_no_value_of_a_config_raises(tmp_path: Path, value: Any) -> None:
    model = a_model(tmp_path / "m")
    for weights in (True, False):
        for config in wrong(value):
            (model / "config.json").write_text(json.dumps(config))
            found = look(model)
            if isinstance(found, ModelShape):
                told = footprint(found, Serving(tensor_parallel=3, pipeline_parallel=2, max_model_len=1000))
                assert told.total_bytes > 0
                assert all(term.memory_bytes > 0 and term.why for term in told.terms)
        if weights:
            (model / "model.safetensors").unlink()


def test_what_is_no_regular_file_is_a_sentence_at_once(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json"):
        for make in (os.mkfifo, os.mkdir):
            model = a_model(tmp_path / f"{name}-{make.__name__}")
            (model / name).unlink(missing_ok=True)
            make(model / name)
            assert "not a regular file" in why(model)
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "not a regular file" in why(tmp_path / "pipe.gguf")
    (tmp_path / "folder.gguf").mkdir()
    assert "not a regular file" in why(tmp_path / "folder.gguf")
    (tmp_path / "zero.gguf").symlink_to("/dev/zero")
    assert "not a regular file" in why(tmp_path / "zero.gguf")
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    assert "loop.gguf" in why(tmp_path / "loop.gguf")
    assert "No such file" in why(tmp_path / "gone")
    assert "no config.json" in why(a_model(tmp_path / "m") / "..")


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "a/b.safetensors", "", "x", "\0.safetensors"])
def test_an_index_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    model = a_model(tmp_path / "m")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))

    assert "does not say which files" in why(model)


def test_a_header_of_a_hundred_megabytes_does_not_take_gigabytes(tmp_path: Path) -> None:
    for name, body in (
        ("one text", b'{"__metadata__":{"a":"' + b"x" * 99_000_000 + b'"}}'),
        ("one wide text", '{"__metadata__":{"a":"😀'.encode() + b"x" * 99_000_000 + b'"}}'),
        ("small lists", b'{"a":[' + b"[]," * 33_000_000 + b"[]]}"),
    ):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(with_header(body))
        with contextlib.suppress(BadFile), HeaderFile(str(path)) as file:
            tensors_of(file)
        path.unlink()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 1_500_000_000
