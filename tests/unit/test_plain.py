"""Values survive the way to JSON and back exactly, and what cannot is refused by name."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_ft.errors import ConfigError
from paddle_ft.plain import from_plain, to_plain


def nothing(where: str, value: object) -> None:
    return None


def refuse(reference: dict[str, Any]) -> object:
    raise AssertionError(reference)


def round_trip(value: object) -> object:
    return from_plain(json.loads(json.dumps(to_plain(value, "x", nothing))), refuse)


keys = st.none() | st.booleans() | st.integers() | st.text() | st.tuples(st.integers(), st.text())
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=20,
)


@settings(deadline=None)
@given(values)
def test_values_come_back_equal_and_of_the_same_type(value: object) -> None:
    back = round_trip(value)
    assert back == value
    assert repr(back) == repr(value)


def test_nan_and_tags_come_back() -> None:
    back = round_trip({"a": float("nan"), "$": 1, "b": {"$": "taken", "value": {}}})
    assert isinstance(back, dict)
    assert math.isnan(back.pop("a"))
    assert back == {"$": 1, "b": {"$": "taken", "value": {}}}


def test_numpy_scalars_become_the_number_they_hold() -> None:
    assert round_trip([np.float32(0.5), np.int64(3), np.bool_(True)]) == [0.5, 3, True]


def test_what_is_taken_out_is_given_back() -> None:
    kept = {}

    def take(where: str, value: object) -> dict[str, Any] | None:
        if not isinstance(value, np.ndarray):
            return None
        kept[where] = value
        return {"name": where}

    plain = to_plain({"w": [np.arange(3), 1]}, "x", take)
    assert list(kept) == ["x/w/0"]
    back = from_plain(json.loads(json.dumps(plain)), lambda reference: kept[reference["name"]])
    assert back == {"w": [kept["x/w/0"], 1]}


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", 1j, lambda: None])
def test_the_rest_is_refused_and_named(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^state/a/1 is a .*cannot be kept in a checkpoint"):
        to_plain({"a": [0, value]}, "state", nothing)
