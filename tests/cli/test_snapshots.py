"""A plan is made from a snapshot as on the machine that it is of, and from nothing else."""

import difflib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from sage_reconcile.cli import main as command_line
from sage_reconcile.core.facts import Gap
from sage_reconcile.core.lookup import seen_for
from sage_reconcile.core.planner import make_plan
from sage_reconcile.core.snapshot import ManifestsPlace, Snapshot, parse_snapshot, snapshot_json
from sage_reconcile.render.plan_json import plan_json
from sage_reconcile.render.plan_text import plan_text
from tests import fakenvml
from tests.e2e import Place, fake, place_in
from tests.gpu_worlds import LLAMA_8B, LLAMA_70B, MIB, SOURCE, desired, h100, holder, machine, on_gpu, wants
from tests.tiny_gguf import write_tiny_gguf

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
SECRET = "not-for-the-world-0451"


# --- the same plan ----------------------------------------------------------------------------------------------------


def box(place: Place) -> dict[str, str]:
    """A machine with two GPUs, programs and models; the variables that its user has."""
    for name in ("vllm", "llama-server"):
        program = place.root / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\nexit 1\n")
        program.chmod(0o755)
    (place.manifests / "models").mkdir()
    (place.manifests / "models" / "config.json").write_text(json.dumps(CONFIG))
    (place.root / "home").mkdir()
    write_tiny_gguf(place.root / "home" / "tiny.gguf")
    # With UUIDs of their own: engines of other tests on this machine are engines of this user, too.
    place.gpus(*(fakenvml.Gpu(index=index, uuid=f"GPU-{uuid4()}") for index in range(2)))
    return {
        "PATH": f"{place.root / 'bin'}:{os.environ['PATH']}", "HOME": str(place.root / "home"),
        "HF_TOKEN": SECRET, "SOME_PASSWORD": SECRET,
    }  # fmt: skip


def elsewhere(place: Place, root: Path) -> dict[str, str]:
    """A checkout on a machine without GPUs, programs, models, and with a `vllm` of its own that must not matter."""
    root.mkdir()
    shutil.copytree(place.manifests, root / "manifests", ignore=shutil.ignore_patterns("models"))
    (root / "bin").mkdir()
    (root / "bin" / "vllm").write_text("no program")
    return {
        "PATH": str(root / "bin"),
        "HOME": str(root),
        "SAGE_STATE_DIR": str(root / "none"),
        "SAGE_DISABLE_NVML": "1",
    }


def alone(text: str) -> str:
    """Without the second of the look, and the digest of all sockets of this machine, on which others work, too."""
    left_out = ('    "observed_at"', '    "observed":')
    return "\n".join(line for line in text.splitlines() if not line.startswith(left_out))


def test_the_plan_of_a_snapshot_is_the_machine_s_own_to_the_byte(tmp_path: Path) -> None:
    """Steps, a refusal with numbers, a stop; models by relative path, `~/` and hub id; found and missing programs."""
    (tmp_path / "box").mkdir()
    with place_in(tmp_path / "box") as place:
        user = box(place)
        old = place.gpu_fake("old", mib=2000, env={"GREETING": "hello"})
        place.write(old, fake("gone"))
        place.sage("apply", "manifests", "-y", **user)
        place.write(
            old,
            {"name": "chat", "model": "./models", "max_model_len": 4096},
            {"name": "tiny", "model": "~/tiny.gguf", "use_gpu": True, "max_model_len": 512},
            {"name": "huge", "model": "acme/Huge-900B", "gpu_memory": "300GiB"},
            {"name": "embed", "kind": "embedding", "model": "BAAI/bge-small-en-v1.5"},
        )
        file = str(tmp_path / "box.json")
        away = elsewhere(place, tmp_path / "ci")
        with place.foreign_on(1, 30_000):
            here = [
                alone(place.sage("plan", "manifests", "-o", output, expect=4, **user).stdout)
                for output in ("json", "text")
            ]
            place.sage("snapshot", "manifests", "--out", file, **user)

        *there, touched = probed(tmp_path / "ci", file, away)

        for mine, other in zip(here, map(alone, there), strict=True):
            assert list(difflib.unified_diff(mine.splitlines(), other.splitlines(), lineterm="")) == []
        assert touched == ""
        assert "lab/huge" in here[1] and "foreign pid" in here[1]
        plan = json.loads(here[0])
        assert plan["source"] == str(place.manifests)
        assert {step["engine"]: step["action"] for step in plan["steps"]} == {
            "lab/chat": "start", "lab/gone": "stop", "lab/tiny": "start",
        }  # fmt: skip
        assert [act["resolved"]["argv"][2] for act in plan["acts"] if act["engine"] == "lab/chat"] == [
            str(place.manifests / "models")
        ]
        assert SECRET not in Path(file).read_text() and "hello" in Path(file).read_text()
        shutil.rmtree(place.manifests / "models")
        place.write(old)


PROBE = """
import os, sys
directory, file, code = sys.argv[1:4]
import sage_reconcile.cli.main as main
import sage_reconcile.app.snapshots, sage_reconcile.cli.outcome, sage_reconcile.world.manifests, deepdiff
mine = [os.path.realpath(path) for path in (directory, file, sys.prefix, sys.base_prefix, os.path.dirname(code))]
touched = []

def seen(event, arguments):
    if event.split(".")[0] in ("socket", "subprocess", "ctypes", "shutil") or event in ("os.system", "os.exec"):
        touched.append(f"{event} {arguments}")
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str):
        path = os.path.realpath(arguments[0])
        if not any(path == root or path.startswith(root + "/") for root in mine) and path != "/dev/null":
            touched.append(f"{event} {path}")

sys.addaudithook(seen)
os.chdir(directory)
for output in ("json", "text"):
    sys.stdout = open(os.path.join(directory, output), "w")
    main._run(["plan", "manifests", "-o", output, "--observed", file])
    sys.stdout.close()
loaded = [name for name in ("psutil", "pynvml", "sage_reconcile.app.host", "sage_reconcile.world.programs",
                            "sage_reconcile.world.models") if name in sys.modules]
print(*touched, *loaded, sep="\\n", end="", file=open(os.path.join(directory, "touched"), "w"))
"""


def probed(directory: Path, file: str, variables: dict[str, str]) -> list[str]:
    """The plan from a snapshot as JSON and as text; and what it touched beside its files and its code, and loaded."""
    code = command_line.__file__
    assert code is not None
    subprocess.run(
        [sys.executable, "-c", PROBE, str(directory), file, str(Path(code).parent)],
        env={**os.environ, **variables},
        check=True,
        capture_output=True,
        timeout=60,
    )
    return [(directory / name).read_text() for name in ("json", "text", "touched")]


# --- manifests that have changed since --------------------------------------------------------------------------------

MANIFEST = """
version: 1
name: lab
engines:
  - {name: chat, model: meta-llama/Llama-3.1-8B-Instruct, max_model_len: 8192}
"""


def recorded(path: Path, *, source: str | None = SOURCE, **fields: Any) -> str:
    """A snapshot of a machine with one GPU that is half full, taken for manifests with one model and one program."""
    seen = machine(h100(0, holders=(holder(4242, 35.0),)), engines=(), **fields)
    place = ManifestsPlace(source=source, home="/home/ada") if source is not None else None
    path.write_text(snapshot_json(Snapshot(observed=seen, manifests=place)))
    return str(path)


def sage(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """A command in this process."""
    code = command_line._run(list(words))
    said = capsys.readouterr()
    return code, said.out, said.err


def lab(tmp_path: Path, text: str = MANIFEST) -> str:
    directory = tmp_path / "lab"
    directory.mkdir(exist_ok=True)
    (directory / "lab.yaml").write_text(text)
    (directory / "sage.yaml").write_text("project: lab\n")
    return str(directory)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("{name: x, model: acme/new-7b}", "nobody looked for the model acme/new-7b"),
        ("{name: x, model: ./new.gguf, use_gpu: false}", f"nobody looked for the model {SOURCE}/new.gguf"),
        ("{name: x, model: /srv/models/small.gguf}", "nobody looked for the model /srv/models/small.gguf"),
        ("{name: x, model: a/b, runtime: infinity, kind: embedding}", "nobody looked for the program infinity_emb"),
    ],
)
def test_what_nobody_looked_for_is_told_and_is_11(
    engine: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, manifests = recorded(tmp_path / "s.json"), lab(tmp_path, f"{MANIFEST}  - {engine}\n")

    code, out, err = sage(capsys, "plan", manifests, "--observed", file)

    assert code == 11, err
    assert err.startswith("note: this is for box as it was at 1970-01-01T00:16:40Z\n")
    assert "+   lab/chat" in out and words in " ".join(out.split())
    assert "a new snapshot, taken with these manifests" in " ".join(out.split())
    assert sage(capsys, "validate", manifests, "--observed", file)[0] == 11


def test_without_manifests_nobody_looked_for_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recorded(tmp_path / "s.json", source=None, models=())
    assert sage(capsys, "plan", lab(tmp_path), "--observed", file)[0] == 11


def test_a_file_of_the_manifests_is_planned_as_on_the_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More was looked for than this file asks: the plan does not know of it."""
    manifests, file = lab(tmp_path), recorded(tmp_path / "s.json")
    recorded(tmp_path / "less.json", models=tuple(fact for fact in machine().models if fact.model == LLAMA_8B))
    whole = sage(capsys, "plan", f"{manifests}/lab.yaml", "--observed", file, "-o", "json")
    assert whole[0] == 0
    assert whole == sage(
        capsys, "plan", f"{manifests}/lab.yaml", "--observed", str(tmp_path / "less.json"), "-o", "json"
    )


def test_the_order_of_paths_and_of_lists_in_the_file_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifests = lab(tmp_path)
    (tmp_path / "lab" / "more.yaml").write_text(MANIFEST.replace("lab", "more").replace("chat", "talk"))
    seen = machine(h100(0), h100(1), engines=(on_gpu("old/a", 8001, 10, 0, gib=9), on_gpu("old/b", 8002, 11, 1, gib=8)))
    place = ManifestsPlace(source=SOURCE, home="/")
    file = tmp_path / "s.json"
    file.write_text(snapshot_json(Snapshot(observed=seen, manifests=place)))
    paths = [f"{manifests}/lab.yaml", f"{manifests}/more.yaml"]
    first = sage(capsys, "plan", *paths, "--observed", str(file), "-o", "json")

    shuffled = json.loads(file.read_text())
    for entry in shuffled.values():
        if isinstance(entry, list) and entry and isinstance(entry[0], dict):
            entry.reverse()
    file.write_text(json.dumps(dict(reversed(shuffled.items()))))

    assert sage(capsys, "plan", *reversed(paths), "--observed", str(file), "-o", "json") == first
    assert first[0] == 0 and json.loads(first[1])["summary"]["start"] == 2


# --- validate ---------------------------------------------------------------------------------------------------------


def test_validate_says_whether_all_has_a_place_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, manifests = recorded(tmp_path / "s.json"), lab(tmp_path)
    code, out, _ = sage(capsys, "validate", manifests, "--observed", file)
    assert (code, out.splitlines()) == (
        0,
        ["valid: project lab, 1 stack, 1 engine", "all of it has a place on box, as of 1970-01-01T00:16:40Z"],
    )
    answer = json.loads(sage(capsys, "validate", manifests, "--observed", file, "-o", "json")[1])
    assert (answer["valid"], answer["placeable"], answer["blocked"]) == (True, True, [])
    assert answer["observed"] == {"host": "box", "observed_at": "1970-01-01T00:16:40Z"}


def test_validate_is_4_for_what_has_no_place_and_names_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recorded(tmp_path / "s.json")
    manifests = lab(tmp_path, MANIFEST.replace("max_model_len: 8192", "gpu_memory: 60GiB"))
    code, out, err = sage(capsys, "validate", manifests, "--observed", file)
    assert code == 4 and "valid: project lab" in out and "short" in out and "cannot place lab/chat" in err
    code, out, _ = sage(capsys, "validate", manifests, "--observed", file, "-o", "json")
    answer = json.loads(out)
    assert (code, answer["valid"], answer["placeable"]) == (4, True, False)
    assert [(one["engine"], one["reason"]) for one in answer["blocked"]] == [("lab/chat", "memory")]
    code, out, _ = sage(capsys, "validate", manifests, "--observed", file, "-o", "github")
    assert code == 4 and out.startswith(f"::error file={manifests}/lab.yaml,line=5,col=5::cannot place lab/chat")
    # One line, in which GitHub shows %0A as a line break: what is missing where, and what would help.
    assert out.count("\n") == 1 and "%0Agpu0  free " in out and "held by foreign pid 4242" in out
    assert "%0Awould fit with: gpu_memory <= " in out


def test_an_annotation_says_that_a_new_snapshot_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, manifests = recorded(tmp_path / "s.json"), lab(tmp_path, f"{MANIFEST}  - {{name: x, model: acme/new-7b}}\n")
    code, out, _ = sage(capsys, "validate", manifests, "--observed", file, "-o", "github")
    assert code == 11 and "%0Awould help: a new snapshot, taken with these manifests" in out


@pytest.mark.parametrize(("source", "code"), [(None, 3), ("/else", 10)], ids=["no snapshot", "another source"])
def test_a_program_is_told_what_hinders_a_validation(
    source: str | None, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, manifests = str(tmp_path / "a,b.json"), lab(tmp_path)
    seen = machine(h100(0), engines=(on_gpu("lab/chat", 8001, 10, 0, gib=9),))
    whole = snapshot_json(Snapshot(observed=seen, manifests=ManifestsPlace(source=source or "", home="/")))
    Path(file).write_text(whole if source else "[]")
    ended, out, err = sage(capsys, "validate", manifests, "--observed", file, "-o", "json")
    answer = json.loads(out)
    (problem,) = answer["problems"]
    assert (ended, answer["valid"], problem["file"]) == (code, False, file)
    assert f"error: {problem['message']}\n  hint: {problem['hint']}" in err
    ended, out, _ = sage(capsys, "validate", manifests, "--observed", file, "-o", "github")
    place = file.replace(",", "%2C")
    assert (ended, out) == (
        code, f"::error file={place},line=1,col=1::{problem['message']}%0Ahint: {problem['hint']}\n"
    )  # fmt: skip


def test_validate_is_3_for_invalid_manifests_whatever_the_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, manifests = recorded(tmp_path / "s.json"), lab(tmp_path, MANIFEST.replace("model:", "modle:"))
    code, out, err = sage(capsys, "validate", manifests, "--observed", file, "-o", "json")
    assert code == 3 and json.loads(out)["valid"] is False and "modle" in err


def test_the_machine_s_other_source_is_refused_there_as_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "s.json"
    seen = machine(h100(0), engines=(on_gpu("lab/chat", 8001, 10, 0, gib=9),))
    file.write_text(snapshot_json(Snapshot(observed=seen, manifests=ManifestsPlace(source="/else", home="/"))))
    code, _, err = sage(capsys, "plan", lab(tmp_path), "--observed", str(file))
    assert code == 10 and f"runs from {SOURCE}" in err
    assert sage(capsys, "plan", lab(tmp_path), "--observed", str(file), "--take-over")[0] == 0


def test_the_state_of_a_newer_sage_is_refused_there_as_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newer = Gap(what="state", why="/var/state/lab/journal.jsonl was written by a newer sage")
    code, out, err = sage(capsys, "plan", lab(tmp_path), "--observed", recorded(tmp_path / "s.json", gaps=(newer,)))
    assert (code, out) == (3, "")
    assert "cannot plan for box: /var/state/lab/journal.jsonl was written by a newer sage" in err


# --- files that are no snapshots --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: "", "it is no whole JSON: EOF"),
        (lambda text: text[: len(text) // 2], "it is no whole JSON"),
        (lambda text: "[" * 100_000, "it is no whole JSON: recursion limit"),
        (lambda text: text.replace('"1.0"', '"1.1"'), "a newer sage wrote it: its format is 1.1"),
        (lambda text: text.replace('"1.0"', '"x"'), "a newer sage wrote it: its format is x"),
        (lambda text: "{}", "Field required"),
        (lambda text: text.replace('"taken_at": 1000.0', '"taken_at": "NaN"'), "taken_at: this is no time"),
        (lambda text: text.replace('"total_bytes": ', '"total_bytes": -'), "devices.0.total_bytes: -"),
        (lambda text: text.replace('"total_bytes": ', '"total_bytes": "many", "x": '), "devices.0.total_bytes: "),
    ],
    ids=["empty", "cut", "deep", "newer", "odd version", "other JSON", "no time", "below 0", "no number"],
)
def test_a_damaged_snapshot_is_one_clear_error(
    damage: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, manifests = Path(recorded(tmp_path / "s.json")), lab(tmp_path)
    file.write_text(damage(file.read_text()))
    code, out, err = sage(capsys, "plan", manifests, "--observed", str(file))
    assert (code, out) == (3, "")
    assert err.startswith(f"error: cannot use the snapshot {file}: ") and words in err


def test_a_file_that_is_missing_a_directory_or_huge_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge, manifests = tmp_path / "huge", lab(tmp_path)
    huge.touch()
    os.truncate(huge, 64 * MIB + 1)
    for file, words in ((huge, "larger than 64 MiB"), (tmp_path / "no", "no such file"), (tmp_path, "a directory")):
        code, _, err = sage(capsys, "plan", manifests, "--observed", str(file))
        assert code == 3 and words in err


def damaged(value: Any, rng: random.Random) -> Any:
    """The same with one leaf changed."""
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        return value | {key: damaged(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        index = rng.randrange(len(value))
        return [*value[:index], damaged(value[index], rng), *value[index + 1 :]]
    return rng.choice([0, -1, 1, 2**80, 1e300, "", "x", "\u0000", None, [], {}, True, [[1]], "GPU-0"])


def test_no_damaged_number_or_word_makes_a_plan_crash() -> None:
    """It is refused with a sentence, or it is a snapshot of another machine."""
    want = desired(
        wants("lab/chat", max_model_len=8192), wants("lab/big", model=LLAMA_70B, tensor_parallel=2), wants("lab/old")
    )
    seen = machine(h100(0, holders=(holder(4242, 35.0),)), h100(1), engines=(on_gpu("lab/old", 8001, 10, 0, gib=9),))
    whole = json.loads(snapshot_json(Snapshot(observed=seen)))
    refused = 0
    for seed in range(400):
        text = json.dumps(damaged(whole, random.Random(seed))).encode()
        try:
            observed = seen_for(want, parse_snapshot(text).observed)
        except ValueError:
            refused += 1
            continue
        plan = make_plan(want, observed)
        assert plan_text(plan, observed) and plan_json(plan, observed), f"seed {seed}"
    assert 100 < refused < 400


def test_a_snapshot_survives_its_json_form_and_its_plan_is_that_of_the_look() -> None:
    want = desired(wants("lab/b", max_model_len=8192))
    seen = machine(h100(0), engines=(on_gpu("lab/a", 8001, 10, 0, gib=9),))
    look = seen_for(want, seen)
    snapshot = Snapshot(observed=seen, manifests=ManifestsPlace(source=SOURCE, home="/home/ada"))

    again = parse_snapshot(snapshot_json(snapshot).encode())

    assert again == snapshot
    there = seen_for(want, again.observed)
    assert plan_json(make_plan(want, there), there) == plan_json(make_plan(want, look), look)
