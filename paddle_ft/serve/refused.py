"""Inputs that workers were lost with: remembered for a while, so that no more are lost.

Once may be chance, of a machine on which processes are killed; what was refused twice is not tried
again. Memory: ``_KEPT_MAX`` digests. Inputs are read only while any of their shapes is remembered.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Hashable

import numpy as np

from paddle_ft.serve.tensors import nbytes_of
from paddle_ft.serve.types import BatchRefused, Tensors

_KEPT_MAX = 64
KEPT_S = 60.0
_TIMES = 2
_INLINE_BYTES = 2**20
_Key = tuple[Hashable, bytes]


class Refused:
    """For one event loop."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._until_s: OrderedDict[_Key, float] = OrderedDict()
        self._times: dict[_Key, int] = {}

    def __bool__(self) -> bool:
        """Whether anything may be remembered."""
        return bool(self._until_s)

    async def note(self, inputs: Tensors, session: str) -> None:
        """A batch that was refused."""
        key = await _key(inputs, session)
        self._times[key] = self._times.get(key, 0) + 1
        self._until_s[key] = time.monotonic() + KEPT_S
        self._until_s.move_to_end(key)
        while len(self._until_s) > _KEPT_MAX:
            self._forget_first()

    async def check(self, inputs: Tensors, session: str) -> None:
        """Raises BatchRefused for inputs that were refused often, not long ago."""
        now_s = time.monotonic()
        while self._until_s and next(iter(self._until_s.values())) <= now_s:
            self._forget_first()
        if not self._until_s:
            return
        shapes = _shapes(inputs, session)
        if all(known != shapes for known, _ in self._until_s):
            return
        if self._times.get(await _key(inputs, session), 0) >= _TIMES:
            raise BatchRefused(
                f"Workers of {self._name} were lost with these inputs, several times and not long "
                f"ago; they are not tried again for up to {KEPT_S:.0f} s."
            )

    def _forget_first(self) -> None:
        key, _ = self._until_s.popitem(last=False)
        del self._times[key]


def _shapes(inputs: Tensors, session: str) -> Hashable:
    described = ((name, array.dtype.str, array.shape) for name, array in sorted(inputs.items()))
    return (session, *described)


async def _key(inputs: Tensors, session: str) -> _Key:
    if nbytes_of(inputs) > _INLINE_BYTES:
        return _shapes(inputs, session), await asyncio.to_thread(_digest, inputs)
    return _shapes(inputs, session), _digest(inputs)


def _digest(inputs: Tensors) -> bytes:
    digest = hashlib.sha256()
    for _, array in sorted(inputs.items()):
        if array.dtype.kind == "O":
            for element in array.flat:
                data = element if isinstance(element, bytes) else str(element).encode()
                digest.update(b"%d:" % len(data) + data)
        else:
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.digest()
