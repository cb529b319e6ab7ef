"""Tensors to host memory and back, without holding up training.

Between two optimizer steps the parameters and the optimizer's state do not change, so they are
copied by a thread of their own beside the next forward and backward pass (``Snapshot``), and then,
beside the steps that follow, what is not trained; what a forward pass changes is copied before it.
The memory belongs to the agent, or to whoever keeps it.

On the CPU a tensor is copied from where it lies (``data_ptr``), in pieces, with the GIL free
(ctypes releases it). A tensor on an accelerator goes through a copy in host memory; that path is
written for, but has not been run on, a GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from paddle_ft.checkpoint.boxes import Box
from paddle_ft.types import Changes, ImageInfo, TensorSpec

CHUNK_BYTES = 8 * 2**20
"""Copied in one go; a copy that is no longer wanted stops after it."""
_LARGE_BYTES = 4096
_SUMS = 1021
"""Of a chunk's words: a prime, so that no usual row length is a multiple of it."""


# ---------------------------------------------------------------- one tensor


def dtype_name(tensor: Any) -> str:
    """``float32``, ``bfloat16`` …: the name a TensorSpec uses, for a Paddle tensor or an array."""
    return str(tensor.dtype).removeprefix("paddle.")


def nbytes_of(tensor: Any) -> int:
    if isinstance(tensor, np.ndarray):
        return int(tensor.nbytes)
    return int(tensor.element_size()) * int(np.prod(tensor.shape, dtype=np.int64))


def in_place(tensor: Any) -> bool:
    """Whether the bytes of a Paddle tensor can be had from where it lies, in C order."""
    return (
        not isinstance(tensor, np.ndarray)
        and bool(tensor.place.is_cpu_place())
        and bool(tensor.is_contiguous())
    )


@dataclass(slots=True)
class Source:
    """Bytes [start, start + nbytes) of a tensor, and where they go in the buffer.

    ``keep`` holds the memory at ``address`` alive even if the tensor is given other memory.
    """

    keep: Any
    address: int
    nbytes: int
    offset: int
    inplace_version: int
    tensor: Any

    @classmethod
    def of(cls, tensor: Any, start: int, nbytes: int, offset: int) -> Source:
        if isinstance(tensor, np.ndarray):
            keep = np.ascontiguousarray(tensor)
            return cls(keep, keep.ctypes.data + start, nbytes, offset, 0, None)
        if in_place(tensor):
            return cls.in_place(tensor, start, nbytes, offset)
        keep = _host_copy(tensor)
        return cls(keep, keep.data_ptr() + start, nbytes, offset, 0, None)

    @classmethod
    def in_place(cls, tensor: Any, start: int, nbytes: int, offset: int) -> Source:
        """Of a tensor that ``in_place`` holds for; nothing is copied yet."""
        keep = tensor.detach()
        address = keep.data_ptr() + start
        return cls(keep, address, nbytes, offset, tensor.inplace_version, tensor)

    def words(self, address: int) -> tuple[int, ...]:
        """Some of the source's bytes, read at ``address``: the last word, of a large one more."""
        if self.nbytes < 8:
            return tuple((ctypes.c_uint8 * self.nbytes).from_address(address))
        last = (self.nbytes - 8) // 8
        at = (last,) if self.nbytes < _LARGE_BYTES else (last // 4, last // 2, last * 3 // 4, last)
        return tuple(ctypes.c_uint64.from_address(address + 8 * word).value for word in at)

    def copy(self, target: int, stopped: Callable[[], bool]) -> None:
        for at in range(0, self.nbytes, CHUNK_BYTES):
            if stopped():
                return
            size = min(CHUNK_BYTES, self.nbytes - at)
            ctypes.memmove(target + self.offset + at, self.address + at, size)


def fingerprint(data: memoryview) -> bytes:
    """Tells whether bytes have changed; about as fast as reading them, and without the GIL.

    Every ``_SUMS``-th word of a chunk is added up. Only changes that cancel out in such a sum go
    unseen, so it is nothing against whoever wants that.
    """
    found = hashlib.sha256()
    for at in range(0, len(data), CHUNK_BYTES):
        chunk = np.frombuffer(data[at : at + CHUNK_BYTES], np.uint8)
        whole = len(chunk) - len(chunk) % (8 * _SUMS)
        words = chunk[:whole].view(np.uint64).reshape(-1, _SUMS)
        found.update(np.add.reduce(words, axis=0).tobytes())
        found.update(chunk[whole:].tobytes())
    return found.digest()


def _host_copy(tensor: Any) -> Any:
    """The tensor in C order and in host memory, pinned if there is such; not run on a GPU yet."""
    tensor = tensor.detach().contiguous()
    if tensor.place.is_gpu_place():
        return tensor.pin_memory()
    return tensor.cpu()


def write_tensor(tensor: Any, data: memoryview) -> None:
    """Overwrites ``tensor`` with ``data``, the bytes of its shape and dtype in C order."""
    assert len(data) == nbytes_of(tensor), "the caller compares shapes and dtypes"
    if not data:
        return
    if tensor.place.is_cpu_place() and tensor.is_contiguous():
        source = np.frombuffer(data, dtype=np.uint8)
        ctypes.memmove(tensor.data_ptr(), source.ctypes.data, len(data))
        return
    tensor.set_value(array_of(dtype_name(tensor), tuple(tensor.shape), data))


def array_of(dtype: str, shape: Sequence[int], data: memoryview) -> np.ndarray[Any, Any]:
    """A view of ``data`` as an array; bfloat16 as uint16, as Paddle has it."""
    return np.frombuffer(data, dtype="uint16" if dtype == "bfloat16" else dtype).reshape(shape)


# ---------------------------------------------------------------- a whole state


Boxes = Callable[[Mapping[str, Box]], Mapping[str, memoryview]]
"""From the names of tensors and the part that is wanted of each to their bytes."""


class Image:
    """A state in host memory, to be read by name."""

    def __init__(self, info: ImageInfo, data: memoryview, boxes: Boxes | None = None) -> None:
        """``boxes`` reads parts of tensors that are divided among the ranks; they are not here."""
        self.info = info
        self.boxes = boxes
        self._data = data
        self._pieces: dict[str, list[TensorSpec]] = {}
        for spec in info.tensors:
            self._pieces.setdefault(spec.name, []).append(spec)

    @classmethod
    def open(cls, path: str | Path, info: ImageInfo, boxes: Boxes | None = None) -> Image:
        """Maps the file at ``path``, which must stay as it is as long as the image is used."""
        if not any(spec.nbytes for spec in info.tensors):
            return cls(info, memoryview(b""), boxes)
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls(info, memoryview(mapped), boxes)

    def names(self) -> list[str]:
        return list(self._pieces)

    def spec(self, name: str) -> TensorSpec | None:
        """A piece of ``name``, with dtype and shape of the whole; None if it is not here."""
        pieces = self._pieces.get(name)
        return pieces[0] if pieces else None

    def read(self, name: str) -> memoryview:
        """The bytes of the whole tensor."""
        pieces = sorted(self._pieces[name], key=lambda p: p.start)
        views = [self._data[p.offset : p.offset + p.nbytes] for p in pieces]
        return views[0] if len(views) == 1 else memoryview(b"".join(views))


Outcome = Literal["intact", "stopped", "in step", "seldom"]
"""Of a copy. The last two make it useless: a tensor of that kind was seen to change meanwhile."""


class Snapshot:
    """One copy of the state on its way into a buffer.

    ``sources`` that change at "any time" are copied by the constructor, the others by a thread:
    first those that change "in step", then those that change "seldom". ``on_done(outcome)`` is
    called once all is there, by that thread (or by the constructor, if it has copied all).
    """

    def __init__(
        self,
        target: memoryview,
        sources: Sequence[tuple[Source, Changes]],
        on_done: Callable[[Outcome], None],
    ) -> None:
        self._target = target  # or its memory might go
        self._on_done = on_done
        self._stop = threading.Event()
        self._steady_copied = threading.Event()
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(target)) if target else 0
        for source, changes in sources:
            if changes == "any time":
                source.copy(self._address, _never)
        self._steady = [source for source, changes in sources if changes == "in step"]
        self._seldom = [source for source, changes in sources if changes == "seldom"]
        self._words = {id(s): s.words(s.address) for s in (*self._steady, *self._seldom)}
        self._thread: threading.Thread | None = None
        if self._words:
            self._thread = threading.Thread(target=self._copy, name="snapshot", daemon=True)
            self._thread.start()
        else:
            on_done("intact")

    def wait_steady(self) -> None:
        """Returns once everything is copied that the optimizer's step changes."""
        if self._thread is not None:
            self._steady_copied.wait()

    def wait(self) -> None:
        """Returns once everything is copied and ``on_done`` has been called."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def abandon(self) -> None:
        """Stops copying; ``on_done`` is called with "stopped" unless all was there already."""
        self._stop.set()
        self.wait()

    def _copy(self) -> None:
        steady = self._copied(self._steady)
        self._steady_copied.set()
        seldom = self._copied(self._seldom)
        if self._stop.is_set():
            self._on_done("stopped")
        else:
            self._on_done("intact" if steady and seldom else "seldom" if steady else "in step")

    def _copied(self, sources: Sequence[Source]) -> bool:
        """Copies them; whether each is as it was when the snapshot began."""
        intact = True
        for source in sources:
            source.copy(self._address, self._stop.is_set)
            intact = intact and self._unchanged(source)
        return intact

    def _unchanged(self, source: Source) -> bool:
        """Whether nothing wrote to the tensor before all of it was copied.

        Paddle counts in-place operations, but not ``set_value``; that would have changed one of
        the words that were looked at before.
        """
        words = self._words[id(source)]
        return (
            source.words(self._address + source.offset) == words
            and source.words(source.address) == words
            and (source.tensor is None or source.tensor.inplace_version == source.inplace_version)
        )


def _never() -> bool:
    return False
