"""Questions to engines over HTTP: is it healthy, which models does it list, does it answer a request of its kind.

Asked in a few threads; the answers come back as facts. http.client, because importing aiohttp costs 0.2 s.
"""

import http.client
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from sage_reconcile.core.facts import HealthFact
from sage_reconcile.core.identity import EngineId, ProcessIdentity
from sage_reconcile.world.pending import Pending

# An engine that computes may answer a health question late, but not this late.
_HEALTH_SECONDS = 2.0

# A first answer can wait for kernels to be compiled.
_PROOF_SECONDS = 60.0

# Nothing that an engine says of itself is longer.
_LONGEST_ANSWER_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Is this engine healthy?"""

    leader: ProcessIdentity
    host: str
    port: int
    path: str
    # Whether to ask for the model list too.
    ask_models: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What came of a request of an engine's kind. `failure` is empty when it was answered."""

    engine: EngineId
    leader: ProcessIdentity
    failure: str


@dataclass(slots=True, kw_only=True)
class _Asked:
    """The newest question to one engine, while it is under way, and the newest answer."""

    pending: "Pending[HealthFact] | None" = None
    answer: HealthFact | None = None


@dataclass(slots=True)
class Prober:
    """Asks in the background, at most one question of each sort to each engine at a time."""

    _asked: dict[ProcessIdentity, _Asked] = field(default_factory=dict)
    _proofs: dict[ProcessIdentity, "Pending[Proof]"] = field(default_factory=dict)

    def healths(self, questions: Iterable[Question], *, wait_seconds: float) -> tuple[HealthFact, ...]:
        """The newest answer of each engine, waiting at most so long for those that are under way."""
        deadline = time.monotonic() + wait_seconds
        questions = tuple(questions)
        self._asked = {question.leader: self._asked.get(question.leader, _Asked()) for question in questions}
        for question in questions:
            asked = self._asked[question.leader]
            if asked.pending is None:
                asked.pending = Pending(lambda question=question: _health(question))  # type: ignore[misc]
        found = [_newest(leader, asked, deadline) for leader, asked in self._asked.items()]
        return tuple(fact for fact in found if fact is not None)

    def prove(self, engine: EngineId, leader: ProcessIdentity, kind: str, model: str, host: str, port: int) -> None:
        """Send one request of the engine's kind, unless one is under way."""
        if leader not in self._proofs:
            self._proofs[leader] = Pending(lambda: _proof(engine, leader, kind, model, host, port))

    def proofs(self) -> tuple[Proof, ...]:
        """What came of the requests that have ended since this was last asked."""
        done = {leader: proof for leader, pending in self._proofs.items() if (proof := pending.answer()) is not None}
        for leader in done:
            del self._proofs[leader]
        return tuple(done.values())


def _newest(leader: ProcessIdentity, asked: _Asked, deadline: float) -> HealthFact | None:
    if asked.pending is None:
        return asked.answer
    answer = asked.pending.answer(wait_seconds=deadline - time.monotonic())
    if answer is not None:
        asked.answer, asked.pending = answer, None
    elif time.monotonic() - asked.pending.begun_at > _HEALTH_SECONDS:
        return HealthFact(
            leader=leader, health="silent", detail=f"GET health was not answered in {_HEALTH_SECONDS:g} s"
        )
    return asked.answer


def _health(question: Question) -> HealthFact:
    """ "ok", "loading", "refused", "broken", "silent" or "odd": see facts.HealthFact."""
    try:
        status, _ = _asked_once(question.host, question.port, "GET", question.path, None, _HEALTH_SECONDS)
        models = None
        if status == 200 and question.ask_models:
            models = _model_names(question.host, question.port)
    except ConnectionRefusedError:
        return HealthFact(leader=question.leader, health="refused", detail="refuses connections")
    except TimeoutError:
        detail = f"GET {question.path} was not answered in {_HEALTH_SECONDS:g} s"
        return HealthFact(leader=question.leader, health="silent", detail=detail)
    except ConnectionError as error:
        return HealthFact(leader=question.leader, health="broken", detail=f"GET {question.path}: {_sentence(error)}")
    except (OSError, http.client.HTTPException) as error:
        return HealthFact(leader=question.leader, health="odd", detail=f"GET {question.path}: {_sentence(error)}")
    health = {200: "ok", 503: "loading"}.get(status, "odd")
    detail = "" if status == 200 else f"GET {question.path} answers {status}"
    return HealthFact(leader=question.leader, health=health, detail=detail, models=models)


def _model_names(host: str, port: int) -> tuple[str, ...] | None:
    status, body = _asked_once(host, port, "GET", "/v1/models", None, _HEALTH_SECONDS)
    entries = _object(body).get("data")
    if status != 200 or not isinstance(entries, list):
        return None
    return tuple(str(entry["id"]) for entry in entries if isinstance(entry, dict) and "id" in entry)


# A path, a body, and whether an answer is one of this kind.
_Request = tuple[str, dict[str, object], Callable[[dict[str, object]], bool]]


def _proof(engine: EngineId, leader: ProcessIdentity, kind: str, model: str, host: str, port: int) -> Proof:
    """Ask for one token, or for one vector."""
    failure = ""
    if kind == "embedding":
        requests: list[_Request] = [("/v1/embeddings", {"model": model, "input": "sage"}, _has_vector)]
    else:
        options: dict[str, object] = {"model": model, "max_tokens": 1, "temperature": 0}
        messages = [{"role": "user", "content": "sage"}]
        requests = [
            ("/v1/completions", {**options, "prompt": "sage"}, _has_choice),
            ("/v1/chat/completions", {**options, "messages": messages}, _has_choice),
        ]
    for path, body, is_answer in requests:
        try:
            status, answer = _asked_once(host, port, "POST", path, body, _PROOF_SECONDS)
        except TimeoutError:
            return Proof(engine=engine, leader=leader, failure=f"POST {path} was not answered in {_PROOF_SECONDS:g} s")
        except (OSError, http.client.HTTPException) as error:
            return Proof(engine=engine, leader=leader, failure=f"POST {path}: {_sentence(error)}")
        if status == 200 and is_answer(_object(answer)):
            return Proof(engine=engine, leader=leader, failure="")
        failure = f"POST {path} answers {status}" + ("" if status != 200 else ", and not what this kind answers")
    return Proof(engine=engine, leader=leader, failure=f"does not serve kind {kind}: {failure}")


def _has_vector(answer: dict[str, object]) -> bool:
    data = answer.get("data")
    first = data[0] if isinstance(data, list) and data else None
    vector = first.get("embedding") if isinstance(first, dict) else None
    return isinstance(vector, list) and len(vector) > 0


def _has_choice(answer: dict[str, object]) -> bool:
    choices = answer.get("choices")
    return isinstance(choices, list) and len(choices) > 0


def _asked_once(
    host: str, port: int, method: str, path: str, body: dict[str, object] | None, timeout_seconds: float
) -> tuple[int, bytes]:
    """Raises OSError and http.client.HTTPException."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_seconds)
    try:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read(_LONGEST_ANSWER_BYTES)
    finally:
        connection.close()


def _object(body: bytes) -> dict[str, object]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _sentence(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
