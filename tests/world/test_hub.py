"""Shapes of models on the hub, from a real HTTP server that behaves as the hub does, and worse."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sage_reconcile.core.shape import ModelShape, UnknownShape
from sage_reconcile.world.hub import Hub
from sage_reconcile.world.models import model_fact, model_shape
from tests.e2e import until
from tests.fake_hub import REVISION, FakeHub, serving
from tests.world.test_models import LLAMA, TENSORS, a_model, safetensors


@pytest.fixture
def serve() -> Iterator[Callable[[FakeHub], FakeHub]]:
    with serving() as begin:
        yield begin


def tiny(tensors: Any = TENSORS, **more: bytes) -> dict[str, bytes]:
    return {"config.json": json.dumps(LLAMA).encode(), "model.safetensors": safetensors(tensors), **more}


def asked(hub: FakeHub, tmp_path: Path, **environment: str) -> ModelShape | UnknownShape:
    own = {"HOME": str(tmp_path), "HF_ENDPOINT": hub.url, **environment}
    return Hub(own).shape(hub.model, own)


def why(found: ModelShape | UnknownShape) -> str:
    assert isinstance(found, UnknownShape), found
    return found.why


def test_the_hub_tells_what_the_same_files_would_here(serve: Callable[[FakeHub], FakeHub], tmp_path: Path) -> None:
    hub = serve(FakeHub(tiny()))

    assert asked(hub, tmp_path) == model_shape(str(a_model(tmp_path / "m")), directory="/", environment={})


def split(count: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """A model in many files, each with a header longer than what is read at first, as (files, files without data)."""
    files, index = {}, {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        tensors = {f"model.layers.{number}.mlp.experts.{e}.up_proj.weight": ("BF16", (8, 64)) for e in range(1500)}
        files[name] = safetensors(tensors)
        index |= dict.fromkeys(tensors, name)
    facts = {"metadata": {"total_size": sum(map(len, files.values()))}, "weight_map": index}
    return {
        "config.json": json.dumps({**LLAMA, "num_hidden_layers": count}).encode(),
        "model.safetensors.index.json": json.dumps(facts).encode(),
    }, files


def test_a_model_in_many_files_is_read_by_their_headers_alone(
    serve: Callable[[FakeHub], FakeHub], tmp_path: Path
) -> None:
    told, weights = split(11)
    here = tmp_path / "here"
    here.mkdir()
    for name, content in (told | weights).items():
        (here / name).write_bytes(content)
    hub = serve(FakeHub(told | weights))

    assert asked(hub, tmp_path) == model_shape(str(here), directory="/", environment={})
    assert hub.sent_bytes < sum(map(len, told.values())) + len(weights) * 400_000 < sum(map(len, weights.values()))


def test_the_token_is_sent_to_the_hub_and_not_to_where_it_leads(
    serve: Callable[[FakeHub], FakeHub], tmp_path: Path
) -> None:
    files = tiny()
    store = serve(FakeHub(files))
    hub = serve(FakeHub(files, elsewhere=store.url))

    found = asked(hub, tmp_path, HF_TOKEN="hf_secret")

    assert isinstance(found, ModelShape)
    assert {headers.get("Authorization") for _, headers in hub.seen} == {"Bearer hf_secret"}
    assert store.seen and all("Authorization" not in headers for _, headers in store.seen)


def test_the_token_of_the_tools_of_the_hub_is_used_unless_that_is_forbidden(
    serve: Callable[[FakeHub], FakeHub], tmp_path: Path
) -> None:
    hub = serve(FakeHub(tiny()))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_of_the_file\n")
    asked(hub, tmp_path, HF_HOME=str(tmp_path / "hf"))
    assert {headers.get("Authorization") for _, headers in hub.seen} == {"Bearer hf_of_the_file"}

    hub.seen.clear()
    asked(hub, tmp_path, HF_HOME=str(tmp_path / "hf"), HF_HUB_DISABLE_IMPLICIT_TOKEN="1")
    asked(hub, tmp_path, HF_TOKEN="two\r\nlines: of it")
    assert {headers.get("Authorization") for _, headers in hub.seen} == {None}


def test_an_address_that_a_manifest_names_gets_no_token_and_no_file_of_the_user(
    serve: Callable[[FakeHub], FakeHub], tmp_path: Path
) -> None:
    """Who plans somebody else's branch must not send what lies on the disk to where that branch says."""
    hub = serve(FakeHub(tiny()))
    (tmp_path / "secret").write_text("AKIASECRET\n")
    own = {"HOME": str(tmp_path), "HF_TOKEN": "hf_of_the_user"}
    engine = own | {"HF_ENDPOINT": hub.url, "HF_TOKEN_PATH": str(tmp_path / "secret"), "HF_TOKEN": ""}

    for environment in (engine, own | {"HF_ENDPOINT": hub.url}):
        assert isinstance(Hub(own).shape(hub.model, environment), ModelShape)
    assert {headers.get("Authorization") for _, headers in hub.seen} == {None}


def test_a_proxy_s_password_is_for_the_proxy_alone(
    serve: Callable[[FakeHub], FakeHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tiny()
    store = serve(FakeHub(files))
    proxy = serve(FakeHub(files, elsewhere=store.url))
    monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//user:password@"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    own = {"HOME": str(tmp_path), "HF_ENDPOINT": "http://hub.test"}

    assert isinstance(Hub(own).shape("lab/tiny", own), ModelShape)
    assert all("Proxy-Authorization" in headers for _, headers in map(titled, proxy.seen))
    assert store.seen and all("Proxy-Authorization" not in headers for _, headers in map(titled, store.seen))


def titled(request: tuple[str, Mapping[str, str]]) -> tuple[str, dict[str, str]]:
    return request[0], {name.title(): value for name, value in request[1].items()}


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_hub_that_may_not_be_asked_is_not(serve: Callable[[FakeHub], FakeHub], tmp_path: Path, name: str) -> None:
    hub = serve(FakeHub(tiny()))

    assert name in why(asked(hub, tmp_path, **{name: "1"}))
    assert hub.seen == []


def test_what_is_not_there_or_not_for_everybody_is_told_with_what_may_help(
    serve: Callable[[FakeHub], FakeHub], tmp_path: Path
) -> None:
    hub = serve(FakeHub(tiny()))
    hub.odd["/api/models/lab/private"] = (401, {}, b"no")
    hub.odd["/api/models/lab/missing"] = (404, {}, b"no")
    hub.odd["/api/models/lab/broken"] = (500, {}, b"no")
    environment = {"HOME": str(tmp_path), "HF_ENDPOINT": hub.url}

    assert "HF_TOKEN" in why(Hub(environment).shape("lab/private", environment))
    assert "has no lab/missing" in why(Hub(environment).shape("lab/missing", environment))
    assert "500" in why(Hub(environment).shape("lab/broken", environment))
    assert "neither a path nor the id" in why(Hub(environment).shape("../etc", environment))


@pytest.mark.parametrize(
    ("path", "answer", "word"),
    [
        ("/api/models/lab/tiny", (200, {}, b"<html>"), "not JSON"),
        ("/api/models/lab/tiny", (200, {}, b'{"sha": "../..", "siblings": []}'), "names no revision"),
        ("/api/models/lab/tiny", (200, {}, b'{"sha": "abc", "siblings": [1, {"rfilename": 2}]}'), "no config.json"),
        ("/api/models/lab/tiny", (302, {"Location": "file:///etc/passwd"}, b""), "answered 302"),
        ("/api/models/lab/tiny", (302, {"Location": "/api/models/lab/tiny"}, b""), "answered 302"),
        (f"/lab/tiny/resolve/{REVISION}/config.json", (200, {}, b"[]"), "JSON object"),
        (f"/lab/tiny/resolve/{REVISION}/config.json", (200, {"Content-Length": "9" * 12}, b"{}"), "larger than"),
        (f"/lab/tiny/resolve/{REVISION}/model.safetensors", (200, {}, b"12"), "cut short"),
        (
            f"/lab/tiny/resolve/{REVISION}/model.safetensors",
            (206, {"Content-Range": "bytes 5-9/100"}, b"12345"),
            "another part",
        ),
    ],
)
def test_odd_answers_are_sentences(
    serve: Callable[[FakeHub], FakeHub],
    tmp_path: Path,
    path: str,
    answer: tuple[int, Mapping[str, str], bytes],
    word: str,
) -> None:
    hub = serve(FakeHub(tiny(), odd={path: answer}))

    assert word in why(asked(hub, tmp_path))


def test_a_server_without_ranges_is_good_enough_for_small_headers(
    serve: Callable[[FakeHub], FakeHub], tmp_path: Path
) -> None:
    assert isinstance(asked(serve(FakeHub(tiny(), ignores_ranges=True)), tmp_path), ModelShape)


def test_a_model_of_which_the_weights_are_in_the_older_format_is_known_by_their_size(
    serve: Callable[[FakeHub], FakeHub], tmp_path: Path
) -> None:
    files = {"config.json": json.dumps(LLAMA).encode(), "pytorch_model.bin": bytes(200_000)}
    here = tmp_path / "here"
    here.mkdir()
    for name, content in files.items():
        (here / name).write_bytes(content)

    assert asked(serve(FakeHub(files)), tmp_path) == model_shape(str(here), directory="/", environment={})


def test_a_hub_that_never_answers_is_waited_for_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        environment = {"HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{deaf.getsockname()[1]}"}
        hub = Hub(environment, deadline_seconds=0.3)
        began = time.monotonic()
        first = why(hub.shape("lab/one", environment))
        waited = time.monotonic() - began
        second = why(hub.shape("lab/two", environment))

        assert "did not tell of lab/one in 0.3 s" in first and second == first
        assert time.monotonic() - began < 2 * waited


def test_a_hub_that_is_not_there_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    environment = {"HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{port}"}

    assert f"127.0.0.1:{port} cannot be reached: " in why(Hub(environment).shape("lab/tiny", environment))


@pytest.mark.parametrize(
    "endpoint", ["ftp://127.0.0.1", "127.0.0.1", "http://", "http://u:secret@127.0.0.1", "http://[", "http://\u00e4"]
)
def test_an_address_that_is_none_is_refused_and_not_repeated(tmp_path: Path, endpoint: str) -> None:
    environment = {"HOME": str(tmp_path), "HF_ENDPOINT": endpoint}
    found = why(Hub(environment).shape("lab/tiny", environment))

    assert "HF_ENDPOINT" in found and "secret" not in found


def test_the_cache_is_asked_before_the_hub(serve: Callable[[FakeHub], FakeHub], tmp_path: Path) -> None:
    hub = serve(FakeHub(tiny()))
    environment = {"HF_HUB_CACHE": str(tmp_path), "HOME": str(tmp_path), "HF_ENDPOINT": hub.url}

    assert model_fact("lab/tiny", environment=environment, shape=True).shape is None
    assert hub.seen == []
    assert model_fact("lab/tiny", environment=environment, shape=True, hub=Hub(environment)).shape is not None
    assert hub.seen != []

    hub.seen.clear()
    a_model(tmp_path / "models--lab--tiny" / "snapshots" / "abc")
    assert model_fact("lab/tiny", environment=environment, shape=True, hub=Hub(environment)).shape is not None
    assert hub.seen == []


def test_why_there_is_no_shape_tells_of_the_cache_and_of_the_hub(
    serve: Callable[[FakeHub], FakeHub], tmp_path: Path
) -> None:
    hub = serve(FakeHub({}))
    environment = {"HF_HUB_CACHE": str(tmp_path), "HOME": str(tmp_path), "HF_ENDPOINT": hub.url}

    told = model_fact("lab/tiny", environment=environment, shape=True, hub=Hub(environment)).shape_why
    assert "not in the hub's cache" in told and "has no config.json" in told


def test_the_body_of_a_redirect_is_not_read(serve: Callable[[FakeHub], FakeHub], tmp_path: Path) -> None:
    hub = serve(FakeHub(tiny()))
    hub.odd["/api/models/lab/tiny"] = (302, {"Location": "/api/models/lab/moved"}, bytes(200_000_000))
    hub.odd["/api/models/lab/moved"] = (404, {}, b"")

    assert "has no lab/tiny" in why(asked(hub, tmp_path))
    assert hub.sent_bytes < 20_000_000, "what the kernel takes"


def test_headers_of_all_files_together_have_a_limit(serve: Callable[[FakeHub], FakeHub], tmp_path: Path) -> None:
    told, weights = split(11)
    hub = serve(FakeHub(told | weights))
    own = {"HOME": str(tmp_path), "HF_ENDPOINT": hub.url}

    assert "more memory than those of any model" in why(Hub(own, most_bytes=1_500_000).shape(hub.model, own))


def test_what_is_under_way_ends_with_the_time_that_it_has(serve: Callable[[FakeHub], FakeHub], tmp_path: Path) -> None:
    """A server that goes on and on: nobody waits for it, and its thread ends, too."""
    before = set(threading.enumerate())
    with raw_server(b"HTTP/1.1 200 OK\r\nContent-Length: 30000000\r\n\r\n", forever=b" ") as url:
        own = {"HOME": str(tmp_path), "HF_ENDPOINT": url}
        assert "did not tell of lab/tiny in 0.3 s" in why(Hub(own, deadline_seconds=0.3).shape("lab/tiny", own))
        until(lambda: len(set(threading.enumerate()) - before) == 1, "the server's thread is the only new one")


def test_a_server_s_words_cannot_steer_a_terminal(tmp_path: Path) -> None:
    with raw_server(b"\x1b]0;pwned\x07\x1b[31mgarbage\r\n\r\n") as url:
        own = {"HOME": str(tmp_path), "HF_ENDPOINT": url}
        told = why(Hub(own).shape("lab/tiny", own))

    assert "garbage" in told and told.isprintable()


@contextmanager
def raw_server(answer: bytes, *, forever: bytes = b"") -> Iterator[str]:
    """Says the same to everybody, and then the other for as long as somebody listens."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)

        def serve() -> None:
            while not over.is_set():
                with contextlib.suppress(OSError):
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(answer)
                        while forever and not over.is_set():
                            connection.sendall(forever)
                            time.sleep(0.02)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            over.set()
            thread.join()


def test_names_that_no_address_can_hold_are_left_out(serve: Callable[[FakeHub], FakeHub], tmp_path: Path) -> None:
    files = tiny()
    hub = serve(FakeHub(files | {"weights.safetensors": files["model.safetensors"]}))
    names = ["config.json", "weights.safetensors", "odd\ud800.safetensors", "\x1b[31m.safetensors"]
    listed = {"sha": REVISION, "siblings": [{"rfilename": name} for name in names]}
    hub.odd["/api/models/lab/tiny"] = (200, {}, json.dumps(listed).encode())

    assert isinstance(asked(hub, tmp_path), ModelShape)


def test_a_machine_without_threads_has_a_plan_all_the_same(tmp_path: Path) -> None:
    own = {"HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:1"}
    # No address space is left for a stack of that size.
    before = threading.stack_size(1 << 46)
    try:
        told = why(Hub(own).shape("lab/tiny", own))
    finally:
        threading.stack_size(before)

    assert "no thread can be started" in told


def test_one_odd_answer_says_nothing_of_other_models(serve: Callable[[FakeHub], FakeHub], tmp_path: Path) -> None:
    hub = serve(FakeHub(tiny()))
    hub.odd["/api/models/lab/odd"] = (302, {"Location": "http://127.0.0.1:1/"}, b"")
    own = {"HOME": str(tmp_path), "HF_ENDPOINT": hub.url}
    one = Hub(own)

    assert isinstance(one.shape("lab/tiny", own), ModelShape)
    assert "cannot be reached" in why(one.shape("lab/odd", own))
    assert isinstance(one.shape("lab/tiny", own), ModelShape)
