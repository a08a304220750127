"""A JSON object on one line that shows when it was damaged: text in, sealed text out, and back. Values only.

The seal is the last field, `"crc32"`: of the line without it (ISO 3309, as zlib and gzip compute it). A line stays a
JSON object that any program reads. This form is kept by every later version, so that a newer one can be told from a
damaged one.
"""

import json
import zlib
from typing import Any

_SEAL = ',"crc32":"'


def sealed(text: str) -> str:
    """A JSON object (`{...}`, not empty, on one line) with its seal."""
    assert text.startswith("{") and text.endswith("}") and "\n" not in text
    return f'{text[:-1]}{_SEAL}{_crc32(text)}"}}'


def unsealed(line: str | bytes) -> dict[str, Any] | None:
    """The object without its seal; None when it is none, or is not as it was written."""
    try:
        text = line.decode() if isinstance(line, bytes) else line
        body, found, seal = text.rpartition(_SEAL)
        body += "}"
        if not found or seal != f'{_crc32(body)}"}}':
            return None
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _crc32(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
