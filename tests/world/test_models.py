"""The shapes of models on disk, from real files made on the spot. Only headers are read."""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from sage_reconcile.core.footprint import Serving, footprint
from sage_reconcile.core.shape import HeadCache, LatentCache, LayerGroup, ModelShape, StateCache, UnknownShape
from sage_reconcile.world.hub_places import hub_cache
from sage_reconcile.world.models import model_shape
from tests.tiny_gguf import write_tiny_gguf

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 320,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "torch_dtype": "bfloat16",
}  # fmt: skip
TENSORS = {
    "model.embed_tokens.weight": ("BF16", (320, 64)),
    "model.layers.0.self_attn.q_proj.weight": ("BF16", (64, 64)),
    "model.layers.0.mlp.gate_proj.weight": ("BF16", (128, 64)),
    "model.layers.0.input_layernorm.weight": ("BF16", (64,)),
    "model.layers.1.mlp.down_proj.weight": ("F8_E4M3", (64, 128)),
    "model.layers.2.mlp.down_proj.weight": ("BF16", (64, 128)),
    "lm_head.weight": ("BF16", (320, 64)),
}
NUMBER_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}


def safetensors(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """A file of zeros in the format of safetensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, sizes) in tensors.items():
        count = NUMBER_BYTES[dtype] * math.prod(sizes)
        header[name] = {"dtype": dtype, "shape": list(sizes), "data_offsets": [end, end + count]}
        end += count
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def a_model(directory: Path, config: Any = LLAMA, tensors: Any = TENSORS) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes(safetensors(tensors))
    return directory


def look(path: Path | str, **environment: str) -> ModelShape | UnknownShape:
    return model_shape(str(path), directory="/", environment=environment)


def seen(path: Path | str, **environment: str) -> ModelShape:
    found = look(path, **environment)
    assert isinstance(found, ModelShape), found
    return found


def why(path: Path | str, **environment: str) -> str:
    found = look(path, **environment)
    assert isinstance(found, UnknownShape)
    assert found.why
    return found.why


def test_a_directory_tells_its_bytes_by_part_and_leaves_out_layers_for_drafting(tmp_path: Path) -> None:
    found = seen(a_model(tmp_path / "m"))

    assert found.basis == "tensors"
    assert found.bytes_of("embeddings") == found.bytes_of("lm_head") == 320 * 64 * 2
    assert found.bytes_of("whole") == 64 * 2
    assert {(part.storage, part.disk_bytes) for part in found.parts if part.role == "rest"} == {
        ("BF16", (64 * 64 + 128 * 64) * 2),
        ("F8_E4M3", 64 * 128),
    }
    assert found.groups == (LayerGroup(count=2, cache=HeadCache(kv_heads=2, key_size=16, value_size=16)),)


def test_a_tower_may_have_more_layers_than_the_text_model_has(tmp_path: Path) -> None:
    """PaliGemma 3B: 18 layers of text and 27 of SigLIP, of which nine were taken for layers that draft."""
    tower = {
        f"vision_tower.vision_model.encoder.layers.{index}.mlp.fc1.weight": ("BF16", (64, 64)) for index in range(5)
    }
    ears = {"thinker.audio_tower.layers.3.fc1.weight": ("BF16", (64, 64))}
    # GLM-4V 9B: 63 layers that see, above 40 of text.
    eyes = {"transformer.vision.transformer.layers.62.mlp.fc1.weight": ("BF16", (64, 64))}

    found = seen(a_model(tmp_path / "m", tensors={**TENSORS, **tower, **ears, **eyes}))

    assert found.bytes_of("vision") == 7 * 64 * 64 * 2
    assert found.bytes_of("rest") == seen(a_model(tmp_path / "text")).bytes_of("rest")


def test_what_speaks_aloud_is_not_loaded_by_engines_that_answer_with_words(tmp_path: Path) -> None:
    """Qwen2.5-Omni: a fifth of its files are a voice, which vLLM skips (talker and token2wav)."""
    voice = {
        "talker.model.layers.0.mlp.gate_proj.weight": ("BF16", (64, 64)),
        "token2wav.code2wav_dit_model.proj_out.weight": ("F32", (64, 64)),
    }

    assert seen(a_model(tmp_path / "m", tensors={**TENSORS, **voice})).parts == seen(a_model(tmp_path / "x")).parts


def test_the_files_that_the_index_names_are_read_and_no_other_copy(tmp_path: Path) -> None:
    model = a_model(tmp_path / "m")
    (model / "model.safetensors").unlink()
    names = list(TENSORS)
    for file, part in (
        ("model-00001-of-00002.safetensors", names[:3]),
        ("model-00002-of-00002.safetensors", names[3:]),
    ):
        (model / file).write_bytes(safetensors({name: TENSORS[name] for name in part}))
    (model / "consolidated.safetensors").write_bytes(safetensors(TENSORS))
    places = {name: f"model-0000{1 if name in names[:3] else 2}-of-00002.safetensors" for name in names}
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 200_000}, "weight_map": places})
    )

    assert seen(model).parts == seen(a_model(tmp_path / "whole")).parts


def test_a_download_that_is_not_complete_is_counted_from_what_the_index_says(tmp_path: Path) -> None:
    model = a_model(tmp_path / "m")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 400_000}, "weight_map": {"x": "model-00001-of-00002.safetensors"}})
    )

    found = seen(model)

    assert found.basis == "total"
    assert 399_990 <= found.disk_bytes <= 400_000


def test_a_config_alone_is_counted(tmp_path: Path) -> None:
    model = a_model(tmp_path / "m")
    (model / "model.safetensors").unlink()

    found = seen(model)

    assert found.basis == "config"
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert found.disk_bytes == 2 * (2 * 320 * 64 + 2 * layer + 64)


def test_an_unknown_architecture_tells_its_tensors_and_a_cache_by_the_usual_keys(tmp_path: Path) -> None:
    found = seen(a_model(tmp_path / "m", {**LLAMA, "model_type": "brand_new"}))

    assert not found.known
    assert found.disk_bytes == seen(a_model(tmp_path / "l")).disk_bytes
    assert footprint(found, Serving()).kv_bytes_per_token == 2 * 2 * 2 * 16 * 2


def test_a_config_without_any_sizes_still_tells_tensors(tmp_path: Path) -> None:
    found = seen(a_model(tmp_path / "m", {"model_type": "odd"}))

    assert found.layers == 0
    assert footprint(found, Serving(tensor_parallel=2, pipeline_parallel=3)).bytes_of("weights") > 0


def a_hub(home: Path) -> Path:
    hub = home / ".cache" / "huggingface" / "hub" / "models--org--tiny"
    a_model(hub / "snapshots" / "abc123")
    # The cache keeps blobs, and snapshots are links to them.
    (hub / "blobs").mkdir()
    (hub / "snapshots" / "abc123" / "config.json").rename(hub / "blobs" / "c0ffee")
    (hub / "snapshots" / "abc123" / "config.json").symlink_to("../../blobs/c0ffee")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc123")
    return hub


def test_a_hub_id_is_found_in_the_cache_wherever_the_environment_puts_it(tmp_path: Path) -> None:
    hub = a_hub(tmp_path)
    cache = hub.parent

    for environment in (
        {"HOME": str(tmp_path)},
        {"HF_HUB_CACHE": str(cache), "HOME": "/nowhere"},
        {"HF_HOME": str(cache.parent), "HOME": "/nowhere"},
        {"XDG_CACHE_HOME": str(tmp_path / ".cache"), "HOME": "/nowhere"},
        {"HF_HOME": "~/.cache/huggingface", "HOME": str(tmp_path)},
    ):
        assert hub_cache(environment) == str(cache)
        assert seen("org/tiny", **environment).layers == 2
    assert "not in the hub's cache" in why("org/other", HOME=str(tmp_path))


def test_without_a_revision_called_main_the_only_one_counts(tmp_path: Path) -> None:
    hub = a_hub(tmp_path)
    (hub / "refs" / "main").unlink()
    assert seen("org/tiny", HOME=str(tmp_path)).layers == 2

    (hub / "snapshots" / "def456").mkdir()
    assert "has 2 revisions" in why("org/tiny", HOME=str(tmp_path))


@pytest.mark.parametrize("revision", ["../../../etc", "..", "", "a/b", "x" * 500, "\0", "é"])
def test_a_reference_that_names_no_revision_leads_nowhere(tmp_path: Path, revision: str) -> None:
    hub = a_hub(tmp_path)
    (hub / "refs" / "main").write_text(revision)

    assert "does not name a revision" in why("org/tiny", HOME=str(tmp_path))


@pytest.mark.parametrize("model", ["..", "org/..", "org/../../etc", "a/b/c", "", "org/\0", "-x", "a" * 5000, "org/ä"])
def test_a_name_that_is_no_hub_id_is_a_sentence(tmp_path: Path, model: str) -> None:
    assert why(model, HOME=str(tmp_path))


def test_a_gguf_file_tells_what_the_reference_reader_tells(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    reference = GGUFReader(path)

    found = seen(path)

    assert found.disk_bytes == sum(int(tensor.n_bytes) for tensor in reference.tensors)
    assert found.bytes_of("embeddings") == found.bytes_of("lm_head") == 320 * 64 * 4
    assert (found.family, found.layers, found.vocabulary, found.max_positions) == ("llama", 2, 320, 2048)
    assert found.groups == (LayerGroup(count=2, cache=HeadCache(kv_heads=1, key_size=32, value_size=32)),)
    assert footprint(found, Serving(runtime="llama.cpp", max_model_len=512)).kv_bytes_per_token == 2 * 2 * 32 * 2


def gguf(values: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]] | None = None) -> bytes:
    """A GGUF file of 32-bit zeros with these values: whole numbers, texts, and lists of whole numbers."""
    tensors = {"token_embd.weight": (8, 16), "output.weight": (8, 16)} if tensors is None else tensors

    def text(word: str) -> bytes:
        return struct.pack("<Q", len(word.encode())) + word.encode()

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    for key, value in values.items():
        out += text(key)
        if isinstance(value, str):
            out += struct.pack("<I", 8) + text(value)
        elif isinstance(value, tuple):
            out += struct.pack("<IIQ", 9, 4, len(value)) + struct.pack(f"<{len(value)}I", *value)
        else:
            out += struct.pack("<II", 4, value)
    offset = 0
    for name, sizes in tensors.items():
        out += text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, 0, offset)
        offset += 4 * math.prod(sizes)
    return out + bytes(-len(out) % 32 + offset)


def test_gguf_layers_that_share_a_cache_keep_none(tmp_path: Path) -> None:
    """Gemma 3n: of 35 layers the last 15 look into the cache of one before them."""
    values = {
        "general.architecture": "gemma3n", "gemma3n.block_count": 35, "gemma3n.attention.head_count": 8,
        "gemma3n.attention.head_count_kv": 2, "gemma3n.attention.key_length": 256, "gemma3n.embedding_length": 2048,
        "gemma3n.attention.value_length": 256, "gemma3n.attention.sliding_window": 512,
        "gemma3n.attention.shared_kv_layers": 15,
    }  # fmt: skip
    (tmp_path / "m.gguf").write_bytes(gguf(values))

    found = seen(tmp_path / "m.gguf")

    whole = HeadCache(kv_heads=2, key_size=256, value_size=256)
    assert {group.cache: group.count for group in found.groups} == {
        None: 15, whole: 4, replace(whole, window=512): 16,
    }  # fmt: skip


def test_gguf_layers_of_each_kind_keep_what_llama_cpp_keeps(tmp_path: Path) -> None:
    common = {"block_count": 6, "embedding_length": 64, "context_length": 4096, "attention.head_count": 4}

    def groups(family: str, **values: Any) -> set[tuple[int, Any]]:
        path = tmp_path / f"{family}.gguf"
        named = {f"{family}.{key}": value for key, value in {**common, **values}.items()}
        path.write_bytes(gguf({"general.architecture": family, **named}))
        return {(group.count, group.cache) for group in seen(path).groups}

    window = {"attention.head_count_kv": 2, "attention.sliding_window": 128}
    assert groups("gemma3", **window) == {
        (5, HeadCache(kv_heads=2, key_size=16, value_size=16, window=128)),
        (1, HeadCache(kv_heads=2, key_size=16, value_size=16)),
    }
    assert groups("deepseek2", **{"attention.kv_lora_rank": 32, "attention.key_length_mla": 24,
                                  "rope.dimension_count": 8, "attention.head_count_kv": 1}) == {
        (6, LatentCache(rank=32, rope_size=8))
    }  # fmt: skip
    assert groups("nemotron_h", **{"attention.head_count_kv": (0, 0, 2, 0, 0, 2), "ssm.conv_kernel": 4,
                                   "feed_forward_length": (0, 99, 0, 0, 99, 0), "ssm.inner_size": 128,
                                   "ssm.state_size": 16, "ssm.group_count": 2}) == {
        (2, HeadCache(kv_heads=2, key_size=16, value_size=16)),
        (2, StateCache(convolution_numbers=2 * 3 * (128 + 64), state_numbers=128 * 16)),
        (2, None),
    }  # fmt: skip
    assert groups("bert") == {(6, None)}


def test_a_model_in_several_gguf_files_is_one_model(tmp_path: Path) -> None:
    values = {"general.architecture": "llama", "llama.block_count": 1, "llama.attention.head_count": 1}
    first, second = {"token_embd.weight": (8, 16)}, {"output.weight": (8, 16)}
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(gguf(values, first))
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(gguf({}, second))

    assert seen(tmp_path / "m-00001-of-00002.gguf").disk_bytes == 2 * 8 * 16 * 4
    assert "not the first file" in why(tmp_path / "m-00002-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    assert "No such file" in why(tmp_path / "m-00001-of-00002.gguf")


def with_header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def test_of_a_file_of_20_gb_only_the_header_is_read(tmp_path: Path) -> None:
    """The files are sparse: they take no room, and reading them whole would take minutes."""
    size = 20 * 1000**3
    entry = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}
    header = with_header(json.dumps({"model.layers.0.mlp.down_proj.weight": entry}).encode())
    model = a_model(tmp_path / "m")
    (model / "model.safetensors").write_bytes(header)
    os.truncate(model / "model.safetensors", len(header) + size)
    path = tmp_path / "large.gguf"
    path.write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
        + struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 5) + b"llama"
        + struct.pack("<Q", 17) + b"llama.block_count" + struct.pack("<II", 4, 1)
        + struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, size // 4, 0, 0)
    )  # fmt: skip
    os.truncate(path, path.stat().st_size + 32 + size)

    before = read_bytes()
    assert seen(model).disk_bytes == size
    assert seen(path).disk_bytes == size
    assert read_bytes() - before < 4 * 1024 * 1024


def read_bytes() -> int:
    """What this process has read through system calls so far (proc(5), io)."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])
