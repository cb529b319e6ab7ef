"""The gradient of the global batch: a weighted sum over the ranks, in a few flat buckets.

Every rank's loss is the mean over its slice, so its gradients count for the slice's part of the
batch. Buckets depend on the model alone, so the order of every addition, and with it every bit of
the result, is the same in each run of the same world size.

Small gradients are packed (all-reduce costs much more per call than per byte), large ones are
summed where they lie. float16 travels as float32: gloo's sum of float16 is not to be trusted.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from paddle_ft.checkpoint.snapshot import dtype_name, nbytes_of
from paddle_ft.collective import Collective
from paddle_ft.errors import ConfigError

BUCKET_BYTES = 8 * 2**20
ALONE_BYTES = 1 * 2**20
"""From this size on, a gradient is not copied into a bucket."""


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
    alone: bool = False

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

    def reduce(self, weight: float) -> list[int]:
        """Sums weight x gradient over the ranks; call ``finish`` before the gradients are used.

        Gives 1 for each trainable parameter that has a gradient on this rank, else 0. A rank
        without one adds zeros. Raises CollectiveFailed, and ConfigError for sparse gradients.
        """
        present = self.gather(weight)
        for flat in self.flats:
            self._collective.all_reduce(flat)
        return present

    def gather(self, weight: float) -> list[int]:
        """As ``reduce``, but sums nothing: weight x gradient lies in ``flats`` then."""
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

        ``present`` is what ``reduce`` gave, summed over the ranks.
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
        count = bucket.nbytes // bucket.parameters[0].element_size()
        bucket.flat = paddle.zeros([count], dtype=bucket.dtype)
    address = bucket.flat.data_ptr()
    for grad, size in zip(grads, bucket.sizes, strict=True):
        if grad is None:
            ctypes.memset(address, 0, size)
        else:
            ctypes.memmove(address, grad.data_ptr(), size)
        address += size
