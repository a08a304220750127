"""The old and the new value of a field, as people write them; of long ones, what differs."""

import json
import os
import re
from difflib import SequenceMatcher

from sage_reconcile.core.quantities import size_text

# What was written as 40GiB is carried as its bytes.
_SIZE = re.compile(r'"(\d{1,18})B"', re.ASCII)

# Longer values are cut: the manifest has them in full.
_VALUE_WIDTH = 60

# As much of what is the same stands before the first letter that differs.
_COMMON_WIDTH = 16

# As much of a list in which nearly all differs.
_LIST_WIDTH = 5 * _VALUE_WIDTH


def change_values(old: str, new: str) -> tuple[str, str]:
    """Both values of a change, from JSON texts.

    >>> change_values('["/opt/engines/bin/serve","--listen","127.0.0.1:9000","-n","2"]', '["/opt/x","-n","3"]')[1]
    '["/opt/x", "-n", "3"]'
    """
    before, after = json.loads(old), json.loads(new)
    if isinstance(before, list) and isinstance(after, list) and max(len(old), len(new)) > _VALUE_WIDTH:
        return _lists([json.dumps(word, ensure_ascii=False) for word in before],
                      [json.dumps(word, ensure_ascii=False) for word in after])  # fmt: skip
    return _cut(_value(old), _value(new))


def _value(text: str) -> str:
    if json.loads(text) is None:
        return "(unset)"
    size = _SIZE.fullmatch(text)
    return f'"{size_text(int(size[1]))}"' if size else text


def _lists(before: list[str], after: list[str]) -> tuple[str, str]:
    """The words that differ, each run of them with the option before it; "…" stands for words that are the same."""
    old: list[str] = []
    new: list[str] = []
    for tag, start, end, new_start, new_end in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if tag == "equal":
            option = [_cut(before[end - 1], "")[0]] if before[end - 1].startswith('"-') and end < len(before) else []
            same = (["…"] if end - start > len(option) else []) + option
            old, new = old + same, new + same
            continue
        pairs = [_cut(*pair) for pair in zip(before[start:end], after[new_start:new_end], strict=False)]
        old += [*(word for word, _ in pairs), *(_cut(word, "")[0] for word in before[start + len(pairs) : end])]
        new += [*(word for _, word in pairs), *(_cut("", word)[1] for word in after[new_start + len(pairs) : new_end])]
    return _shortened(f"[{', '.join(old)}]", _LIST_WIDTH), _shortened(f"[{', '.join(new)}]", _LIST_WIDTH)


def _cut(old: str, new: str) -> tuple[str, str]:
    """Both texts with what differs between them in view."""
    same = len(os.path.commonprefix([old, new]))
    begin = same - _COMMON_WIDTH if same > _VALUE_WIDTH - _COMMON_WIDTH and old and new else 0
    if max(len(old), len(new)) <= _VALUE_WIDTH or begin <= 0:
        return _shortened(old, _VALUE_WIDTH), _shortened(new, _VALUE_WIDTH)
    return _shortened(f"…{old[begin:]}", _VALUE_WIDTH), _shortened(f"…{new[begin:]}", _VALUE_WIDTH)


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[:width]}…"
