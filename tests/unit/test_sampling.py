"""The order of samples is part of a checkpoint's format: these vectors never change (A8)."""

from __future__ import annotations

import numpy as np
import pytest

from paddle_ft import sampling
from paddle_ft.sampling import Batch, Share, Stream

VECTORS = [
    # length, seed, epoch, start, stop, indices
    (10, 0, 0, 0, 10, [3, 4, 1, 7, 9, 5, 2, 8, 0, 6]),
    (10, 0, 1, 0, 10, [6, 2, 7, 9, 0, 3, 8, 1, 5, 4]),
    (10, 1, 0, 0, 10, [7, 5, 1, 2, 6, 9, 3, 4, 8, 0]),
    (1, 5, 0, 0, 1, [0]),
    (2, 0, 3, 0, 2, [1, 0]),
    (1437, 7, 12, 0, 8, [734, 1193, 933, 808, 1008, 653, 747, 131]),
    (1437, 7, 12, 1430, 1437, [180, 1156, 1362, 834, 212, 250, 1350]),
    (10**6, 123456789, 3, 999_995, 10**6, [359289, 548014, 112554, 354384, 712949]),
    (2**40, -1, 0, 2**39, 2**39 + 3, [365861713684, 632260535546, 42973711862]),
]


@pytest.mark.parametrize(("length", "seed", "epoch", "start", "stop", "expected"), VECTORS)
def test_the_order_is_the_one_written_down(
    length: int, seed: int, epoch: int, start: int, stop: int, expected: list[int]
) -> None:
    stream = Stream(length, 1, epoch + 1, True, seed)
    assert sampling.indices(stream, epoch, start, stop).tolist() == expected


def test_seeds_of_a_step_are_those_written_down() -> None:
    assert sampling.step_seed(0, 0, 0, "data") == 7258564773604071255
    assert sampling.step_seed(3, 17, 2, "compute") == 7756426823934535334


def test_without_shuffle_the_order_is_the_datasets_own() -> None:
    stream = Stream(10, 4, 1, False, 0)
    assert sampling.indices(stream, 0, 3, 7).tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("length", [5, 10])
def test_every_sample_comes_to_every_position_equally_often(length: int) -> None:
    counts = np.zeros((length, length))
    epochs = 300
    stream = Stream(length, 1, epochs, True, 1)
    for epoch in range(epochs):
        counts[np.arange(length), sampling.indices(stream, epoch, 0, length)] += 1
    expected = epochs / length
    chi2 = ((counts - expected) ** 2 / expected).sum()
    degrees = (length - 1) ** 2
    assert chi2 < degrees + 5 * (2 * degrees) ** 0.5


def test_neighbours_epochs_and_seeds_are_uncorrelated() -> None:
    n = 10_000
    stream = Stream(n, 1, 2, True, 0)
    first = sampling.indices(stream, 0, 0, n)
    others = [
        sampling.indices(stream, 1, 0, n),
        sampling.indices(Stream(n, 1, 1, True, 1), 0, 0, n),
        np.roll(first, 1),
        np.arange(n),
    ]
    for other in others:
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.05


def test_batches_go_through_every_epoch_and_may_end_small() -> None:
    stream = Stream(5, 2, 2, True, 0)
    assert list(sampling.batches(stream)) == [
        Batch(0, 0, 2, False),
        Batch(0, 2, 4, False),
        Batch(0, 4, 5, True),
        Batch(1, 0, 2, False),
        Batch(1, 2, 4, False),
        Batch(1, 4, 5, True),
    ]


@pytest.mark.parametrize(("epoch", "offset", "left"), [(0, 0, 6), (0, 5, 3), (1, 4, 1), (2, 0, 0)])
def test_steps_left(epoch: int, offset: int, left: int) -> None:
    stream = Stream(5, 2, 2, True, 0)
    assert sampling.steps_left(stream, epoch, offset) == left
    assert len(list(sampling.batches(stream, epoch, offset))) == left


def test_a_rank_without_samples_gets_one_that_does_not_count() -> None:
    batch = Batch(0, 8, 10, True)
    assert [sampling.share(batch, rank, 3) for rank in range(3)] == [
        Share(8, 9, 0.5),
        Share(9, 10, 0.5),
        Share(8, 9, 0.0),
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 7])
def test_equal_slices_weigh_exactly_one_over_the_world_size(world_size: int) -> None:
    batch = Batch(0, 0, 12 * world_size, True)
    assert sampling.share(batch, world_size - 1, world_size).weight == 1 / world_size


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, 1, 1, True, 0), "the dataset is empty"),
        ((5, 0, 1, True, 0), "batch_size is 0"),
        ((5, 1, -1, True, 0), "epochs is -1"),
        ((2**62, 1, 1, True, 0), "beyond 2\\*\\*62"),
    ],
)
def test_impossible_streams_are_refused(
    arguments: tuple[int, int, int, bool, int], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Stream(*arguments)
