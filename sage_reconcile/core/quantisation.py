"""How a checkpoint is quantised, from its config: bits per weight, and the modules that were left at 16 bits."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

from sage_reconcile.core.config_keys import Keys

# Patterns longer than these, or more of them, are not what a person or a tool wrote.
_LONGEST_PATTERN = 200
_MOST_PATTERNS = 64
_MOST_MODULES = 20_000
_MOST_ALTERNATIVES = 32

# Under what the methods list modules that they left at 16 bits.
_LEFT = (
    "ignore", "exclude_modules", "modules_to_not_convert", "ignored_layers", "llm_int8_skip_modules", "exclude",
)  # fmt: skip

_CHOICE = re.compile(r"\(\??:?([\w|.\\-]*)\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """How the linear layers of a checkpoint are stored."""

    # awq, gptq, fp8, mxfp4, nvfp4, bitsandbytes, ...
    method: str
    # Bits per weight with the scales that go with them.
    bits: float
    # Bits per weight of experts, where they differ.
    expert_bits: float
    experts_only: bool
    # Modules left at 16 bits: whole names, or runs of their parts.
    modules: frozenset[str]
    # The same with "*".
    patterns: tuple[str, ...]

    def leaves(self, module: str) -> bool:
        """Whether a module, such as model.layers.0.self_attn.o_proj, is left at 16 bits."""
        parts = module.split(".")
        runs = (".".join(parts[first:last]) for first in range(len(parts)) for last in range(first + 1, len(parts) + 1))
        return any(run in self.modules for run in runs) or any(
            fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*") for pattern in self.patterns
        )


def quantisation_of(config: Mapping[str, Any]) -> Quantisation | None:
    """None: the weights are stored as numbers of 16 or 32 bits."""
    keys = _said(Keys(values=config))
    method = (keys.text("quant_method") or keys.text("quant_algo")).lower()
    if not method:
        return None
    name, bits = _bits(keys, method)
    ignored = [entry for key in _LEFT for entry in _texts(keys.values.get(key))]
    modules, patterns = _split(ignored)
    # DeepSeek-V4 keeps its experts in 4 bits below an fp8 checkpoint.
    expert_bits = 4.25 if Keys(values=config).text("expert_dtype") == "fp4" else bits
    return Quantisation(
        method=name,
        bits=bits,
        expert_bits=expert_bits,
        experts_only=name == "mxfp4" and not ignored,
        modules=modules,
        patterns=patterns,
    )


def _said(config: Keys) -> Keys:
    """What a config says of it: a model with towers may say it of its text model alone, as Kimi K2.5 does."""
    texts = (config.below(name) for name in ("text_config", "llm_config", "language_config"))
    places = (
        holder.below(name) for holder in (config, *texts) for name in ("quantization_config", "compression_config")
    )
    return next((place for place in places if place.values), Keys(values={}))


def _bits(keys: Keys, method: str) -> tuple[str, float]:
    """The method by its plain name, and bits per weight."""
    if method in ("awq", "gptq", "gptq_marlin", "awq_marlin", "auto-round", "auto_round"):
        return method.split("_marlin")[0], _grouped(keys.whole("bits", "w_bit", default=4), keys.whole("group_size"))
    if method == "bitsandbytes":
        # 4 bits, and an absolute maximum in 32 bits for 64 weights: vLLM from 0.9 on unpacks maxima that were quantised
        # themselves, which older ones kept at 4.127 bits per weight in all.
        return method, 4.5 if keys.flag("load_in_4bit", default=not keys.flag("load_in_8bit")) else 8.0
    if method in ("fp8", "fbgemm_fp8"):
        return "fp8", 8.0
    if method == "mxfp4":
        # OCP microscaling: 4 bits, and a scale of 8 bits for 32 weights.
        return method, 4.25
    if method == "compressed-tensors":
        return _compressed(keys)
    if method.startswith("modelopt") or method in ("nvfp4", "fp8_pb_wo"):
        algorithm = (keys.text("quant_algo") or keys.below("quantization").text("quant_algo") or method).lower()
        # NVFP4: 4 bits, and a scale of 8 bits for 16 weights.
        return ("nvfp4", 4.5) if "fp4" in algorithm else ("fp8", 8.0)
    if method == "aqlm":
        return method, _aqlm_bits(keys)
    if method == "exl3":
        return method, keys.fraction("bits", 16.0)
    if method == "quark":
        return _quark(keys.below("global_quant_config").below("weight"))
    if method == "hqq":
        weights = keys.below("quant_config").below("weight_quant_params")
        return method, _grouped(weights.whole("nbits", default=4), weights.whole("group_size", default=64))
    return method, float(keys.whole("bits", "w_bit", default=16))


def _grouped(bits: int, group: int) -> float:
    """Each group of weights has a scale of 16 bits and a zero point of as many bits as a weight."""
    bits = bits if 1 <= bits <= 16 else 4
    return bits + (16 + bits) / (group or 128)


def _quark(weights: Keys) -> tuple[str, float]:
    """AMD's: fp8_e4m3, fp4 (with a scale of 8 bits for 32), int4, int8."""
    dtype, group = weights.text("dtype"), weights.whole("group_size")
    if dtype.startswith("fp8"):
        return "fp8", 8.0
    if dtype.startswith("fp4"):
        return "quark", 4.25
    return "quark", {"int4": _grouped(4, group), "uint4": _grouped(4, group), "int8": 8.0}.get(dtype, 16.0)


def _compressed(keys: Keys) -> tuple[str, float]:
    groups = keys.below("config_groups").values
    first = next((group for group in groups.values() if isinstance(group, Mapping)), {})
    weights = Keys(values=first).below("weights")
    bits, group = weights.whole("num_bits", default=8), weights.whole("group_size")
    form = keys.text("format") or Keys(values=first).text("format")
    if "nvfp4" in form:
        return "nvfp4", 4.5
    if bits >= 8 or weights.text("type") == "float":
        return ("fp8" if weights.text("type") == "float" else "int8"), float(max(bits, 8))
    # Symmetric groups have no zero point.
    zero = 0 if weights.flag("symmetric", default=True) else bits
    return f"int{bits}", bits + (16 + zero) / (group or 128)


def _aqlm_bits(keys: Keys) -> float:
    """Codes of `nbits_per_codebook` bits for groups of weights; the code books themselves are counted by the layer."""
    group = keys.whole("in_group_size", default=8) * keys.whole("out_group_size", default=1)
    return keys.whole("num_codebooks", default=1) * keys.whole("nbits_per_codebook", default=16) / max(1, group)


def _texts(value: Any) -> list[str]:
    entries = value if isinstance(value, list | tuple) else []
    return [entry for entry in entries[:_MOST_MODULES] if isinstance(entry, str) and len(entry) <= _LONGEST_PATTERN]


def _split(ignored: list[str]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Whole module names, and patterns with "*"."""
    modules, patterns = [], []
    for entry in ignored:
        name = entry.replace("model.language_model.", "model.").replace("language_model.model.", "model.")
        if name.startswith("re:"):
            patterns += _globs(name.removeprefix("re:"))
        elif "*" in name:
            patterns.append(name)
        else:
            modules.append(name.rstrip("."))
    return frozenset(modules), tuple(patterns[:_MOST_PATTERNS])


def _globs(expression: str) -> list[str]:
    """The regular expressions that such lists hold, as patterns with "*".

    They come with the model, and running a stranger's regular expression can take forever; what is more than names,
    wildcards and a choice of names therefore matches nothing.
    """
    parts = _CHOICE.split(expression)
    choices = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > _MOST_ALTERNATIVES:
        return []
    return [glob for words in product(*choices) if (glob := _glob("".join(words)))]


def _glob(expression: str) -> str:
    """An expression matches from the start of a name (re.match), and needs not reach its end."""
    plain = expression.strip("^$").replace("\\d+", "*").replace(".*", "*").replace("\\.", ".")
    if not re.fullmatch(r"[\w.*-]+", plain):
        return ""
    return plain + ("" if expression.endswith("$") else "*")
