"""The Open Inference Protocol (v2) between bytes and arrays: JSON bodies and binary tensors. Pure.

Whatever a client sends gives either a checked ``Request`` or ``BadRequest``, and nothing else. A
body is JSON, or JSON of ``Inference-Header-Content-Length`` bytes followed by the raw elements of
those tensors that name a ``binary_data_size``, in their order. Memory: a request costs at most some
ten times its body (elements of JSON are Python objects for a moment).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from paddle_ft.serve.tensors import (
    BadRequest,
    datatype_of,
    from_json,
    from_raw,
    short,
    tensor_shape,
    to_json,
    to_raw,
)
from paddle_ft.serve.types import Feature, ModelInfo, Tensors

TENSORS_MAX = 256
TIMEOUT_US_MAX = 3_600_000_000


@dataclass(frozen=True, slots=True)
class Asked:
    """One output that the client wants."""

    name: str
    binary: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked, checked against the model."""

    inputs: Tensors
    outputs: tuple[Asked, ...]
    """All of the model's where the client names none."""
    id: str = ""
    timeout_us: int = 0
    """From the parameter ``timeout``; 0: none."""
    parameters: Mapping[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------- requests


def decode(body: bytes, header_bytes: int | None, info: ModelInfo) -> Request:
    """The request in ``body``, whose first ``header_bytes`` are JSON (all, if None).

    Raises:
        BadRequest: for anything that is not a request for this model.
    """
    if header_bytes is not None and not 0 <= header_bytes <= len(body):
        raise BadRequest(
            f"Inference-Header-Content-Length is {header_bytes}, but the body has {len(body)} bytes"
        )
    header = _object(parse_json(body[:header_bytes]), "the request")
    parameters = _object(header.get("parameters", {}), "parameters")
    asked_id = header.get("id", "")
    if not isinstance(asked_id, str):
        raise BadRequest("id must be a string")
    raw = memoryview(body)[len(body) if header_bytes is None else header_bytes :]
    inputs: dict[str, NDArray[Any]] = {}
    for entry in _tensors(header.get("inputs"), "inputs"):
        name, datatype, shape = _described(entry)
        if name in inputs:
            raise BadRequest(f"input {short(name)} is given twice")
        size = _binary_size(name, entry)
        if size is None:
            inputs[name] = from_json(name, datatype, shape, entry.get("data"))
            continue
        if "data" in entry:
            raise BadRequest(f"input {short(name)} has both data and binary_data_size")
        if size > len(raw):
            raise BadRequest(
                f"input {short(name)} wants {size} binary bytes, but {len(raw)} are left"
            )
        inputs[name] = from_raw(name, datatype, shape, raw[:size])
        raw = raw[size:]
    if raw:
        raise BadRequest(f"{len(raw)} bytes after the JSON belong to no input")
    binary = _boolean(parameters, "binary_data_output")
    return Request(
        check_inputs(info, inputs),
        _outputs(header.get("outputs"), info, binary),
        asked_id,
        timeout_of(parameters.get("timeout", 0)),
        parameters,
    )


def parse_json(text: bytes) -> Any:
    """The value in ``text``; raises BadRequest, also for NaN, Infinity and bottomless nesting."""
    try:
        return json.loads(text.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]
        raise BadRequest(f"the request is not valid JSON: {why}") from None


def timeout_of(value: object) -> int:
    """Microseconds of the parameter ``timeout``, 0 for none."""
    if type(value) is not int or not 0 <= value <= TIMEOUT_US_MAX:
        raise BadRequest(f"timeout must be microseconds from 0 to {TIMEOUT_US_MAX}")
    return value


def check_inputs(info: ModelInfo, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """``inputs`` in the model's order, if they are all that it wants, of its types and shapes."""
    wanted = {feature.name for feature in info.inputs}
    if unknown := next((name for name in inputs if name not in wanted), None):
        names = ", ".join(feature.name for feature in info.inputs)
        raise BadRequest(f"{info.name} has no input {short(unknown)}: its inputs are {names}")
    rows: int | None = None
    for feature in info.inputs:
        array = inputs.get(feature.name)
        if array is None:
            raise BadRequest(f"input {feature.name} of {info.name} is missing")
        if datatype_of(array) != feature.datatype:
            raise BadRequest(
                f"input {feature.name} is of type {feature.datatype}, not {datatype_of(array)}"
            )
        if not fits(feature, array.shape):
            raise BadRequest(
                f"input {feature.name} has the shape {list(feature.shape)} (-1: any), "
                f"not {list(array.shape)}"
            )
        if info.batched:
            if array.ndim == 0 or array.shape[0] == 0:
                raise BadRequest(f"input {feature.name} needs at least one row")
            if rows not in (None, array.shape[0]):
                raise BadRequest(f"the inputs of {info.name} differ in their number of rows")
            rows = array.shape[0]
    return {feature.name: inputs[feature.name] for feature in info.inputs}


def fits(feature: Feature, shape: Sequence[int]) -> bool:
    return len(shape) == len(feature.shape) and all(
        wanted in (size, -1) for size, wanted in zip(shape, feature.shape, strict=True)
    )


# ---------------------------------------------------------------- responses


def encode(info: ModelInfo, request: Request, outputs: Tensors) -> tuple[list[bytes], int | None]:
    """The parts of the body, and the length of its JSON where binary tensors follow it.

    Raises BadRequest for an element that JSON cannot hold: the client is to ask for binary data.
    """
    entries: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for asked in request.outputs:
        array = outputs[asked.name]
        entry: dict[str, Any] = {
            "name": asked.name,
            "datatype": datatype_of(array),
            "shape": list(array.shape),
        }
        if asked.binary:
            parts.append(to_raw(array))
            entry["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            entry["data"] = to_json(asked.name, array)
        entries.append(entry)
    header: dict[str, Any] = {"model_name": info.name, "model_version": info.version}
    if request.id:
        header["id"] = request.id
    text = json.dumps({**header, "outputs": entries}, separators=(",", ":")).encode()
    return [text, *parts], len(text) if parts else None


def error_body(message: str) -> bytes:
    return json.dumps({"error": message}).encode()


# ---------------------------------------------------------------- parts


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRequest(f"{what} must be a JSON object")
    return value


def _tensors(value: object, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > TENSORS_MAX:
        raise BadRequest(f"{what} must be a list of up to {TENSORS_MAX} tensors")
    return [_object(entry, f"each of {what}") for entry in value]


def _described(entry: dict[str, Any]) -> tuple[str, str, tuple[int, ...]]:
    name, datatype = entry.get("name"), entry.get("datatype")
    if not isinstance(name, str) or not name:
        raise BadRequest("each input needs a name")
    if not isinstance(datatype, str):
        raise BadRequest(f"input {short(name)} needs a datatype")
    return name, datatype, tensor_shape(name, entry.get("shape"))


def _binary_size(name: str, entry: dict[str, Any]) -> int | None:
    parameters = _object(entry.get("parameters", {}), f"parameters of input {short(name)}")
    if shared := next((key for key in parameters if key.startswith("shared_memory")), None):
        raise BadRequest(f"input {short(name)}: {short(shared)} is not served; send the data")
    size = parameters.get("binary_data_size")
    if size is not None and (type(size) is not int or size < 0):
        raise BadRequest(f"binary_data_size of input {short(name)} must be a whole number")
    return size


def _outputs(value: object, info: ModelInfo, binary: bool) -> tuple[Asked, ...]:
    if value is None or value == []:
        return tuple(Asked(feature.name, binary) for feature in info.outputs)
    found: dict[str, Asked] = {}
    for entry in _tensors(value, "outputs"):
        name = entry.get("name")
        if not isinstance(name, str) or name in found:
            raise BadRequest("each of outputs needs a name of its own")
        parameters = _object(entry.get("parameters", {}), f"parameters of output {short(name)}")
        for key in parameters:
            if key.startswith("shared_memory") or (key == "classification" and parameters[key]):
                raise BadRequest(f"output {short(name)}: {short(key)} is not served")
        wants = _boolean(parameters, "binary_data") if "binary_data" in parameters else binary
        found[name] = Asked(name, wants)
    check_outputs(info, found)
    return tuple(found.values())


def check_outputs(info: ModelInfo, names: Iterable[str]) -> None:
    known = [feature.name for feature in info.outputs]
    if unknown := next((name for name in names if name not in known), None):
        raise BadRequest(
            f"{info.name} has no output {short(unknown)}: its outputs are {', '.join(known)}"
        )


def _boolean(parameters: Mapping[str, Any], key: str) -> bool:
    value = parameters.get(key, False)
    if not isinstance(value, bool):
        raise BadRequest(f"{key} must be true or false")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
