"""Strict JSON, negotiation, entity tags and ranges, as functions."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import MalformedJson, NotAcceptable, RangeNotSatisfiable
from service.http import choose_format, etag, matches, usable_range
from service.strictjson import parse_json

TYPES = {"json": "application/json", "csv": "text/csv", "png": "image/png"}
NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_all_strict_json_is_read_as_python_reads_it(value: object) -> None:
    text = json.dumps(value)
    assert parse_json(text.encode()) == json.loads(text)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_in_order(body: bytes) -> None:
    try:
        parsed = parse_json(body)
    except MalformedJson:
        return
    # What is taken is JSON for any reader: no NaN or Infinity at any depth, and nothing lost.
    assert json.loads(json.dumps(parsed, allow_nan=False)) == json.loads(body)


@pytest.mark.parametrize(
    "body", [b'{"a":1,"a":1}', b'[{"a":{"b":1,"b":2}}]', b"NaN", b"[Infinity]", b"\xff", b"1" * 5000]
)
def test_what_lenient_parsers_take_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedJson):
        parse_json(body)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, "json"),
        ("*/*", "json"),
        ("text/*", "csv"),
        ("image/png, */*;q=0.5", "png"),
        ("application/json;q=0.2, text/csv;q=0.3", "csv"),
        ("*/*, application/json;q=0", "csv"),
        ("TEXT/CSV", "csv"),
        ("application/json;charset=utf-8;q=0.1, image/png;q=0.2", "png"),
        ("text/csv;q=1.5", "json"),
        ("nonsense", "json"),
    ],
)
def test_the_most_wanted_representation_is_chosen(accept: str | None, chosen: str) -> None:
    assert choose_format(None, accept, TYPES) == chosen


def test_nothing_acceptable_names_what_there_is() -> None:
    with pytest.raises(NotAcceptable) as caught:
        choose_format(None, "application/xml, application/json;q=0, text/csv;q=0.0, image/gif", TYPES)
    assert caught.value.extra["available"] == list(TYPES.values())


def test_format_beats_accept() -> None:
    assert choose_format("csv", "image/png", TYPES) == "csv"


def test_tags_differ_with_any_part_and_match_in_lists() -> None:
    tag = etag("a", 1, None)
    assert tag == etag("a", 1, None)
    assert len({tag, etag("a", 1, 0), etag("a", "1x", None), etag("b", 1, None)}) == 4
    assert matches(tag, tag)
    assert matches(f'"x", W/{tag}', tag)
    assert not matches(f"W/{tag}", tag, weakly=False)
    assert matches("*", tag)
    assert not matches('"x"', tag)
    assert not matches(None, tag)


@pytest.mark.parametrize(
    ("header", "used"),
    [
        ("bytes=0-", "bytes=0-99"),
        ("bytes=99-", "bytes=99-99"),
        ("bytes=-1", "bytes=99-99"),
        ("bytes=-500", "bytes=0-99"),
        ("bytes=10-500", "bytes=10-99"),
        ("bytes=500-,0-1", "bytes=0-1"),
        ("bytes=0-1, 5-6", "bytes=0-1,5-6"),
        (None, None),
        ("items=0-", None),
        ("bytes=x", None),
        ("bytes=-", None),
        ("bytes=5-2", None),
        ("bytes=0-1,5-2", None),
    ],
)
def test_the_part_of_a_range_inside_the_file_is_used_and_what_is_none_ignored(
    header: str | None, used: str | None
) -> None:
    assert usable_range(header, 100) == used


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=-0", "bytes=100-,200-", "bytes=" + ",".join(["0-"] * 101)])
def test_ranges_outside_are_refused_with_the_size(header: str) -> None:
    with pytest.raises(RangeNotSatisfiable) as caught:
        usable_range(header, 100)
    assert caught.value.extra["headers"] == {"content-range": "bytes */100"}
