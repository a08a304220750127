"""Which engine a request goes to, what each side gets to see of the other, and what the router says itself."""

import json
import socket
import threading
from pathlib import Path

import pytest
from openai import APIError, NotFoundError, OpenAI

from sage_reconcile.core.routes import Absent
from sage_reconcile.router.limits import Limits
from tests.builders import identity, the_id
from tests.router.street import (
    CHAT,
    EVENTS,
    Line,
    answers,
    ask,
    backend,
    fake_engine,
    post_bytes,
    raw,
    router,
    scripted,
    table,
    wait_until,
)


def test_a_body_that_names_the_engines_model_passes_byte_for_byte() -> None:
    body = (
        '{ "messages":[{"role":"user","content":"Grüße \\u00e9 🌍"}],\r\n\t"model" :"chat-model", "n":1.50e0 }'.encode()
    )
    with scripted(answers) as engine, router(backend(engine.port)) as front:
        answer = ask(front.port, "POST", CHAT, body)

    assert answer.status == 200
    assert engine.lines[0].body == body


@pytest.mark.parametrize("name", ["nickname", "lab/chat", "lab:lab/chat"])
def test_an_alias_or_an_id_becomes_the_engines_model_and_nothing_else_changes(name: str) -> None:
    body = b'{"x":  1,"model": "%s" ,"messages":[]}'
    served = backend(1, aliases=("nickname", "lab:lab/chat"))
    with scripted(answers) as engine, router(backend(engine.port, aliases=served.names)) as front:
        answer = ask(front.port, "POST", CHAT, body % name.encode())

    assert answer.json()["model"] == "chat-model"
    assert engine.lines[0].body == body % b"chat-model"
    assert answer.headers["x-sage-engine"] == "lab/chat"


def test_only_the_headers_on_the_lists_pass_in_either_direction() -> None:
    odd = "Set-Cookie: a=b\r\nX-Request-ID: 7\r\nX-Internal: 1\r\nTrailer: x\r\nServer: uvicorn\r\n"
    sent = {
        "Authorization": "Bearer secret",
        "Cookie": "session=secret",
        "Proxy-Authorization": "secret",
        "X-Forwarded-For": "1.2.3.4",
        "Connection": "X-Custom",
        "X-Custom": "1",
        "TE": "trailers",
        "Accept-Encoding": "gzip",
        "Accept": "application/json",
        "User-Agent": "an app",
        "X-Request-ID": "7",
    }
    with scripted(lambda line: line.say_json({}, headers=odd)) as engine, router(backend(engine.port)) as front:
        answer = ask(front.port, "POST", CHAT, {"model": "chat-model"}, sent)

    assert engine.lines[0].headers() == {
        "host": f"127.0.0.1:{engine.port}",
        "content-type": "application/json",
        "accept": "application/json",
        "user-agent": "an app",
        "x-request-id": "7",
        "accept-encoding": "identity",
        "content-length": "23",
        "connection": "close",
    }
    assert sorted(answer.headers) == [
        "content-length", "content-type", "date", "server", "x-request-id", "x-sage-engine",
    ]  # fmt: skip
    assert answer.headers["server"] == "sage"


def test_a_proxy_of_the_environment_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with scripted(answers) as engine, router(backend(engine.port)) as front:
        assert ask(front.port, "POST", CHAT, {}).status == 200


@pytest.mark.parametrize("status", ["400 Bad Request", "429 Too Many Requests", "500 Internal Server Error"])
def test_an_engines_own_error_passes_as_it_is(status: str) -> None:
    with scripted(lambda line: line.say_json({"error": "so"}, status)) as engine, router(backend(engine.port)) as front:
        answer = ask(front.port, "POST", CHAT, {})

    assert (answer.status, answer.json()) == (int(status[:3]), {"error": "so"})
    assert len(engine.lines) == 1


def test_the_least_busy_replica_is_asked() -> None:
    def slow(line: Line) -> None:
        line.wait_for_test()
        answers(line)

    with (
        scripted(slow) as first,
        scripted(slow) as second,
        router(backend(first.port, pid=1), backend(second.port, "lab/chat#1", pid=2)) as front,
    ):
        clients = []
        for count in range(1, 7):
            clients.append(threading.Thread(target=ask, args=(front.port, "POST", CHAT, {"model": "chat-model"})))
            clients[-1].start()
            wait_until(lambda count=count: len(first.lines) + len(second.lines) == count)

        assert front.traffic.in_flight() == ((identity(1), 3), (identity(2), 3))
        first.let_go.release(3)
        wait_until(lambda: front.traffic.in_flight() == ((identity(2), 3),))
        second.let_go.release(3)
        wait_until(lambda: front.traffic.in_flight() == ())
        for client in clients:
            client.join(5)


def test_more_than_an_engine_may_take_is_told_to_come_back() -> None:
    def slow(line: Line) -> None:
        line.wait_for_test()
        answers(line)

    with scripted(slow) as engine, router(backend(engine.port, max_in_flight=1)) as front:
        client = threading.Thread(target=ask, args=(front.port, "POST", CHAT, {}))
        client.start()
        wait_until(lambda: engine.lines)

        refused = ask(front.port, "POST", CHAT, {})

        engine.let_go.release()
        client.join(5)
        assert (refused.status, refused.code(), refused.headers["retry-after"]) == (503, "overloaded", "1")


def test_more_requests_than_the_router_takes_are_told_so_and_health_still_answers() -> None:
    def slow(line: Line) -> None:
        line.wait_for_test()
        answers(line)

    with scripted(slow) as engine, router(backend(engine.port), limits=Limits(requests=1)) as front:
        client = threading.Thread(target=ask, args=(front.port, "POST", CHAT, {}))
        client.start()
        wait_until(lambda: engine.lines)

        refused = ask(front.port, "POST", CHAT, {})
        healthy = ask(front.port, "GET", "/health")

        engine.let_go.release()
        client.join(5)
        assert (refused.status, refused.code(), healthy.status) == (503, "overloaded", 200)
        engine.let_go.release()
        assert ask(front.port, "POST", CHAT, {}).status == 200


def test_a_request_that_no_engine_can_answer_is_told_why_and_goes_nowhere() -> None:
    absent = Absent(engine=the_id("lab/big"), kind="llm", model="big", names=("big", "lab/big"))
    with scripted(answers) as engine:
        chat = backend(engine.port)
        vectors = backend(engine.port, "lab/vectors", pid=2, kind="embedding", model="vectors")
        loading = backend(engine.port, "lab/late", pid=3, model="late", state="starting", reason="it loads")
        with router() as front:
            front.traffic.use(table(chat, vectors, loading, absent=(absent,)))
            unknown = ask(front.port, "POST", CHAT, {"model": "nobody"})
            wrong_kind = ask(front.port, "POST", "/v1/embeddings", {"model": "chat-model"})
            not_ready = ask(front.port, "POST", CHAT, {"model": "late"})
            not_running = ask(front.port, "POST", CHAT, {"model": "big"})
            not_text = ask(front.port, "POST", CHAT, {"model": 7})

    assert (unknown.status, unknown.code()) == (404, "model_not_found")
    assert unknown.json()["error"]["message"] == 'there is no model "nobody"; there is big, chat-model, late, vectors'
    assert unknown.json()["error"]["param"] == "model"
    assert (wrong_kind.status, wrong_kind.code()) == (400, "wrong_kind")
    assert (not_ready.status, not_ready.code(), not_ready.headers["retry-after"]) == (503, "not_ready", "5")
    assert (not_running.status, not_running.code()) == (503, "not_ready")
    assert (not_text.status, not_text.code()) == (400, "invalid_model")
    assert engine.connections == 0


def test_no_engine_at_all_is_a_503_at_once() -> None:
    with router() as front:
        refused = ask(front.port, "POST", CHAT, {})
        took = wait_until(lambda: ask(front.port, "POST", CHAT, {}).status == 503)

    assert (refused.status, refused.code(), refused.headers["retry-after"]) == (503, "no_backend", "5")
    # Generous: a connect and an answer are about 2 ms.
    assert took < 0.5


@pytest.mark.parametrize("body", [b"{}", b'{"model": null}', b'{"model": ""}'])
def test_without_a_model_the_only_one_is_meant(body: bytes) -> None:
    with scripted(answers) as engine:
        vectors = backend(1, "lab/vectors", pid=2, kind="embedding", model="vectors")
        with router(backend(engine.port), vectors) as front:
            answer = ask(front.port, "POST", CHAT, body)

    assert (answer.status, answer.headers["x-sage-engine"]) == (200, "lab/chat")
    assert engine.lines[0].body == (b"{}" if body == b"{}" else b'{"model": "chat-model"}')


def test_without_a_model_two_are_too_many() -> None:
    with scripted(answers) as engine:
        other = backend(engine.port, "lab/other", pid=2, model="other")
        with router(backend(engine.port), other) as front:
            refused = ask(front.port, "POST", CHAT, {})

    assert (refused.status, refused.code()) == (400, "model_required")
    assert engine.connections == 0


def test_models_health_and_readiness_follow_the_table_at_once() -> None:
    with router() as front:
        before = [ask(front.port, "GET", path) for path in ("/v1/models", "/health", "/ready")]
        front.traffic.use(
            table(
                backend(1, aliases=("nickname",)),
                backend(2, "lab/chat#1", pid=2),
                backend(3, "lab/late", pid=3, model="late", state="starting"),
                taken_at=1700000000.5,
            )
        )
        after = [ask(front.port, "GET", path + "?x=1") for path in ("/v1/models", "/health", "/ready")]

    assert [answer.status for answer in before] == [200, 200, 503]
    assert before[0].json() == {"object": "list", "data": []}
    assert [answer.status for answer in after] == [200, 200, 200]
    assert after[0].json()["data"] == [
        {
            "id": "chat-model",
            "object": "model",
            "created": 1700000000,
            "owned_by": "sage",
            "kind": "llm",
            "aliases": ["lab/chat", "nickname"],
            "engine": "lab/chat",
        }
    ]
    assert after[1].json()["status"] == "ok"
    assert after[1].json()["engines"] == {"ready": 2, "total": 3}
    assert after[1].json()["table_age_seconds"] > 0


def test_the_official_client_works_unchanged(tmp_path: Path) -> None:
    record = tmp_path / "record"
    llm = fake_engine("--model", "chat-model", "--tokens", "3", "--record", str(record))
    with llm as (port, _), fake_engine("--model", "vectors", "--kind", "embedding") as (embedding_port, _):
        vectors = backend(embedding_port, "lab/vectors", pid=2, kind="embedding", model="vectors")
        with (
            router(backend(port, aliases=("nickname",)), vectors) as front,
            OpenAI(base_url=f"http://127.0.0.1:{front.port}/v1", api_key="secret", max_retries=0) as client,
        ):
            listed = [model.id for model in client.models.list()]
            said = client.chat.completions.create(model="nickname", messages=[{"role": "user", "content": "hi"}])
            stream = client.chat.completions.create(
                model="lab/chat", messages=[{"role": "user", "content": "hi"}], stream=True
            )
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            completed = client.completions.create(model="chat-model", prompt="hi").choices[0].text
            vector = client.embeddings.create(model="vectors", input="hi").data[0].embedding
            with pytest.raises(NotFoundError):
                client.chat.completions.create(model="nobody", messages=[])
    words = "chat-model-0 chat-model-1 chat-model-2 "
    assert listed == ["chat-model", "vectors"]
    assert (said.choices[0].message.content, streamed, completed, len(vector)) == (words, words, words, 8)
    assert "secret" not in record.read_text()


def test_the_official_client_raises_when_an_engine_dies_midway() -> None:
    with (
        fake_engine("--model", "chat-model", "--die-mid-stream", "2") as (port, _),
        router(backend(port)) as front,
        OpenAI(base_url=f"http://127.0.0.1:{front.port}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(model="chat-model", messages=[], stream=True)
        got: list[object] = []
        with pytest.raises(APIError) as caught:
            got.extend(stream)

    assert caught.value.code == "engine_died"


def test_the_first_token_arrives_before_the_second_is_made() -> None:
    def two_tokens(line: Line) -> None:
        line.say(EVENTS)
        for token in ("one", "two"):
            line.wait_for_test()
            line.say_event(token)
        line.say_event("[DONE]")
        line.say(b"0\r\n\r\n")

    with (
        scripted(two_tokens) as engine,
        router(backend(engine.port)) as front,
        socket.create_connection(("127.0.0.1", front.port), timeout=5) as client,
    ):
        client.sendall(post_bytes(CHAT, {"stream": True}))
        head = client.recv(65536)
        engine.let_go.release()
        first = client.recv(65536)
        engine.let_go.release()
        rest = b""
        while not rest.endswith(b"0\r\n\r\n"):
            rest += client.recv(65536)

    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"text/event-stream" in head and b"X-Accel-Buffering: no" in head and b"Cache-Control: no-cache" in head
    assert first == b"b\r\ndata: one\n\n\r\n"
    assert b"data: two" in rest and b"data: [DONE]" in rest and b"error" not in rest


def test_a_large_body_arrives_whole_and_one_beyond_the_limit_is_refused_before_it_is_read() -> None:
    body = json.dumps({"text": "x" * 3_000_000}).encode()
    with (
        scripted(answers) as engine,
        router(backend(engine.port), limits=Limits(body_bytes=len(body), linger_seconds=0.2)) as front,
    ):
        answer = ask(front.port, "POST", CHAT, body)
        announced = raw(
            front.port,
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99999999999\r\n\r\n",
            seconds=5,
        )
        chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
        chunked = raw(
            front.port,
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 3,
            seconds=5,
        )

    assert answer.status == 200
    assert engine.lines[0].body == body
    assert announced.startswith(b"HTTP/1.1 413 ")
    assert chunked.startswith(b"HTTP/1.1 413 ")
    assert engine.connections == 1
