"""From facts to meaning: who is an engine, who belongs to it, what state it is in, and who is foreign."""

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest

from sage_reconcile.core import label
from sage_reconcile.core.assembly import assemble
from sage_reconcile.core.facts import Facts, HealthFact, KnownEngine, ListenerFact, ProcessFact, RecordFact, RouterFact
from sage_reconcile.core.identity import ProcessIdentity
from sage_reconcile.core.observed import Engine
from tests.builders import BOOT, NODE, identity, running

UID = 1000
CHAT = running("lab/chat", 8001, 100)


def labelled(leader: ProcessIdentity, engine: Engine = CHAT) -> tuple[tuple[str, str], ...]:
    variables: Mapping[str, str] = {
        **label.variables(engine=engine.id, source=engine.source, written=engine.written, resolved=engine.resolved),
        label.LEADER: label.leader_text(leader.pid, leader.start_ticks, 0),
    }
    return tuple(sorted(variables.items()))


def process(pid: int, *, session: int | None = None, parent: int = 1, uid: int = UID, **fields: object) -> ProcessFact:
    fact = ProcessFact(
        identity=identity(pid),
        parent_pid=parent,
        session=pid if session is None else session,
        uid=uid,
        user="ada",
        status="S",
        argv=("/usr/bin/llama-server",),
    )
    return replace(fact, **fields)  # type: ignore[arg-type]


def leader(**fields: object) -> ProcessFact:
    return process(100, label=labelled(identity(100)), **fields)


def facts(*processes: ProcessFact, **fields: object) -> Facts:
    seen = Facts(taken_at=1.0, node=NODE, boot_id=BOOT, uid=UID, processes=processes)
    return replace(seen, **fields)  # type: ignore[arg-type]


def own_port(*pids: int) -> ListenerFact:
    return ListenerFact(address="127.0.0.1", port=8001, uid=UID, pids=pids)


def proved(**fields: object) -> RecordFact:
    record = RecordFact(engine=CHAT.id, leader=identity(100), from_start=True, proved=True)
    return replace(record, **fields)  # type: ignore[arg-type]


def healthy(health: str = "ok", models: tuple[str, ...] | None = None) -> HealthFact:
    return HealthFact(leader=identity(100), health=health, models=models)


def the_engine(seen: Facts) -> Engine:
    (engine,) = assemble(seen).engines
    return engine


def test_a_labelled_process_is_an_engine_and_its_children_are_members() -> None:
    child = process(101, session=100, parent=100, label=labelled(identity(100)))
    assert the_engine(facts(leader(), child)).members == (identity(100), identity(101))


def test_a_child_that_made_its_own_session_is_a_member_and_no_second_engine() -> None:
    child = process(101, session=101, label=labelled(identity(100)))
    assert the_engine(facts(leader(), child)).members == (identity(100), identity(101))


def test_a_child_without_an_environment_is_a_member_by_its_session() -> None:
    child = process(101, session=100, label=())
    assert the_engine(facts(leader(), child)).members == (identity(100), identity(101))


def test_a_child_stays_a_member_that_was_seen_as_one_before() -> None:
    """It may wipe its environment and leave the session once it is known."""
    child = process(101, session=101, label=())
    known = KnownEngine(leader=identity(100), label=labelled(identity(100)), members=(identity(100), identity(101)))
    engine = the_engine(facts(child, known=(known,)))
    assert (engine.leader_alive, engine.members) == (False, (identity(101),))


def test_a_leader_whose_environment_reads_empty_is_still_the_engine() -> None:
    """Between exec and the new program's start it does."""
    known = KnownEngine(leader=identity(100), label=labelled(identity(100)), members=(identity(100),))
    assert the_engine(facts(process(100, label=()), known=(known,))).leader_alive


def test_what_runs_in_the_session_of_a_dead_leader_on_record_is_its_engine() -> None:
    child = process(101, session=100, label=())
    engine = the_engine(facts(child, records=(proved(label=labelled(identity(100))),)))
    assert (engine.leader_alive, engine.members) == (False, (identity(101),))


def test_a_session_whose_number_was_given_away_is_not_the_one_on_record() -> None:
    stranger = process(100, identity=identity(100, ticks=99), label=())
    child = process(101, session=100, label=())
    assert assemble(facts(stranger, child, records=(proved(label=labelled(identity(100))),))).engines == ()


def test_a_record_of_another_boot_is_void() -> None:
    old = replace(proved(label=labelled(identity(100))), leader=identity(100, boot="boot-0"))
    assert assemble(facts(process(101, session=100, label=()), records=(old,))).engines == ()


def test_an_engine_of_another_pid_namespace_is_not_ours() -> None:
    """Its label names a leader by a number that means another process here."""
    assert assemble(facts(leader(), namespace=4026531836)).engines == ()


def test_a_child_without_environment_and_session_is_nobody_s() -> None:
    child = process(101, session=101, label=())
    assert the_engine(facts(leader(), child)).members == (identity(100),)


def test_a_child_that_outlives_its_leader_keeps_the_engine_known() -> None:
    child = process(101, session=100, label=labelled(identity(100)))
    engine = the_engine(facts(child))
    assert (engine.leader_alive, engine.state, engine.members) == (False, "failed", (identity(101),))


def test_a_pid_that_was_given_away_is_not_the_leader() -> None:
    stranger = process(100, identity=identity(100, ticks=99), label=())
    child = process(101, session=101, label=labelled(identity(100)))
    engine = the_engine(facts(stranger, child))
    assert (engine.leader_alive, engine.members) == (False, (identity(101),))


def test_a_zombie_counts_as_gone() -> None:
    assert assemble(facts(leader(status="Z"))).engines == ()


def test_another_user_s_process_with_our_label_is_not_ours() -> None:
    assert assemble(facts(leader(uid=UID + 1))).engines == ()


@pytest.mark.parametrize(
    "missing", [label.PROJECT, label.SOURCE, label.ENGINE, label.SPEC, label.PLACEMENT, label.LEADER]
)
def test_a_partial_label_makes_no_engine(missing: str) -> None:
    partial = tuple(entry for entry in labelled(identity(100)) if entry[0] != missing)
    assert assemble(facts(process(101, session=100, label=partial))).engines == ()


def test_a_process_at_the_gate_is_already_its_engine() -> None:
    """The gate learns its own name last; a look in between must not take the engine for gone."""
    gate = tuple(entry for entry in labelled(identity(100)) if entry[0] != label.LEADER)
    argv = (*label.GATE, "/usr/bin/llama-server")
    assert the_engine(facts(process(100, label=gate, argv=argv))).leader == identity(100)
    # Any other program with such an environment is somebody who inherited it.
    assert assemble(facts(process(100, label=gate))).engines == ()
    assert assemble(facts(process(100, session=99, label=gate, argv=argv))).engines == ()


@pytest.mark.parametrize("name", [label.ENGINE, label.SPEC, label.PLACEMENT, label.LEADER])
def test_a_label_that_makes_no_sense_makes_no_engine(name: str) -> None:
    for nonsense in ("", "x", "[]", "{", "/", "1:", '"a"', "null", "[" * 5000):
        forged = tuple((key, nonsense if key == name else value) for key, value in labelled(identity(100)))
        assert assemble(facts(process(100, label=forged))).engines == ()


@pytest.mark.parametrize(("field", "nonsense"), [("defaults", "["), ("defaults", "[]"), ("argv", [])])
def test_what_was_resolved_must_make_sense_in_all_its_parts(field: str, nonsense: object) -> None:
    forged = dict(labelled(identity(100)))
    forged[label.PLACEMENT] = json.dumps(json.loads(forged[label.PLACEMENT]) | {field: nonsense})
    assert assemble(facts(process(100, label=tuple(sorted(forged.items()))))).engines == ()


def test_an_engine_that_a_newer_sage_started_is_an_engine_all_the_same() -> None:
    """2026-11-28: its label had a field more, so it was taken for gone, and a second one was started beside it."""
    newer = dict(labelled(identity(100)))
    resolved = json.loads(newer[label.PLACEMENT])
    newer[label.PLACEMENT] = json.dumps(resolved | {"of_later": 1, "placement": resolved["placement"] | {"numa": [0]}})
    newer["SAGE_OF_LATER"] = "1"
    engine = the_engine(facts(process(100, label=tuple(sorted(newer.items())))))
    assert (engine.id, engine.leader, engine.resolved) == (CHAT.id, identity(100), CHAT.resolved)


def test_sage_and_its_ancestors_are_never_members() -> None:
    shell = process(102, session=100, label=labelled(identity(100)))
    assert the_engine(facts(leader(), shell, own_pids=(102,))).members == (identity(100),)


def test_two_processes_of_one_id_are_two_engines() -> None:
    newer = process(200, label=labelled(identity(200)))
    assert [engine.leader.pid for engine in assemble(facts(leader(), newer)).engines] == [100, 200]


# --- states -----------------------------------------------------------------------------------------------------------


def test_an_engine_that_does_not_listen_is_starting() -> None:
    engine = the_engine(facts(leader(), records=(proved(proved=False),)))
    assert (engine.state, engine.reason) == ("starting", "does not listen on 127.0.0.1:8001 yet")


def test_an_engine_is_ready_once_its_answer_is_on_record() -> None:
    engine = the_engine(facts(leader(), listeners=(own_port(100),), healths=(healthy(),), records=(proved(),)))
    assert engine.state == "ready"


def test_health_alone_is_not_ready_while_its_record_has_no_answer() -> None:
    seen = facts(leader(), listeners=(own_port(100),), healths=(healthy(),), records=(proved(proved=False),))
    assert the_engine(seen).state == "starting"


def test_without_a_record_health_and_the_model_list_stand_in() -> None:
    seen = facts(leader(), listeners=(own_port(100),), healths=(healthy(models=("chat",)),))
    assert the_engine(seen).state == "ready"
    other = facts(leader(), listeners=(own_port(100),), healths=(healthy(models=("another",)),))
    assert the_engine(other).state == "starting"


def test_a_record_of_another_process_proves_nothing() -> None:
    other = proved(leader=identity(100, ticks=7))
    seen = facts(leader(), listeners=(own_port(100),), healths=(healthy(),), records=(other,))
    assert the_engine(seen).state == "starting"


def test_a_stranger_on_the_port_beside_the_engine_takes_its_readiness() -> None:
    """Two sockets with SO_REUSEPORT share a port: answers may come from either."""
    stranger = ListenerFact(address="127.0.0.1", port=8001, uid=UID, pids=(900,))
    seen = facts(leader(), process(900), listeners=(own_port(100), stranger), healths=(healthy(),), records=(proved(),))
    engine = the_engine(seen)
    assert (engine.state, engine.reason) == (
        "unready",
        "port 8001 is answered by pid 900 (llama-server), not by this engine",
    )


def test_a_socket_of_another_user_on_the_port_takes_its_readiness() -> None:
    hidden = ListenerFact(address="0.0.0.0", port=8001, uid=0)
    seen = facts(leader(), listeners=(own_port(100), hidden), healths=(healthy(),), records=(proved(),))
    assert the_engine(seen).reason == "port 8001 is answered by a process of uid 0, not by this engine"


def test_an_engine_that_listens_elsewhere_is_not_ready() -> None:
    elsewhere = replace(own_port(100), port=9999)
    engine = the_engine(facts(leader(), listeners=(elsewhere,), records=(proved(proved=False),)))
    assert (engine.state, engine.reason) == ("starting", "listens on 127.0.0.1:9999, not on 127.0.0.1:8001")


def test_a_worker_may_hold_the_socket() -> None:
    worker = process(101, session=100, label=labelled(identity(100)))
    seen = facts(leader(), worker, listeners=(own_port(101),), healths=(healthy(),), records=(proved(),))
    assert the_engine(seen).state == "ready"


def test_a_busy_engine_is_not_demoted_by_a_slow_answer() -> None:
    seen = facts(leader(), listeners=(own_port(100),), healths=(healthy("silent"),), records=(proved(),))
    assert the_engine(seen).state == "unready"
    router = RouterFact(pid=5, in_flight=((identity(100), 3),))
    engine = the_engine(replace(seen, routers=(router,)))
    assert (engine.state, engine.reason) == ("ready", "busy with 3 requests")


def test_policy_on_record_overlays_the_label_and_identity_does_not() -> None:
    policy = '{"name":"chat","model":"/other.gguf","label":"new","use_gpu":false}'
    engine = the_engine(facts(leader(), records=(proved(policy=policy),)))
    assert '"label":"new"' in engine.written
    assert '"/models/chat.gguf"' in engine.written


# --- foreign ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "kind", "model", "port"),
    [
        (("/opt/vllm/bin/python3", "/opt/vllm/bin/vllm", "serve", "org/m", "--port", "8500"), "llm", "org/m", 8500),
        (("vllm", "serve", "org/m", "--port=8500"), "llm", "org/m", 8500),
        (("vllm", "serve", "--model", "org/m", "--served-model-name", "m"), "llm", "m", 8000),
        (("python3", "-m", "vllm.entrypoints.openai.api_server", "--model=org/m", "--port=1234"), "llm", "org/m", 1234),
        (("vllm", "serve", "org/e", "--runner", "pooling"), "embedding", "org/e", 8000),
        (("/usr/local/bin/llama-server", "-m", "/m/a.gguf", "--port", "9"), "llm", "/m/a.gguf", 9),
        (("llama-server", "--model", "a.gguf", "--embedding"), "embedding", "a.gguf", 8080),
        (("infinity_emb", "v2", "--model-id", "org/e"), "embedding", "org/e", 7997),
    ],
)
def test_an_engine_started_by_hand_is_recognised(argv: tuple[str, ...], kind: str, model: str, port: int) -> None:
    (foreign,) = assemble(facts(process(300, argv=argv))).foreign
    assert (foreign.pid, foreign.kind, foreign.model, foreign.port) == (300, kind, model, port)


@pytest.mark.parametrize(
    "argv", [("vim", "vllm"), ("bash",), ("grep", "llama-server"), ("vllm", "bench"), (), ("cat", "/x/vllm.log")]
)
def test_a_word_alone_makes_no_engine(argv: tuple[str, ...]) -> None:
    assert assemble(facts(process(300, argv=argv))).foreign == ()


def test_a_wrapper_and_its_child_are_one_engine_the_one_that_listens() -> None:
    words = ("vllm", "serve", "org/m")
    wrapper = process(300, argv=("uv", "run", *words))
    child = process(301, parent=300, argv=("python", *words))
    worker = process(302, parent=301, argv=("python", *words))
    socket = ListenerFact(address="127.0.0.1", port=8000, uid=UID, pids=(301,))
    (foreign,) = assemble(facts(wrapper, child, worker, listeners=(socket,))).foreign
    assert foreign.pid == 301
