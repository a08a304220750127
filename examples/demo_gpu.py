"""GPUs without a GPU: a full one that is avoided, a refusal with numbers, a crash that is healed where it happened.

The two GPUs are made up: tests/fakenvml/ stands in for the driver's library, and tests/fake_engine.py for an engine
that takes memory. Everything else is what runs on a machine with GPUs. State and manifests are in a directory of their
own.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stage import SAGE, expect, sage, say, title

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import fakenvml  # noqa: E402 (found below the directory that was just added)

# What the worst day of the control plane before sage looked like: GPU 0 held by somebody else, and chosen all the same.
FOREIGN_MIB = 58_169
# How long the driver takes to free the memory of the dead.
FREED_AFTER_SECONDS = 8


def main() -> None:
    """The five steps, each checked: the demo fails where sage would."""
    with tempfile.TemporaryDirectory(prefix="sage-demo-gpu-") as name:
        place = Path(name)
        gpus = place / "gpus"
        fakenvml.write_state(gpus, fakenvml.Gpu(index=0), fakenvml.Gpu(index=1))
        os.environ |= fakenvml.environment(fakenvml.library(), gpus) | {"SAGE_STATE_DIR": str(place / "state")}
        os.chdir(place)
        Path("manifests").mkdir()
        settings = {"project": "demo-gpu", "ports": {"llm": "8901-8999"}}
        Path("manifests/sage.yaml").write_text(json.dumps(settings))
        try:
            with stranger(gpus):
                show_the_machine()
                place_on_the_free_one(gpus)
                refuse(gpus)
                heal(gpus)
                stop(gpus)
        finally:
            subprocess.run([SAGE, "down", "-y", "manifests/"], capture_output=True, check=False)
    say("That was sage on GPUs. The same with your own: docs/gpus.md")


def show_the_machine() -> None:
    title(1, "Two GPUs, and somebody else's process has most of the first")
    sage("gpu")


def place_on_the_free_one(gpus: Path) -> None:
    title(2, "An engine that wants 0.7 of a GPU goes where there is room, and sees that GPU alone")
    write(engine("chat", gpus, 57_000, gpu_memory=0.7))
    say("cat manifests/lab.yaml   # gpu_memory: 0.7")
    sage("apply", "-y")
    seen = environment(running("chat"))["CUDA_VISIBLE_DEVICES"]
    print(f"\n  its CUDA_VISIBLE_DEVICES is {seen}")
    expect(seen == fakenvml.gpu_uuid(1), "GPU 1 and no other")


def refuse(gpus: Path) -> None:
    title(3, "One more that fits nowhere is refused, with what is missing, who has it and what would help")
    before = running("chat")
    write(engine("chat", gpus, 57_000, gpu_memory=0.7), engine("big", gpus, 40_960))
    sage("apply", "-y", expected=4)
    expect(running("chat") == before, "nothing was touched")
    write(engine("chat", gpus, 57_000, gpu_memory=0.7))


def heal(gpus: Path) -> None:
    title(4, "The engine is killed, and the driver takes a while to free its memory: sage waits for that")
    leader = running("chat")
    say(f"kill -9 {leader}")
    os.kill(leader, signal.SIGKILL)
    until_gone(leader)
    sage("gpu")
    sage("plan")
    sage("apply", "-y")
    expect(environment(running("chat"))["CUDA_VISIBLE_DEVICES"] == fakenvml.gpu_uuid(1), "the same GPU")


def stop(gpus: Path) -> None:
    title(5, "Stopped means that the memory is back")
    sage("down", "-y", "manifests/")
    sage("gpu")
    used = fakenvml.memory(gpus, 1).used_mib
    expect(used == 0, f"nothing on GPU 1, and not {used} MiB")


# --- beneath ----------------------------------------------------------------------------------------------------------


def engine(name: str, gpus: Path, mib: int, **fields: object) -> dict[str, object]:
    """An engine of a manifest that takes so much memory, and whose memory comes back a while after its death."""
    command = [sys.executable, str(ROOT / "tests" / "fake_engine.py"), "--port", "{port}", "--model", "{model}"]
    command += ["--fake-nvml", str(gpus), "--gpu-memory", str(mib), "--memory-lingers", str(FREED_AFTER_SECONDS)]
    update = {"grace": "2s", "drain": "1s"}
    return {
        "name": name,
        "model": f"{name}-model",
        "runtime": "command",
        "command": command,
        "gpu_memory": f"{mib}MiB",
        "update": update,
        **fields,
    }


def write(*engines: dict[str, object]) -> None:
    """The one manifest. JSON is YAML."""
    Path("manifests/lab.yaml").write_text(json.dumps({"version": 1, "name": "lab", "engines": engines}, indent=1))


@contextmanager
def stranger(gpus: Path) -> Iterator[None]:
    """Somebody else's process, which holds memory of GPU 0."""
    with subprocess.Popen(["sleep", "600"]) as process:
        fakenvml.claim(gpus, fakenvml.gpu_uuid(0), process.pid, FOREIGN_MIB)
        try:
            yield
        finally:
            process.kill()


def running(name: str) -> int:
    """The pid of an engine of the demo, as `sage status -o json` has it."""
    found = json.loads(subprocess.run([SAGE, "status", "-o", "json"], capture_output=True, check=True).stdout)
    return next(int(row["pid"]) for row in found["engines"] if row["name"] == name and row["project"] == "demo-gpu")


def environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def until_gone(pid: int) -> None:
    """The engine is no child of ours: whoever reaps it may take a moment."""
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/exe").exists():
        expect(time.monotonic() < deadline, f"pid {pid} to end")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
