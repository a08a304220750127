"""An OpenAI-like engine that misbehaves on demand: python tests/fake_engine.py --port N --model NAME [mode ...]

The real llama.cpp cannot be told to hang, lie or die. Standard library only, so that it starts in about 100 ms.
SIGTERM and SIGINT end it at once with 0 unless a mode says otherwise. GET /fake/state tells what happened so far. It is
neither counted nor recorded, and a request is counted as finished a moment after its last byte: poll. Modes:

--ready-after S        binds at once; /health and everything else answer 503 for S seconds
--bind-after S         connection refused for S seconds
--never-ready          503 for ever
--mute                 /health says 200, requests for work are never answered
--wrong-kind           an llm that answers 404 to chat and serves embeddings, and the other way round
--busy-health          GET /health hangs while any work runs
--exit-code N          logs a few lines and exits with N instead of serving; --exit-after S: that much later
--crash-after-ready S  exits with 1, S seconds after it became ready
--ignore-term          SIGTERM does nothing
--swallow-terms N      the first N SIGTERMs do nothing
--term-delay S         on SIGTERM stops listening, takes S seconds (and as long as work still runs), then exits with 0
--fork-child           starts a child that sleeps for ever and outlives it; prints "child pid N"
--child-setsid         the child leads a session of its own
--child-ignore-term    the child ignores SIGTERM
--child-wipe-environ   the child's /proc/PID/environ is empty
--child-double-fork    the child is a child's child, whose parent has ended: a daemon
--tokens N             tokens per answer (5); a request's max_tokens can only make it fewer
--token-delay S        seconds before each token
--token-bytes N        every token is padded to N bytes
--die-mid-stream N     SIGKILLs itself after N streamed tokens
--stall-mid-stream N   says nothing more after N streamed tokens, until the client goes away
--child-holds-port     the child is started once the engine listens, and holds the listening socket too
--listen-port P        listens there, whatever --port says; --listen-host H: likewise
--also-listen-host H   listens there too, with a second socket on the same port
--reuse-port           sets SO_REUSEPORT on the listener
--workers N            N processes in one session listen with SO_REUSEPORT each; N - 1 are children, which outlive it
--log-bytes N          writes N bytes of log at the start
--say LINE             says that at the start, too; may be repeated
--told WORD            takes what it is told of its memory, and does nothing with it
--log-flood N          writes N bytes of log once it listens, about 50 MB a second, and then "end of the flood"
--close-output         lets go of stdout and stderr after the first lines
--first-thread-ends    on SIGUSR1 its first thread ends, the others go on; nothing hears SIGTERM any more
--record FILE          appends a JSON line per request: method, path, headers, body_length, body (first 2000 characters)

GPUs of tests/fakenvml. The engine sees those that CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER let it see, as CUDA would;
it dies when it sees none, and when one has not enough memory. It is not ready before it has what it takes:

--fake-nvml FILE       what the machine is
--gpu-memory MIB       takes so much of each GPU that it sees
--memory-after S       takes it S seconds after the start
--memory-in-steps N    takes it in N steps, from then until it would be ready without
--memory-grows-to MIB  takes so much, all in all, once it is ready
--memory-lingers S     what it took is free S (whole) seconds after its death was seen
--child-holds-memory   the child of --fork-child takes it
--claims-on GPU        takes it of this one (index of NVML, or UUID), whatever it sees
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import socket
import socketserver
import sys
import threading
import time

# By its own name alone, because this is run as a script. What few engines need is imported where they need it, and what
# only annotations need, never: most of an engine's start is its imports.
from small_http import Exchange

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, NoReturn

_GENERATE = ("/v1/chat/completions", "/v1/completions")
_EMBED = ("/v1/embeddings", "/v1/rerank")
# The longest that the main thread waits in one go. Python looks for signals before a wait, not at its start: one that
# comes in between is seen a turn later, and never in an endless signal.pause(). (2026-11-23: two runs of two hung.)
_TURN_SECONDS = 0.05
# A flood of log comes in chunks, each followed by a pause.
_FLOOD_CHUNK_BYTES, _FLOOD_CHUNK_SECONDS = 1024 * 1024, 0.02


def main() -> NoReturn:
    args = _arguments()
    state = _State(args)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: state.terminate())
    _log_start(args)
    child = _fork_child(args) if args.fork_child and not args.child_holds_port else None
    if args.gpu_memory:
        _load(args, state, child if args.child_holds_memory else os.getpid())
    if args.exit_code is not None:
        _sleep(args.exit_after)
        while not state.loaded.is_set():
            _sleep(_TURN_SECONDS)
        _say(f"error: told to exit with {args.exit_code}")
        os._exit(args.exit_code)
    _sleep(args.bind_after)
    _fork_workers(args)
    _serve(args, state)
    # Only --term-delay comes here: it listens no more, and its own thread ends the process.
    _sleep(math.inf)
    raise AssertionError("slept for ever")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    flag = parser.add_argument
    flag("--host", default="127.0.0.1")
    flag("--port", type=int, required=True)
    flag("--model", default="fake")
    flag("--kind", choices=("llm", "embedding"), default="llm")
    flag("--dim", type=int, default=8)
    flag("--tokens", type=int, default=5)
    for name in ("ready-after", "bind-after", "exit-after", "token-delay", "term-delay"):
        flag(f"--{name}", type=float, default=0.0)
    flag("--crash-after-ready", type=float)
    for name in ("never-ready", "mute", "wrong-kind", "busy-health", "ignore-term", "reuse-port", "close-output"):
        flag(f"--{name}", action="store_true")
    for name in ("fork-child", "child-setsid", "child-ignore-term", "child-wipe-environ"):
        flag(f"--{name}", action="store_true")
    for name in ("child-double-fork", "first-thread-ends"):
        flag(f"--{name}", action="store_true")
    for name in ("swallow-terms", "token-bytes", "log-bytes", "log-flood"):
        flag(f"--{name}", type=int, default=0)
    for name in ("exit-code", "die-mid-stream", "stall-mid-stream", "listen-port"):
        flag(f"--{name}", type=int)
    for name in ("listen-host", "also-listen-host"):
        flag(f"--{name}")
    flag("--child-holds-port", action="store_true")
    flag("--workers", type=int, default=1)
    flag("--record")
    flag("--say", action="append", default=[])
    flag("--told")
    flag("--fake-nvml")
    for name in ("gpu-memory", "memory-grows-to"):
        flag(f"--{name}", type=int)
    flag("--memory-after", type=float, default=0.0)
    flag("--memory-in-steps", type=int, default=1)
    flag("--memory-lingers", type=int, default=0)
    flag("--child-holds-memory", action="store_true")
    flag("--claims-on")
    args = parser.parse_args()
    if args.gpu_memory and (args.fake_nvml is None or args.workers > 1):
        parser.error("--gpu-memory needs --fake-nvml, and that there is one worker")
    if args.child_holds_memory and (args.child_holds_port or not args.fork_child):
        parser.error("--child-holds-memory needs --fork-child, and that it does not hold the port, which comes later")
    return args


class _State:
    """What happened so far, shared by all request threads."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.changed = threading.Condition()
        self.counts = {"active": 0, "finished": 0, "cancelled": 0, "bytes_sent": 0, "requests": 0}
        self.started_at = time.monotonic()
        self.loaded_at = self.started_at + args.bind_after + args.ready_after
        self.ready_at = math.inf if args.never_ready else self.loaded_at
        self.loaded = threading.Event()  # its GPU memory is taken
        if not args.gpu_memory:
            self.loaded.set()
        self.terms_to_swallow = math.inf if args.ignore_term else args.swallow_terms
        self.servers: list[_Server] = []  # those that are bound

    def add(self, **amounts: int) -> None:
        with self.changed:
            for name, amount in amounts.items():
                self.counts[name] += amount
            self.changed.notify_all()

    def wait_until_idle(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.counts["active"] == 0)

    def is_ready(self) -> bool:
        return self.loaded.is_set() and time.monotonic() >= self.ready_at

    def wait_until_ready(self) -> None:
        while not self.is_ready():
            time.sleep(_TURN_SECONDS)

    def terminate(self) -> None:
        if self.terms_to_swallow > 0:
            self.terms_to_swallow -= 1
        elif self.args.term_delay:
            threading.Thread(target=self._leave_slowly).start()
        else:
            os._exit(0)

    def _leave_slowly(self) -> None:
        leave_at = time.monotonic() + self.args.term_delay
        for server in self.servers:
            server.shutdown()
            server.server_close()
        time.sleep(max(0.0, leave_at - time.monotonic()))
        self.wait_until_idle()
        os._exit(0)

    def report(self) -> dict[str, Any]:
        with self.changed:
            return {
                **self.counts,
                "pid": os.getpid(),
                "env": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("CUDA_", "SAGE_", "SPT_NOENV"))},
                "argv": sys.argv,
            }

    def record(self, line: dict[str, Any]) -> None:
        if self.args.record:
            with self.changed, open(self.args.record, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _log_start(args: argparse.Namespace) -> None:
    _say(f"fake engine for {args.model}, pid {os.getpid()}")
    for line in args.say:
        _say(line)
    if args.log_bytes:
        _say("x" * (args.log_bytes - 1))
    if args.close_output:
        # Not os.close: the next socket would become file descriptor 1.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)


def _say(line: str) -> None:
    print(line, flush=True)


def _fork_workers(args: argparse.Namespace) -> None:
    for _ in range(args.workers - 1):
        if os.fork() == 0:
            return


_SLEEP = "import signal\nwhile True: signal.pause()"
# Starts a sleeper, tells its pid and ends: then nobody but PID 1 is the sleeper's parent.
_FORK_AGAIN = (
    f"import subprocess, sys\nwords = [sys.executable, '-ISc', {_SLEEP!r}]\n"
    "print(subprocess.Popen(words, close_fds=False, stdout=2).pid)"
)


def _fork_child(args: argparse.Namespace, *held_fds: int) -> int:
    """Its pid."""
    import subprocess

    def ignore_term() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    child = subprocess.Popen(
        [sys.executable, "-ISc", _FORK_AGAIN if args.child_double_fork else _SLEEP],
        env={} if args.child_wipe_environ else None,
        start_new_session=args.child_setsid,
        pass_fds=held_fds,
        # Before the exec, which keeps it: there is no moment when the child does not ignore SIGTERM yet.
        preexec_fn=ignore_term if args.child_ignore_term else None,
        stdout=subprocess.PIPE if args.child_double_fork else None,
    )
    pid = int(child.communicate()[0]) if args.child_double_fork else child.pid
    _say(f"child pid {pid}")
    return pid


def _load(args: argparse.Namespace, state: _State, holder: int) -> None:
    """Begin to take the memory of the GPUs, on behalf of the process `holder`."""
    from pathlib import Path

    from fakenvml import cuda, device

    args.fake_nvml = Path(args.fake_nvml)
    gpus = cuda.visible(args.fake_nvml, os.environ)
    if args.claims_on is not None:
        gpus = (device(args.fake_nvml, args.claims_on).uuid,)
    if not gpus:
        _say("RuntimeError: No CUDA GPUs are available")
        os._exit(1)

    def load() -> None:
        begin = state.started_at + args.memory_after
        step_seconds = max(state.loaded_at - begin, 0.0) / args.memory_in_steps
        for step in range(args.memory_in_steps):
            time.sleep(max(begin + step * step_seconds - time.monotonic(), 0.0))
            _take(args, gpus, holder, args.gpu_memory * (step + 1) // args.memory_in_steps)
        state.loaded.set()
        if args.memory_grows_to:
            state.wait_until_ready()
            _take(args, gpus, holder, args.memory_grows_to)

    threading.Thread(target=load, daemon=True).start()


def _take(args: argparse.Namespace, gpus: tuple[str, ...], holder: int, mib: int) -> None:
    from fakenvml import allocate, memory

    for number, gpu in enumerate(gpus):
        if not allocate(args.fake_nvml, gpu, holder, mib, linger_seconds=args.memory_lingers):
            now = memory(args.fake_nvml, gpu)
            _say(
                f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {mib} MiB. "
                f"GPU {number} has a total capacity of {now.total_mib} MiB of which {now.free_mib} MiB is free."
            )
            os._exit(1)


def _serve(args: argparse.Namespace, state: _State) -> None:
    _Server.allow_reuse_port = args.reuse_port or args.workers > 1
    hosts = [args.listen_host or args.host, *([args.also_listen_host] if args.also_listen_host else [])]
    for host in hosts:
        address = (host, args.listen_port or args.port)
        try:
            state.servers.append(_Server(address, state))
        except OSError as error:
            _say(f"error: cannot listen on {address[0]}:{address[1]}: {error.strerror}")
            os._exit(1)
    if args.fork_child and args.child_holds_port:
        _fork_child(args, *(server.fileno() for server in state.servers))
    server, *others = state.servers
    for other in others:
        threading.Thread(target=other.serve_forever, args=(_TURN_SECONDS,), daemon=True).start()
    if args.crash_after_ready is not None:
        threading.Thread(target=_crash, args=(state,), daemon=True).start()
    if args.log_flood:
        threading.Thread(target=_flood, args=(args.log_flood,), daemon=True).start()
    if args.first_thread_ends:
        _serve_without_first_thread(server)
    server.serve_forever(poll_interval=_TURN_SECONDS)


def _serve_without_first_thread(server: _Server) -> None:
    threading.Thread(target=server.serve_forever, args=(_TURN_SECONDS,)).start()
    asked = threading.Event()
    signal.signal(signal.SIGUSR1, lambda _number, _frame: asked.set())
    while not asked.is_set():
        time.sleep(_TURN_SECONDS)
    import ctypes

    # The process goes on: to the system its first thread is a zombie.
    ctypes.CDLL(None).pthread_exit(None)


def _flood(size: int) -> None:
    line = b"x" * 1023 + b"\n"
    for begun in range(0, size, _FLOOD_CHUNK_BYTES):
        sys.stdout.buffer.write(line * (min(_FLOOD_CHUNK_BYTES, size - begun) // len(line)))
        sys.stdout.buffer.flush()
        time.sleep(_FLOOD_CHUNK_SECONDS)
    _say("end of the flood")


def _crash(state: _State) -> None:
    state.wait_until_ready()
    time.sleep(state.args.crash_after_ready)
    _say("error: told to crash")
    os._exit(1)


def _sleep(seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _TURN_SECONDS))


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 512

    def __init__(self, address: tuple[str, int], state: _State) -> None:
        self.state = state
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Exchange)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away between two requests is no news."""


class _ClientGone(Exception):
    pass


class _Exchange(Exchange):
    server: _Server

    def do_GET(self) -> None:
        if self.path == "/fake/state":
            return self._answer(200, self.server.state.report())
        state = self.server.state
        self._note(b"")
        if self.path == "/health" and state.args.busy_health:
            state.wait_until_idle()
        if not state.is_ready():
            return self._refuse(503, "Loading model")
        if self.path == "/health":
            return self._answer(200, {"status": "ok"})
        if self.path == "/v1/models":
            return self._answer(200, {"object": "list", "data": [{"id": state.args.model, "object": "model"}]})
        if self.path == "/metrics":
            return self._answer_text(200, "text/plain; version=0.0.4", _metrics(state))
        return self._refuse(404, f"no such path: {self.path}")

    def do_POST(self) -> None:
        body = self._body()
        self._note(body)
        state = self.server.state
        if not state.is_ready():
            return self._refuse(503, "Loading model")
        is_llm = (state.args.kind == "llm") is not state.args.wrong_kind
        if self.path not in (_GENERATE if is_llm else _EMBED):
            return self._refuse(404, f"this server does not serve {self.path}")
        state.add(active=1)
        try:
            self._work(json.loads(body or b"{}"))
        except (_ClientGone, OSError):
            self.close_connection = True
            state.add(active=-1, cancelled=1)
        else:
            state.add(active=-1, finished=1)
        return None

    def _work(self, request: dict[str, Any]) -> None:
        args = self.server.state.args
        if args.mute:
            self._wait_for_client_to_leave()
        if self.path == "/v1/embeddings":
            self._answer(200, _embeddings(args, request))
        elif self.path == "/v1/rerank":
            self._answer(200, _ranking(args, request))
        elif request.get("stream"):
            self._stream(request)
        else:
            tokens = list(self._tokens(request))
            answer = _message(self.path, args.model, "".join(tokens))
            self._answer(200, answer | {"usage": _usage(request, len(tokens))})

    def _tokens(self, request: dict[str, Any]) -> Iterator[str]:
        args = self.server.state.args
        wanted = request.get("max_completion_tokens") or request.get("max_tokens") or args.tokens
        for index in range(min(args.tokens, wanted)):
            time.sleep(args.token_delay)
            if self._client_is_gone():
                raise _ClientGone
            yield f"{args.model}-{index} ".ljust(args.token_bytes, "x")

    def _stream(self, request: dict[str, Any]) -> None:
        args = self.server.state.args
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        sent = 0
        for token in self._tokens(request):
            self._break_if_told(sent)
            self._event(json.dumps(_message(self.path, args.model, token, chunk=True, finished=False)))
            sent += 1
        self._break_if_told(sent)
        usage = (request.get("stream_options") or {}).get("include_usage")
        last = _message(self.path, args.model, "", chunk=True)
        self._event(json.dumps(last | ({"usage": _usage(request, sent)} if usage else {})))
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _break_if_told(self, sent: int) -> None:
        if sent == self.server.state.args.die_mid_stream:
            os.kill(os.getpid(), signal.SIGKILL)
        if sent == self.server.state.args.stall_mid_stream:
            self._wait_for_client_to_leave()

    def _event(self, text: str) -> None:
        event = f"data: {text}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
        self.server.state.add(bytes_sent=len(event))

    def _wait_for_client_to_leave(self) -> NoReturn:
        while self.connection.recv(1, socket.MSG_PEEK):
            time.sleep(0.01)  # a pipelined request: the client is still there
        raise _ClientGone

    def _client_is_gone(self) -> bool:
        try:
            return len(self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)) == 0
        except BlockingIOError:
            return False

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _note(self, body: bytes) -> None:
        self.server.state.add(requests=1)
        line = {"method": self.command, "path": self.path, "headers": dict(self.headers), "body_length": len(body)}
        self.server.state.record({**line, "body": body.decode(errors="replace")[:2000]})

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        self._answer_text(status, "application/json", json.dumps(answer))

    def _refuse(self, status: int, why: str) -> None:
        self._answer(status, {"error": {"message": why, "type": "fake", "code": status}})

    def _answer_text(self, status: int, content_type: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if self.path in _GENERATE + _EMBED:
            self.server.state.add(bytes_sent=len(body))

    def end_headers(self) -> None:
        self.send_header("X-Fake-Pid", str(os.getpid()))
        super().end_headers()


def _message(path: str, model: str, text: str, *, chunk: bool = False, finished: bool = True) -> dict[str, Any]:
    said: dict[str, Any] = {"text": text}
    kind = "text_completion"
    if path == "/v1/chat/completions":
        said = {"delta": {"content": text}} if chunk else {"message": {"role": "assistant", "content": text}}
        kind = "chat.completion.chunk" if chunk else "chat.completion"
    choice = {"index": 0, "finish_reason": "stop" if finished else None, **said}
    return {"id": "fake-1", "created": 0, "object": kind, "model": model, "choices": [choice]}


def _usage(request: dict[str, Any], completion: int) -> dict[str, int]:
    prompt = len(json.dumps(request.get("messages") or request.get("prompt") or request.get("input") or "").split())
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _embeddings(args: argparse.Namespace, request: dict[str, Any]) -> dict[str, Any]:
    texts = request.get("input", "")
    texts = texts if isinstance(texts, list) else [texts]
    rows = [{"object": "embedding", "index": i, "embedding": _vector(args, str(text))} for i, text in enumerate(texts)]
    return {"object": "list", "model": args.model, "data": rows, "usage": _usage(request, 0)}


def _vector(args: argparse.Namespace, text: str) -> list[float]:
    import hashlib

    digest = hashlib.shake_256(f"{args.model}\n{text}".encode()).digest(args.dim)
    return [byte / 255 for byte in digest]


def _ranking(args: argparse.Namespace, request: dict[str, Any]) -> dict[str, Any]:
    documents = request.get("documents", [])
    results = [{"index": i, "relevance_score": _vector(args, str(text))[0]} for i, text in enumerate(documents)]
    return {"object": "list", "model": args.model, "results": results, "usage": _usage(request, 0)}


def _metrics(state: _State) -> str:
    """The running gauge under llama.cpp's name and under vLLM's."""
    model, active, finished = state.args.model, state.counts["active"], state.counts["finished"]
    return (
        f"# TYPE llamacpp:requests_processing gauge\nllamacpp:requests_processing {active}\n"
        f'# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{{model_name="{model}"}} {active}\n'
        f"# TYPE fake:requests_finished_total counter\nfake:requests_finished_total {finished}\n"
    )


if __name__ == "__main__":
    main()
