"""The loader of manifests: what good ones mean, and that every bad one is told at its place and never crashes."""

import random
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from sage_reconcile.core.desired import DesiredState, Wanted
from sage_reconcile.core.spec import written_fields
from sage_reconcile.world.manifests import ProblemsFound, load
from sage_reconcile.world.yaml_scan import scan
from tests.bad_manifests import BAD, HEAD, Bad, engine, write
from tests.seed_preset import SEED_PRESET

DEV_NOTE_PRESET = """\
version: 1
name: qwen-plus-embeddings
engines:
  - {name: chat, kind: llm, model: Qwen/Qwen2.5-7B-Instruct, tensor_parallel: 2, pipeline_parallel: 1,
     label: chat-primary, max_concurrent_requests: 512, metadata: {traffic_class: production}}
  - {name: embed, kind: embedding, model: BAAI/bge-m3, port: 8090, label: embed-default,
     metadata: {traffic_class: production}}
"""


def project(tmp_path: Path, files: Mapping[str, str | bytes], name: str = "lab") -> str:
    """A directory of manifests."""
    write(Bad(name="", files=files, expect="", message=""), tmp_path / name)
    return str(tmp_path / name)


def loaded(*paths: str, project: str | None = None) -> DesiredState:
    return load(paths, project=project, home="/home/me")


def only(tmp_path: Path, text: str) -> Wanted:
    """The one engine of a project with one file."""
    (wanted,) = loaded(project(tmp_path, {"a.yaml": text})).wanted
    return wanted


def places(found: ProblemsFound) -> list[tuple[str, int, int]]:
    return [(Path(problem.file).name, problem.line, problem.column) for problem in found.problems]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_a_bad_manifest_is_told_at_its_place_within_a_second(bad: Bad, tmp_path: Path) -> None:
    write(bad, tmp_path / "lab")
    began = time.process_time()

    with pytest.raises(ProblemsFound) as raised:
        loaded(str(tmp_path / "lab"))

    assert time.process_time() - began < 1
    problems = [p for p in raised.value.problems if bad.message in p.message]
    assert problems, raised.value.report()
    assert [f"{p.file}:{p.line}:{p.column}" for p in problems][0] == f"{tmp_path}/lab/{bad.expect}"
    assert f"{tmp_path}/lab/{bad.expect}: error: " in raised.value.report()
    assert raised.value.exit_code == 3
    assert raised.value.report().replace("\n", "").isprintable()
    assert all(len(p.message) < 600 and len(p.snippet) <= 160 for p in raised.value.problems)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_one_mistake_is_one_problem(bad: Bad, tmp_path: Path) -> None:
    # None of the ten keys of the bomb is a field, and the three fields of a stack are missing. A loop has two links.
    expected = {"billion laughs": 14, "link loop": 2}.get(bad.name, 1)
    write(bad, tmp_path / "lab")

    with pytest.raises(ProblemsFound) as raised:
        loaded(str(tmp_path / "lab"))

    assert len(raised.value.problems) == expected, raised.value.report()


def test_names_of_bad_manifests_are_unique() -> None:
    assert len({bad.name for bad in BAD}) == len(BAD) >= 45


def test_a_report_shows_the_line_a_caret_and_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project(tmp_path, {"a.yaml": engine("port: '8001'")})
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ProblemsFound) as raised:
        loaded("lab")

    assert raised.value.report() == (
        'lab/a.yaml:6:5: error: port must be "auto" or a number from 1024 to 65535, not the string "8001"\n'
        "        port: '8001'\n"
        "        ^\n"
        "  hint: write 8001 without quotes"
    )


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("max_lenght: 5", 'did you mean "max_model_len"?'),
        ("tensor-parallel: 2", 'did you mean "tensor_parallel"?'),
        ("kind: embeding", 'did you mean "embedding"?'),
        ("use_gpu: no", "YAML 1.2 has only true and false: write false"),
        ("use_gpu: 'true'", "write true without quotes"),
        ("replicas: '2'", "write 2 without quotes"),
        ("args: [8000]", "put it in quotes"),
        ("args:", "leave the field out to get its default"),
        ("restart: {policy: never}", "remove it: this version of sage would not act on it"),
        ("devices: ['0']", "write 0 without quotes for the index of one"),
        ("devices: [gpu1]", "write 1 without quotes for the index of one"),
        ("devices: 0", "write a list: [0]"),
        ("devices: gpu0", "write a list: [0]"),
        ("devices: GPU-5b8f", "write a list: [GPU-5b8f]"),
        ("gpu_memory: '0.7'", "write 0.7 without quotes"),
        ("gpu_memory: '70%'", "write 0.7"),
        ("gpu_memory: 40G", 'write "40GiB"'),
        ("gpu_memory: 40gib", 'write "40GiB"'),
        ("gpu_memory: 40 gb", 'write "40GB"'),
        ("gpu_memory: '40'", 'write "40GiB"'),
        ("gpu_memory: 40", 'write "40GiB"'),
        ("gpu_memory: 1.5", 'write "1.5GiB"'),
        ("gpu_memory: 0", "leave gpu_memory out: it is computed then"),
        ("gpu_memory: 0GiB", "leave gpu_memory out: it is computed then"),
        ("gpu_memory: -1", None),
        ("gpu_memory: true", None),
        ("gpu_memory: lots", None),
        ("kind: rerank", "write llm or embedding"),
        ("runtime: tei", "write auto, vllm, sglang, llama.cpp, infinity or command"),
        ("update: {strategy: surge}", "write auto or recreate"),
        ("runtime: infinity", "write kind: embedding, or choose another runtime"),
        ("depends_on: [chart]", "write NAME for an engine of this stack, or STACK/NAME"),
    ],
)
def test_a_problem_brings_its_cure(line: str, hint: str | None, tmp_path: Path) -> None:
    with pytest.raises(ProblemsFound) as raised:
        only(tmp_path, engine(line))

    assert [problem.hint for problem in raised.value.problems] == [hint]


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ("none", "leave device_reserve out: nothing is kept free then"),
        ("0", "leave device_reserve out: nothing is kept free then"),
        ("0GiB", "leave device_reserve out: nothing is kept free then"),
        ("2", 'write "2GiB"'),
        ("2g", 'write "2GiB"'),
        ("0.1", None),
        ("'0.1'", None),
        ("10%", None),
        ("auto", None),
        ("true", None),
    ],
)
def test_a_reserve_is_a_size_and_nothing_else(written: str, hint: str | None, tmp_path: Path) -> None:
    files = {"a.yaml": engine(), "sage.yaml": f"device_reserve: {written}\n"}

    with pytest.raises(ProblemsFound) as raised:
        loaded(project(tmp_path, files))

    (problem,) = raised.value.problems
    assert problem.message.startswith("device_reserve")
    assert "size" in problem.message or "no memory at all" in problem.message
    assert problem.hint == hint


@pytest.mark.parametrize("written", ["40gib", "'70%'", "'0.7'", "40G", "40", "'16'", "1.5", "70 %"])
def test_a_size_as_its_hint_writes_it_is_valid(written: str, tmp_path: Path) -> None:
    with pytest.raises(ProblemsFound) as raised:
        only(tmp_path, engine(f"gpu_memory: {written}"))
    (problem,) = raised.value.problems
    cure = (problem.hint or "").removeprefix("write ").removesuffix(" without quotes")

    only(tmp_path / "again", engine(f"gpu_memory: {cure}"))


def test_all_mistakes_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    directory = project(
        tmp_path,
        {
            "a.yaml": engine("port: x", "port: y", "use_gpu: no", "prot: 1"),
            "b.yaml": "engines: [",
            "c.yaml": b"\xff",
            "d.yaml": HEAD + "  - {name: a, model: m, live: {timeout: x}}\n  - {name: b}\n",
            "sage.yaml": "router: 5\n",
        },
    )

    with pytest.raises(ProblemsFound) as raised:
        loaded(directory)

    assert places(raised.value) == [
        ("a.yaml", 6, 5),
        ("a.yaml", 7, 5),
        ("a.yaml", 8, 5),
        ("a.yaml", 9, 5),
        ("b.yaml", 2, 1),
        ("c.yaml", 1, 1),
        ("d.yaml", 2, 1),
        ("d.yaml", 4, 25),
        ("d.yaml", 5, 5),
        ("sage.yaml", 1, 1),
    ]


def test_a_mistake_in_a_default_is_told_once_for_all_engines(tmp_path: Path) -> None:
    text = "version: 1\nname: lab\ndefaults:\n  prot: 1\n  ready: {timeout: x}\nengines:\n"
    engines = "".join(f"  - {{name: e{i}, model: m, ready: {{path: /up}}}}\n" for i in range(5))

    with pytest.raises(ProblemsFound) as raised:
        only(tmp_path, text + engines)

    assert places(raised.value) == [("a.yaml", 4, 3), ("a.yaml", 5, 11)]


def test_a_thousand_mistakes_do_not_take_for_ever(tmp_path: Path) -> None:
    engines = "".join(f"  - {{name: e{i}, model: m, {', '.join(f'x{j}: 1' for j in range(30))}}}\n" for i in range(900))
    began = time.process_time()

    with pytest.raises(ProblemsFound) as raised:
        only(tmp_path, HEAD + engines)

    assert time.process_time() - began < 2
    assert "more than 100 mistakes up to here" in raised.value.report()


def test_a_secret_is_in_no_report(tmp_path: Path) -> None:
    lines = (
        "env: {HF_TOKEN: hf_canary12345, 1: x, MY_PASSWORD: canary-two}",
        "label: [sk-canary-three-1234]",
        "kind: sk-canary-four-1234",
        "dtype: {API_KEY: 'canary five'}",
    )

    with pytest.raises(ProblemsFound) as raised:
        only(tmp_path, engine(*lines))

    assert len(raised.value.problems) == 6
    assert "canary" not in raised.value.report()


def test_the_seed_preset_is_a_valid_manifest_as_it_stands(tmp_path: Path) -> None:
    desired = loaded(project(tmp_path, {"qwen.yaml": SEED_PRESET}))

    assert [(str(one.id), one.spec.kind, one.spec.use_gpu) for one in desired.wanted] == [
        ("qwen-mini-with-embeddings/chat", "llm", None),
        ("qwen-mini-with-embeddings/embed", "embedding", None),
        ("qwen-mini-with-embeddings/embed-gpu", "embedding", True),
    ]
    assert desired.project == "lab"
    assert desired.source == str(tmp_path / "lab")
    assert desired.prune_stacks is None
    assert written_fields(desired.wanted[1].spec) == {
        "name": "embed",
        "kind": "embedding",
        "model": "BAAI/bge-small-zh-v1.5",
        "label": "embedding-bge",
    }


def test_the_preset_of_the_dev_note_is_a_valid_manifest_as_it_stands(tmp_path: Path) -> None:
    chat, embed = loaded(project(tmp_path, {"a.yaml": DEV_NOTE_PRESET})).wanted

    assert written_fields(chat.spec) == {
        "name": "chat",
        "kind": "llm",
        "model": "Qwen/Qwen2.5-7B-Instruct",
        "tensor_parallel": 2,
        "pipeline_parallel": 1,
        "label": "chat-primary",
        "max_concurrent_requests": 512,
        "metadata": {"traffic_class": "production"},
    }
    assert dict(embed.fields_at)["port"].endswith("a.yaml:6:56")


def test_defaults_fill_in_and_merge_one_level_deep(tmp_path: Path) -> None:
    text = (
        "version: 1\nname: lab\n"
        "defaults:\n"
        "  env: {A: d, B: d}\n"
        "  args: [--default]\n"
        "  ready:\n"
        "    timeout: 5m\n"
        "  gpu_memory: 24GiB\n"
        "engines:\n"
        "  - name: chat\n"
        "    model: m\n"
        "    env: {B: e}\n"
        "    extra_args: [--mine]\n"
        "    required_memory_gb: 16\n"
    )

    wanted = only(tmp_path, text)

    assert written_fields(wanted.spec) == {
        "name": "chat",
        "model": "m",
        "env": {"A": "d", "B": "e"},
        "args": ["--mine"],
        "ready": {"timeout": 300.0},
        "gpu_memory": f"{16 * 1024**3}B",
    }
    assert wanted.at == f"{tmp_path}/lab/a.yaml:10:5"
    assert [(path, at.removeprefix(f"{tmp_path}/lab/")) for path, at in wanted.fields_at] == [
        ("args", "a.yaml:13:5"),
        ("env", "a.yaml:12:5"),
        ("env.A", "a.yaml:4:9"),
        ("env.B", "a.yaml:12:11"),
        ("gpu_memory", "a.yaml:14:5"),
        ("model", "a.yaml:11:5"),
        ("name", "a.yaml:10:5"),
        ("ready", "a.yaml:6:3"),
        ("ready.timeout", "a.yaml:7:5"),
    ]


def test_plain_scalars_mean_what_yaml_1_2_says(tmp_path: Path) -> None:
    written = {
        "no": "no", "off": "off", "y": "y", "22:22": "22:22", "1_000": "1_000", "2024-01-02": "2024-01-02",
        "010": 10, "0o17": 15, "0x1F": 31, "+3": 3, "1e3": 1000.0, ".5": 0.5, "TRUE": True, "~": None, "": None,
        "'5'": "5", "0b1": "0b1", "=": "=", "1.5.2": "1.5.2",
    }  # fmt: skip
    lines = "".join(f"      k{i}: {text}\n" for i, text in enumerate(written))

    wanted = only(tmp_path, engine("metadata:") + lines)

    got = list(wanted.spec.metadata.values())
    assert got == list(written.values())
    assert [type(value) for value in got] == [type(value) for value in written.values()]


def test_shell_metacharacters_in_args_stay_as_they_are(tmp_path: Path) -> None:
    wanted = only(tmp_path, engine('args: ["; rm -rf /", "$(id)", "a\\nb", "{x}", "`id`"]'))

    assert wanted.spec.args == ("; rm -rf /", "$(id)", "a\nb", "{x}", "`id`")


def test_a_command_may_hold_placeholders_and_doubled_braces(tmp_path: Path) -> None:
    wanted = only(tmp_path, engine("runtime: command", 'command: [serve, "{port}", "{{\\"a\\": {memory_bytes}}}"]'))

    assert wanted.spec.command == ("serve", "{port}", '{{"a": {memory_bytes}}}')


@pytest.mark.parametrize(
    "lines",
    [
        ("command: [serve, '--listen={host}:{port}']",),
        ("command: [serve]", "args: [--port, '{port}']"),
        ("command: [serve]", "port: 9000"),
    ],
)
def test_a_command_is_told_its_port_or_has_one_of_its_own(lines: tuple[str, ...], tmp_path: Path) -> None:
    assert only(tmp_path, engine("runtime: command", *lines)).spec.runtime == "command"


def test_model_paths_become_absolute_and_hub_ids_stay(tmp_path: Path) -> None:
    models = ("./m.gguf", "../m", "~/m.gguf", "/abs/m", "m.gguf", "org/model")
    engines = "".join(f"  - {{name: e{i}, model: {model}}}\n" for i, model in enumerate(models))

    desired = loaded(project(tmp_path, {"a.yaml": HEAD + engines}))

    assert [one.spec.model for one in desired.wanted] == [
        f"{tmp_path}/lab/m.gguf",
        f"{tmp_path}/m",
        "/home/me/m.gguf",
        "/abs/m",
        f"{tmp_path}/lab/m.gguf",
        "org/model",
    ]
    assert {one.directory for one in desired.wanted} == {f"{tmp_path}/lab"}
    assert written_fields(desired.wanted[0].spec) == {"name": "e0", "model": f"{tmp_path}/lab/m.gguf"}


def test_every_replica_is_wanted_and_dependencies_name_their_stack(tmp_path: Path) -> None:
    files = {
        "b.yaml": HEAD
        + "  - {name: a, model: m, replicas: 3, depends_on: [b, two/c, lab/b]}\n  - {name: b, model: m}\n",
        "a.yml": "version: 1\nname: two\nengines:\n  - {name: c, model: m}\n",
        ".hidden.yaml": "not: read",
        "notes.txt": "not read",
    }

    desired = loaded(project(tmp_path, files))

    assert [(str(one.id), one.depends_on) for one in desired.wanted] == [
        ("lab/a", ("lab/b", "two/c")),
        ("lab/a#1", ("lab/b", "two/c")),
        ("lab/a#2", ("lab/b", "two/c")),
        ("lab/b", ()),
        ("two/c", ()),
    ]


def test_the_order_of_files_and_paths_changes_nothing(tmp_path: Path) -> None:
    files = {f"{name}.yaml": engine(head=HEAD.replace("lab", name)) for name in "abc"}
    one = project(tmp_path, files)
    two = project(tmp_path, dict(reversed(files.items())), name="again")

    assert loaded(f"{one}/a.yaml", f"{one}/b.yaml") == loaded(f"{one}/b.yaml", f"{one}/a.yaml")
    assert loaded(one).digest == loaded(two).digest
    assert [each.id.stack for each in loaded(two).wanted] == ["a", "b", "c"]


def test_the_digest_changes_with_every_byte_and_name(tmp_path: Path) -> None:
    texts: tuple[Mapping[str, str], ...] = (
        {"a.yaml": engine()},
        {"a.yaml": engine() + "#"},
        {"a.yaml": engine("port: 8001")},
        {"b.yaml": engine()},
        {"a.yaml": engine(), "sage.yaml": "project: lab\n"},
    )

    digests = [loaded(project(tmp_path, files, name=f"p{i}")).digest for i, files in enumerate(texts)]

    assert len(set(digests)) == len(digests)
    assert all(digest.startswith("sha256:") and len(digest) == 71 for digest in digests)


def test_a_file_prunes_only_the_stacks_it_holds(tmp_path: Path) -> None:
    files = {"a.yaml": engine(), "b.yaml": engine(head=HEAD.replace("lab", "two")), "sage.yaml": "project: home\n"}
    directory = project(tmp_path, files)

    desired = loaded(f"{directory}/b.yaml")

    assert (desired.project, desired.source, desired.prune_stacks) == ("home", directory, ("two",))
    assert [str(one.id) for one in desired.wanted] == ["two/chat"]


def test_an_empty_directory_wants_nothing(tmp_path: Path) -> None:
    desired = loaded(project(tmp_path, {}))

    assert desired.wanted == ()
    assert desired.prune_stacks is None


def test_the_settings_give_ports_and_router(tmp_path: Path) -> None:
    settings = 'project: home\nports: {llm: "9001-9010"}\nrouter: {port: 9000}\n'

    desired = loaded(project(tmp_path, {"a.yaml": engine("port: 8000"), "sage.yml": settings}))

    assert (desired.project, desired.ports.llm, desired.router.port) == ("home", "9001-9010", 9000)


def test_the_project_is_named_by_settings_then_argument_then_directory(tmp_path: Path) -> None:
    plain = project(tmp_path, {"a.yaml": engine()}, name="plain")
    below = project(tmp_path, {"a.yaml": engine()}, name="shop/manifests")
    named = project(tmp_path, {"a.yaml": engine(), "sage.yaml": "project: home\n"}, name="named")

    assert loaded(plain).project == "plain"
    assert loaded(below).project == "shop"
    assert loaded(plain, project="given").project == "given"
    assert loaded(named).project == loaded(named, project="home").project == "home"


@pytest.mark.parametrize(
    ("directory", "given", "settings", "place", "message"),
    [
        (
            "lab",
            "other",
            "project: home\n",
            "lab/sage.yaml:1:1",
            'the project is "home" here, and "other" on the command',
        ),
        (
            "my lab",
            None,
            "router: {port: 9000}\n",
            "my lab:1:1",
            'the directory\'s name "my lab" cannot name a project',
        ),
        ("lab", "a/b", "project: home\n", "lab:1:1", '"a/b" is not a name that a project can have'),
    ],
)
def test_a_project_without_one_good_name_is_refused(
    directory: str, given: str | None, settings: str, place: str, message: str, tmp_path: Path
) -> None:
    path = project(tmp_path, {"a.yaml": engine(), "sage.yaml": settings}, name=directory)

    with pytest.raises(ProblemsFound) as raised:
        loaded(path, project=given)

    assert f"{tmp_path}/{place}: error: {message}" in raised.value.report()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone", "gone:1:1: error: there is no such file or directory"),
        ("gone/a.yaml", "gone/a.yaml:1:1: error: there is no such file or directory"),
        ("", '"":1:1: error: there is no such file or directory'),
        ("a\0b", "a\\x00b:1:1: error: cannot be read"),
        ("\ud800", "\\ud800:1:1: error: cannot be read"),
        ("x" * 5000, ":1:1: error: cannot be read: File name too long"),
        ("/dev/zero", "/dev/zero:1:1: error: is a device, not a file"),
        # The kernel says that it is empty, and then it is not: so does a file that grows.
        ("/proc/self/status", "/proc/self/status:1:1: error: changed while it was being read"),
    ],
)
def test_a_path_that_cannot_be_read_is_an_invalid_manifest(path: str, message: str) -> None:
    with pytest.raises(ProblemsFound) as raised:
        loaded(path)

    assert len(raised.value.problems) == 1
    assert message in raised.value.report()


def test_two_directories_are_not_one_project(tmp_path: Path) -> None:
    one, two = (project(tmp_path, {"a.yaml": engine()}, name=name) for name in ("one", "two"))

    with pytest.raises(ProblemsFound) as raised:
        loaded(one, two)

    assert f"{two}:1:1: error: not in the same project as {one}" in raised.value.report()


def test_a_link_that_stays_in_the_directory_is_followed(tmp_path: Path) -> None:
    directory = project(tmp_path, {".real": engine("port: 8001")})
    (Path(directory) / "a.yaml").symlink_to(".real")
    (tmp_path / "link").symlink_to("lab")

    assert loaded(directory).wanted[0].spec.port == 8001
    assert loaded(str(tmp_path / "link")).source == directory


def test_a_dependency_on_a_file_that_cannot_be_read_is_not_called_unknown(tmp_path: Path) -> None:
    directory = project(tmp_path, {"a.yaml": engine("depends_on: [two/x]"), "b.yaml": "["})

    with pytest.raises(ProblemsFound) as raised:
        loaded(directory)

    assert places(raised.value) == [("b.yaml", 2, 1)]


@pytest.mark.parametrize("loader", [yaml.CSafeLoader, yaml.SafeLoader])
def test_random_bytes_in_a_good_manifest_never_raise_anything_else(loader: type, tmp_path: Path) -> None:
    seed = 20260307
    print(f"seed {seed}")
    chance = random.Random(seed)
    good = (SEED_PRESET + "  - {name: x, model: ./y.gguf, args: [a, 'b'], env: {A: \"\\u00e9\"}}\n").encode()
    tokens = (
        b"&a ",
        b"*a",
        b"!!x ",
        b"<<: ",
        b"\t",
        b"[",
        b"{",
        b"'",
        b'"',
        b": ",
        b"- ",
        b"\n",
        b"---\n",
        b"\\U",
        b"%",
    )
    file = tmp_path / "lab" / "a.yaml"
    file.parent.mkdir()
    refused = 0
    for _ in range(3000 if loader is yaml.CSafeLoader else 300):
        content = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(content))
            match chance.randrange(4):
                case 0:
                    content[at] = chance.randrange(256)
                case 1:
                    del content[at : at + chance.randint(1, 20)]
                case 2:
                    content[at:at] = chance.choice(tokens)
                case 3:
                    content[at:at] = content[at : at + 40]
        if loader is yaml.SafeLoader:
            scan("a.yaml", bytes(content), loader=loader)
            continue
        file.write_bytes(content)
        try:
            loaded(str(file.parent))
        except ProblemsFound as found:
            refused += 1
            assert found.report().replace("\n", "").isprintable()
    assert loader is yaml.SafeLoader or refused > 1000


def test_both_parsers_find_the_same_values_and_places() -> None:
    text = (SEED_PRESET + DEV_NOTE_PRESET.replace("version: 1\nname", "x: 1\ny").replace("engines:", "z:")).encode()

    fast, slow = (scan("a.yaml", text, loader=loader) for loader in (yaml.CSafeLoader, yaml.SafeLoader))

    assert fast.top == slow.top
    assert fast.marks == slow.marks
