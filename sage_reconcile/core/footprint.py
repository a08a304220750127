"""The GPU memory that an engine needs on each of its devices, from the shape of its model and how it is served.

What goes in: a ModelShape and the settings of the engine. What comes out: named terms in bytes, each with a sentence
that explains it. Must not know: which devices there are, and what is free on them.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from sage_reconcile.core.activations import GIB, Batch, llama_cpp_activations, tei_activations, torch_activations
from sage_reconcile.core.kv_cache import KvSettings, bytes_per_sequence, bytes_per_token, known_dtype, rounded_tokens
from sage_reconcile.core.shape import ModelShape
from sage_reconcile.core.spec import Kind, RuntimeName
from sage_reconcile.core.weights import counts_dtype, counts_quantization, table_bytes, weight_bytes

TermName = Literal["weights", "kv_cache", "activations", "non_torch", "cuda_graphs", "cuda_context", "margin", "slack"]

# What vLLM calls non-torch memory: workspaces of attention, and the buffers of NCCL with several devices. Published
# logs have 0.01 to 0.16 GiB on one device and 0.20 to 1.84 on several (llm-d's planner has the same 0.15 and 0.6).
_NON_TORCH_BYTES = round(0.15 * GIB)
_NON_TORCH_SEVERAL_BYTES = round(0.6 * GIB)
# The median of 27 logs, which have 0.09 to 2.41 GiB.
_CUDA_GRAPH_BYTES = round(0.65 * GIB)
# The CUDA context and its kernels stand before an engine first measures what is free, so that no budget counts them:
# half a GiB with PyTorch on today's cards; with several devices NCCL's channels too (gpt-oss-120b on eight cards ended
# 1.37 GiB above its budget, of which graphs are a part).
_CONTEXT_BYTES = round(0.5 * GIB)
_CONTEXT_SEVERAL_BYTES = round(0.9 * GIB)
# SGLang tells what is gone from the device while it loads: 0.09 to 0.19 GiB more than tensors and tables in five logs.
_SGLANG_LOADING_BYTES = round(0.12 * GIB)

# The one log of gpt-oss on eight devices has 9.98 GiB of weights, and the padding that is known explains 8.57.
_PADDED_EXPERTS_MARGIN = 0.17
_MARGIN_FROM_DEVICES = 8
# vLLM and SGLang give their cache what is left of the budget, and do not start when that is short of one sequence. Of
# 19 published logs one took more than 5% above what is counted without the cache (9%).
_SLACK = 0.05
# Servers of vectors and scores drop the output of a model that could speak (vLLM's _create_pooling_model_cls), or never
# load it (AutoModel of transformers).
_WITHOUT_OUTPUT = ("vllm", "infinity", "tei")
# No model of such a family was compared, and its parameters were counted by the rules of others.
_UNKNOWN_FAMILY_MARGIN = 0.10


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One part of a footprint."""

    name: TermName
    memory_bytes: int
    why: str
    # Whether the engine counts it to the budget that it is told (--gpu-memory-utilization).
    in_budget: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """The memory on each device, term by term; terms of no bytes are left out."""

    terms: tuple[Term, ...]
    # What each further token of a sequence takes on one device.
    kv_bytes_per_token: int
    # What a sequence takes however long it is: states, and windows that are full.
    kv_bytes_per_sequence: int
    # What is written and has no figure here, a sentence each.
    not_counted: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        return sum(term.memory_bytes for term in self.terms)

    @property
    def budget_bytes(self) -> int:
        """What the engine must be told that it may use."""
        return sum(term.memory_bytes for term in self.terms if term.in_budget)

    def bytes_of(self, *names: TermName) -> int:
        return sum(term.memory_bytes for term in self.terms if term.name in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How an engine serves a model."""

    kind: Kind = "llm"
    runtime: RuntimeName = "vllm"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    # None: the model's own limit.
    max_model_len: int | None = None
    # vLLM's defaults below 70 GiB of memory; llama.cpp: its slots (-np).
    max_num_seqs: int = 256
    # llama.cpp: its physical batch (-ub), 512 by default.
    max_num_batched_tokens: int = 2048
    # "auto": 16 bits.
    kv_dtype: str = "auto"
    # The type of values, where it differs from that of keys (llama.cpp's -ctv); "": the same.
    value_dtype: str = ""
    dtype: str = "auto"
    # Quantisation while loading (vLLM's --quantization on a checkpoint of 16 bits); "": none.
    quantization: str = ""
    # Sequences of max_model_len that the cache must hold at once. With one, an engine starts; with more, it serves more
    # long requests at the same time. llama.cpp shares one context among its slots, so there it is one.
    full_sequences: int = 1
    enforce_eager: bool = False
    without_windows: bool = False


def context_bytes(devices: int) -> int:
    """What each of an engine's devices loses to CUDA contexts beyond the budget that vLLM or SGLang is told."""
    return _CONTEXT_SEVERAL_BYTES if devices > 1 else _CONTEXT_BYTES


def footprint(shape: ModelShape, serving: Serving) -> Footprint:
    """The memory that serving the model takes on the device that needs most."""
    serving = _settled(shape, serving)
    weights = _weights(shape, serving)
    kv = _kv_settings(serving)
    keeps = serving.runtime in ("vllm", "sglang", "llama.cpp")
    per_token = bytes_per_token(shape, kv) if keeps else 0
    per_sequence = bytes_per_sequence(shape, kv) if keeps else 0
    terms = (
        weights,
        _kv_cache(serving, kv, per_token, per_sequence),
        _activations(shape, serving),
        *_overheads(serving),
        *_margins(shape, serving, weights.memory_bytes),
    )
    terms += _slack(serving, terms)
    return Footprint(
        terms=tuple(term for term in terms if term.memory_bytes > 0),
        kv_bytes_per_token=per_token,
        kv_bytes_per_sequence=per_sequence,
        not_counted=tuple(_not_counted(shape, serving)),
    )


def _settled(shape: ModelShape, serving: Serving) -> Serving:
    """The settings with nothing left open and nothing below 1."""
    length = serving.max_model_len if serving.max_model_len is not None else shape.max_positions
    # A text to embed is not cut into chunks: a batch of theirs holds the longest.
    whole = length if serving.kind != "llm" and serving.runtime in ("vllm", "sglang") else 1
    return replace(
        serving,
        tensor_parallel=max(1, serving.tensor_parallel),
        pipeline_parallel=max(1, serving.pipeline_parallel),
        max_model_len=max(1, length),
        max_num_seqs=max(1, serving.max_num_seqs),
        max_num_batched_tokens=max(1, whole, serving.max_num_batched_tokens),
        value_dtype=serving.value_dtype or serving.kv_dtype,
        full_sequences=max(1, serving.full_sequences),
    )


def _weights(shape: ModelShape, serving: Serving) -> Term:
    tensor, pipeline = serving.tensor_parallel, serving.pipeline_parallel
    if serving.kind != "llm" and serving.runtime in _WITHOUT_OUTPUT and shape.basis != "total":
        # Where only the size of all files is known, it may be that of files without an output.
        shape = replace(shape, parts=tuple(part for part in shape.parts if part.role != "lm_head"))
    size = weight_bytes(
        shape,
        runtime=serving.runtime,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        dtype=serving.dtype,
        quantization=serving.quantization,
    )
    if serving.runtime in ("vllm", "sglang"):
        size += table_bytes(shape, tensor_parallel=tensor, pipeline_parallel=pipeline)
    if serving.runtime == "sglang":
        size += _SGLANG_LOADING_BYTES
    known_from = {
        "tensors": "the tensors in its files",
        "total": "the size of its files, divided as its config.json says",
        "config": "its config.json alone",
    }[shape.basis]
    share = f", over {tensor * pipeline} devices" if tensor * pipeline > 1 else ""
    stored = f"{shape.disk_bytes / GIB:.2f} GiB on disk" if shape.basis != "config" else "counted"
    return Term(name="weights", memory_bytes=size, why=f"{stored}, from {known_from}{share}")


def _kv_settings(serving: Serving) -> KvSettings:
    assert serving.max_model_len is not None
    return KvSettings(
        runtime=serving.runtime,
        key_dtype=serving.kv_dtype if known_dtype(serving.kv_dtype) else "auto",
        value_dtype=serving.value_dtype if known_dtype(serving.value_dtype) else "auto",
        tensor_parallel=serving.tensor_parallel,
        pipeline_parallel=serving.pipeline_parallel,
        max_model_len=serving.max_model_len,
        max_num_batched_tokens=serving.max_num_batched_tokens,
        without_windows=serving.without_windows,
    )


def _kv_cache(serving: Serving, kv: KvSettings, per_token: int, per_sequence: int) -> Term:
    tokens = rounded_tokens(kv.max_model_len, kv)
    sequences = serving.full_sequences
    # llama.cpp makes room for the windows and states of all its slots at once.
    fixed = max(sequences, serving.max_num_seqs) if serving.runtime == "llama.cpp" else sequences
    counted = "a sequence" if sequences == 1 else f"{sequences} sequences"
    why = f"{counted} of {tokens:,} tokens at {per_token:,} bytes per token"
    if per_sequence:
        why += f", and {per_sequence:,} bytes per sequence for windows and states"
    unknown = [name for name in (serving.kv_dtype, serving.value_dtype) if not known_dtype(name)]
    if unknown:
        why += f'; the type "{unknown[0]}" is not known here and counts as 16 bits'
    return Term(name="kv_cache", memory_bytes=sequences * tokens * per_token + fixed * per_sequence, why=why)


def _not_counted(shape: ModelShape, serving: Serving) -> Iterator[str]:
    """Runtimes know more words than there are figures for."""
    if not counts_dtype(serving.dtype):
        yield f"dtype: {serving.dtype} is not known here and counts as 16 bits"
    if not counts_quantization(shape, serving.quantization):
        yield (
            f"quantization: {serving.quantization} counts for nothing: its files are not quantised, and how it would "
            "load them is not known here"
        )
    for name in dict.fromkeys((serving.kv_dtype, serving.value_dtype)):
        if not known_dtype(name):
            yield f"the type {name} of its cache is not known here and counts as 16 bits"


def _activations(shape: ModelShape, serving: Serving) -> Term:
    assert serving.max_model_len is not None
    batch = Batch(
        speaks=serving.kind == "llm",
        max_num_seqs=serving.max_num_seqs,
        max_num_batched_tokens=serving.max_num_batched_tokens,
        max_model_len=serving.max_model_len,
        tensor_parallel=serving.tensor_parallel,
        stages=serving.tensor_parallel * serving.pipeline_parallel,
        number_bytes=4 if serving.dtype in ("float32", "float") else 2,
    )
    peak = {"llama.cpp": llama_cpp_activations, "tei": tei_activations}.get(serving.runtime, torch_activations)
    memory_bytes, why = peak(shape, batch)
    return Term(name="activations", memory_bytes=memory_bytes, why=why)


def _overheads(serving: Serving) -> tuple[Term, ...]:
    several = serving.tensor_parallel * serving.pipeline_parallel > 1
    budgeted = serving.runtime in ("vllm", "sglang")
    counted = "several devices" if several else "one device"
    context = Term(
        name="cuda_context",
        memory_bytes=context_bytes(serving.tensor_parallel * serving.pipeline_parallel if budgeted else 1),
        why="the CUDA context, which no budget of an engine counts" if budgeted else "the CUDA context",
        in_budget=False,
    )
    if not budgeted:
        return (context,)
    return (
        Term(
            name="non_torch",
            memory_bytes=_NON_TORCH_SEVERAL_BYTES if several else _NON_TORCH_BYTES,
            why=f"workspaces outside PyTorch, as logs with {counted} have them",
        ),
        Term(
            name="cuda_graphs",
            memory_bytes=0 if serving.enforce_eager else _CUDA_GRAPH_BYTES,
            why="captured CUDA graphs, the median of published logs",
        ),
        context,
    )


def _margins(shape: ModelShape, serving: Serving, weights: int) -> tuple[Term, ...]:
    """A margin for what the formulas are known to count too low by more than 5%."""
    padded = any(part.storage == "mxfp4" and part.role == "experts" for part in shape.parts)
    if padded and serving.tensor_parallel >= _MARGIN_FROM_DEVICES and serving.runtime == "vllm":
        why = "mxfp4 experts on eight devices took 17% more in the one log there is than their padding explains"
        return (Term(name="margin", memory_bytes=round(weights * _PADDED_EXPERTS_MARGIN), why=why),)
    if not shape.known and shape.basis == "config":
        why = f'no model of the family "{shape.family}" was compared with a measurement'
        return (Term(name="margin", memory_bytes=round(weights * _UNKNOWN_FAMILY_MARGIN), why=why),)
    return ()


def _slack(serving: Serving, terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """What a cache that is cut to fit must not lose to an error of the formulas."""
    if serving.runtime not in ("vllm", "sglang"):
        return ()
    counted = sum(term.memory_bytes for term in terms if term.name in ("weights", "activations", "non_torch"))
    why = "5% of what is not cache: formulas err, and without room for one sequence the engine does not start"
    return (Term(name="slack", memory_bytes=round(counted * _SLACK), why=why),)


# The table of the control plane that sage replaces: GB for one device.
_NAMED_GB = (
    ("qwen2.5-0.5b", 6.0),
    ("qwen2.5-1.5b", 10.0),
    ("qwen2.5-7b", 18.0),
    ("qwen2.5-14b", 36.0),
    ("llama3.1-8b", 20.0),
    ("llama3.1-70b", 160.0),
    ("mixtral-8x7b", 64.0),
)
_BILLIONS = re.compile(r"(\d+(\.\d+)?)\s*b", re.ASCII)
_LONGEST_NAME = 1024


def by_name(model: str, tensor_parallel: int, pipeline_parallel: int) -> int:
    """Bytes per device by the model's name alone: the last resort, for a model that cannot be looked into.

    The rule of the control plane that sage replaces: a table, else 2.5 GB for each billion that the name tells, else
    16 GB; divided over the devices, and 4 GB on top. Its GB are GiB.
    """
    name = model.lower()[:_LONGEST_NAME]
    base = next((size for hint, size in _NAMED_GB if hint in name), None)
    if base is None:
        found = _BILLIONS.search(name)
        # A number of hundreds of digits is no size.
        billions = float(found[1]) if found is not None else math.inf
        base = max(4.0, billions * 2.5) if math.isfinite(billions) else 16.0
    devices = max(1, tensor_parallel) * max(1, pipeline_parallel)
    return round(round(max(base / devices + 4.0, 4.0), 2) * GIB)
