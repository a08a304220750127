"""Where the tools of the Hugging Face hub keep things, and what they were told of it.

As huggingface_hub finds them (https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables).
"""

import os
import re
from collections.abc import Mapping

from sage_reconcile.world.header_files import BadFile, HeaderFile

_LONGEST_TOKEN_BYTES = 4096
_TOKEN = re.compile(r"[!-~]+", re.ASCII)
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?", re.ASCII)


def home_path(path: str, environment: Mapping[str, str]) -> str:
    """A path with ~/ in it made whole."""
    return os.path.join(environment.get("HOME", "/"), path[2:]) if path.startswith("~/") else path


def is_hub_id(model: str) -> bool:
    """Whether this can be the id of a model on the hub."""
    return _HUB_ID.fullmatch(model) is not None and ".." not in model


def hub_cache(environment: Mapping[str, str]) -> str:
    """The directory of the hub's cache."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(name):
            return home_path(environment[name], environment)
    return os.path.join(_hub_home(environment), "hub")


def hub_token(environment: Mapping[str, str]) -> str:
    """The user's token; empty without one, and where it may not be sent unasked."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if environment.get(name):
            return _sound(environment[name])
    if _is_on(environment.get("HF_HUB_DISABLE_IMPLICIT_TOKEN")):
        return ""
    path = environment.get("HF_TOKEN_PATH") or os.path.join(_hub_home(environment), "token")
    try:
        with HeaderFile(home_path(path, environment)) as file:
            return _sound(file.read(min(file.size_bytes, _LONGEST_TOKEN_BYTES), offset=0).decode("ascii", "replace"))
    except BadFile:
        return ""


def why_offline(environment: Mapping[str, str]) -> str:
    """The variable that forbids to ask the hub; empty when none does."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if _is_on(environment.get(name))), "")


def _hub_home(environment: Mapping[str, str]) -> str:
    if environment.get("HF_HOME"):
        return home_path(environment["HF_HOME"], environment)
    caches = environment.get("XDG_CACHE_HOME") or os.path.join(environment.get("HOME", "/"), ".cache")
    return os.path.join(caches, "huggingface")


def _sound(token: str) -> str:
    return token.strip() if _TOKEN.fullmatch(token.strip()) else ""


def _is_on(value: str | None) -> bool:
    return (value or "").upper() in ("1", "ON", "YES", "TRUE")
