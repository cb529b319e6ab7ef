"""The global order of samples, and who computes which of them.

Invariant: which sample stands at position p of an epoch depends on (seed, epoch, p) and on the
length of the dataset alone; never on the world size, the batch size, the rank or what happened
before. So a run that is resumed, by more or fewer ranks or with another batch size, goes on with
exactly the samples that have not been used, and every sample of every epoch is used exactly once.

The order is a keyed permutation of [0, n): a balanced Feistel network over the next power of four,
with cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). It needs no
memory and can be entered at any position. It must never change: the vectors in
``tests/unit/test_sampling.py`` are part of the format of a checkpoint.

Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

_ROUNDS = 8
_HALF_BITS_MIN = 3
"""Halves of fewer bits permute poorly; tiny datasets walk a little longer instead."""


@dataclass(frozen=True, slots=True)
class Stream:
    """What one call of ``Session.batches`` goes through."""

    length: int
    """Samples in the dataset."""
    batch_size: int
    """Samples of one step, over all ranks."""
    epochs: int
    shuffle: bool
    seed: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError("the dataset is empty: give one with at least one sample")
        if self.length >= 1 << 62:
            raise ValueError(f"a dataset of {self.length} samples is beyond 2**62")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: it must be at least 1")
        if self.epochs < 0:
            raise ValueError(f"epochs is {self.epochs}: it must not be negative")


@dataclass(frozen=True, slots=True)
class Batch:
    """The positions [start, stop) of ``epoch`` that one step uses, over all ranks."""

    epoch: int
    start: int
    stop: int
    last: bool
    """It ends its epoch."""

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part [start, stop) of a batch of ``batch_size`` samples.

    ``weight`` is what the mean over this part counts in the mean over the batch. A rank without a
    sample of its own is given the first one of the batch, with weight 0, to keep step with the
    others.
    """

    start: int
    stop: int
    weight: float


@dataclass(frozen=True, slots=True)
class Item:
    """One step's part of the data, for one rank."""

    number: int
    """Of the batch, counted from 0 over the whole job."""
    batch: Batch
    share: Share


def batches(stream: Stream, epoch: int = 0, offset: int = 0) -> Iterator[Batch]:
    """The batches of ``stream`` from position ``offset`` of ``epoch`` on; the last may be small.

    ``offset`` may be ``length``, the end of ``epoch``.
    """
    while epoch < stream.epochs:
        while offset < stream.length:
            stop = min(offset + stream.batch_size, stream.length)
            yield Batch(epoch, offset, stop, last=stop == stream.length)
            offset = stop
        epoch, offset = epoch + 1, 0


def steps_left(stream: Stream, epoch: int = 0, offset: int = 0) -> int:
    """How many batches ``batches`` would give."""
    if epoch >= stream.epochs:
        return 0
    per_epoch = -(-stream.length // stream.batch_size)
    this_epoch = -(-(stream.length - offset) // stream.batch_size)
    return this_epoch + (stream.epochs - epoch - 1) * per_epoch


def share(batch: Batch, rank: int, world_size: int) -> Share:
    """What ``rank`` computes of ``batch``: contiguous parts whose sizes differ by at most one."""
    each, more = divmod(batch.size, world_size)
    size = each + (rank < more)
    if size == 0:
        return Share(batch.start, batch.start + 1, 0.0)
    start = batch.start + rank * each + min(rank, more)
    return Share(start, start + size, size / batch.size)


def indices(stream: Stream, epoch: int, start: int, stop: int) -> Indices:
    """Dataset indices at the positions [start, stop) of ``epoch``; int64, shape (stop - start,)."""
    assert 0 <= start <= stop <= stream.length
    positions = np.arange(start, stop, dtype=np.int64)
    if not stream.shuffle or stream.length == 1:
        return positions
    return permute(positions, stream.length, stream.seed, epoch)


def permute(positions: Indices, length: int, seed: int, epoch: int) -> Indices:
    """Images of ``positions`` under the permutation of [0, length) keyed by (seed, epoch)."""
    half_bits = max(_HALF_BITS_MIN, ((length - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = _feistel(positions.astype(np.uint64), keys, half_bits)
    # Cycle walking: the domain is at most 4 x length, so this ends after a few rounds.
    outside = np.flatnonzero(values >= length)
    while outside.size:
        values[outside] = _feistel(values[outside], keys, half_bits)
        outside = outside[values[outside] >= length]
    return values.astype(np.int64)


def step_seed(seed: int, step: int, rank: int, purpose: str) -> int:
    """A 63-bit seed for the random generators of ``rank`` at ``step``, one for each purpose."""
    text = f"{seed}/{step}/{rank}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def _round_keys(seed: int, epoch: int) -> list[np.uint64]:
    material = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return [np.uint64(k) for k in np.frombuffer(material, dtype="<u8")]


def _feistel(
    values: npt.NDArray[np.uint64], keys: list[np.uint64], half_bits: int
) -> npt.NDArray[np.uint64]:
    shift = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    joined: npt.NDArray[np.uint64] = (left << shift) | right
    return joined


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of MurmurHash3, 64 bits: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(33))
    return mixed
