"""The body of a request: what it asks for, and the one value that may be replaced in it."""

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_reconcile.router.answers import Rejected
from sage_reconcile.router.body import Asked, parse_asked, with_model
from sage_reconcile.router.limits import Limits

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.just("model"), inner, max_size=3),
    max_leaves=8,
)
space = st.text(alphabet=" \t\r\n", max_size=2)
keys = st.text(max_size=5).filter(lambda key: key != "model")


def parsed(body: bytes) -> Asked:
    return parse_asked(body, Limits())


@given(
    before=st.lists(st.tuples(keys, values), max_size=3),
    after=st.lists(st.tuples(keys, values), max_size=3),
    asked=st.text(min_size=1),
    served=st.text(min_size=1),
    spaces=st.tuples(space, space, space, space),
    ascii_only=st.booleans(),
    key=st.sampled_from(['"model"', '"\\u006dodel"', '"mode\\u006c"']),
)
def test_no_byte_but_the_models_is_ever_changed(
    before: list[tuple[str, object]],
    after: list[tuple[str, object]],
    asked: str,
    served: str,
    spaces: tuple[str, str, str, str],
    ascii_only: bool,
    key: str,
) -> None:
    def written(pairs: list[tuple[str, object]]) -> list[str]:
        return [f"{spaces[0]}{json.dumps(k)}{spaces[1]}:{json.dumps(v, ensure_ascii=ascii_only)}" for k, v in pairs]

    def surrounded(middle: str) -> bytes:
        pair = f"{key}{spaces[2]}:{spaces[3]}{middle}{spaces[1]}"
        text = spaces[3] + "{" + ",".join([*written(before), pair, *written(after)]) + spaces[0] + "}" + spaces[2]
        return text.encode()

    body = surrounded(json.dumps(asked, ensure_ascii=ascii_only))

    found = parsed(body)
    replaced = with_model(body, found, served)

    assert found.model == asked
    assert replaced == (body if asked == served else surrounded(json.dumps(served)))


@given(st.lists(st.tuples(keys, values), max_size=4))
def test_a_model_is_never_put_where_none_was(pairs: list[tuple[str, object]]) -> None:
    body = ("{" + ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in pairs) + "}").encode()

    assert with_model(body, parsed(body), "served") == body


@given(st.binary(max_size=40) | st.text(alphabet='{}[]":,model \\u0', max_size=40).map(str.encode))
def test_any_bytes_are_either_json_to_python_too_or_rejected(body: bytes) -> None:
    try:
        asked = parsed(body)
    except Rejected as rejected:
        assert rejected.status == 400
        return
    assert isinstance(json.loads(asked.text), dict)


@given(values.map(json.dumps))
def test_every_object_that_python_reads_is_read(text: str) -> None:
    is_object = isinstance(json.loads(text), dict)
    try:
        parsed(text.encode())
    except Rejected as rejected:
        assert not is_object or rejected.code == "invalid_model"
    else:
        assert is_object


def test_a_model_that_stands_twice_is_replaced_in_both_places_and_the_last_one_counts() -> None:
    body = b'{"model": "a", "x": {"model": "a"}, "model":"b"}'

    asked = parsed(body)

    assert asked.model == "b"
    assert with_model(body, asked, "served") == b'{"model": "served", "x": {"model": "a"}, "model":"served"}'


def test_a_second_model_cannot_pass_behind_one_that_is_served() -> None:
    body = b'{"model": "other", "model": "served"}'

    assert with_model(body, parsed(body), "served") == b'{"model": "served", "model": "served"}'


@pytest.mark.parametrize("model", ["null", '""'])
def test_an_empty_model_is_none_and_is_filled_in(model: str) -> None:
    body = f'{{"model": {model}}}'.encode()

    asked = parsed(body)

    assert asked.model is None
    assert with_model(body, asked, "served") == b'{"model": "served"}'


BAD = {
    "nothing": b"",
    "space": b"  ",
    "no object": b"[]",
    "a string": b'"model"',
    "null": b"null",
    "not closed": b'{"model": "a"',
    "trailing comma": b'{"model": "a",}',
    "no comma": b'{"a": 1 "b": 2}',
    "no colon": b'{"a" 1}',
    "no key": b"{: 1}",
    "bare key": b"{model: 1}",
    "single quotes": b"{'model': 'a'}",
    "comment": b'{"a": 1} // so',
    "two objects": b"{}{}",
    "trailing NUL": b"{}\0",
    "byte order mark": b'\xef\xbb\xbf{"model": "a"}',
    "UTF-16": '{"model": "a"}'.encode("utf-16"),
    "not UTF-8": b'{"model": "\xff"}',
    "raw control character": b'{"model": "a\nb"}',
    "bad escape": b'{"model": "\\x"}',
    "huge number": b'{"n": ' + b"9" * 5000 + b"}",
    "deep arrays": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep arrays, open": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "many arrays": b'{"a": [' + b"[]," * 500_001 + b"[]]}",
    "many numbers": b'{"a": [' + b"1," * 500_001 + b"1]}",
    "many keys": b"{" + b'"a": 1, ' * 1000 + b'"b": 1}',
    "comma alone": b"{,}",
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD.keys())
def test_bad_json_is_a_400(body: bytes) -> None:
    with pytest.raises(Rejected) as caught:
        parsed(body)

    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize("model", ["1", "true", "[]", '{"model": "a"}', "NaN"])
def test_a_model_that_is_not_a_string_is_a_400(model: str) -> None:
    with pytest.raises(Rejected) as caught:
        parsed(f'{{"model": {model}}}'.encode())

    assert (caught.value.status, caught.value.code) == (400, "invalid_model")


def test_a_lone_surrogate_in_a_model_is_a_name_like_any_other() -> None:
    assert parsed(b'{"model": "\\ud800"}').model == "\ud800"


def test_an_ascii_name_survives_beside_other_letters() -> None:
    body = '{"model": "a", "content": "Grüße, 世界 🌍"}'.encode()

    assert with_model(body, parsed(body), string.ascii_letters) == body.replace(
        b'"a"', b'"%s"' % string.ascii_letters.encode()
    )
