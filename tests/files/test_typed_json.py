"""Dataclasses from JSON and back: every type is checked, and what is absent stays absent."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from kasa_cli.files.typed_json import INLINE, OPTIONAL, Malformed, from_json, to_json


@dataclass(frozen=True)
class Place:
    file: str
    offset: int | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class Record:
    name: str
    kappa: float
    shape: tuple[int, ...]
    is_new: bool
    parts: Mapping[str, Place] = field(default_factory=dict)
    note: str | None = None
    place: Place | None = field(default=None, metadata=INLINE)


BARE = {"name": "w", "kappa": 2.5, "shape": [3, 4], "is_new": True}
CASES = {
    "without a place": (BARE, Record("w", 2.5, (3, 4), True)),
    "a place among its fields": (
        {**BARE, "file": "a", "offset": 7},
        Record("w", 2.5, (3, 4), True, place=Place("a", 7)),
    ),
    "an optional field": (
        {**BARE, "parts": {"x": {"file": "a"}}},
        Record("w", 2.5, (3, 4), True, {"x": Place("a")}),
    ),
    "an infinity": ({**BARE, "kappa": None}, Record("w", math.inf, (3, 4), True)),
    "an integer for a float": ({**BARE, "kappa": 2}, Record("w", 2, (3, 4), True)),
}


@pytest.mark.parametrize("name", CASES)
def test_json_becomes_a_dataclass_and_the_same_json_again(name):
    content, record = CASES[name]
    assert from_json(Record, content) == record
    assert to_json(record) == {"parts": {}, "note": None, **content}


def test_unknown_fields_are_ignored():
    assert from_json(Record, {**BARE, "later": 1}) == CASES["without a place"][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "name is no str"),
        ({"name": None}, "name is no str"),
        ({"kappa": "2"}, "kappa is no float"),
        ({"kappa": True}, "kappa is no float"),
        ({"shape": [3, "4"]}, "shape.1 is no int"),
        ({"shape": [3, True]}, "shape.1 is no int"),
        ({"shape": {}}, "shape is not a list"),
        ({"is_new": 1}, "is_new is no bool"),
        ({"parts": []}, "parts is not an object"),
        ({"parts": {"x": 1}}, "parts.x is not an object"),
        ({"parts": {"x": {}}}, "parts.x.file is missing"),
        ({"file": 1}, "file is no str"),
    ],
)
def test_a_value_of_another_type_is_named(change, message):
    with pytest.raises(Malformed) as caught:
        from_json(Record, BARE | change)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", BARE)
def test_a_missing_field_is_named(name):
    with pytest.raises(Malformed, match=f"^{name} is missing$"):
        from_json(Record, {key: value for key, value in BARE.items() if key != name})


@pytest.mark.parametrize("value", [None, 3, "text", [1]])
def test_what_is_not_an_object_is_refused(value):
    with pytest.raises(Malformed, match="is not an object"):
        from_json(Record, value)
