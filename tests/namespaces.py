"""Namespaces (namespaces(7)) and lesser privileges, for what a test may not do to the machine itself.

A function of a test module runs inside as a program of its own; what it asserts, the test asserts. Where the kernel
lets this user make no such namespace, the test is skipped with that reason.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

_FLAGS = {"pid": ("--pid", "--fork", "--kill-child", "--mount-proc"), "mount": ("--mount",)}
_AS_ROOT_OF_ITS_OWN = ("--user", "--map-root-user")

_PR_CAPBSET_DROP = 24  # include/uapi/linux/prctl.h
# include/uapi/linux/capability.h
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_NET_BIND_SERVICE, CAP_SYS_PTRACE = 1, 2, 10, 19


@lru_cache
def words(*kinds: str) -> tuple[str, ...]:
    """The command that runs another one in new namespaces of these kinds; empty when this user may not."""
    flags = tuple(flag for kind in kinds for flag in _FLAGS[kind])
    for more in ((), _AS_ROOT_OF_ITS_OWN):
        command = ("unshare", *more, *flags)
        try:
            done = subprocess.run([*command, "true"], capture_output=True, check=False)
        except FileNotFoundError:
            return ()
        if done.returncode == 0:
            return command
    return ()


def inside(kinds: tuple[str, ...], function: Callable[..., None], *arguments: str, seconds: float = 90.0) -> str:
    """Run a function of a module, with texts as arguments, in new namespaces; what it printed.

    With "pid" the function's process is PID 1 there, and reaps nobody that it does not wait for. Whatever it leaves
    running is killed with it. Fails with its output when it fails.
    """
    command = words(*kinds)
    if not command:
        pytest.skip(f"this user may not make {' and '.join(kinds)} namespaces here")
    call = f"from {function.__module__} import {function.__name__} as f; import sys; f(*sys.argv[1:])"
    done = subprocess.run(
        [*command, sys.executable, "-c", call, *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def mount(*arguments: str) -> None:
    """mount(8), inside a mount namespace."""
    subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)


def without(*capabilities: int) -> Callable[[], None]:
    """For `before` of a command: root without these capabilities, as any other user is."""
    libc = ctypes.CDLL(None, use_errno=True)

    def drop() -> None:
        for capability in capabilities if os.getuid() == 0 else ():
            if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
                raise OSError(ctypes.get_errno(), "prctl(PR_CAPBSET_DROP)")

    return drop
