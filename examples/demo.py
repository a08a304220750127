"""What sage is for, in a minute: real llama.cpp engines, a router, a crash, a bad change, and nothing left at the end.

Runs on a copy of manifests/ with a state directory of its own, so it changes nothing of yours.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from stage import SAGE, edit, expect, free_port, listens, sage, say, title

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """The six steps, each checked: the demo fails where sage would."""
    with tempfile.TemporaryDirectory(prefix="sage-demo-") as name:
        place = Path(name)
        shutil.copytree(ROOT / "manifests", place / "manifests")
        (place / ".models").symlink_to(ROOT / ".models")
        os.chdir(place)
        os.environ["SAGE_STATE_DIR"] = str(place / "state")
        try:
            plan_and_apply()
            with router() as address:
                ask(address)
                crash_and_heal(address)
                change_and_roll_back(place / "manifests" / "quickstart.yaml")
                stop(address)
        finally:
            subprocess.run([SAGE, "down", "-y", "manifests/"], capture_output=True, check=False)
    say("That was sage. The same with your own models: docs/first-steps.md")


def plan_and_apply() -> None:
    title(1, "What would change: two engines to start")
    sage("plan", "manifests/")
    title(2, "Make it so: each is ready once it has answered a request of its kind")
    sage("apply", "manifests/", "-y")


def ask(address: str) -> None:
    title(3, "One OpenAI-compatible address in front, used by the official client")
    # Imported here: it takes a second, and nothing above needs it.
    from openai import OpenAI

    client = OpenAI(base_url=f"{address}/v1", api_key="none-needed", max_retries=0)
    say(f"client = OpenAI(base_url='{address}/v1')")
    question = [{"role": "user", "content": "Name three colours of the rainbow."}]
    print("  smollm2: ", end="", flush=True)
    words = 0
    for chunk in client.chat.completions.create(model="smollm2", messages=question, max_tokens=40, stream=True):
        if chunk.choices and chunk.choices[0].delta.content:
            words += 1
            print(chunk.choices[0].delta.content, end="", flush=True)
    print()
    vector = client.embeddings.create(model="smollm2-embed", input="a rainbow").data[0].embedding
    print(f"  smollm2-embed: a vector of dimension {len(vector)}")
    expect(words > 3 and len(vector) == 576, "a streamed answer and a vector of dimension 576")


def crash_and_heal(address: str) -> None:
    title(4, "The chat engine is killed; sage sees it, and heals it on the same port")
    before = engine("chat")
    say(f"kill -9 {before['pid']}")
    os.kill(int(str(before["pid"])), signal.SIGKILL)
    sage("status")
    sage("plan")
    sage("apply", "-y")
    after = engine("chat")
    expect(after["port"] == before["port"] and after["pid"] != before["pid"], "the same port, another process")


def change_and_roll_back(manifest: Path) -> None:
    title(5, "An edit replaces the one engine that it is about; one that cannot work is rolled back")
    embed = engine("embed")["pid"]
    edit(manifest, "max_model_len: 2048", "max_model_len: 4096")
    sage("apply", "-y")
    working = manifest.read_text()
    edit(manifest, "max_model_len: 4096", "max_model_len: 4096\n    args: [--no-such-flag]")
    sage("apply", "-y", expected=5)
    sage("status")
    expect(engine("chat")["state"] == "ready", "what ran before runs again")
    expect(engine("embed")["pid"] == embed, "the other engine was never touched")
    manifest.write_text(working)
    say("the bad line is taken out again")
    sage("plan")


def stop(address: str) -> None:
    title(6, "Stop everything: nothing is left")
    ports = [engine("chat")["port"], engine("embed")["port"]]
    sage("down", "manifests/", "-y")
    tokens = [process.pid for process in psutil.process_iter() if carries_token(process)]
    taken = [port for port in ports if listens(int(str(port)))]
    print(f"\n  leak check: {len(tokens)} processes, {len(taken)} ports")
    expect(not tokens and not taken, "zero processes and zero ports")


# --- beneath ---------------------------------------------------------------------------------------------------------


@contextmanager
def router() -> Iterator[str]:
    """`sage serve` in the background, on the usual port where that is free."""
    port = 8000 if not listens(8000) else free_port()
    say(f"sage serve --port {port} &")
    serving = subprocess.Popen([SAGE, "serve", "--port", str(port)])
    try:
        deadline = time.monotonic() + 20
        while not listens(port):
            expect(time.monotonic() < deadline and serving.poll() is None, "a router that listens")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        serving.terminate()
        serving.wait()


def engine(name: str) -> dict[str, object]:
    """An engine of the demo, as `sage status -o json` has it."""
    import json

    found = json.loads(subprocess.run([SAGE, "status", "-o", "json"], capture_output=True, check=True).stdout)
    return next(row for row in found["engines"] if row["name"] == name and row["project"] == "quickstart")


def carries_token(process: psutil.Process) -> bool:
    try:
        return process.environ().get("SAGE_SOURCE", "") == os.path.realpath("manifests")
    except psutil.Error:
        return False


if __name__ == "__main__":
    main()
