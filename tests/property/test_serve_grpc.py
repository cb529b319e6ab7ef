"""Messages of gRPC: whatever they hold gives a checked request or a bad one."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_ft.serve import grpc_tensors
from paddle_ft.serve.grpc_messages import inference
from paddle_ft.serve.grpc_tensors import CONTENTS
from paddle_ft.serve.tensors import DTYPES, BadRequest
from paddle_ft.serve.types import Feature, ModelInfo

KINDS = sorted(DTYPES)
MODEL = ModelInfo(
    "m",
    "1",
    "numpy",
    (Feature("x", "INT8", (-1, -1)), Feature("s", "BYTES", (-1,))),
    (Feature("y", "FP16", (-1,)),),
)


@st.composite
def messages(draw: st.DrawFn) -> Any:
    request = inference().ModelInferRequest(model_name="m")
    for name in draw(st.lists(st.sampled_from(["x", "s", "", "z"]), max_size=3)):
        datatype = draw(st.sampled_from([*KINDS, "INT8", "BYTES", "BF16", ""]))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, -1, 2**40]), max_size=3))
        tensor = request.inputs.add(name=name, datatype=datatype, shape=shape)
        if draw(st.booleans()):
            tensor.contents.int_contents.extend(draw(st.lists(st.integers(-300, 300), max_size=4)))
        if draw(st.booleans()):
            tensor.contents.bytes_contents.extend(draw(st.lists(st.binary(max_size=3), max_size=3)))
    request.raw_input_contents.extend(draw(st.lists(st.binary(max_size=12), max_size=3)))
    for name in draw(st.lists(st.sampled_from(["y", "z"]), max_size=2)):
        output = request.outputs.add(name=name)
        output.parameters["classification"].int64_param = draw(st.integers(0, 1))
    request.parameters["timeout"].int64_param = draw(st.sampled_from([0, 5, -1]))
    return request


@given(messages())
@settings(max_examples=150)
def test_any_message_gives_a_checked_request_or_a_bad_one(message: Any) -> None:
    try:
        found = grpc_tensors.decode(message, MODEL)
    except BadRequest as error:
        status = error.status
    else:
        status = 400
        assert list(found.inputs) == ["x", "s"]
        assert found.inputs["x"].dtype == np.int8
        assert len(found.inputs["x"]) == len(found.inputs["s"]) > 0
    assert 400 <= status < 500


@given(st.sampled_from(sorted(CONTENTS)), st.integers(1, 3), st.booleans())
@settings(max_examples=40)
def test_a_message_gives_the_arrays_back(datatype: str, rows: int, raw: bool) -> None:
    shape = (rows, 2)
    model = ModelInfo(
        "m", "1", "numpy", (Feature("a", datatype, shape),), (Feature("a", datatype, shape),)
    )
    array: Any = np.arange(rows * 2).reshape(shape).astype(DTYPES[datatype])
    if datatype == "BYTES":
        array = np.array([[str(e).encode() for e in row] for row in array], np.object_)
    request = grpc_tensors.wire.Request({"a": array}, (grpc_tensors.wire.Asked("a", raw),))
    answer = grpc_tensors.encode(model, request, {"a": array})
    back = inference().ModelInferRequest(
        model_name="m", raw_input_contents=answer.raw_output_contents
    )
    assert bool(back.raw_input_contents) == raw
    back.inputs.add().ParseFromString(answer.outputs[0].SerializeToString())
    assert grpc_tensors.decode(back, model).inputs["a"].tolist() == array.tolist()
