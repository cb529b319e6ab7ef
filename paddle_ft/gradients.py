"""The gradient of the global batch: a weighted sum over the ranks, in a few flat buckets.

Every rank's loss is the mean over its slice, so its gradients count for the slice's part of the
batch. Buckets depend on the model alone, so the order of every addition, and with it every bit of
the result, is the same in each run of the same world size.

Small gradients are packed (all-reduce costs much more per call than per byte), large ones are
summed where they lie. float16 travels as float32: gloo's sum of float16 is not to be trusted.

What else the ranks tell each other at a step rides at the end of a bucket, if it can: integers, in
pieces so small that their sums are exact in its floats. An all-reduce of their own would cost a
step of 50 ms some 2 to 4 %.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from paddle_ft.checkpoint.snapshot import dtype_name, nbytes_of
from paddle_ft.collective import Collective
from paddle_ft.errors import ConfigError

BUCKET_BYTES = 8 * 2**20
ALONE_BYTES = 1 * 2**20
"""From this size on, a gradient is not copied into a bucket."""

Words = npt.NDArray[np.int64]

SPARE_WORDS = 256
"""Room that a bucket has for words, beside one for each parameter."""
PIECE_BITS = 12
RANKS_MAX = 2 ** (24 - PIECE_BITS)
"""So many ranks' pieces of a word add up to what a float32 still holds exactly."""
_PIECES = -(-64 // PIECE_BITS)
_SHIFTS = np.arange(_PIECES, dtype=np.uint64) * np.uint64(PIECE_BITS)
_MASK = np.uint64(2**PIECE_BITS - 1)


@dataclass(slots=True)
class _Bucket:
    dtype: str
    host: bool
    """Its parameters lie in host memory."""
    parameters: list[Any] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """Bytes of each parameter."""
    nbytes: int = 0
    flat: Any = None
    """The gradients, one behind the other; in the one that carries words, room for these too."""
    alone: bool = False

    @property
    def carries(self) -> bool:
        """Whether words may ride in it: on accelerators they would make every step wait."""
        return self.host and not self.alone and self.dtype in ("float32", "float64")

    @property
    def count(self) -> int:
        """Elements of the gradients."""
        return self.nbytes // int(self.parameters[0].element_size())

    def add(self, parameter: Any, size: int) -> None:
        self.parameters.append(parameter)
        self.sizes.append(size)
        self.nbytes += size


class Gradients:
    """Sums the gradients of the trainable ones of ``parameters`` over ``collective``.

    Those of ``apart`` are left as they are until ``clear``.
    """

    def __init__(
        self, parameters: Sequence[Any], collective: Collective, apart: Sequence[Any] = ()
    ) -> None:
        self._all = list(parameters)
        self._apart = {id(p) for p in apart}
        self._collective = collective
        self._trained: list[Any] = []
        self._buckets: list[_Bucket] = []

    def gather(self, weight: float) -> list[int]:
        """Puts weight x gradient into ``flats``.

        Gives 1 for each trainable parameter that has a gradient on this rank, else 0; one without
        counts as zeros. Raises ConfigError for sparse gradients.
        """
        trained = [p for p in self._all if not p.stop_gradient and id(p) not in self._apart]
        if len(trained) != len(self._trained) or any(
            a is not b for a, b in zip(trained, self._trained, strict=True)
        ):
            self._trained = trained
            self._buckets = _buckets_of(trained)
        present = [int(p.grad is not None) for p in trained]
        for bucket in self._buckets:
            _fill(bucket, weight)
        return present

    def sum(self, words: Words) -> Words:
        """Sums what was gathered, and ``words``, over the ranks, and gives the sums of these.

        Call ``finish`` before the gradients are used. Raises CollectiveFailed.
        """
        room = SPARE_WORDS + len(self._trained)
        carrier = next((b for b in reversed(self._buckets) if b.carries), None)
        if carrier is None:
            for flat in self.flats:
                self._collective.all_reduce(flat)
            return self._collective.sum_words(words)
        # The room is there in any case: buckets, and so every bit, depend on the model alone.
        rides = words.size <= room and self._collective.world_size <= RANKS_MAX
        place = _make_room(carrier, room)
        place[:] = 0
        if rides:
            place[: words.size] = to_pieces(words)
        for bucket in self._buckets:
            if bucket is not carrier:
                self._collective.all_reduce(bucket.flat)
        self._collective.all_reduce(carrier.flat)
        return of_pieces(place[: words.size]) if rides else self._collective.sum_words(words)

    @property
    def flats(self) -> list[Any]:
        """The contents of the buckets: memory of this object, or of a gradient."""
        return [bucket.flat for bucket in self._buckets]

    @flats.setter
    def flats(self, flats: Sequence[Any]) -> None:
        for bucket, flat in zip(self._buckets, flats, strict=True):
            bucket.flat = flat

    def finish(self, present: Sequence[int]) -> None:
        """Hands the sums to the parameters that have a gradient on any rank.

        ``present`` is what ``gather`` gave, summed over the ranks.
        """
        used = {id(p) for p, count in zip(self._trained, present, strict=True) if count}
        for bucket in self._buckets:
            _empty(bucket, used)

    def clear(self) -> None:
        """Removes all gradients.

        They are not set to zero, as ``Optimizer.clear_grad`` does by default: whether a parameter
        had a gradient earlier must not matter after a restart.
        """
        for parameter in self._all:
            if parameter.grad is not None:
                parameter.clear_gradient(False)


def to_pieces(words: Words) -> npt.NDArray[np.float64]:
    """Each word in a row of its own."""
    pieces: npt.NDArray[np.uint64] = (words.view(np.uint64)[:, None] >> _SHIFTS) & _MASK
    return pieces.astype(np.float64)


def of_pieces(pieces: npt.NDArray[Any]) -> Words:
    """The words whose pieces, or sums of pieces, these are."""
    shifted: npt.NDArray[np.uint64] = pieces.astype(np.uint64) << _SHIFTS
    sums: Words = shifted.sum(axis=1, dtype=np.uint64).view(np.int64)
    return sums


def _make_room(bucket: _Bucket, words: int) -> npt.NDArray[Any]:
    """Where so many words ride in ``bucket``, a row of pieces for each."""
    import paddle

    count, room = bucket.count, words * _PIECES
    if bucket.flat.size != count + room:
        gradients = bucket.flat
        bucket.flat = paddle.zeros([count + room], dtype=bucket.dtype)
        ctypes.memmove(bucket.flat.data_ptr(), gradients.data_ptr(), bucket.nbytes)
    kind = ctypes.c_float if bucket.dtype == "float32" else ctypes.c_double
    memory = (kind * room).from_address(bucket.flat.data_ptr() + bucket.nbytes)
    return np.ctypeslib.as_array(memory).reshape(words, _PIECES)


def _buckets_of(parameters: Sequence[Any]) -> list[_Bucket]:
    """From the last parameter to the first, as a backward pass produces them."""
    done: list[_Bucket] = []
    filling: dict[tuple[str, bool], _Bucket] = {}
    for parameter in reversed(parameters):
        key = dtype_name(parameter), bool(parameter.place.is_cpu_place())
        size = nbytes_of(parameter)
        alone = size >= ALONE_BYTES and key[0] != "float16"
        bucket = _Bucket(*key, alone=alone) if alone else filling.setdefault(key, _Bucket(*key))
        bucket.add(parameter, size)
        if alone:
            done.append(bucket)
        elif bucket.nbytes >= BUCKET_BYTES:
            done.append(filling.pop(key))
    return done + list(filling.values())


def _fill(bucket: _Bucket, weight: float) -> None:
    import paddle

    grads = [_dense(p) for p in bucket.parameters]
    with paddle.no_grad():
        if bucket.alone:
            grad, parameter = grads[0], bucket.parameters[0]
            bucket.flat = paddle.zeros_like(parameter) if grad is None else grad
        elif bucket.dtype != "float16" and bucket.host and all(map(_contiguous, grads)):
            _copy_in(bucket, grads)
        else:
            parts = [
                (paddle.zeros(p.shape, p.dtype) if g is None else g).flatten()
                for g, p in zip(grads, bucket.parameters, strict=True)
            ]
            flat = paddle.concat(parts)
            bucket.flat = flat.astype("float32") if bucket.dtype == "float16" else flat
        if weight == 0.0:
            bucket.flat.zero_()  # not scaled: a gradient may be nan
        elif weight != 1.0:
            bucket.flat.scale_(weight)


def _empty(bucket: _Bucket, used: set[int]) -> None:
    import paddle

    with paddle.no_grad():
        if bucket.alone:
            parameter = bucket.parameters[0]
            if id(parameter) in used and parameter.grad is None:
                parameter.grad = bucket.flat
            bucket.flat = None
            return
        at = 0
        for parameter, size in zip(bucket.parameters, bucket.sizes, strict=True):
            if id(parameter) in used:
                _hand_over(bucket, parameter, at, size)
            at += size
        if bucket.dtype == "float16":
            bucket.flat = None


def _hand_over(bucket: _Bucket, parameter: Any, at: int, size: int) -> None:
    """Bytes [at, at + size) of the bucket become the gradient of ``parameter``."""
    import paddle

    grad, flat = parameter.grad, bucket.flat
    if grad is not None and bucket.host and bucket.dtype != "float16" and grad.is_contiguous():
        ctypes.memmove(grad.data_ptr(), flat.data_ptr() + at, size)
        return
    width = parameter.element_size()
    part = flat[at // width : (at + size) // width].reshape(parameter.shape)
    if grad is None:
        parameter.grad = part.astype(parameter.dtype)
    else:
        paddle.assign(part.astype(grad.dtype), output=grad)


def _dense(parameter: Any) -> Any:
    grad = parameter.grad
    if grad is not None and grad.is_selected_rows():
        raise ConfigError(
            f"{parameter.name} has a sparse gradient, which cannot be summed over ranks; create "
            f"the layer with sparse=False."
        )
    return grad


def _contiguous(grad: Any) -> bool:
    return grad is None or bool(grad.is_contiguous())


def _copy_in(bucket: _Bucket, grads: Sequence[Any]) -> None:
    import paddle

    if bucket.flat is None:
        bucket.flat = paddle.zeros([bucket.count], dtype=bucket.dtype)
    address = bucket.flat.data_ptr()
    for grad, size in zip(grads, bucket.sizes, strict=True):
        if grad is None:
            ctypes.memset(address, 0, size)
        else:
            ctypes.memmove(address, grad.data_ptr(), size)
        address += size
