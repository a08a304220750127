"""Sizes, durations and port pools: from the words of a manifest to bytes, seconds and port numbers, and back."""

import re
from collections.abc import Iterator

# IEC units mean powers of 1024 and SI units powers of 1000, as IEC 80000-13 has it.
_BYTES_PER_UNIT = {
    "B": 1,
    "KiB": 1024,
    "MiB": 1024**2,
    "GiB": 1024**3,
    "TiB": 1024**4,
    "KB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "TB": 1000**4,
}
_SECONDS_PER_UNIT = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s?([KMGT]i?B|B)", re.ASCII)
_NEARLY_A_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*([kmgt](?:i?b?)|%|)", re.ASCII | re.IGNORECASE)
_DURATION_PART = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)(ms|s|m|h|d)", re.ASCII)

# Ports below 1024 need a privilege that engines do not get.
LOWEST_PORT = 1024
HIGHEST_PORT = 65535

# A week: nothing that sage waits for takes longer, and a typo such as 30000h should be told.
LONGEST_DURATION_SECONDS = 7 * 86400.0


def bytes_of(text: str) -> int:
    """Bytes in a size such as "24GiB", "512 MiB" or "80GB".

    Raises ValueError with a sentence for the user.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f'"{text}" is not a size; write a number and a unit, such as "24GiB" or "512MiB"')
    amount = float(found[1]) * _BYTES_PER_UNIT[found[2]]
    if amount < 1:
        raise ValueError(f'"{text}" is no memory at all')
    return int(amount)


def size_meant(text: str, *, or_fraction: bool) -> str:
    """What to write for a size, or a fraction where one may stand, that misses its unit or spells it otherwise.

    Empty when nobody can tell, or when it is nothing.

    >>> size_meant("40gib", or_fraction=False), size_meant("70%", or_fraction=True), size_meant("16", or_fraction=True)
    ('"40GiB"', '0.7', '"16GiB"')
    """
    found = _NEARLY_A_SIZE.fullmatch(text.strip())
    if found is None or float(found[1]) == 0:
        return ""
    amount, unit = found[1], found[2].lower()
    if unit == "%":
        return f"{float(amount) / 100:g}" if or_fraction and float(amount) <= 100 else ""
    if unit:
        return f'"{amount}{unit[0].upper()}{"B" if unit[1:] == "b" else "iB"}"'
    if float(amount) < 1:
        return amount if or_fraction else ""
    return f'"{amount}GiB"'


def size_text(size: int) -> str:
    """A size as a person would have written it: in the largest unit that has no more than one decimal."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        tenths, rest = divmod(10 * size, _BYTES_PER_UNIT[unit])
        if tenths and not rest:
            return f"{tenths / 10:g}{unit}"
    return f"{size}B"


def seconds_of(written: str | int | float) -> float:
    """Seconds in a duration such as "30s", "1m30s" or "250ms"; a bare number is in seconds.

    Raises ValueError with a sentence for the user.
    """
    if isinstance(written, str):
        parts = _DURATION_PART.findall(written)
        if not parts or "".join(number + unit for number, unit in parts) != written:
            raise ValueError(f'"{written}" is not a duration; write a number and a unit, such as "30s", "5m" or "1h"')
        seconds = sum(float(number) * _SECONDS_PER_UNIT[unit] for number, unit in parts)
    else:
        seconds = float(written)
    if not 0 <= seconds <= LONGEST_DURATION_SECONDS:
        raise ValueError(f"{written} is not between 0 and 7 days")
    return seconds


def ports_of(text: str) -> tuple[int, ...]:
    """Ports in a pool such as "8001,8901,8900-8999": in the order written, each once.

    Raises ValueError with a sentence for the user.
    """
    return tuple(dict.fromkeys(_ports(text)))


def _ports(text: str) -> Iterator[int]:
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,5})(?:\s*-\s*(\d{1,5}))?\s*", part, re.ASCII)
        if found is None:
            raise ValueError(f'"{part.strip()}" is not a port or a range of ports such as 8900-8999')
        first, last = int(found[1]), int(found[2] or found[1])
        if not LOWEST_PORT <= first <= last <= HIGHEST_PORT:
            raise ValueError(f'"{part.strip()}" is not a range within {LOWEST_PORT}-{HIGHEST_PORT}')
        yield from range(first, last + 1)


def gib(size: float) -> str:
    """Bytes in GiB, as tables and sentences have them: "38.1"."""
    return f"{size / _BYTES_PER_UNIT['GiB']:.1f}"


def duration_text(seconds: float) -> str:
    """A duration for a person: "12s", "3m05s", "2h07m", "4d02h"."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
