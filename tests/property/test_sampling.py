"""Every sample of every epoch once, whatever the world size, batch size or restarts (A8)."""

from __future__ import annotations

import hashlib
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_ft import sampling
from paddle_ft.sampling import Stream

lengths = st.integers(1, 3000)
seeds = st.integers(-(2**63), 2**63)
worlds = st.integers(1, 9)


def reference(position: int, length: int, seed: int, epoch: int) -> int:
    """The permutation once more, on single Python integers."""
    half = max(3, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    material = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=64).digest()
    keys = [int.from_bytes(material[i : i + 8], "little") for i in range(0, 64, 8)]

    def mix(x: int) -> int:
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            x = (x ^ (x >> 33)) * factor % (1 << 64)
        return x ^ (x >> 33)

    value = position
    while True:
        left, right = value >> half, value & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        value = left << half | right
        if value < length:
            return value


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 2**61), seeds, st.integers(0, 10**6), st.data())
def test_the_order_is_that_of_the_reference(
    length: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    positions = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=4))
    images = sampling.permute(np.array(positions, dtype=np.int64), length, seed, epoch)
    assert images.tolist() == [reference(p, length, seed, epoch) for p in positions]


@settings(deadline=None, max_examples=50)
@given(lengths, seeds, st.integers(0, 100))
def test_an_epoch_is_a_permutation(length: int, seed: int, epoch: int) -> None:
    order = sampling.indices(Stream(length, 1, 1, True, seed), epoch, 0, length)
    assert sorted(order.tolist()) == list(range(length))


@settings(deadline=None, max_examples=50)
@given(lengths, seeds, st.data())
def test_any_part_can_be_had_alone(length: int, seed: int, data: st.DataObject) -> None:
    stream = Stream(length, 1, 1, True, seed)
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    whole = sampling.indices(stream, 0, 0, length)
    assert sampling.indices(stream, 0, start, stop).tolist() == whole[start:stop].tolist()


@settings(deadline=None)
@given(st.integers(1, 200), worlds)
def test_shares_cover_a_batch_once_and_weigh_one_together(size: int, world_size: int) -> None:
    batch = sampling.Batch(0, 7, 7 + size, True)
    shares = [sampling.share(batch, rank, world_size) for rank in range(world_size)]
    real = [s for s in shares if s.weight]
    assert [p for s in real for p in range(s.start, s.stop)] == list(range(7, 7 + size))
    sizes = [s.stop - s.start if s.weight else 0 for s in shares]
    assert max(sizes) - min(sizes) <= 1
    assert all(s.stop > s.start for s in shares)
    assert math.isclose(math.fsum(s.weight for s in shares), 1.0)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 120),
    st.integers(1, 4),
    seeds,
    st.lists(st.tuples(worlds, st.integers(1, 50), st.integers(1, 20)), min_size=1, max_size=6),
)
def test_restarts_with_other_worlds_and_batch_sizes_use_every_sample_once(
    length: int, epochs: int, seed: int, lives: list[tuple[int, int, int]]
) -> None:
    """Each life of the job has a world size, a batch size and a number of steps it lives for."""
    used: list[tuple[int, int]] = []
    epoch = offset = 0
    for life, (world_size, batch_size, steps) in enumerate(lives):
        stream = Stream(length, batch_size, epochs, True, seed)
        orders = [sampling.indices(stream, e, 0, length).tolist() for e in range(epochs)]
        last = life == len(lives) - 1
        for step, batch in enumerate(sampling.batches(stream, epoch, offset)):
            if step == steps and not last:
                break
            for rank in range(world_size):
                share = sampling.share(batch, rank, world_size)
                if share.weight:
                    order = orders[batch.epoch][share.start : share.stop]
                    used += [(batch.epoch, i) for i in order]
            epoch, offset = batch.epoch, batch.stop
    assert sorted(used) == [(e, i) for e in range(epochs) for i in range(length)]
