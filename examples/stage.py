"""What the demos share: commands as a user would give them, told before they run and checked after."""

import socket
import subprocess
import sys
from pathlib import Path

SAGE = Path(sys.executable).with_name("sage")


def sage(*words: str, expected: int = 0) -> None:
    """Run a command as a user would, and check its exit code."""
    say(f"sage {' '.join(words)}")
    code = subprocess.run([SAGE, *words], check=False).returncode
    if expected:
        print(f"  exit code {code}")
    expect(code == expected, f"exit code {expected}, not {code}")


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def edit(manifest: Path, old: str, new: str) -> None:
    say(f"edit {manifest.name}: {old}  ->  {' + '.join(line.strip() for line in new.splitlines())}")
    text = manifest.read_text()
    expect(old in text, f"{old} in the manifest")
    manifest.write_text(text.replace(old, new, 1))


def title(number: int, text: str) -> None:
    print(f"\n{'─' * 100}\n{number}. {text}", flush=True)


def say(text: str) -> None:
    print(f"\n$ {text}" if not text.startswith("That") else f"\n{text}", flush=True)


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"demo: expected {what}")
