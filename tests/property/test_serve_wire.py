"""The codec of serving: what is sent arrives, and whatever else is sent is a bad request."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from paddle_ft.serve import wire
from paddle_ft.serve.tensors import DTYPES, BadRequest, from_json, from_raw, to_json, to_raw
from paddle_ft.serve.types import Feature, ModelInfo

MODEL = ModelInfo(
    "m",
    "3",
    "paddle",
    (Feature("x", "FP32", (-1, 2)), Feature("s", "BYTES", (-1,))),
    (Feature("y", "FP32", (-1, 2)), Feature("t", "BYTES", (-1,))),
)
SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)


@st.composite
def tensors(draw: st.DrawFn, finite: bool = False) -> tuple[str, NDArray[Any]]:
    datatype = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(SHAPES)
    if datatype != "BYTES":
        dtype = DTYPES[datatype]
        options = {"allow_nan": False, "allow_infinity": False} if finite else {}
        elements = hnp.from_dtype(dtype, **options) if dtype.kind == "f" else None
        return datatype, draw(hnp.arrays(dtype, shape, elements=elements))
    array = np.empty(shape, np.object_)
    one = st.text(max_size=8).map(str.encode) if finite else st.binary(max_size=8)
    for index in np.ndindex(shape):
        array[index] = draw(one)
    return datatype, array


def same(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and to_raw(a) == to_raw(b)


@given(tensors())
@settings(max_examples=40)
def test_raw_bytes_give_the_array_back(given_tensor: tuple[str, NDArray[Any]]) -> None:
    datatype, array = given_tensor
    assert same(from_raw("x", datatype, array.shape, memoryview(to_raw(array))), array)


@given(tensors(finite=True), st.booleans())
@settings(max_examples=40)
def test_json_gives_the_array_back(given_tensor: tuple[str, NDArray[Any]], nested: bool) -> None:
    datatype, array = given_tensor
    data = json.loads(json.dumps(to_json("x", array)))
    if nested and datatype != "BYTES":
        data = array.tolist()
    assert same(from_json("x", datatype, array.shape, data), array)


@given(tensors(), st.data())
@settings(max_examples=40)
def test_no_other_number_of_bytes_is_taken(
    given_tensor: tuple[str, NDArray[Any]], data: st.DataObject
) -> None:
    datatype, array = given_tensor
    raw = to_raw(array)
    other = data.draw(st.sampled_from([raw + b"\0", raw[:-1]] if raw else [b"\0"]))
    with pytest.raises(BadRequest):
        from_raw("x", datatype, array.shape, other)


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, int | None, dict[str, NDArray[Any]], bool]:
    rows = draw(st.integers(1, 5))
    floats = hnp.arrays(np.float32, (rows, 2), elements=st.floats(-9, 9, width=32))
    texts = np.array(draw(st.lists(st.text(max_size=5), min_size=rows, max_size=rows)), np.object_)
    inputs = {"x": draw(floats), "s": np.array([t.encode() for t in texts], np.object_)}
    entries, raw = [], b""
    for name, array in inputs.items():
        entry: dict[str, Any] = {"name": name, "shape": array.shape}
        entry["datatype"] = {"x": "FP32", "s": "BYTES"}[name]
        if draw(st.booleans()):
            entry["parameters"] = {"binary_data_size": len(to_raw(array))}
            raw += to_raw(array)
        else:
            entry["data"] = to_json(name, array)
        entries.append(entry)
    binary = draw(st.booleans())
    header: dict[str, Any] = {"inputs": entries, "parameters": {"binary_data_output": binary}}
    header["id"] = "7"
    text = json.dumps(header).encode()
    return text + raw, len(text) if raw or draw(st.booleans()) else None, inputs, binary


@given(requests())
@settings(max_examples=40)
def test_a_request_is_understood_and_its_answer_too(
    request: tuple[bytes, int | None, dict[str, NDArray[Any]], bool],
) -> None:
    body, header_bytes, inputs, binary = request
    if header_bytes is not None:
        with pytest.raises(BadRequest, match="belong to no input"):
            wire.decode(body + b"x", header_bytes, MODEL)
    asked = wire.decode(body, header_bytes, MODEL)
    assert asked.id == "7"
    assert all(same(asked.inputs[name], array) for name, array in inputs.items())
    outputs = {"y": inputs["x"], "t": inputs["s"]}
    parts, json_bytes = wire.encode(MODEL, asked, outputs)
    assert (json_bytes is not None) == binary
    answer, raw = json.loads(parts[0]), b"".join(parts[1:])
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("m", "3", "7")
    for entry in answer["outputs"]:
        if binary:
            size = entry["parameters"]["binary_data_size"]
            array = from_raw("o", entry["datatype"], tuple(entry["shape"]), raw[:size])
            raw = raw[size:]
        else:
            array = from_json("o", entry["datatype"], tuple(entry["shape"]), entry["data"])
        assert same(array, outputs[entry["name"]])
    assert not raw


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
ODD = st.sampled_from(
    [-1, 0, 2**31, 2**63, 10**30, 1e308, "x", "FP32", "INT8", "BF16", "\ud800", [], [[]], {}]
)


def attempt(body: bytes, header_bytes: int | None) -> None:
    try:
        found = wire.decode(body, header_bytes, MODEL)
    except BadRequest as error:
        status = error.status
        wire.error_body(str(error))
    else:
        status = 400
        assert list(found.inputs) == ["x", "s"]
    assert 400 <= status < 500


@given(st.binary(), st.none() | st.integers(-5, 40))
@example(b"[" * 100_000, None)
@example(b'{"inputs": [{"name": "x", "shape": [' + b"9" * 5000 + b"]}]}", None)
@example(b'{"inputs": [{"name":"x","datatype":"FP32","shape":[1,2],"data":[NaN,1]}]}', None)
@example(b'{"inputs": [{"name":"x","datatype":"FP32","shape":[1,2],"data":[1e999,1]}]}', None)
def test_any_bytes_give_a_bad_request_and_nothing_else(
    body: bytes, header_bytes: int | None
) -> None:
    attempt(body, header_bytes)


@given(JSON)
@settings(max_examples=40)
def test_any_json_gives_a_bad_request(value: object) -> None:
    attempt(json.dumps(value).encode(), None)


@given(requests(), st.data())
@settings(max_examples=40)
def test_a_request_with_something_odd_in_it_gives_a_bad_request_or_a_checked_one(
    request: tuple[bytes, int | None, dict[str, NDArray[Any]], bool], data: st.DataObject
) -> None:
    body, header_bytes, _, _ = request
    tree = json.loads(body[:header_bytes])
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(tree)
    node, key = data.draw(st.sampled_from(places))
    node[key] = data.draw(ODD | JSON)
    text = json.dumps(tree).encode()
    raw = b"" if header_bytes is None else body[header_bytes:]
    attempt(text + raw, None if header_bytes is None else len(text))


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("FP32", ["1", "2"]),
        ("FP32", [None, 1]),
        ("FP32", [True, 1.0]),
        ("FP32", [1e39, 1.0]),
        ("FP16", [70000, 1]),
        ("INT8", [128, 0]),
        ("UINT64", [-1, 0]),
        ("INT32", [1.5, 1]),
        ("INT32", [True, False]),
        ("BOOL", [1, 0]),
        ("BYTES", [1, "x"]),
        ("BF16", [1.0, 2.0]),
        ("FP32", [[1.0], [2.0]]),
        ("FP32", [1.0]),
        ("FP32", "12"),
    ],
)
def test_no_element_is_bent_into_shape(datatype: str, data: object) -> None:
    with pytest.raises(BadRequest):
        from_json("x", datatype, (1, 2), data)


def test_what_json_cannot_hold_is_to_be_asked_for_as_binary_data() -> None:
    for array in (np.array([np.nan]), np.array([b"\xff"], np.object_)):
        with pytest.raises(BadRequest, match="binary_data"):
            to_json("y", array)
