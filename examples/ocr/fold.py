"""Folds factors and terms of one number into the convolutions beside them.

PP-OCRv4 scales and shifts what comes out of most convolutions, and of the activations behind them,
by two learnt numbers (its "learnable affine blocks"). By itself each is a pass through memory, and
Paddle Inference joins them with nothing: they were a fifth of the recognition's time. Written into
weights and biases they cost nothing, and the results are the same but for rounding.

    s · (W x + c) + t  =  (s W) x + (s c + t)
    W (s x + t) + c    =  (s W) x + (c + t Σ W)         where nothing is padded
    W (s x + t)        =  (s W) (x + t / s)             where x is padded: one pass instead of two
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CONVOLUTIONS = ("conv2d", "depthwise_conv2d")
FLOAT32 = 5
"""As Paddle numbers data types."""


class Affine(NamedTuple):
    """``add(mul(x))`` of two numbers in a program."""

    mul: Any
    add: Any
    factor: str
    term: str
    source: str
    result: str


class Program:
    """A Paddle 2 program (`.pdmodel`) whose parameters are views into ``data`` (`.pdiparams`)."""

    def __init__(self, program: bytes, data: bytearray) -> None:
        from paddle.base import core

        self._program = core.ProgramDesc(program)
        self._version = self._program._version()
        self._block = self._program.block(0)
        self.values = {}
        names = sorted(v.name() for v in self._block.all_vars() if _is_parameter(v))
        offset = 0
        for name in names:
            self.values[name], offset = _tensor_at(data, offset)
        if offset != len(data):
            raise ValueError("the parameters do not fit the program")

    def ops(self) -> list[Any]:
        return [self._block.op(i) for i in range(self._block.op_size())]

    def users(self, name: str) -> list[Any]:
        return [op for op in self.ops() if name in op.input_arg_names()]

    def only_user(self, name: str, *kinds: str) -> Any:
        """The op that alone takes ``name``, if it is of one of ``kinds``."""
        found = self.users(name)
        return found[0] if len(found) == 1 and found[0].type() in kinds else None

    def remove(self, op: Any) -> None:
        index = next(i for i, other in enumerate(self.ops()) if same(op, other))
        self._block._remove_op(index, index + 1)

    def number(self, name: str) -> bool:
        """Whether ``name`` is a parameter of one element that nobody else takes."""
        value = self.values.get(name)
        return value is not None and value.size == 1 and len(self.users(name)) == 1

    def written(self) -> bytes:
        self._program._set_version(self._version)  # a newer Paddle would put its own
        written: bytes = self._program.serialize_to_string()
        return written


def fold(folder: Path) -> int:
    """Of the model in ``folder``, in place; gives how many passes through memory are gone.

    Raises ValueError or OSError if its files are not Paddle 2's.
    """
    paths = folder / "inference.pdmodel", folder / "inference.pdiparams"
    data = bytearray(paths[1].read_bytes())
    program = Program(paths[0].read_bytes(), data)
    before = len(program.ops())
    for affine in list(affines(program)):
        if not into_before(program, affine):
            into_after(program, affine)
    paths[0].write_bytes(program.written())
    paths[1].write_bytes(data)
    return before - len(program.ops())


def affines(program: Program) -> Iterator[Affine]:
    for op in program.ops():
        if op.type() != "elementwise_mul":
            continue
        names = sorted((op.input("X")[0], op.input("Y")[0]), key=program.number, reverse=True)
        (scaled,) = op.output("Out")
        add = program.only_user(scaled, "elementwise_add")
        if add is None or not program.number(names[0]):
            continue
        (term,) = {add.input("X")[0], add.input("Y")[0]} - {scaled}
        if program.number(term):
            yield Affine(op, add, names[0], term, names[1], add.output("Out")[0])


def into_before(program: Program, a: Affine) -> bool:
    """Where a convolution's sum with its bias goes nowhere else."""
    if program.only_user(a.source, "elementwise_mul") is None:
        return False
    biased = maker(program, a.source, "elementwise_add")
    if biased is None or biased.input("Y")[0] not in program.values:
        return False
    convolution = maker(program, biased.input("X")[0], *CONVOLUTIONS)
    if convolution is None or program.only_user(biased.input("X")[0], "elementwise_add") is None:
        return False
    factor, term = program.values[a.factor].item(), program.values[a.term].item()
    weight, bias = convolution.input("Filter")[0], biased.input("Y")[0]
    if len(program.users(weight)) > 1 or len(program.users(bias)) > 1:
        return False
    program.values[weight][...] *= factor
    program.values[bias][...] = program.values[bias] * factor + term
    program.remove(a.mul)
    program.remove(a.add)
    biased._rename_output(a.source, a.result)
    return True


def into_after(program: Program, a: Affine) -> bool:
    """Where only one convolution takes the result; its padding stays zero."""
    convolution = program.only_user(a.result, *CONVOLUTIONS)
    if convolution is None:
        return False
    biased = program.only_user(convolution.output("Output")[0], "elementwise_add")
    weight = convolution.input("Filter")[0]
    factor, term = program.values[a.factor].item(), program.values[a.term].item()
    if len(program.users(weight)) > 1 or not factor or not math.isfinite(term / factor):
        return False
    if not any(convolution.attr("paddings")) and biased is not None:
        bias = biased.input("Y")[0]
        if bias not in program.values or len(program.users(bias)) > 1:
            return False
        program.values[bias][...] += term * program.values[weight].sum(axis=(1, 2, 3))
        convolution._rename_input(a.result, a.source)
        program.remove(a.add)
    else:
        program.values[a.term][...] = term / factor
        a.add._rename_input(a.mul.output("Out")[0], a.source)
    program.values[weight][...] *= factor
    program.remove(a.mul)
    return True


def maker(program: Program, name: str, *kinds: str) -> Any:
    """The op that alone gives ``name``, if it is of one of ``kinds``."""
    found = [op for op in program.ops() if name in op.output_arg_names()]
    return found[0] if len(found) == 1 and found[0].type() in kinds else None


def same(op: Any, other: Any) -> bool:
    return bool(op.type() == other.type() and op.output_arg_names() == other.output_arg_names())


def _is_parameter(variable: Any) -> bool:
    return bool(variable.persistable()) and variable.name() not in ("feed", "fetch")


def _tensor_at(data: bytearray, offset: int) -> tuple[NDArray[np.float32], int]:
    """The tensor that begins at ``offset``, and where the next one does; raises ValueError."""
    try:
        version, levels, of_tensor, size = struct.unpack_from("<IQIi", data, offset)
        offset += 20
        kind, dims = _described(bytes(data[offset : offset + size]))
        if (version, levels, of_tensor, kind) != (0, 0, 0, FLOAT32):
            raise ValueError("a parameter is not of float32")
    except (struct.error, IndexError):
        raise ValueError("the parameters end too soon") from None
    end = offset + size + 4 * math.prod(dims)
    if end > len(data):
        raise ValueError("the parameters end too soon")
    return np.frombuffer(data, np.float32, math.prod(dims), offset + size).reshape(dims), end


def _described(message: bytes) -> tuple[int, list[int]]:
    """Data type and dimensions, of a protobuf of varints alone: fields 1 and 2."""
    fields: list[tuple[int, int]] = []
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7:
            raise ValueError("the parameters are not as Paddle 2 writes them")
        value, at = _varint(message, at)
        fields.append((tag >> 3, value))
    return dict(fields)[1], [value for field, value in fields if field == 2]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while message[at] & 128:
        value, shift, at = value | (message[at] & 127) << shift, shift + 7, at + 1
    return value | message[at] << shift, at + 1
