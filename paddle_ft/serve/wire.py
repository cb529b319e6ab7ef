"""The Open Inference Protocol (v2) between bytes and arrays: JSON bodies and binary tensors. Pure.

Whatever a client sends gives either a checked ``Request`` or ``BadRequest``, and nothing else. A
body is JSON, or JSON of ``Inference-Header-Content-Length`` bytes followed by the raw elements of
those tensors that name a ``binary_data_size``, in their order. Memory: a request costs at most some
ten times its body (elements of JSON are Python objects for a moment).
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from numpy.typing import NDArray

from paddle_ft.serve.tensors import (
    BadRequest,
    datatype_of,
    finish,
    from_json,
    from_raw,
    json_slices,
    raw_slices,
    short,
    tensor_shape,
)
from paddle_ft.serve.types import Feature, ModelInfo, Tensors

TENSORS_MAX = 256
TIMEOUT_US_MAX = 3_600_000_000


@dataclass(frozen=True, slots=True)
class Bounds:
    """On what costs time for each element: Python makes an object of it."""

    json_bytes: int = 4 * 2**20
    """Of a request's JSON, which takes some 0.1 s to parse, in which nobody else is answered."""
    listed: int = 2**20
    """Elements of a request, and of an answer, in JSON or in typed contents of gRPC."""
    strings: int = 65_536
    """Elements of BYTES of a request, however they come; and of an answer in JSON."""


BOUNDS = Bounds()


class Counted:
    """Elements of one message so far, as its tensors come, before anything is made of them."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._strings = self._listed = 0

    def add(self, datatype: str, shape: Sequence[int], listed: bool) -> None:
        """Raises BadRequest (413) beyond a bound."""
        elements, bounds = math.prod(shape), self._bounds
        self._listed += elements if listed else 0
        self._strings += elements if datatype == "BYTES" else 0
        if self._strings > bounds.strings:
            raise BadRequest(f"more than {bounds.strings} elements of BYTES: split them up", 413)
        if self._listed > bounds.listed:
            raise BadRequest(
                f"more than {bounds.listed} elements one by one: send, and ask for, binary data",
                413,
            )


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


def decode(
    body: bytes, header_bytes: int | None, info: ModelInfo, bounds: Bounds = BOUNDS
) -> Request:
    """The request in ``body``, whose first ``header_bytes`` are JSON (all, if None).

    Raises:
        BadRequest: for anything that is not a request for this model.
    """
    if header_bytes is not None and not 0 <= header_bytes <= len(body):
        raise BadRequest(
            f"Inference-Header-Content-Length is {header_bytes}, but the body has {len(body)} bytes"
        )
    if (json_bytes := len(body) if header_bytes is None else header_bytes) > bounds.json_bytes:
        raise BadRequest(
            f"the JSON of a request may have {bounds.json_bytes} bytes, not {json_bytes}: "
            "send tensors as binary data",
            413,
        )
    header = _object(parse_json(body[:header_bytes]), "the request")
    parameters = _object(header.get("parameters", {}), "parameters")
    asked_id = header.get("id", "")
    if not isinstance(asked_id, str):
        raise BadRequest("id must be a string")
    raw = memoryview(body)[len(body) if header_bytes is None else header_bytes :]
    inputs: dict[str, NDArray[Any]] = {}
    counted = Counted(bounds)
    for entry in _tensors(header.get("inputs"), "inputs"):
        name, datatype, shape = _described(entry)
        if name in inputs:
            raise BadRequest(f"input {short(name)} is given twice")
        check_name(info, name)
        size = _binary_size(name, entry)
        counted.add(datatype, shape, listed=size is None)
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
        return _DECODER.decode(text.decode())
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


def check_name(info: ModelInfo, name: str) -> None:
    for feature in info.inputs:
        if feature.name == name:
            return
    names = ", ".join(feature.name for feature in info.inputs)
    raise BadRequest(f"{info.name} has no input {short(name)}: its inputs are {names}")


def fits(feature: Feature, shape: Sequence[int]) -> bool:
    return len(shape) == len(feature.shape) and all(
        wanted in (size, -1) for size, wanted in zip(shape, feature.shape, strict=True)
    )


# ---------------------------------------------------------------- responses


def encode(
    info: ModelInfo, request: Request, outputs: Tensors, bounds: Bounds = BOUNDS
) -> tuple[list[bytes], int | None]:
    """The parts of the body, and the length of its JSON where binary tensors follow it.

    Raises BadRequest for what JSON cannot hold: the client is to ask for binary data.
    """
    return finish(encoding(info, request, outputs, bounds))


def encoding(
    info: ModelInfo, request: Request, outputs: Tensors, bounds: Bounds = BOUNDS
) -> Generator[None, None, tuple[list[bytes], int | None]]:
    """``encode`` in steps of a few milliseconds, however large the outputs are."""
    head = _head(info.name, info.version)
    if request.id:
        head = _open(_told(info.name, info.version) | {"id": request.id}, "outputs")
    text = [head]
    parts: list[bytes] = []
    counted = Counted(bounds)
    for number, asked in enumerate(request.outputs):
        array = outputs[asked.name]
        datatype = datatype_of(array)
        text.append(b"," if number else b"")
        if asked.binary:
            size = 0
            for at, part in enumerate(raw_slices(array)):
                if at:
                    yield
                parts.append(part)
                size += len(part)
            entry = _described_as(asked.name, datatype, array.shape)
            text.append(_compact(entry | {"parameters": {"binary_data_size": size}}).encode())
            continue
        counted.add(datatype, array.shape, listed=True)
        text.append(_listing(asked.name, datatype, array.shape))
        for at, values in enumerate(json_slices(asked.name, array)):
            if at:
                yield
                text.append(b",")
            text.append(_elements(values, array.dtype.kind))
        text.append(b"]}")
    text.append(b"]}")
    whole = b"".join(text)
    binary = any(asked.binary for asked in request.outputs)
    return [whole, *parts], len(whole) if binary else None


_compact = json.JSONEncoder(separators=(",", ":")).encode


def _open(entry: dict[str, Any], key: str) -> bytes:
    """``entry`` as JSON with a list ``key`` at its end, which is left open."""
    return f'{_compact(entry)[:-1]},"{key}":['.encode()


def _told(name: str, version: str) -> dict[str, Any]:
    return {"model_name": name, "model_version": version}


def _described_as(name: str, datatype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape)}


@lru_cache(64)
def _head(name: str, version: str) -> bytes:
    """How every answer of a version begins that has no ``id``."""
    return _open(_told(name, version), "outputs")


@lru_cache(256)
def _listing(name: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    """How an output in JSON begins; most have the shape of one before."""
    return _open(_described_as(name, datatype, shape), "data")


def _elements(values: list[Any], kind: str) -> bytes:
    """As in JSON; of numpy's ``kind``."""
    if kind == "f":  # all finite; the encoder says the same, more slowly
        return ",".join(map(float.__repr__, values)).encode()
    return _compact(values)[1:-1].encode()


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


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
