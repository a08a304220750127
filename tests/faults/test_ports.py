"""Ports under attack: thieves before, while and after an engine starts, engines that listen elsewhere, twice or for
everybody, TIME_WAIT, exhausted and forbidden pools, and a lost child that keeps the port of its engine.
"""

import ctypes
import fcntl
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from sage_reconcile.core.journal import ActDone
from tests.e2e import Place, fake, kill, listens, place_in, stranger, until
from tests.faults.test_serving import ask, engine, models, served, serving
from tests.namespaces import CAP_NET_BIND_SERVICE, inside, without
from tests.oracle import alive, environ, stat_fields

CHAOS = os.environ.get("CHAOS") == "1"

_CHAT = "/v1/chat/completions"

# --- thieves ----------------------------------------------------------------------------------------------------------

_OPTIONS = {
    "plain": (),
    "reuseaddr": (socket.SO_REUSEADDR,),
    "reuseport": (socket.SO_REUSEPORT,),
    "both": (socket.SO_REUSEADDR, socket.SO_REUSEPORT),
}

# Listens, writes down what whoever comes says first, and answers as a ready llm would. Ends with 3 where the kernel
# refuses it the port. With `turn` it has the kernel give it every connection: a program may choose among the sockets
# that share a port by SO_REUSEPORT, by the order in which they began to listen (SO_ATTACH_REUSEPORT_CBPF, socket(7)).
_THIEF = """
import ctypes, socket, struct, sys, threading

ANSWER = b'{"choices": [{"index": 0, "text": "stolen", "message": {"role": "assistant", "content": "stolen"}}]}'
port, caught, turn, *options = sys.argv[1:]
thief = socket.socket()
for option in options:
    thief.setsockopt(socket.SOL_SOCKET, int(option), 1)
try:
    thief.bind(("127.0.0.1", int(port)))
    thief.listen(64)
except OSError:
    sys.exit(3)
if turn:
    choose = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, int(turn)))  # BPF_RET | BPF_K
    thief.setsockopt(socket.SOL_SOCKET, 51, struct.pack("HP", 1, ctypes.addressof(choose)))

def serve(connection):
    with connection:
        while words := connection.recv(65536):
            with open(caught, "ab") as file:
                file.write(words)
            head = b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n"
            connection.sendall(head % len(ANSWER) + ANSWER)

while True:
    threading.Thread(target=serve, args=thief.accept()[:1], daemon=True).start()
"""


_KNOCK = b"knock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thief:
    """A stranger who wants a port."""

    pid: int
    port: int
    # Whether the kernel gave it the port.
    has_it: bool
    caught: Path

    def heard(self) -> bytes:
        return self.caught.read_bytes() if self.caught.exists() else b""

    def assert_untouched(self) -> None:
        """It lives and answers, and what it heard before is in the file by then."""
        assert alive(self.pid)
        with socket.create_connection(("127.0.0.1", self.port)) as client:
            client.sendall(_KNOCK)
            assert client.recv(65536).startswith(b"HTTP/1.1 200")


@contextmanager
def thief(place: Place, port: int, options: str, *, turn: int | None = None) -> Iterator[Thief]:
    """A stranger with these options. With `turn`, the one-based place of its socket among those on the port, it gets
    every connection."""
    caught = place.root / "caught"
    chosen = "" if turn is None else str(turn - 1)
    words = ("-ISc", _THIEF, str(port), str(caught), chosen, *map(str, _OPTIONS[options]))
    with stranger(sys.executable, *words) as process:
        until(lambda: listens_by(process.pid, port) or process.poll() is not None, "the thief has tried")
        yield Thief(pid=process.pid, port=port, has_it=process.poll() is None, caught=caught)


def listens_by(pid: int, port: int) -> bool:
    return any(
        connection.status == psutil.CONN_LISTEN and (connection.pid, connection.laddr.port) == (pid, port)
        for connection in psutil.net_connections("tcp")
    )


def stopped(pid: int) -> bool:
    return stat_fields(pid)[:1] == ["T"]


def seen_beside(place: Place, sage: "subprocess.Popen[str]") -> dict[str, Any]:
    """What the status shows of the chat engine while an apply waits for it: the apply stands still meanwhile."""
    sage.send_signal(signal.SIGSTOP)
    until(lambda: stopped(sage.pid), "sage stands still")
    row = place.engines()["lab/chat"]
    sage.send_signal(signal.SIGCONT)
    return row


_MOMENTS = ("port.begin", "port.proved", "gate.spawned", "gate.recorded", "released")
_THEFTS = [(moment, options) for moment in _MOMENTS for options in _OPTIONS]
_SAMPLE = [
    ("port.begin", "both"),
    ("port.proved", "reuseport"),
    ("gate.spawned", "plain"),
    ("released", "reuseaddr"),
]


@pytest.mark.parametrize(("moment", "options"), _THEFTS if CHAOS else _SAMPLE)
def test_n1_port_that_is_stolen_after_the_plan_is_left_to_the_thief(place: Place, moment: str, options: str) -> None:
    """Before the proof, between proof and hold, while held at the gate, and after the release before it listens."""
    port = place.spare[0]
    place.write(fake("chat", *(["--bind-after", "1"] if moment == "released" else []), port=port))
    wishes = place.failing(*([] if moment == "released" else [f"{moment}=stop"]))

    with place.started("apply", str(place.manifests), "-y", **wishes) as sage:
        until(lambda: bool(place.pids()) if moment == "released" else stopped(sage.pid), f"sage has come to {moment}")
        with thief(place, port, options) as one:
            sage.send_signal(signal.SIGCONT)
            _, said = sage.communicate(timeout=20)

            if one.has_it:
                assert sage.returncode == 5, said
                assert f"{port}" in said
                one.assert_untouched()
                assert one.heard() == _KNOCK, "sage sent the thief something"
                assert place.pids() == {}
                if moment != "released":
                    said_by_engine = "".join(log.read_text(encoding="utf-8") for log in place.state.rglob("*.log"))
                    assert "fake engine" not in said_by_engine, "the program ran, though its port was taken"
                assert not [entry for entry in place.journal() if isinstance(entry, ActDone)]
            else:
                assert sage.returncode == 0, said
                assert place.engines()["lab/chat"]["state"] == "ready"
    place.apply()
    assert place.homes() == {"lab/chat": port}


def test_n1_thief_who_listens_beside_an_engine_keeps_it_from_being_ready(place: Place) -> None:
    """Both set SO_REUSEPORT, so the kernel lets both listen, and gives a connection to either."""
    port = place.ports[0]
    place.write(fake("chat", "--reuse-port", "--bind-after", "1"))

    with place.started("apply", str(place.manifests), "-y", "--timeout", "3s") as sage:
        (pid,) = until(place.pids, "the engine is released").values()
        with thief(place, port, "both") as one:
            assert one.has_it
            until(lambda: listens_by(pid, port), "the engine listens too")
            row = seen_beside(place, sage)
            _, said = sage.communicate(timeout=20)

            assert row["state"] != "ready" and sage.returncode == 5
            assert f"pid {one.pid}" in row["reason"] and f"pid {one.pid}" in said
            one.assert_untouched()
            assert place.pids() == {} and not alive(pid)


def test_n1_answer_of_a_thief_is_not_taken_for_the_answer_of_the_engine(place: Place) -> None:
    """The thief shares the port, has the kernel give it every connection, and answers; the engine never would."""
    port = place.ports[0]
    place.write(fake("chat", "--reuse-port", "--bind-after", "1", "--mute"))

    with place.started("apply", str(place.manifests), "-y", "--timeout", "4s") as sage:
        (pid,) = until(place.pids, "the engine is released").values()
        with thief(place, port, "both", turn=1) as one:
            until(lambda: listens_by(pid, port), "the engine listens too")
            # Long enough for several looks of the apply.
            states = {row["state"] for _ in range(2) for row in place.engines().values()}
        _, said = sage.communicate(timeout=20)

    assert "ready" not in states
    assert b"POST" not in one.heard()
    assert sage.returncode == 5, said
    assert place.pids() == {}


def test_n1_port_of_a_pool_that_was_stolen_is_replaced_by_another_at_the_next_apply(place: Place) -> None:
    place.write(fake("chat"))
    with place.started("apply", str(place.manifests), "-y", **place.failing("gate.recorded=stop")) as sage:
        until(lambda: stopped(sage.pid), "sage holds the port")
        with thief(place, place.ports[0], "reuseaddr") as one:
            row = place.engines()["lab/chat"]
            sage.send_signal(signal.SIGCONT)
            sage.communicate(timeout=20)
            place.apply()

            # What waits at the gate is told apart from what listens in its place.
            assert (row["state"], sage.returncode) == ("starting", 5)
            assert place.homes() == {"lab/chat": place.ports[1]}
            one.assert_untouched()
            assert one.heard() == _KNOCK
    place.assert_at_rest()


def test_n2_engine_beside_a_thief_is_not_routed_until_the_thief_is_gone(place: Place) -> None:
    """The thief shares the port, has the kernel give it every connection, and would answer."""
    place.write(engine(place, "chat", "--reuse-port"))
    place.apply()
    pids, port, model = place.pids(), place.homes()["lab/chat"], served(place, "chat")
    request = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
    with serving(place) as (_, router):
        assert ask(router, _CHAT, request).status == 200

        with thief(place, port, "both", turn=2) as one:
            until(lambda: model not in models(router), "the router has seen it")
            row = place.engines()["lab/chat"]
            answers = [ask(router, _CHAT, request) for _ in range(20)]
            one.assert_untouched()

        assert (row["state"], row["pid"]) == ("unready", pids["lab/chat"])
        assert f"pid {one.pid}" in row["reason"]
        assert {(answer.status, answer.content["error"]["code"]) for answer in answers} == {(503, "not_ready")}
        # Nothing that a client asked. A router of another test has no record of this engine, and may ask it a proof.
        assert b"hello" not in one.heard()
        until(lambda: ask(router, _CHAT, request).status == 200, "the engine is served again")
    assert place.pids() == pids


# --- what the kernel keeps --------------------------------------------------------------------------------------------


def waits(port: int) -> bool:
    return any(
        connection.status == psutil.CONN_TIME_WAIT and connection.laddr.port == port
        for connection in psutil.net_connections("tcp")
    )


def test_n3_port_in_time_wait_is_started_on(place: Place) -> None:
    port = place.spare[0]
    place.write(fake("chat", port=port))
    with socket.create_server(("127.0.0.1", port)) as server, socket.create_connection(("127.0.0.1", port)) as client:
        # Who closes first is the one that waits.
        server.accept()[0].close()
        assert client.recv(1) == b""
    until(lambda: waits(port), "the port is in TIME_WAIT")

    place.apply()

    assert place.homes() == {"lab/chat": port}
    place.assert_at_rest()


def test_n3_engine_that_died_with_connections_open_comes_back_on_its_port(place: Place) -> None:
    place.write(fake("chat"))
    place.apply()
    port = place.homes()["lab/chat"]
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        assert client.recv(1) == b"H"
        kill(place.pids()["lab/chat"])
        # To the end: a client that closes with something unread leaves no TIME_WAIT.
        while client.recv(65536):
            pass
    until(lambda: waits(port), "the port is in TIME_WAIT")

    place.apply()

    assert place.homes() == {"lab/chat": port}
    place.assert_at_rest()


# --- engines that listen elsewhere, for everybody, twice --------------------------------------------------------------


def test_n4_engine_that_listens_on_another_port_is_never_ready(place: Place) -> None:
    elsewhere = place.spare[0]
    place.write(fake("chat", "--listen-port", str(elsewhere)))

    with place.started("apply", str(place.manifests), "-y", "--timeout", "2s") as sage:
        until(lambda: listens(elsewhere), "the engine listens")
        row = seen_beside(place, sage)
        _, said = sage.communicate(timeout=20)

    why = f"listens on 127.0.0.1:{elsewhere}, not on 127.0.0.1:{place.ports[0]}"
    assert (row["state"], row["reason"]) == ("starting", why)
    assert sage.returncode == 5 and why in said
    assert place.pids() == {} and not listens(elsewhere)


@pytest.fixture
def ipv6() -> None:
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"this machine has no IPv6 loopback: {error}")


@pytest.mark.usefixtures("ipv6")
def test_n5_engine_that_listens_on_the_other_loopback_only_is_not_ready(place: Place) -> None:
    port = place.ports[0]
    place.write(fake("chat", "--listen-host", "::1"))

    ran = place.apply("--timeout", "2s", expect=5)

    assert f"listens on [::1]:{port}, not on 127.0.0.1:{port}" in ran.stderr
    assert place.pids() == {} and not listens(port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"] if CHAOS else ["0.0.0.0"])
@pytest.mark.usefixtures("ipv6")
def test_n5_engine_that_is_open_to_other_machines_is_ready_and_told(place: Place, host: str) -> None:
    place.write(fake("chat", "--listen-host", host))

    place.apply()

    row, text = place.engines()["lab/chat"], place.sage("status", "-p", place.project).stdout
    assert row["state"] == "ready"
    told = f"{f'[{host}]' if ':' in host else host}:{row['port']}: other machines may reach it"
    assert told in row["reason"] and told in text
    plan = place.plan()
    assert not plan["changes"]
    assert [note for note in plan["notes"] if "lab/chat" in note and told in note]


@pytest.mark.usefixtures("ipv6")
def test_n5_engine_that_listens_more_than_once_is_ready_routed_and_stopped_as_one(place: Place) -> None:
    place.write(engine(place, "dual", "--also-listen-host", "::1"), engine(place, "many", "--workers", "3"))
    place.apply()
    rows = place.engines()
    assert {name: (row["state"], row["reason"], len(row["members"])) for name, row in rows.items()} == {
        "lab/dual": ("ready", "", 1),
        "lab/many": ("ready", "", 3),
    }
    ports = [rows[name]["port"] for name in ("lab/dual", "lab/many")]
    until(lambda: [listening_sockets(port) for port in ports] == [2, 3], "every worker listens")
    place.assert_at_rest()
    with serving(place) as (_, router):
        asked = [{"model": served(place, name), "messages": []} for name in ("dual", "many") for _ in range(9)]
        answers = [ask(router, _CHAT, request) for request in asked]

    place.sage("down", str(place.manifests), "-y")

    assert {answer.status for answer in answers} == {200}
    assert not [pid for row in rows.values() for pid in row["members"] if alive(pid)]
    assert not [port for port in ports if listens(port)]
    place.assert_nothing_left()


def listening_sockets(port: int) -> int:
    connections = psutil.net_connections("tcp")
    return sum(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in connections)


def test_n5_engine_one_of_whose_worker_sockets_is_a_strangers_is_not_ready(place: Place) -> None:
    place.write(fake("chat", "--workers", "3"))
    place.apply()
    pids, port = place.pids(), place.homes()["lab/chat"]

    with thief(place, port, "reuseport") as one:
        assert one.has_it
        row = place.engines()["lab/chat"]
        plan = place.plan()

        assert row["state"] == "unready" and f"pid {one.pid}" in row["reason"]
        assert one.pid not in row["members"] and len(row["members"]) == 3
        assert [note for note in plan["notes"] if f"pid {one.pid}" in note]
    assert place.engines()["lab/chat"]["state"] == "ready"
    assert place.pids() == pids


# --- what cannot be had -----------------------------------------------------------------------------------------------


def test_n6_two_manifests_that_ask_for_one_port_are_refused_with_both_places(place: Place) -> None:
    port = place.spare[0]
    paths = [place.write(fake("chat", port=port)), place.write(fake("search", port=port), stack="rag")]

    ran = place.apply(expect=3)

    for path, name in zip(paths, ("lab/chat", "rag/search"), strict=True):
        lines = path.read_text(encoding="utf-8").splitlines()
        line = next(number for number, text in enumerate(lines, start=1) if '"port"' in text)
        assert re.search(rf"{path.name}:{line}:\d+", ran.stderr), ran.stderr
        assert name in ran.stderr
    assert str(port) in ran.stderr and "Traceback" not in ran.stderr
    assert place.pids() == {}


def set_pool(place: Place, kind: str, pool: str) -> None:
    settings = place.manifests / "sage.yaml"
    written = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps(written | {"ports": written["ports"] | {kind: pool}}, indent=1), encoding="utf-8")


def test_n7_pool_with_fewer_ports_than_engines_starts_nothing_and_says_how_to_widen_it(place: Place) -> None:
    set_pool(place, "llm", f"{place.ports[0]}-{place.ports[1]}")
    place.write(fake("a"), fake("b"), fake("c"), fake("embed", kind="embedding"))

    plan = place.plan(expect=4)
    ran = place.apply(expect=4)

    assert [(one["engine"], one["reason"]) for one in plan["blocked"]] == [("lab/c", "pool_exhausted")]
    for text in (ran.stdout + ran.stderr, json.dumps(plan["blocked"])):
        assert re.search(r"\b2 ports\b.*\bllm\b", text), text
        assert re.search(r"sage\.yaml.*ports.*llm", text), text
    assert place.pids() == {}


def test_n7_pool_that_others_have_stops_nothing_that_runs(place: Place) -> None:
    set_pool(place, "llm", f"{place.ports[0]}-{place.ports[1]}")
    place.write(fake("chat"))
    place.apply()
    pids = place.pids()
    with thief(place, place.ports[1], "plain") as one:
        place.write(fake("chat", "--tokens", "3"), fake("other"))

        plan = place.plan(expect=4)
        place.apply(expect=4)

        assert [(found["engine"], found["reason"]) for found in plan["blocked"]] == [("lab/other", "pool_exhausted")]
        assert place.pids() == pids
        one.assert_untouched()
        assert one.heard() == _KNOCK
        set_pool(place, "llm", f"{place.ports[0]}-{place.ports[2]}")
        place.apply()
        assert place.homes() == {"lab/chat": place.ports[0], "lab/other": place.ports[2]}


@pytest.mark.parametrize("asked", ["fixed", "pool"])
def test_n8_port_below_1024_is_refused_at_plan(place: Place, asked: str) -> None:
    """For every user: an engine stands behind the router, on loopback, and never needs one."""
    if asked == "pool":
        set_pool(place, "llm", f"81,{place.ports[3]}")
    place.write(fake("chat", port=81 if asked == "fixed" else "auto"))

    for command in ("plan", "apply"):
        ran = place.sage(command, str(place.manifests), before=without(CAP_NET_BIND_SERVICE), expect=3)
        assert "81" in ran.stderr and "1024" in ran.stderr


def test_n8_ports_that_this_user_may_not_have_are_refused_and_a_pool_gives_the_others(tmp_path: Path) -> None:
    """In a network of its own, where the kernel keeps more ports to the privileged: some of the place's."""
    inside(("pid", "mount"), _forbidden_ports, str(tmp_path))


def _forbidden_ports(root: str) -> None:
    unprivileged = without(CAP_NET_BIND_SERVICE)
    enter_network()
    with place_in(Path(root)) as place:
        lowest = place.ports[3]
        _set_kernel("ip_unprivileged_port_start", str(lowest))
        words = ("apply", str(place.manifests), "-y")

        place.write(fake("chat", port=place.ports[0]))
        plan = json.loads(place.sage("plan", str(place.manifests), "-o", "json", before=unprivileged, expect=4).stdout)
        (blocked,) = plan["blocked"]
        assert (blocked["engine"], blocked["reason"]) == ("lab/chat", "port_forbidden"), blocked
        assert str(lowest) in blocked["why"] and str(place.ports[0]) in blocked["why"], blocked
        place.sage(*words, before=unprivileged, expect=4)
        assert place.pids() == {}

        place.write(fake("chat"))
        place.sage(*words, before=unprivileged)
        assert place.homes() == {"lab/chat": lowest}, place.homes()


def test_n8_pool_of_ports_that_this_user_may_not_have_is_told_as_that(tmp_path: Path) -> None:
    """None of them is taken: more such ports would not help."""
    inside(("pid", "mount"), _forbidden_pool, str(tmp_path))


def _forbidden_pool(root: str) -> None:
    enter_network()
    with place_in(Path(root)) as place:
        lowest = place.ports[-1] + 1
        _set_kernel("ip_unprivileged_port_start", str(lowest))
        place.write(fake("chat"))
        words = ("plan", str(place.manifests), "-o", "json")

        ran = place.sage(*words, before=without(CAP_NET_BIND_SERVICE), expect=4)

        (blocked,) = json.loads(ran.stdout)["blocked"]
        assert blocked["reason"] in ("port_forbidden", "pool_exhausted"), blocked
        assert str(lowest) in json.dumps(blocked) and "taken" not in blocked["why"], blocked


# --- ports of clients -------------------------------------------------------------------------------------------------


def test_n9_port_of_a_pool_where_clients_get_theirs_is_told_and_held(tmp_path: Path) -> None:
    """In a network of its own, whose clients get the place's ports."""
    inside(("pid", "mount"), _ports_of_clients, str(tmp_path))


def _ports_of_clients(root: str) -> None:
    enter_network()
    with place_in(Path(root)) as place:
        # As many as can all be had at once.
        first, last = place.ports[0], place.ports[0] + 99
        _set_kernel("ip_local_port_range", f"{first} {last}")
        port = place.ports[0]
        place.write(fake("chat"))

        notes = place.plan()["notes"]
        with place.started("apply", str(place.manifests), "-y", **place.failing("gate.recorded=stop")) as sage:
            until(lambda: stopped(sage.pid), "sage holds the port")
            with thief(place, port, "plain") as one:
                had = _ports_given_to_clients()
                sage.send_signal(signal.SIGCONT)
                _, said = sage.communicate(timeout=20)

        assert [note for note in notes if "lab/chat" in note and f"{port}" in note and f"{first}-{last}" in note], notes
        assert not one.has_it
        assert len(had) > 80 and port not in had, had
        assert sage.returncode == 0, said
        assert place.homes() == {"lab/chat": port}
        place.assert_at_rest()


@pytest.mark.parametrize("state", ["connected", "TIME_WAIT"])
def test_n9_port_of_a_pool_that_a_client_has_is_passed_over(place: Place, state: str) -> None:
    """Without SO_REUSEADDR on the client's socket the kernel lets no engine bind its port, and 60 s long none after it
    closed (N3)."""
    port = place.ports[0]
    place.write(fake("chat"))
    with socket.create_server(("127.0.0.1", place.spare[0])) as server, socket.socket() as client:
        client.bind(("127.0.0.1", port))
        client.connect(server.getsockname())
        if state == "TIME_WAIT":
            client.close()
            server.accept()[0].close()
            until(lambda: waits(port), "the port is in TIME_WAIT")

        place.apply()

    assert place.homes() == {"lab/chat": place.ports[1]}
    place.assert_at_rest()


def _ports_given_to_clients() -> set[int]:
    """All the ports that the kernel gives to clients of one server now."""
    had: set[int] = set()
    clients: list[socket.socket] = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 1025))
        server.listen(1024)
        try:
            while True:
                client = socket.socket()
                clients.append(client)
                client.connect(("127.0.0.1", 1025))
                had.add(client.getsockname()[1])
        except OSError:
            return had
        finally:
            for client in clients:
                # Reset, so that no TIME_WAIT is left.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()


_CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1  # include/uapi/linux/sockios.h, if.h


def enter_network() -> None:
    """Move this process into a network namespace of its own, with a loopback; for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _IFF_UP))


def _set_kernel(name: str, value: str) -> None:
    """A number of this network namespace (ip(7))."""
    Path(f"/proc/sys/net/ipv4/{name}").write_text(value, encoding="ascii")


# --- a lost child that keeps the port ---------------------------------------------------------------------------------

_LOSES_A_CHILD = ("--fork-child", "--child-holds-port", "--child-setsid", "--child-wipe-environ")


@contextmanager
def lost_children(place: Place) -> Iterator[None]:
    """At the end, end what the engines left behind: nobody else will."""
    try:
        yield
    finally:
        for pid in orphans(place):
            kill(pid)


def orphans(place: Place) -> list[int]:
    """Processes that write to a log of the place's engines and carry no label."""
    found = []
    for pid in psutil.pids():
        try:
            output = os.readlink(f"/proc/{pid}/fd/1")
        except OSError:
            continue
        if output.startswith(f"{place.state}/") and alive(pid) and "SAGE_ENGINE" not in environ(pid):
            found.append(pid)
    return found


def strays(place: Place, pid: int) -> list[dict[str, Any]]:
    return [one for one in place.status()["foreign"] if one["pid"] == pid]


def test_acceptance_3_port_that_a_lost_child_keeps_is_shown_and_nothing_is_placed_over_it(place: Place) -> None:
    place.write(fake("chat", *_LOSES_A_CHILD))
    with lost_children(place):
        place.apply()
        (child,) = orphans(place)

        kill(place.pids()["lab/chat"])

        assert listens_by(child, place.ports[0])
        (row,) = strays(place, child)
        assert row["port"] == place.ports[0] and row["note"]
        place.write(fake("a-newcomer"), fake("chat", *_LOSES_A_CHILD))
        plan = place.plan()
        place.apply()
        assert {step["engine"]: step["port"] for step in plan["steps"]} == place.homes()
        assert set(place.homes().values()) == {place.ports[1], place.ports[2]}
        assert listens_by(child, place.ports[0])


def test_acceptance_3_fixed_port_that_a_lost_child_keeps_is_refused_and_the_child_is_named(place: Place) -> None:
    port = place.spare[0]
    place.write(fake("chat", *_LOSES_A_CHILD, port=port))
    with lost_children(place):
        place.apply()
        (child,) = orphans(place)

        kill(place.pids()["lab/chat"])

        plan = place.plan(expect=4)
        ran = place.apply(expect=4)
        assert [(one["engine"], one["reason"]) for one in plan["blocked"]] == [("lab/chat", "port_taken")]
        assert f"pid {child}" in plan["blocked"][0]["why"] and f"pid {child}" in ran.stdout
        assert place.pids() == {} and listens_by(child, port)
    place.write(fake("chat", port=port))
    place.apply()
    place.assert_at_rest()


def test_acceptance_3_engine_whose_port_its_lost_child_would_keep_is_not_stopped_for_an_edit(place: Place) -> None:
    """Its successor could not listen: that is told before anything is stopped, and the child is named."""
    port = place.spare[0]
    place.write(fake("chat", *_LOSES_A_CHILD, port=port))
    with lost_children(place):
        place.apply()
        pids, (child,) = place.pids(), orphans(place)
        place.write(fake("chat", *_LOSES_A_CHILD, "--tokens", "3", port=port))

        plan = place.plan(expect=4)
        place.apply(expect=4)

        assert [(one["engine"], one["reason"]) for one in plan["blocked"]] == [("lab/chat", "port_taken")]
        assert place.pids() == pids
        assert listens_by(child, port)
        assert f"pid {child}" in plan["blocked"][0]["why"]
