"""A sealed line shows any damage; a shortened journal keeps what should run."""

import json
from dataclasses import replace

import pytest

from sage_reconcile.core.journal import (
    ActBegun,
    ActDone,
    Entry,
    JournalBegun,
    PlanBegun,
    PlanEnded,
    entry_json,
    is_newer,
    last_applied,
    parse_entry,
    shortened,
)
from sage_reconcile.core.seal import sealed, unsealed
from tests.builders import the_id

CHAT = the_id("lab/chat")


def test_a_sealed_object_is_a_json_object_that_comes_back() -> None:
    line = sealed('{"a":1,"b":"ä","crc32":"x"}')
    assert json.loads(line)["a"] == 1
    assert unsealed(line) == unsealed(line.encode()) == {"a": 1, "b": "ä", "crc32": "x"}


def test_no_byte_of_a_sealed_line_can_change_unseen() -> None:
    line = sealed('{"a":1,"port":8001}').encode()
    for position in range(len(line)):
        for bit in range(8):
            damaged = bytearray(line)
            damaged[position] ^= 1 << bit
            assert unsealed(bytes(damaged)) is None, damaged


@pytest.mark.parametrize("line", ["", "{}", "null", '{"a":1}', '{"a":1,"crc32":"00000000"}', "[" * 5000, "\0" * 99])
def test_what_was_never_sealed_is_nothing(line: str) -> None:
    assert unsealed(line) is None


def test_a_damaged_format_number_is_damage_and_no_newer_sage() -> None:
    newer = sealed('{"format":2,"entry":"journal_begun"}').encode()
    assert is_newer(newer)
    assert not is_newer(entry_json(JournalBegun()).encode())
    assert not is_newer(newer.replace(b"2", b"3", 1))


def plan(number: int, outcome: str = "converged") -> tuple[Entry, ...]:
    begun = PlanBegun(at=number, pid=1, source="/s", digest="d", acts=("start lab/chat",), revision=((CHAT, "{}"),))
    return begun, ActBegun(at=number, act=0), ActDone(at=number, act=0), PlanEnded(at=number, outcome=outcome)


def test_a_shortened_journal_keeps_the_newest_plans_and_the_last_one_that_was_applied() -> None:
    applied, failed = plan(1), tuple(entry for number in range(2, 50) for entry in plan(number, "restored"))
    size = sum(len(entry_json(entry)) + 1 for entry in plan(49, "restored"))

    kept = shortened((*applied, *failed), 3 * size)

    assert kept[:4] == applied
    assert kept[4:] == failed[-12:]
    assert last_applied(kept) == last_applied((*applied, *failed))


def test_a_shortened_journal_does_not_bring_back_what_was_stopped() -> None:
    begun, *rest = plan(2)
    assert isinstance(begun, PlanBegun)
    stopped = (replace(begun, revision=()), *rest)
    failed = tuple(entry for number in range(3, 50) for entry in plan(number, "restored"))

    kept = shortened((*plan(1), *stopped, *failed), 1)

    assert last_applied(kept) == ()
    assert kept[:4] == stopped


def test_a_plan_that_is_longer_than_a_journal_may_be_is_kept_all_the_same() -> None:
    assert shortened(plan(1), 1) == plan(1)


def test_an_entry_of_another_kind_is_none() -> None:
    assert parse_entry(entry_json(replace(JournalBegun(), format=1))) == JournalBegun()
    assert parse_entry(sealed('{"entry":"act_begun"}')) is None
