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
    """What one round of the loop works on: a rank's slice of a batch, or one logical shard of it.

    A rank has one slice, but may have several shards of a batch.
    """

    number: int
    """Of the batch, counted from 0 over the whole job."""
    batch: Batch
    share: Share
    part: int = 0
    """Rank, or number of the logical shard: random states are derived from it."""
    first: bool = True
    last: bool = True
    """Of what this rank has of the batch."""


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
    mine = spread(batch.size, rank, world_size)
    if not mine:
        return Share(batch.start, batch.start + 1, 0.0)
    start = batch.start + mine.start
    return Share(start, start + len(mine), len(mine) / batch.size)


def spread(count: int, rank: int, world_size: int) -> range:
    """Which of ``count`` things in a row are the rank's: runs whose lengths differ by at most 1."""
    each, more = divmod(count, world_size)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))


def shards_of(batch: Batch, shards: int) -> int:
    """How many of ``shards`` logical shards have a sample of ``batch``; these come first."""
    return min(shards, batch.size)


def items(number: int, batch: Batch, rank: int, world_size: int, shards: int = 0) -> list[Item]:
    """What ``rank`` works on for ``batch``: its slice, or with ``shards`` its logical shards.

    Which samples a shard has depends on the batch and ``shards`` alone. A rank without a shard is
    given a sample that does not count.
    """
    if not shards:
        return [Item(number, batch, share(batch, rank, world_size), rank)]
    mine = spread(shards_of(batch, shards), rank, world_size)
    if not mine:
        none = Share(batch.start, batch.start + 1, 0.0)
        return [Item(number, batch, none, shards + rank)]
    return [
        Item(number, batch, share(batch, i, shards), i, i == mine[0], i == mine[-1]) for i in mine
    ]


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


def step_seed(seed: int, step: int, part: int, purpose: str) -> int:
    """A 63-bit seed for the random generators at ``part`` of ``step``, one for each purpose.

    ``part``: the rank, or the logical shard.
    """
    text = f"{seed}/{step}/{part}/{purpose}".encode()
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
