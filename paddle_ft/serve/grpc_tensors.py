"""Requests and responses of gRPC to and from arrays: ``raw_*_contents`` or typed contents. Pure."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paddle_ft.serve import wire
from paddle_ft.serve.grpc_messages import inference
from paddle_ft.serve.tensors import (
    DTYPES,
    SLICE_ELEMENTS,
    BadRequest,
    datatype_of,
    finish,
    from_raw,
    raw_slices,
    short,
    tensor_shape,
)
from paddle_ft.serve.types import ModelInfo, Tensors

CONTENTS: Mapping[str, str] = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""FP16 has none and goes raw."""


def decode(message: Any, info: ModelInfo, bounds: wire.Bounds = wire.BOUNDS) -> wire.Request:
    """The request in a ModelInferRequest; raises BadRequest."""
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise BadRequest(
            f"there are {len(message.inputs)} inputs, but {len(raw)} raw_input_contents"
        )
    inputs: dict[str, NDArray[Any]] = {}
    counted = wire.Counted(bounds)
    for index, tensor in enumerate(message.inputs):
        name, datatype = tensor.name, tensor.datatype  # each look at a field makes an object
        if name in inputs:
            raise BadRequest(f"input {short(name)} is given twice")
        _no_shared_memory(tensor)
        wire.check_name(info, name)
        shape = tensor_shape(name, list(tensor.shape))
        counted.add(datatype, shape, listed=not raw)
        if raw and not tensor.HasField("contents"):
            array = from_raw(name, datatype, shape, raw[index])
        elif raw:
            raise BadRequest(f"input {short(name)} has both contents and raw contents")
        else:
            array = _from_contents(tensor, shape)
        inputs[name] = array
    parameters = {key: value(each) for key, each in message.parameters.items()}
    asked: list[str] = []
    for output in message.outputs:
        _no_shared_memory(output)
        if "classification" in output.parameters and value(output.parameters["classification"]):
            raise BadRequest(f"output {short(output.name)}: classification is not served")
        if output.name in asked:
            raise BadRequest(f"output {short(output.name)} is asked for twice")
        asked.append(output.name)
    wire.check_outputs(info, asked)
    names = asked or [feature.name for feature in info.outputs]
    binary = bool(raw) or not message.inputs
    return wire.Request(
        wire.check_inputs(info, inputs),
        tuple(wire.Asked(name, binary) for name in names),
        message.id,
        wire.timeout_of(parameters.get("timeout", 0)),
        parameters,
    )


def encode(info: ModelInfo, request: wire.Request, outputs: Tensors) -> Any:
    """A ModelInferResponse: raw, unless the request was not and every output can be without."""
    return finish(encoding(info, request, outputs))


def encoding(
    info: ModelInfo, request: wire.Request, outputs: Tensors, bounds: wire.Bounds = wire.BOUNDS
) -> Generator[None, None, Any]:
    """``encode`` in steps of a few milliseconds; raises BadRequest beyond ``bounds``."""
    response = inference().ModelInferResponse(
        model_name=info.name, model_version=info.version, id=request.id
    )
    arrays = {asked.name: outputs[asked.name] for asked in request.outputs}
    raw = any(asked.binary for asked in request.outputs) or any(
        datatype_of(array) not in CONTENTS for array in arrays.values()
    )
    counted = wire.Counted(bounds)
    for name, array in arrays.items():
        datatype = datatype_of(array)
        tensor = response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        if raw:
            parts = []
            for at, part in enumerate(raw_slices(array)):
                if at:
                    yield
                parts.append(part)
            response.raw_output_contents.append(parts[0] if len(parts) == 1 else b"".join(parts))
            continue
        counted.add(datatype, array.shape, listed=True)
        contents, flat = getattr(tensor.contents, CONTENTS[datatype]), array.reshape(-1)
        for at in range(0, len(flat), SLICE_ELEMENTS):
            if at:
                yield
            values = flat[at : at + SLICE_ELEMENTS].tolist()
            if datatype == "BYTES":
                values = [v if isinstance(v, bytes) else str(v).encode() for v in values]
            contents.extend(values)
    return response


def _from_contents(tensor: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    name, datatype = tensor.name, tensor.datatype
    field = CONTENTS.get(datatype)
    if field is None:
        how = "send it as raw_input_contents" if datatype in DTYPES else f"use {', '.join(DTYPES)}"
        raise BadRequest(f"input {short(name)}: no contents of {short(datatype)}; {how}")
    values = getattr(tensor.contents, field)
    if len(values) != math.prod(shape):
        raise BadRequest(
            f"input {short(name)} of shape {list(shape)} needs {math.prod(shape)} elements in "
            f"{field}, but has {len(values)}"
        )
    dtype = DTYPES[datatype]
    if dtype.kind == "O":
        array: NDArray[Any] = np.empty(len(values), dtype)
        array[:] = list(values)
        return array.reshape(shape)
    wide = np.uint64 if datatype == "UINT64" else np.int64
    found = np.fromiter(values, wide if dtype.kind in "iu" else dtype, len(values))
    array = found.astype(dtype)
    if dtype.kind in "iu" and (array.astype(wide) != found).any():
        raise BadRequest(f"input {short(name)} has elements outside the range of {datatype}")
    return array.reshape(shape)


def _no_shared_memory(tensor: Any) -> None:
    if any(key.startswith("shared_memory") for key in tensor.parameters):
        raise BadRequest(f"{short(tensor.name)}: shared memory is not served; send the data")


def value(parameter: Any) -> Any:
    """What an InferParameter or a ModelRepositoryParameter holds; None: nothing."""
    which = parameter.WhichOneof("parameter_choice")
    return None if which is None else getattr(parameter, which)
