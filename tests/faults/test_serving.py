"""The router over engines that come, change and die: `sage serve` as a process, asked as an app would ask it."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest

from tests.e2e import Place, fake, kill, until
from tests.long_lived import assert_holds_no_more_after, assert_serves_what_is_ready
from tests.tiny_gguf import write_tiny_gguf

_CHAT = "/v1/chat/completions"

# The router looks every 0.4 s; on a busy machine with two cores a look itself may take half a second.
_SOON_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One response."""

    status: int
    headers: dict[str, str]
    content: dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Stream:
    """A chat that streams, read in a thread of its own."""

    port: int
    model: str
    events: list[str] = field(default_factory=list)
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("POST", _CHAT, json.dumps({**_asked(self.model), "stream": True}), _JSON)
        try:
            for line in connection.getresponse():
                if line.startswith(b"data: "):
                    self.events.append(line.decode().removeprefix("data: ").strip())
        except (http.client.HTTPException, OSError) as error:
            self.events.append(type(error).__name__)
        finally:
            connection.close()

    def until_it_runs(self) -> None:
        until(lambda: self.events, "the stream has begun")

    def ended(self) -> list[str]:
        """All its events, once it has ended."""
        self.thread.join(30)
        assert not self.thread.is_alive(), "the stream does not end"
        return self.events


_JSON = {"Content-Type": "application/json"}


def _asked(model: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hello"}]}


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), _JSON)
        response = connection.getresponse()
        content = json.loads(response.read())
        return Answer(status=response.status, headers=dict(response.getheaders()), content=content)
    finally:
        connection.close()


def models(port: int) -> set[str]:
    return {entry["id"] for entry in ask(port, "/v1/models").content["data"]}


@contextmanager
def serving(place: Place) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """`sage serve`, until it is ended by a SIGTERM, or by the test. At its end it serves what is ready."""
    port = place.spare[1]
    with place.started("serve", "--port", str(port)) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == f"serving http://127.0.0.1:{port}/v1 (Ctrl-C drains and stops)\n"
        yield process, port
        if process.poll() is None:
            assert_serves_what_is_ready(place, port)
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0
        place.said.append(process.stderr.read())


@contextmanager
def loaded(port: int, model: str) -> Iterator[list[Answer]]:
    """A client that asks again and again, and a few more times after the test has done its act. Yields its answers."""
    answers: list[Answer] = []
    stopping = threading.Event()

    def run() -> None:
        while not stopping.wait(0.02):
            answers.append(ask(port, _CHAT, _asked(model)))

    client = threading.Thread(target=run)
    client.start()
    try:
        until(lambda: len(answers) > 3, "the client is answered")
        yield answers
        count = len(answers)
        until(lambda: len(answers) > count + 10, "the client is answered after the act")
    finally:
        stopping.set()
        client.join()


def assert_all_served(answers: list[Answer]) -> None:
    failed = {answer.status: answer.content["error"]["message"] for answer in answers if answer.status != 200}
    assert failed == {}


def mine(place: Place, *names: str) -> set[str]:
    """Model names that no other test has: a router sees all engines of its user."""
    return {served(place, name) for name in names}


def served(place: Place, name: str) -> str:
    return f"{place.project}-{name}"


def engine(place: Place, name: str, *modes: str, **fields: Any) -> dict[str, Any]:
    return fake(name, *modes, **({"served_name": served(place, name)} | fields))


# How often engines come and go while one router lives on.
CYCLES = 100 if os.environ.get("CHAOS") == "1" else 4


# --- coming and going -------------------------------------------------------------------------------------------------


def test_engines_are_served_soon_after_they_come_and_not_after_they_go(place: Place) -> None:
    wanted = mine(place, "chat", "embed")
    place.write(engine(place, "chat"), engine(place, "embed", kind="embedding"))
    with serving(place) as (_, port):
        assert not models(port) & wanted
        assert ask(port, _CHAT, _asked(served(place, "chat"))).status == 404

        place.apply()

        until(lambda: models(port) >= wanted, "the engines are listed", _SOON_SECONDS)
        assert ask(port, _CHAT, _asked(served(place, "chat"))).status == 200
        embedded = ask(port, "/v1/embeddings", {"model": served(place, "embed"), "input": "x"})
        assert len(embedded.content["data"][0]["embedding"]) == 8
        # What an engine is comes from its manifest: an embedding server is never asked to chat.
        confused = ask(port, _CHAT, _asked(served(place, "embed")))
        assert (confused.status, confused.content["error"]["code"]) == (400, "wrong_kind")

        place.sage("down", str(place.manifests), "-y")

        until(lambda: not models(port) & wanted, "the engines are listed no more", _SOON_SECONDS)
    place.assert_nothing_left()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", [pytest.param("serve", marks=pytest.mark.chaos), "up"])
def test_a_sage_that_lives_on_while_engines_die_and_come_holds_no_more_than_at_first(
    place: Place, command: str
) -> None:
    place.write(engine(place, "chat"))
    port = place.spare[0]
    words = {"serve": ("serve",), "up": ("up", str(place.manifests), "-y")}[command]
    with place.started(*words, "--port", str(port)) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("serving "):
            pass

        def cycle() -> None:
            place.apply()
            until(lambda: ask(port, _CHAT, _asked(served(place, "chat"))).status == 200, "the engine is served")
            kill(place.pids()["lab/chat"])
            until(lambda: ask(port, _CHAT, _asked(served(place, "chat"))).status != 200, "its end is known")

        assert_holds_no_more_after(process.pid, cycle, cycles=CYCLES)
        place.apply()
        assert_serves_what_is_ready(place, port)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_serve_of_a_project_serves_that_project_and_no_other(place: Place) -> None:
    other = place.root / "other"
    other.mkdir()
    settings = {"project": f"{place.project}-b", "ports": {"llm": f"{place.spare[4]}-{place.spare[6]}"}}
    (other / "sage.yaml").write_text(json.dumps(settings))
    place.write(engine(place, "theirs"), stack="far", directory=other)
    place.write(engine(place, "chat"), engine(place, "dies"))
    place.apply()
    place.sage("apply", str(other), "-y")
    port = place.spare[0]
    try:
        with place.started("serve", "-p", place.project, "--port", str(port)) as process:
            assert process.stderr is not None
            process.stderr.readline()

            assert models(port) == mine(place, "chat", "dies")
            assert ask(port, _CHAT, _asked(served(place, "chat"))).status == 200
            assert ask(port, _CHAT, _asked(served(place, "theirs"))).status == 404
            kill(place.pids()["lab/dies"])
            kill(place.pids()["far/theirs"])
            until(lambda: models(port) == mine(place, "chat"), "the dead are not listed")
            # Without a model: the only one of the project is meant, whatever others there are.
            assert ask(port, _CHAT, {"messages": []}).status == 200
            assert ask(port, _CHAT, _asked(served(place, "theirs"))).status == 404
    finally:
        place.sage("down", "-p", f"{place.project}-b", "-y")


def test_an_engine_that_still_loads_or_hangs_is_not_listed(place: Place) -> None:
    place.write(engine(place, "chat"), engine(place, "loads", "--never-ready"), engine(place, "hangs"))
    place.apply("--no-wait")
    place.sage("wait", "lab/chat", "lab/hangs", "-p", place.project)
    os.kill(place.pids()["lab/hangs"], signal.SIGSTOP)
    with serving(place) as (_, port):
        until(
            lambda: models(port) & mine(place, "chat", "loads", "hangs") == mine(place, "chat"), "chat alone is listed"
        )


def test_policy_that_was_edited_is_served_without_a_restart(place: Place) -> None:
    place.write(engine(place, "chat"))
    place.apply()
    pids = place.pids()
    nickname = served(place, "nickname")
    with serving(place) as (_, port):
        place.write(engine(place, "chat", aliases=[nickname]))
        place.apply()

        until(lambda: ask(port, _CHAT, _asked(nickname)).status == 200, "the alias is served", _SOON_SECONDS)
    assert place.pids() == pids


def test_router_that_was_killed_knows_everything_again_at_once(place: Place) -> None:
    place.write(engine(place, "chat", replicas=2), engine(place, "embed", kind="embedding"))
    place.apply()
    pids = place.pids()
    with serving(place) as (process, _):
        process.kill()
        process.wait()

    with serving(place) as (_, port):
        first = ask(port, _CHAT, _asked(served(place, "chat")))
        assert models(port) >= mine(place, "chat", "embed")
    assert first.status == 200
    assert place.pids() == pids
    # A router that died is not waited for when an engine stops.
    assert place.sage("down", str(place.manifests), "-y").seconds < 8
    place.assert_nothing_left()


def test_losing_the_state_directory_fails_no_request(place: Place) -> None:
    """Who looks anew then goes by the engine's list of models: it names what clients ask for."""
    place.write(engine(place, "chat", model=served(place, "chat")))
    place.apply()
    with serving(place) as (process, port), loaded(port, served(place, "chat")) as answers:
        mine = place.state / "routers" / f"{process.pid}.json"
        until(mine.exists, "the router has said what it does")
        shutil.rmtree(place.state, ignore_errors=True)

        until(mine.exists, "the router says it again")

    assert_all_served(answers)


# --- changes under load -----------------------------------------------------------------------------------------------


def test_stream_runs_to_its_end_before_its_engine_is_replaced(place: Place) -> None:
    place.write(engine(place, "chat", "--tokens", "40", "--token-delay", "0.05"))
    place.apply()
    before = place.pids()
    with serving(place) as (_, port):
        stream = Stream(port=port, model=served(place, "chat"))
        stream.until_it_runs()
        place.write(engine(place, "chat", "--tokens", "2"))

        place.apply()

        events = stream.ended()
        assert events[-1] == "[DONE]"
        assert len(events) == 40 + 2
        after = place.pids()
        assert after != before
        answer = until(
            lambda: (found := ask(port, _CHAT, _asked(served(place, "chat")))).status == 200 and found,
            "the new process is served",
            _SOON_SECONDS,
        )
        assert answer.content["usage"]["completion_tokens"] == 2
    place.assert_at_rest()


def test_stream_that_is_longer_than_the_drain_is_cut_and_told_so(place: Place) -> None:
    update = {"grace": "1s", "drain": "0.5s"}
    place.write(engine(place, "chat", "--tokens", "200", "--token-delay", "0.1", update=update))
    place.apply()
    with serving(place) as (_, port):
        stream = Stream(port=port, model=served(place, "chat"))
        stream.until_it_runs()

        ran = place.sage("down", str(place.manifests), "-y")

        events = stream.ended()
        assert ran.seconds < 10
        assert "[DONE]" not in events
        assert json.loads(events[-1])["error"]["code"] == "engine_died"
    place.assert_nothing_left()


def test_no_request_fails_while_replicas_are_replaced(place: Place) -> None:
    place.write(engine(place, "chat", replicas=2))
    place.apply()
    before = place.pids()
    with serving(place) as (_, port), loaded(port, served(place, "chat")) as answers:
        place.write(engine(place, "chat", "--tokens", "2", replicas=2))

        place.apply()

    assert_all_served(answers)
    assert answers[-1].content["usage"]["completion_tokens"] == 2
    assert not set(before.values()) & set(place.pids().values())
    place.assert_at_rest()


# --- deaths -----------------------------------------------------------------------------------------------------------


def test_engine_that_died_is_told_and_when_to_ask_again(place: Place) -> None:
    place.write(engine(place, "chat"))
    place.apply()
    (pid,) = place.pids().values()
    with serving(place) as (_, port):
        assert ask(port, _CHAT, _asked(served(place, "chat"))).status == 200
        kill(pid)

        answer = ask(port, _CHAT, _asked(served(place, "chat")))

        assert (answer.status, answer.content["error"]["code"]) == (503, "not_ready")
        assert int(answer.headers["Retry-After"]) > 0
        place.apply()
        until(lambda: ask(port, _CHAT, _asked(served(place, "chat"))).status == 200, "it is served", _SOON_SECONDS)


@pytest.mark.parametrize("victim", ["lab/chat", "lab/chat#1"])
def test_replica_answers_for_one_that_died(place: Place, victim: str) -> None:
    place.write(engine(place, "chat", replicas=2))
    place.apply()
    with serving(place) as (_, port):
        assert ask(port, _CHAT, _asked(served(place, "chat"))).status == 200
        kill(place.pids()[victim])

        answers = [ask(port, _CHAT, _asked(served(place, "chat"))).status for _ in range(5)]

    assert answers == [200] * 5


def test_stream_whose_engine_dies_ends_with_an_error_and_others_go_on(place: Place) -> None:
    slow = ["--tokens", "30", "--token-delay", "0.05"]
    place.write(engine(place, "chat", *slow), engine(place, "other", *slow))
    place.apply()
    with serving(place) as (_, port):
        doomed, other = (Stream(port=port, model=served(place, name)) for name in ("chat", "other"))
        doomed.until_it_runs()
        other.until_it_runs()

        kill(place.pids()["lab/chat"])

        events = doomed.ended()
        assert "[DONE]" not in events
        assert json.loads(events[-1])["error"]["code"] == "engine_died"
        assert other.ended()[-1] == "[DONE]"


def test_engine_that_crashes_while_an_apply_waits_for_another_is_not_served(place: Place) -> None:
    place.write(engine(place, "chat"))
    place.apply()
    place.write(engine(place, "chat"), engine(place, "slow", "--ready-after", "1.5"))
    with serving(place) as (_, port), place.started("apply", str(place.manifests), "-y") as process:
        until(lambda: len(place.pids()) == 2, "the slow engine is started")
        kill(place.pids()["lab/chat"])

        # Not ready is not served, by whatever name.
        assert ask(port, _CHAT, _asked(served(place, "slow"))).status in (404, 503)
        assert ask(port, _CHAT, _asked(served(place, "chat"))).status in (502, 503)
        assert process.wait(20) == 0
    place.apply()
    place.assert_at_rest()


# --- apps -------------------------------------------------------------------------------------------------------------


def test_openai_client_chats_streams_and_embeds(place: Place) -> None:
    place.write(engine(place, "chat", aliases=[served(place, "gpt-x")]), engine(place, "embed", kind="embedding"))
    place.apply()
    with serving(place) as (_, port):
        assert_client_works(port, served(place, "chat"), served(place, "embed"))
        assert_client_works(port, served(place, "gpt-x"), f"{place.project}:lab/embed")


@pytest.mark.e2e
def test_openai_client_chats_streams_and_embeds_with_the_real_llama_cpp(place: Place) -> None:
    pytest.importorskip("xllamacpp")
    write_tiny_gguf(place.manifests / "tiny.gguf")
    write_tiny_gguf(place.manifests / "vectors.gguf", embedding=True)
    fields = {"runtime": "llama.cpp", "use_gpu": False, "max_model_len": 512}
    place.write(
        {"name": "chat", "model": "./tiny.gguf", "served_name": served(place, "chat"), **fields},
        {
            "name": "vectors",
            "kind": "embedding",
            "model": "./vectors.gguf",
            "served_name": served(place, "vectors"),
            **fields,
        },
    )
    place.apply()
    with serving(place) as (_, port):
        assert_client_works(port, served(place, "chat"), served(place, "vectors"))
        # A client that leaves in the middle must not keep the engine busy for the next.
        started = time.monotonic()
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(
                model=served(place, "chat"), messages=[{"role": "user", "content": "hello"}], stream=True
            )
            next(iter(stream))
            stream.close()
            assert_client_works(port, served(place, "chat"), served(place, "vectors"))
        assert time.monotonic() - started < 15


def assert_client_works(port: int, chat: str, embed: str) -> None:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        messages: list[Any] = [{"role": "user", "content": "hello"}]
        answer = client.chat.completions.create(model=chat, messages=messages, max_tokens=3)
        assert answer.choices[0].message.content
        assert answer.usage is not None and answer.usage.completion_tokens == 3
        chunks = list(client.chat.completions.create(model=chat, messages=messages, max_tokens=3, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        vectors = client.embeddings.create(model=embed, input=["one", "two", "one"]).data
        assert vectors[0].embedding == pytest.approx(vectors[2].embedding, abs=1e-5)
        assert vectors[0].embedding != pytest.approx(vectors[1].embedding, abs=1e-5)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="nobody/has-this", messages=messages)
