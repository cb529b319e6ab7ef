"""Tensors of the Open Inference Protocol: arrays to and from JSON lists and raw bytes. Pure.

Whatever a client sends gives an array of just the type and shape that it names, or ``BadRequest``.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from paddle_ft.serve.types import ServeError

T = TypeVar("T")

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"{kind.upper()}{8 * size}": np.dtype(f"<{kind[0]}{size}")
       for kind in ("int", "uint") for size in (1, 2, 4, 8)},
    **{f"FP{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
    "BYTES": np.dtype(np.object_),
}  # fmt: skip
"""All of the protocol's but BF16, which neither numpy nor JSON has."""

_NAMES = {(dtype.kind, dtype.itemsize): name for name, dtype in DTYPES.items()}

DIMENSIONS_MAX = 16
SLICE_ELEMENTS = 8192
"""Are turned into JSON or strings at a time, some 5 ms."""
SLICE_BYTES = 2**20


class BadRequest(ServeError):
    """The request is wrong, and no other replica would say otherwise."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def nbytes_of(tensors: Mapping[str, NDArray[Any]]) -> int:
    """What they take, in bytes; of an element of BYTES what it holds, too."""
    return sum(array.nbytes + _held_by(array) for array in tensors.values())


def _held_by(array: NDArray[Any]) -> int:
    try:
        return sum(map(len, array.flat)) if array.dtype.kind == "O" else 0
    except TypeError:  # no bytes, which is refused when it is written
        return 0


def tensor_shape(name: str, shape: object) -> tuple[int, ...]:
    """``shape`` as sent, if it is one; raises BadRequest."""
    if (
        not isinstance(shape, (list, tuple))
        or len(shape) > DIMENSIONS_MAX
        or not all(type(size) is int and 0 <= size < 2**31 for size in shape)
        or math.prod(filter(None, shape)) >= 2**40  # numpy: also without elements
    ):
        raise BadRequest(
            f"the shape of input {short(name)} must be a list of up to {DIMENSIONS_MAX} sizes"
        )
    return tuple(shape)


def from_json(name: str, datatype: str, shape: tuple[int, ...], data: object) -> NDArray[Any]:
    """The array of ``data``, a flat list or one nested as ``shape``; nothing is cut or rounded
    but decimal fractions."""
    flat = _flat(name, shape, data)
    if datatype == "BYTES":
        return _of_texts(name, shape, flat)
    dtype = _dtype(name, datatype)
    fits: dict[str, set[type]] = {"b": {bool}, "i": {int}, "u": {int}, "f": {int, float}}
    if not set(map(type, flat)) <= fits[dtype.kind]:
        raise BadRequest(f"input {short(name)} has elements that are not {datatype}")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if flat and not (limits.min <= min(flat) and max(flat) <= limits.max):
            raise BadRequest(f"input {short(name)} has elements outside the range of {datatype}")
    try:
        with np.errstate(over="ignore"):
            exact = np.float64 if dtype.kind == "f" else dtype
            array: NDArray[Any] = np.array(flat, exact).astype(dtype)
    except OverflowError:
        raise BadRequest(f"input {short(name)} has elements beyond {datatype}") from None
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise BadRequest(f"input {short(name)} has elements outside the range of {datatype}")
    reshaped: NDArray[Any] = array.reshape(shape)
    return reshaped


def from_raw(
    name: str, datatype: str, shape: tuple[int, ...], raw: memoryview | bytes
) -> NDArray[Any]:
    """The array whose little-endian elements are ``raw``; of BYTES each after its 4-byte length.

    A read-only view of ``raw`` where that is possible.
    """
    elements = math.prod(shape)
    if datatype == "BYTES":
        return _of_strings(name, shape, elements, raw)
    dtype = _dtype(name, datatype)
    if elements * dtype.itemsize != len(raw):
        raise BadRequest(
            f"input {short(name)} of shape {list(shape)} and type {datatype} has "
            f"{elements * dtype.itemsize} bytes, but {len(raw)} came"
        )
    if dtype.kind == "b":  # other values of a byte would be neither true nor false
        truth: NDArray[Any] = np.frombuffer(raw, np.uint8).reshape(shape) != 0
        return truth
    array: NDArray[Any] = np.frombuffer(raw, dtype).reshape(shape)
    return array


def to_json(name: str, array: NDArray[Any]) -> list[Any]:
    """The elements in row order; raises BadRequest for what JSON cannot hold."""
    return list(chain.from_iterable(json_slices(name, array)))


def json_slices(name: str, array: NDArray[Any]) -> Iterator[list[Any]]:
    """``to_json`` in parts."""
    flat = array.reshape(-1)
    for at in range(0, len(flat), SLICE_ELEMENTS):
        yield _to_json(name, flat[at : at + SLICE_ELEMENTS])


def _to_json(name: str, array: NDArray[Any]) -> list[Any]:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadRequest(
            f"output {name} has elements that are not finite, which JSON cannot hold: "
            "ask for binary_data"
        )
    if datatype_of(array) != "BYTES":
        values: list[Any] = array.tolist()
        return values
    try:
        return [_bytes_of(element).decode() for element in array.tolist()]
    except UnicodeDecodeError:
        raise BadRequest(f"output {name} is not text: ask for binary_data") from None


def to_raw(array: NDArray[Any]) -> bytes:
    """Little-endian elements in row order; those of BYTES each after its 4-byte length."""
    return b"".join(raw_slices(array))


def raw_slices(array: NDArray[Any]) -> Iterator[bytes]:
    """``to_raw`` in parts."""
    flat = array.reshape(-1)
    if datatype_of(array) != "BYTES":
        flat = flat.astype(array.dtype.newbyteorder("<"), copy=False)
        step = max(1, SLICE_BYTES // array.dtype.itemsize)
        yield from (flat[at : at + step].tobytes() for at in range(0, len(flat), step))
        return
    for at in range(0, len(flat), SLICE_ELEMENTS):
        parts = map(_bytes_of, flat[at : at + SLICE_ELEMENTS].tolist())
        yield b"".join(chain.from_iterable((len(p).to_bytes(4, "little"), p) for p in parts))


def finish(steps: Generator[None, None, T]) -> T:
    """What ``steps`` returns, without a pause."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def datatype_of(array: NDArray[Any]) -> str:
    """The protocol's name of the type of ``array``; raises ServeError where it has none."""
    if array.dtype.kind in "OSU":
        return "BYTES"
    found = _NAMES.get((array.dtype.kind, array.dtype.itemsize))
    if found is None:
        raise ServeError(f"the protocol has no type for arrays of {array.dtype}")
    return found


def short(name: str) -> str:
    """``name`` as a client gave it, in quotes, printable and not long."""
    return ascii(name if len(name) <= 60 else f"{name[:57]}...")


def _dtype(name: str, datatype: str) -> np.dtype[Any]:
    dtype = DTYPES.get(datatype)
    if dtype is None:
        known = ", ".join(DTYPES)
        raise BadRequest(f"input {short(name)}: no datatype {short(datatype)}; use {known}")
    return dtype


def _flat(name: str, shape: tuple[int, ...], data: object) -> list[Any]:
    """Elements of a flat list, or of one nested as ``shape``, in row order."""
    wrong = BadRequest(f"the data of input {short(name)} is not a list of shape {list(shape)}")
    if not isinstance(data, list):
        raise wrong
    if not (len(shape) > 1 and data and isinstance(data[0], list)):
        if len(data) != math.prod(shape):
            raise wrong
        return data
    level: list[Any] = [data]
    for size in shape:
        if any(type(part) is not list or len(part) != size for part in level):
            raise wrong
        level = list(chain.from_iterable(level))
    return level


def _of_texts(name: str, shape: tuple[int, ...], flat: list[Any]) -> NDArray[Any]:
    array = np.empty(len(flat), np.object_)
    for index, element in enumerate(flat):
        if not isinstance(element, str):
            raise BadRequest(f"input {short(name)} has elements that are not strings")
        # A lone surrogate is something that JSON can write and no text can hold.
        array[index] = element.encode("utf-8", "surrogatepass")
    return array.reshape(shape)


def _of_strings(
    name: str, shape: tuple[int, ...], elements: int, raw: memoryview | bytes
) -> NDArray[Any]:
    if elements * 4 > len(raw):
        raise BadRequest(f"input {short(name)} has fewer than {elements} elements")
    array = np.empty(elements, np.object_)
    at = 0
    for index in range(elements):
        begin = at + 4
        at = begin + int.from_bytes(raw[at:begin], "little")
        if begin > len(raw) or at > len(raw):
            raise BadRequest(f"input {short(name)} ends within an element")
        array[index] = bytes(raw[begin:at])
    if at != len(raw):
        raise BadRequest(f"input {short(name)} has more than {elements} elements")
    return array.reshape(shape)


def _bytes_of(element: object) -> bytes:
    return element if isinstance(element, bytes) else str(element).encode()
