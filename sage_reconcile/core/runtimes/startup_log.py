"""What engines say of their memory while they start: lines of a log in, bytes out. Pure, and safe with any text.

A line counts only with the head that its logger writes: a prompt that is logged may say anything. Figures differ by
device; that of the device with the least room counts. "GB" is GiB in all these logs.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

# Whatever an engine says of its memory, it says before it is ready.
MOST_LINES = 2000
_LONGEST_LINE = 2000

_MIB, _GIB = 1024**2, 1024**3
_SIZE = r"(\d{1,6}(?:\.\d{1,6})?)"
# Colours, which a logger may write into a file too.
_COLOUR = re.compile(r"\x1b\[[\d;]{0,20}m", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedFootprint:
    """What an engine's log says that it took of a device; 0 where it does not say."""

    weights_bytes: int = 0
    kv_cache_bytes: int = 0
    graphs_bytes: int = 0
    # The tokens that the cache holds.
    kv_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Saying:
    """A line that says something. The group `who` names the device or its process, the others are figures to be added.

    A device that says it again says more where parts `add`, and the same once more where they do not.
    """

    pattern: re.Pattern[str]
    unit: int = _GIB
    # Of several devices, the figure of which counts.
    pick: Callable[[Iterable[int]], int] = max
    adds: bool = False


def _said(head: str, *texts: str) -> re.Pattern[str]:
    return re.compile(head + "(?:" + "|".join(texts) + ")", re.ASCII)


# "INFO 01-30 03:18:12 gpu_model_runner.py:848] ", "(Worker_TP0 pid=9) INFO 05-06 20:59:59 [gpu_model_runner.py:4879] "
_VLLM_HEAD = r"(?P<who>(?:\([^()]{1,80}\) ?)*)(?:INFO|DEBUG|WARNING) \S{1,20} \S{1,20} \[?[\w./]{1,200}:\d{1,6}\] "
_VLLM = {
    "weights_bytes": _Saying(
        pattern=_said(_VLLM_HEAD, rf"Model loading took {_SIZE} Gi?B", rf"Loading model weights took {_SIZE} Gi?B"),
    ),
    "kv_cache_bytes": _Saying(
        pattern=_said(
            _VLLM_HEAD,
            rf"Available KV cache memory: {_SIZE} GiB",
            rf"model weights take .{{1,200}} reserved for KV Cache is {_SIZE}GiB",
            rf"available_kv_cache_memory\s+{_SIZE}GiB",
        ),
        pick=min,
    ),
    "graphs_bytes": _Saying(pattern=_said(_VLLM_HEAD, rf"Graph capturing finished in \d+ secs, took {_SIZE} GiB")),
    "kv_tokens": _Saying(pattern=_said(_VLLM_HEAD, r"GPU KV cache size: ([\d,]{1,20}) tokens"), unit=1, pick=min),
}

# "[2025-03-27 21:33:30 TP0] "
_SGLANG_HEAD = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?P<who>[ \w]{0,40})\] "
_SGLANG = {
    "weights_bytes": _Saying(
        pattern=_said(_SGLANG_HEAD, rf"Load weight end\..{{1,200}} mem usage={_SIZE} GB"),
    ),
    "kv_cache_bytes": _Saying(
        pattern=_said(
            _SGLANG_HEAD,
            rf"KV Cache is allocated\..{{1,100}}K size: {_SIZE} GB, V size: {_SIZE} GB",
            rf"KV Cache is allocated\..{{1,100}}KV size: {_SIZE} GB",
        ),
        pick=min,
        # A model with windows has a cache for them beside the other.
        adds=True,
    ),
    "graphs_bytes": _Saying(pattern=_said(_SGLANG_HEAD, rf"Capture cuda graph end\..{{1,100}} mem usage={_SIZE} GB")),
    "kv_tokens": _Saying(pattern=_said(_SGLANG_HEAD, r"max_total_num_tokens=(\d{1,15}),"), unit=1, pick=min),
}

# "load_tensors:        CUDA0 model buffer size =  4403.49 MiB"; a time and a level may stand before it.
_LLAMA_HEAD = r"(?:[\d.]{1,20} \w )?\w{1,60}: +"
_LLAMA_DEVICE = r"(?P<who>[A-Za-z]{1,20}\d{1,3})"
_LLAMA_CPP = {
    "weights_bytes": _Saying(
        pattern=_said(rf"{_LLAMA_HEAD}{_LLAMA_DEVICE}", rf" (?:model )?buffer size = +{_SIZE} MiB"),
        unit=_MIB,
        adds=True,
    ),
    "kv_cache_bytes": _Saying(
        pattern=_said(rf"{_LLAMA_HEAD}{_LLAMA_DEVICE}", rf" KV buffer size = +{_SIZE} MiB"), unit=_MIB, adds=True
    ),
    "kv_tokens": _Saying(pattern=_said(rf"{_LLAMA_HEAD}(?P<who>)", r"n_ctx += +(\d{1,12})$"), unit=1),
}


def vllm_log(lines: Iterable[str]) -> LoggedFootprint | None:
    """Versions 0.4 to 0.24; None when it says nothing of memory."""
    return _read(lines, _VLLM)


def sglang_log(lines: Iterable[str]) -> LoggedFootprint | None:
    """Versions 0.4 to 0.5; None when it says nothing of memory."""
    return _read(lines, _SGLANG)


def llama_cpp_log(lines: Iterable[str]) -> LoggedFootprint | None:
    """Builds of 2024 to 2026; None when it says nothing of the memory of GPUs."""
    return _read(lines, _LLAMA_CPP)


def any_log(lines: Iterable[str]) -> LoggedFootprint | None:
    """For a program of which nobody knows what it is: it may speak as one of those that are known."""
    kept = list(islice(lines, MOST_LINES))
    return vllm_log(kept) or sglang_log(kept) or llama_cpp_log(kept)


def no_log(_lines: Iterable[str]) -> LoggedFootprint | None:
    """For a program that says nothing of its memory."""
    return None


def _read(lines: Iterable[str], sayings: dict[str, _Saying]) -> LoggedFootprint | None:
    """The figures of each device first; then, of each figure, the one that counts."""
    figures: dict[str, dict[str, int]] = {name: {} for name in sayings}
    for line in islice(lines, MOST_LINES):
        text = _COLOUR.sub("", line[:_LONGEST_LINE])
        for name, saying in sayings.items():
            found = saying.pattern.match(text)
            if found is not None:
                earlier = figures[name].get(found["who"], 0) if saying.adds else 0
                figures[name][found["who"]] = earlier + _size(found, saying.unit)
    picked = {name: sayings[name].pick(said.values()) for name, said in figures.items() if said}
    # How many tokens fit says nothing of bytes.
    return LoggedFootprint(**picked) if picked.keys() - {"kv_tokens"} else None


def _size(found: re.Match[str], unit: int) -> int:
    """The sum of the numbers in a line."""
    # The first group names the device.
    numbers = [text.replace(",", "") for text in found.groups()[1:] if text is not None]
    return round(sum(float(number or 0) for number in numbers) * unit)
