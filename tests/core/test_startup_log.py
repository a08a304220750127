"""What engines say of their memory while they start: lines as they were published, each with where.

Of long lines the part that nobody reads is left out; a line that was not published, but made as the program's source
writes it, says so.
"""

import random

import pytest

from sage_reconcile.core.runtimes import RUNTIMES
from sage_reconcile.core.runtimes.startup_log import (
    LoggedFootprint,
    any_log,
    llama_cpp_log,
    sglang_log,
    vllm_log,
)

MIB, GIB = 1024**2, 1024**3


def logged(weights: float = 0, kv: float = 0, graphs: float = 0, tokens: int = 0, unit: int = GIB) -> LoggedFootprint:
    sizes = [round(size * unit) for size in (weights, kv, graphs)]
    return LoggedFootprint(weights_bytes=sizes[0], kv_cache_bytes=sizes[1], graphs_bytes=sizes[2], kv_tokens=tokens)


VLLM = {
    # vllm-project/vllm#3120, where the unit is still MB: that is not read.
    "0.3": (
        "INFO 02-29 19:21:45 model_runner.py:90] Loading model weights took 244.61 MB\n"
        "INFO 02-29 19:21:45 llm_engine.py:338] # GPU blocks: 76240, # CPU blocks: 7281",
        None,
    ),
    # vllm-project/vllm#10511, the pull request that overhauled the profile.
    "0.6": (
        "INFO 12-13 19:54:18 worker.py:243] the current vLLM instance can use    71.29GiB\n"
        "INFO 12-13 19:54:18 worker.py:243] model weights take   14.96GiB\n"
        "INFO 12-13 19:54:18 worker.py:243] PyTorch activation peak memory       1.26GiB\n"
        "INFO 12-13 19:54:18 worker.py:243] available_kv_cache_memory    53.29GiB",
        logged(kv=53.29),
    ),
    # vllm-project/vllm#12569.
    "0.7, V1": (
        "INFO 01-30 03:18:12 gpu_model_runner.py:848] Loading model weights took 67.7229 GB\n"
        "INFO 01-30 03:19:14 kv_cache_utils.py:395] # GPU blocks: 1381",
        logged(weights=67.7229),
    ),
    # kubernetes-sigs/gateway-api-inference-extension#550.
    "0.8, V0": (
        "INFO 03-21 20:15:45 [worker.py:267] Memory profiling takes 34.26 seconds\n"
        "INFO 03-21 20:15:45 [worker.py:267] model weights take 12.55GiB; non_torch_memory takes 0.16GiB; PyTorch "
        "activation peak memory takes 2.38GiB; the rest of the memory reserved for KV Cache is 56.18GiB.\n"
        "INFO 03-21 20:15:46 [executor_base.py:111] # cuda blocks: 7191, # CPU blocks: 512",
        logged(kv=56.18),
    ),
    # vllm-project/vllm#17122, and run-ai/runai-model-streamer#67 for its last line.
    "0.8, V1": (
        "INFO 04-24 16:33:00 [gpu_model_runner.py:1316] Model loading took 14.9889 GiB and 3.652170 seconds\n"
        "INFO 04-24 16:33:13 [kv_cache_utils.py:634] GPU KV cache size: 158,656 tokens\n"
        "INFO 06-02 11:03:55 [gpu_model_runner.py:1933] Graph capturing finished in 37 secs, took 0.45 GiB",
        logged(weights=14.9889, graphs=0.45, tokens=158656),
    ),
    # vllm-project/vllm#29335.
    "0.11": (
        "(EngineCore_DP0 pid=441) INFO 11-24 11:43:54 [gpu_model_runner.py:3341] Model loading took 2.0513 GiB memory "
        "and 27.200487 seconds\n"
        "(EngineCore_DP0 pid=441) INFO 11-24 11:44:17 [gpu_worker.py:348] Available KV cache memory: 33.31 GiB\n"
        "(EngineCore_DP0 pid=441) INFO 11-24 11:44:18 [kv_cache_utils.py:1234] GPU KV cache size: 1,587,648 tokens\n"
        "Capturing CUDA graphs (decode, FULL): 100%|####| 35/35 [00:01<00:00, 33.86it/s]",
        logged(weights=2.0513, kv=33.31, tokens=1587648),
    ),
    # aivrar/vllm-windows-build#17 and #4.
    "0.2x": (
        "INFO 09-21 12:50:12 [model_runner.py:404] Model loading took 17.7 GiB memory and 12.003756 seconds\n"
        "INFO 05-26 21:34:12 [kv_cache_utils.py:1710] GPU KV cache size: 396,928 tokens\n"
        "INFO 05-26 21:34:14 [gpu_model_runner.py:6243] Graph capturing finished in 2 secs, took 0.11 GiB",
        logged(weights=17.7, graphs=0.11, tokens=396928),
    ),
}

SGLANG = {
    # sgl-project/sglang#4826.
    "0.4": (
        "[2025-03-27 21:33:30 TP0] Load weight end. type=Gemma3ForConditionalGeneration, dtype=torch.bfloat16, "
        "avail mem=131.08 GB, mem usage=8.13 GB.\n"
        "[2025-03-27 21:33:31 TP0] KV Cache is allocated. #tokens: 834615, K size: 54.12 GB, V size: 54.12 GB\n"
        "[2025-03-27 21:33:31 TP0] Memory pool end. avail mem=14.61 GB",
        logged(weights=8.13, kv=108.24),
    ),
    # sgl-project/sglang#11830; the last line is made as scheduler.py writes it.
    "0.5": (
        "[2025-11-30 12:50:10] KV Cache is allocated. #tokens: 2243474, K size: 59.91 GB, V size: 59.91 GB\n"
        "[2025-11-30 12:50:15] Capture cuda graph end. Time elapsed: 5.37 s. mem usage=1.44 GB. avail mem=38.05 GB.\n"
        "[2025-11-30 12:50:16] max_total_num_tokens=2243474, chunked_prefill_size=16384, max_prefill_tokens=16384",
        logged(kv=119.82, graphs=1.44, tokens=2243474),
    ),
    # sgl-project/sglang#18263.
    "of 2026": (
        "[2026-07-15 13:14:53] Load weight end. elapsed=19.09 s, type=Qwen3MoeForCausalLM, avail mem=230.20 GB, "
        "mem usage=56.98 GB.\n"
        "[2026-07-15 13:14:54] KV Cache is allocated. dtype: torch.bfloat16, #tokens: 1669816, K size: 76.44 GB, "
        "V size: 76.44 GB",
        logged(weights=56.98, kv=152.88),
    ),
    # Made as memory_pool.py writes it for latent attention.
    "latent": (
        "[2025-11-10 19:59:08 DP0 TP1 EP1] KV Cache is allocated. #tokens: 478320, KV size: 30.79 GB",
        logged(kv=30.79),
    ),
}

LLAMA_CPP = {
    # ggml-org/llama.cpp#6122, on two devices: of each figure that of the device that has most.
    "of 2024": (
        "llm_load_tensors:        CPU buffer size =  1640.62 MiB\n"
        "llm_load_tensors:      CUDA0 buffer size =  5434.38 MiB\n"
        "llm_load_tensors:      CUDA1 buffer size = 13989.53 MiB\n"
        "llama_new_context_with_model: n_ctx      = 4096\n"
        "llama_kv_cache_init:      CUDA0 KV buffer size =  1536.00 MiB\n"
        "llama_kv_cache_init:      CUDA1 KV buffer size =  3584.00 MiB\n"
        "llama_new_context_with_model:      CUDA0 compute buffer size =   672.01 MiB",
        logged(weights=13989.53, kv=3584, tokens=4096, unit=MIB),
    ),
    # ggml-org/llama.cpp#9390.
    "of 2025": (
        "load_tensors:        CUDA2 model buffer size = 25338.47 MiB\n"
        "load_tensors:        CUDA3 model buffer size = 22171.16 MiB\n"
        "llama_init_from_model: n_ctx         = 16384\n"
        "llama_init_from_model: n_ctx_per_seq = 2048\n"
        "llama_kv_cache_init:      CUDA2 KV buffer size =  5824.00 MiB\n"
        "llama_kv_cache_init:      CUDA3 KV buffer size =  5096.00 MiB",
        logged(weights=25338.47, kv=5824, tokens=16384, unit=MIB),
    ),
    # Made, with times, levels and colours as in ggml-org/llama.cpp#27680; two caches, as a model with windows has.
    "of 2026": (
        "\x1b[34m0.00.612.795\x1b[0m \x1b[32mI \x1b[0mload_tensors:        CUDA0 model buffer size =  4403.49 MiB\n"
        "0.01.012.795 I llama_kv_cache:      CUDA0 KV buffer size =   512.00 MiB\n"
        "0.01.012.796 I llama_kv_cache:      CUDA0 KV buffer size =   300.00 MiB",
        logged(weights=4403.49, kv=812, unit=MIB),
    ),
    "on the CPU": ("load_tensors:   CPU_Mapped model buffer size =  4403.49 MiB", None),
}


@pytest.mark.parametrize(("text", "expected"), VLLM.values(), ids=VLLM)
def test_vllm(text: str, expected: LoggedFootprint | None) -> None:
    assert vllm_log(text.split("\n")) == expected


@pytest.mark.parametrize(("text", "expected"), SGLANG.values(), ids=SGLANG)
def test_sglang(text: str, expected: LoggedFootprint | None) -> None:
    assert sglang_log(text.split("\n")) == expected


@pytest.mark.parametrize(("text", "expected"), LLAMA_CPP.values(), ids=LLAMA_CPP)
def test_llama_cpp(text: str, expected: LoggedFootprint | None) -> None:
    assert llama_cpp_log(text.split("\n")) == expected


def test_of_several_workers_the_one_with_the_least_room_counts() -> None:
    lines = (
        "(Worker_TP0 pid=9) INFO 05-06 20:59:59 [gpu_model_runner.py:4879] Model loading took 12.66 GiB memory and 3 s",
        "(Worker_TP1 pid=8) INFO 05-06 20:59:59 [gpu_model_runner.py:4879] Model loading took 12.70 GiB memory and 3 s",
        "(Worker_TP0 pid=9) INFO 05-06 21:00:59 [gpu_worker.py:348] Available KV cache memory: 8.11 GiB",
        "(Worker_TP1 pid=8) INFO 05-06 21:00:59 [gpu_worker.py:348] Available KV cache memory: 7.92 GiB",
    )
    assert vllm_log(lines) == logged(weights=12.70, kv=7.92)


def test_what_a_prompt_says_is_not_believed() -> None:
    said = "INFO 11-24 11:44:17 [gpu_worker.py:348] Available KV cache memory: 1.00 GiB"
    lines = (
        f"INFO 11-24 12:44:17 [logger.py:43] Received request chat-1: prompt: '{said}'",
        f"  {said}",
        f"user: {said}",
        "[2025-11-30 12:50:10] prompt: [2025-11-30 12:50:10] KV Cache is allocated. #tokens: 1, KV size: 1.00 GB",
    )
    assert any_log(lines) is None


def test_a_program_that_nobody_knows_is_heard_where_it_speaks_as_one_that_is_known() -> None:
    for known in (VLLM["0.11"], SGLANG["0.4"], LLAMA_CPP["of 2025"]):
        assert any_log(iter(known[0].split("\n"))) == known[1]


def test_garbage_says_nothing_and_costs_nothing() -> None:
    seed = 20261125
    print(f"seed {seed}")
    rng = random.Random(seed)
    whole = "\n".join(text for table in (VLLM, SGLANG, LLAMA_CPP) for text, _ in table.values())
    for _ in range(200):
        letters = list(whole)
        for _ in range(40):
            letters[rng.randrange(len(letters))] = chr(rng.choice((0, 10, 32, 40, 41, 46, 48, 0x661, 0x10FFFF)))
        for runtime in RUNTIMES:
            runtime.measured_log("".join(letters).split("\n"))
    endless = ("(" * 3000, ")(" * 3000, "INFO " * 3000, "9" * 3000, "[2025-11-30 12:50:10" + " " * 3000)
    for runtime in RUNTIMES:
        assert runtime.measured_log(line for _ in range(100_000) for line in endless) is None
