"""Manifests with one mistake each, and the place and words by which sage must tell it."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

HEAD = "version: 1\nname: lab\nengines:\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad:
    """A directory of manifests that must be refused."""

    name: str
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    # Builds what no bytes can say: links, FIFOs.
    build: Callable[[Path], None] | None = None
    # "FILE:LINE:COLUMN" within the directory.
    expect: str
    # A part of the message.
    message: str


def write(bad: Bad, directory: Path) -> None:
    """Make the directory that `bad` describes."""
    directory.mkdir(parents=True)
    for name, content in bad.files.items():
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    if bad.build is not None:
        bad.build(directory)


def engine(*lines: str, head: str = HEAD) -> str:
    """A stack with one engine that has further lines: the first of them is line 6, at column 5."""
    return head + "  - name: chat\n    model: org/model\n" + "".join(f"    {line}\n" for line in lines)


def one(name: str, content: str | bytes, place: str, message: str) -> Bad:
    """A directory with one bad file, a.yaml."""
    return Bad(name=name, files={"a.yaml": content}, expect=f"a.yaml:{place}", message=message)


def field_of(name: str, line: str, message: str, place: str = "6:5") -> Bad:
    """A good engine with one bad line."""
    return one(name, engine(line), place, message)


def named(name: str, written: str) -> Bad:
    """An engine with a bad name."""
    return one(name, HEAD + f"  - name: {written}\n    model: m\n", "4:5", "name must be letters, digits")


def _fifo(directory: Path) -> None:
    os.mkfifo(directory / "a.yaml")


def _link_out(directory: Path) -> None:
    (directory.parent / "outside.yaml").write_text(engine())
    (directory / "a.yaml").symlink_to("../outside.yaml")


def _link_loop(directory: Path) -> None:
    (directory / "a.yaml").symlink_to("b.yaml")
    (directory / "b.yaml").symlink_to("a.yaml")


def _link_to_nothing(directory: Path) -> None:
    (directory / "a.yaml").symlink_to("gone.yaml")


def _link_to_device(directory: Path) -> None:
    (directory / "a.yaml").symlink_to("/dev/zero")


def _directory(directory: Path) -> None:
    (directory / "a.yaml").mkdir()


_BOMB = "a: &a [x, x]\n" + "".join(
    f"{'bcdefghij'[i]}: &{'bcdefghij'[i]} [{', '.join(['*' + 'abcdefghi'[i]] * 9)}]\n" for i in range(9)
)

_SYNTAX = (
    one("billion laughs", _BOMB, "1:4", "anchors and aliases (&a) are not allowed"),
    one("100k nested lists", "[" * 100_000, "1:34", "nested deeper than 32 levels"),
    one("100k nested mappings", "{" * 100_000, "1:34", "nested deeper than 32 levels"),
    one("100k nested block lists", "- " * 100_000, "1:67", "nested deeper than 32 levels"),
    one("300k values", "[" + "a," * 300_000 + "]", "1:200000", "more than 100000 values"),
    one("duplicate key", engine("port: 8001", "port: 8002"), "7:5", '"port" is written twice; first at line 6'),
    one("duplicate engines", engine() + "engines: []\n", "6:1", '"engines" is written twice'),
    field_of("anchor", "label: &x y", "anchors and aliases (&x) are not allowed", "6:12"),
    field_of("alias", "label: *x", "anchors and aliases (*x) are not allowed", "6:12"),
    field_of("merge key", "<<: {port: 8001}", "merge keys (<<) are not allowed"),
    field_of(
        "python tag", "label: !!python/object/apply:os.system [ls]", 'tag "!!python/object/apply:os.system"', "6:12"
    ),
    field_of("own tag", "label: !vault x", 'the tag "!vault" is not allowed', "6:12"),
    field_of("explicit standard tag", "label: !!str 5", 'the tag "!!str" is not allowed', "6:12"),
    one("tag directive", "%TAG ! tag:x,2000:\n---\n" + engine(), "1:1", "%TAG is not allowed"),
    one("version directive of the future", "%YAML 3.0\n---\n" + engine(), "1:1", "incompatible YAML document"),
    field_of("a number as a key", "metadata: {1: x}", "the key 1 is not a text", "6:16"),
    field_of("a list as a key", "metadata: {[a]: x}", "a key must be a text", "6:16"),
    one("non-UTF-8", engine().encode() + b"    label: caf\xe9\n", "6:15", "byte 0xe9 is not UTF-8"),
    one("UTF-16", engine().encode("utf-16"), "1:1", "the file is UTF-16"),
    one("UTF-16 without a mark", engine().encode("utf-16-le"), "1:2", "a NUL character stands in the file"),
    one("byte order mark", b"\xef\xbb\xbf" + engine().encode(), "1:1", "starts with a byte order mark"),
    field_of("NUL", "label: a\0b", "a NUL character stands in the file", "6:13"),
    field_of("escape character", "label: a\x1b[31mb", "the control character U+001B", "6:13"),
    field_of("line separator", "label: a\u2028b", "the control character U+2028", "6:13"),
    one("empty file", "", "1:1", "the file is empty"),
    one("empty document", "---\n", "1:1", "the file holds no manifest"),
    one("only comments", "# nothing\n\n# yet\n", "1:1", "only comments"),
    one("list on top", "- name: chat\n  model: m\n", "1:1", "the file holds a list, not a mapping"),
    one("text on top", "hello\n", "1:1", "the file holds a single value, not a mapping"),
    one("two documents", engine() + "---\n" + engine(), "6:1", "a second document starts here"),
    one("2 MiB", engine() + "#" * (2 * 1024 * 1024), "1:1", "is larger than 1024 KiB"),
    one("tab as indentation", "version: 1\nname: lab\nengines:\n\t- name: a\n", "4:1", "a tab cannot indent"),
    field_of("unclosed quote", "label: 'x", "the quote that opens here is never closed", "6:12"),
    field_of("unclosed list", "args: [a, b", "did not find expected ',' or ']'", "7:1"),
    field_of("colon in a text", "label: a: b", '":" cannot stand here', "6:13"),
    field_of("at sign", "label: @x", "a plain text cannot start with @", "6:12"),
    field_of("half a surrogate pair", 'label: "\\ud800"', "not valid YAML", "6:15"),
)

_FIELDS = (
    field_of("port 22:22", "port: 22:22", 'port must be "auto" or a number from 1024 to 65535, not the string "22:22"'),
    field_of("port '8000'", "port: '8000'", 'not the string "8000"'),
    field_of("port 0", "port: 0", "port: 0 is below 1024"),
    field_of("port -1", "port: -1", "port: -1 is below 1024"),
    field_of("port 65536", "port: 65536", "port: there is no port 65536: the highest is 65535"),
    field_of("port 10^5000", "port: 1" + "0" * 5000, "is too large", "6:11"),
    field_of("port 1e3", "port: 1e3", "port must be"),
    field_of("port 0o17", "port: 0o17", "port: 15 is below 1024"),
    field_of("port true", "port: true", "not true"),
    field_of("port 1_000", "port: 1_000", 'not the string "1_000"'),
    field_of("quoted boolean", 'use_gpu: "false"', 'use_gpu must be true, false or null, not the string "false"'),
    field_of("use_gpu: no", "use_gpu: no", 'use_gpu must be true, false or null, not the string "no"'),
    field_of("unknown field", "max_lenght: 5", 'unknown field "max_lenght"'),
    field_of("unknown field below", "ready: {timeot: 5s}", 'unknown field "ready.timeot"', "6:13"),
    one("unknown field on top", "projekt: x\n" + engine(), "1:1", 'unknown field "projekt"'),
    one("engine field on top", "model: x\n" + engine(), "1:1", 'unknown field "model"'),
    field_of("wrong kind", "kind: embeding", 'kind must be "llm" or "embedding", not the string "embeding"'),
    field_of("wrong runtime", "runtime: vlm", "runtime must be"),
    one("wrong version", engine(head=HEAD.replace("1", "2")), "1:1", "version must be 1, not the number 2"),
    one("version as a text", engine(head=HEAD.replace("1", "'1'")), "1:1", 'version must be 1, not the string "1"'),
    one("version true", engine(head=HEAD.replace("1", "true")), "1:1", "version must be 1, not true"),
    one("no version", "name: lab\nengines:\n  - {name: a, model: m}\n", "1:1", 'the stack has no "version"'),
    one("no stack name", "version: 1\nengines:\n  - {name: a, model: m}\n", "1:1", 'the stack has no "name"'),
    one("no engines", "version: 1\nname: lab\n", "1:1", 'the stack has no "engines"'),
    one("empty engines", HEAD + "  []\n", "3:1", "engines must not be empty"),
    one("null engines", HEAD, "3:1", "engines must be a list, not null"),
    one("engines as a mapping", HEAD + "  chat: {model: m}\n", "3:1", "engines must be a list, not a mapping"),
    one("engine as a text", HEAD + "  - chat\n", "4:5", 'an engine must be a mapping, not the string "chat"'),
    one("no model", HEAD + "  - name: chat\n    port: 8001\n", "4:5", 'engine has no "model"'),
    one("no name", HEAD + "  - {model: m}\n", "4:5", 'engine has no "name"'),
    one("null model", HEAD + "  - name: chat\n    model:\n", "5:5", "model must be a text, not null"),
    named("name with a slash", "a/b"),
    named("name with dots", "'..'"),
    named("name with a newline", '"a\\n"'),
    named("name with an ANSI escape", '"a\\e[31m"'),
    named("name of 10 kB", "a" * 10_000),
    named("name in look-alike letters", "ch\u0430t"),
    named("name as a number", "7"),
    one("stack name with a slash", engine(head=HEAD.replace("lab", "a/b")), "2:1", "name must be letters"),
    field_of("memory '16 gb'", 'gpu_memory: "16 gb"', 'gpu_memory: "16 gb" is not a size'),
    field_of("memory '-1'", 'gpu_memory: "-1"', 'gpu_memory: "-1" is not a size'),
    field_of("memory '1e400'", 'gpu_memory: "1e400"', 'gpu_memory: "1e400" is not a size'),
    field_of("memory 1e400", "gpu_memory: 1e400", "1e400 is not a finite number", "6:17"),
    field_of("memory .inf", "gpu_memory: .inf", ".inf is not a finite number", "6:17"),
    field_of("memory .nan", "gpu_memory: .nan", ".nan is not a finite number", "6:17"),
    field_of("memory inf", "gpu_memory: inf", 'gpu_memory: "inf" is not a size'),
    field_of("memory without a unit", "gpu_memory: 16", "gpu_memory: 16 has no unit"),
    field_of("memory in the wrong unit", "gpu_memory: 24MiB", "24MiB is too little for any model"),
    field_of("a share of nearly nothing", "gpu_memory: 0.00085", "0.00085 of a GPU is too little for any model"),
    field_of("memory as a list", "gpu_memory: [1]", 'gpu_memory must be "auto", a size such as "24GiB"'),
    field_of("older memory as a text", "required_memory_gb: '16'", "required_memory_gb must be a number"),
    one(
        "memory in both spellings",
        engine("gpu_memory: 1GiB", "required_memory_gb: 1"),
        "7:5",
        "gpu_memory and required_memory_gb are the same field",
    ),
    field_of("number in args", "args: [--x, 8000]", "args[1] must be a text, not the number 8000", "6:17"),
    field_of("args as a text", "args: --x 1", 'args must be a list, not the string "--x 1"'),
    field_of("device as a fraction", "devices: [0, 1.5]", "devices[1] must be a GPU's index or UUID", "6:18"),
    field_of("device index in quotes", 'devices: ["0"]', '"0" is not the UUID of a GPU', "6:15"),
    field_of("device as plans name it", "devices: [gpu1]", '"gpu1" is not the UUID of a GPU', "6:15"),
    field_of("memory 0", "gpu_memory: 0", "gpu_memory: 0 is no memory at all"),
    field_of("memory -1", "gpu_memory: -1", "gpu_memory: -1 is no memory at all"),
    field_of("memory true", "gpu_memory: true", 'gpu_memory must be "auto", a size such as "24GiB", or'),
    field_of("memory in per cent", 'gpu_memory: "70%"', 'gpu_memory: "70%" is not a size'),
    field_of("duration", "ready: {timeout: soon}", 'ready.timeout: "soon" is not a duration', "6:13"),
    field_of("replicas 0", "replicas: 0", "replicas must be at least 1, not 0"),
    field_of("env CUDA_VISIBLE_DEVICES", 'env: {CUDA_VISIBLE_DEVICES: "0"}', "is set by sage alone", "6:11"),
    field_of("env SAGE_PROJECT", "env: {SAGE_PROJECT: x}", "SAGE_PROJECT is set by sage alone", "6:11"),
    field_of("env with a bad name", "env: {A-B: x}", '"A-B" is not a name that a variable can have', "6:11"),
    field_of("env with a number", "env: {A: 1}", "env.A must be a text, not the number 1", "6:11"),
    field_of("literal secret by name", "env: {OPENAI_API_KEY: abcdefgh1234}", "a secret must not stand", "6:11"),
    field_of("literal secret by value", "env: {X: hf_abcdefghijkl}", "a secret must not stand in a manifest", "6:11"),
    field_of("secrets", "secrets: {HF_TOKEN: {env: HF_TOKEN}}", "secrets is not served yet"),
    field_of("memory in args", "args: [--gpu-memory-utilization, '0.9']", "is told by sage; write gpu_memory"),
    one(
        "fraction of an sglang in args",
        engine("runtime: sglang", "args: [--mem-fraction-static=0.9]"),
        "7:5",
        "is told by sage; write gpu_memory",
    ),
    one(
        "layers in args",
        HEAD + "  - name: chat\n    model: ./a.gguf\n    args: [-ngl, '20']\n",
        "6:5",
        "is told by sage; write gpu_memory",
    ),
    one("sglang without a GPU", engine("runtime: sglang", "use_gpu: false"), "7:5", "write use_gpu: true"),
    field_of("rerank", "kind: rerank", "kind: rerank is not served yet"),
    field_of("surge", "update: {strategy: surge}", "update.strategy: surge is not served yet", "6:14"),
    one(
        "a bad default",
        "version: 1\nname: lab\ndefaults:\n  replicas: x\nengines:\n  - {name: a, model: m}\n",
        "4:3",
        'replicas must be a whole number, not the string "x"',
    ),
    one(
        "a default for the name",
        "version: 1\nname: lab\ndefaults: {name: x}\nengines:\n  - {name: a, model: m}\n",
        "3:12",
        "name cannot have a default",
    ),
    one("defaults as a list", "defaults: [x]\n" + engine(), "1:1", "defaults must be a mapping, not a list"),
)

_RULES = (
    field_of("command without runtime", "command: [serve]", "command has no effect without runtime: command"),
    field_of("runtime without command", "runtime: command", "runtime: command needs a command"),
    one("empty command", engine("runtime: command", "command: []"), "7:5", "command is empty"),
    one(
        "unknown placeholder",
        engine("runtime: command", 'command: [serve, "--port={prot}"]'),
        "7:22",
        'unknown placeholder "{prot}" in the command',
    ),
    one(
        "lone brace",
        engine("runtime: command", 'command: [serve, "a}", "{port}"]'),
        "7:22",
        'a lone "}" in the command',
    ),
    one(
        "command without its port",
        engine("runtime: command", 'command: [/bin/sleep, "{{port}}"]'),
        "7:5",
        "the program cannot know its port: sage chooses one",
    ),
    one("GPU field without a GPU", engine("kind: embedding", "devices: [0]"), "7:5", "devices has no effect"),
    one("parallel without a GPU", engine("use_gpu: false", "tensor_parallel: 2"), "7:5", "tensor_parallel has no"),
    field_of("a device twice", "devices: [0, 0]", "the device 0 is named twice", "6:18"),
    one("replicas on one port", engine("replicas: 2", "port: 8001"), "7:5", "2 replicas cannot share port 8001"),
    field_of("the router's port", "port: 8000", "port 8000 is the router's"),
    one(
        "engine name twice",
        HEAD + "  - {name: a, model: m}\n  - {name: a, model: n}\n",
        "5:6",
        'two engines are called "a"; the first is at ',
    ),
    Bad(
        name="stack name twice",
        files={"a.yaml": engine(), "b.yml": engine()},
        expect="b.yml:2:1",
        message='two stacks are called "lab"; the first is at ',
    ),
    Bad(
        name="port twice",
        files={"a.yaml": engine("port: 8001"), "b.yaml": engine("port: 8001", head=HEAD.replace("lab", "two"))},
        expect="b.yaml:6:5",
        message="two/chat and lab/chat both ask for port 8001; the other is at ",
    ),
    Bad(
        name="model name of two kinds",
        files={
            "a.yaml": engine("aliases: [x, best]"),
            "b.yaml": engine("kind: embedding", "served_name: best", head=HEAD.replace("lab", "two")),
        },
        expect="b.yaml:7:5",
        message='clients ask for "best" of two/chat (embedding) and of lab/chat (llm, at ',
    ),
    one(
        "dependency cycle",
        HEAD
        + "  - {name: a, model: m, depends_on: [b]}\n"
        + "  - {name: b, model: m, depends_on: [c, lab/a]}\n"
        + "  - {name: c, model: m}\n",
        "4:38",
        "engines wait for each other: a -> b -> a",
    ),
    field_of("dependency on itself", "depends_on: [chat]", "chat -> chat", "6:18"),
    one(
        "unknown dependency",
        HEAD + "  - {name: a, model: m, depends_on: [embd]}\n  - {name: embed, model: n}\n",
        "4:38",
        'lab/a depends on "embd", which no manifest holds',
    ),
    field_of("spec too large", "args: [" + ", ".join(["x" * 30_000] * 4) + "]", "bytes when written out", "4:5"),
)

_SETTINGS = (
    Bad(
        name="unknown setting",
        files={"sage.yaml": "project: lab\nrouters: {port: 9000}\n", "a.yaml": engine()},
        expect="sage.yaml:2:1",
        message='unknown field "routers"',
    ),
    Bad(
        name="router port as a text",
        files={"sage.yaml": "router:\n  port: '9000'\n", "a.yaml": engine()},
        expect="sage.yaml:2:3",
        message='router.port must be a number from 1024 to 65535, not the string "9000"',
    ),
    Bad(
        name="port pool",
        files={"sage.yaml": "ports: {llm: 8001-}\n", "a.yaml": engine()},
        expect="sage.yaml:1:9",
        message='ports.llm: "8001-" is not a port or a range',
    ),
    Bad(
        name="setting not served yet",
        files={"sage.yaml": "guards: {max_stop: 10%}\n", "a.yaml": engine()},
        expect="sage.yaml:1:1",
        message="guards is not served yet",
    ),
    Bad(
        name="settings twice",
        files={"sage.yaml": "project: lab\n", "sage.yml": "project: lab\n"},
        expect="sage.yml:1:1",
        message="sage.yaml and sage.yml both hold the settings",
    ),
)

_FILES = (
    Bad(name="FIFO", build=_fifo, expect="a.yaml:1:1", message="is a FIFO, not a file"),
    Bad(name="link out", build=_link_out, expect="a.yaml:1:1", message="leads out of its directory"),
    Bad(name="link loop", build=_link_loop, expect="a.yaml:1:1", message="goes in circles"),
    Bad(name="link to nothing", build=_link_to_nothing, expect="a.yaml:1:1", message="No such file or directory"),
    Bad(name="link to a device", build=_link_to_device, expect="a.yaml:1:1", message="leads out of its directory"),
    Bad(name="directory", build=_directory, expect="a.yaml:1:1", message="is a directory, not a file"),
)

BAD: tuple[Bad, ...] = _SYNTAX + _FIELDS + _RULES + _SETTINGS + _FILES
