"""One rank's batches: fetched, collated and seeded so that how they are loaded does not matter.

Invariant: the data of a step, and the random states it is drawn and used with, depend on (seed,
number of the batch, rank or logical shard) and the position alone. So loading in line and in worker
processes give the same batches, and a resumed run gets those of an undisturbed one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from numbers import Number
from pathlib import Path
from typing import Any, cast

import numpy as np

from paddle_ft import sampling
from paddle_ft.errors import ConfigError
from paddle_ft.sampling import Item

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - Paddle's choice, its names hold the pid
_WINDOW = 4096
"""Positions whose indices are computed together: a call costs as much as for one."""


class Feed:
    """Iterates over (item, data) of one stream, from a position on.

    With ``shards`` each item is one of that many logical shards of its batch (``sampling.items``).
    ``dataset`` is map-style (``__len__`` and ``__getitem__``); ``data`` is what
    ``paddle.io.DataLoader`` would make of it. With ``num_workers`` > 0 that many processes fetch
    ahead, at most two batches each.
    """

    def __init__(
        self,
        dataset: Any,
        stream: sampling.Stream,
        *,
        rank: int,
        world_size: int,
        shards: int = 0,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self.stream = stream
        self._steps = _Steps(dataset, stream, collate_fn or collate)
        self._dataset = dataset
        self._collate_fn = collate_fn
        self._rank = rank
        self._world_size = world_size
        self._shards = shards
        self._num_workers = num_workers
        self._loading: Any = None
        """Paddle's iterator over what loader processes give, while there are such."""

    def of(self, rank: int, world_size: int) -> Feed:
        """The same stream for another rank, or this one."""
        if (rank, world_size) == (self._rank, self._world_size):
            return self
        return Feed(
            self._dataset,
            self.stream,
            rank=rank,
            world_size=world_size,
            shards=self._shards,
            num_workers=self._num_workers,
            collate_fn=self._collate_fn,
        )

    def run(self, number: int, epoch: int, offset: int) -> Iterator[tuple[Item, Any]]:
        """From the position on; ``number`` is that of the first batch."""
        items = self._items(number, epoch, offset)
        loaded = self._ahead(number, epoch, offset) if self._num_workers else None
        for item in items:
            data = self._steps[item] if loaded is None else next(loaded)
            seed_all(sampling.step_seed(self.stream.seed, item.number, item.part, "compute"))
            yield item, _to_tensors(data)
        if loaded is not None:
            next(loaded, None)  # at its end a loader ends its processes
            self._loading = None

    def kill(self) -> None:
        """Ends the loader processes at once, before this process ends itself.

        What they had ready lies in shared memory and would stay there.
        """
        if self._loading is None:
            return
        from paddle.base import core

        core._erase_process_pids(id(self._loading))  # or Paddle takes their end for a failure
        for process in self._loading._workers:
            process.kill()
            process.join(1.0)
            for path in _SHARED_MEMORY.glob(f"paddle_{process.pid}_*"):
                path.unlink(missing_ok=True)
        self._loading = None

    def _items(self, number: int, epoch: int, offset: int) -> Iterator[Item]:
        for batch in sampling.batches(self.stream, epoch, offset):
            yield from sampling.items(number, batch, self._rank, self._world_size, self._shards)
            number += 1

    def _ahead(self, number: int, epoch: int, offset: int) -> Iterator[Any]:
        import paddle

        loader = paddle.io.DataLoader(
            self._steps,
            batch_sampler=_OneByOne(lambda: self._items(number, epoch, offset)),
            collate_fn=_only,
            num_workers=self._num_workers,
        )
        self._loading = iter(loader)
        return cast(Iterator[Any], self._loading)


class _OneByOne:
    """What DataLoader takes for a batch sampler: each item is a batch of its own."""

    def __init__(self, items: Callable[[], Iterator[Item]]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[list[Item]]:
        for item in self._items():
            yield [item]


class _Steps:
    """A dataset whose index is an Item and whose sample is that item's data."""

    def __init__(
        self,
        dataset: Any,
        stream: sampling.Stream,
        collate_fn: Callable[[list[Any]], Any],
    ) -> None:
        self._dataset = dataset
        self._stream = stream
        self._collate = collate_fn

    def __len__(self) -> int:
        return sampling.steps_left(self._stream)

    def __getitem__(self, item: Item) -> Any:
        seed_all(sampling.step_seed(self._stream.seed, item.number, item.part, "data"))
        share = item.share
        chosen = _indices(self._stream, item.batch.epoch, share.start, share.stop)
        return self._collate([self._dataset[int(i)] for i in chosen])


def _indices(stream: sampling.Stream, epoch: int, start: int, stop: int) -> sampling.Indices:
    first, last = start // _WINDOW, (stop - 1) // _WINDOW
    windows = [_window(stream, epoch, at) for at in range(first, last + 1)]
    joined = windows[0] if len(windows) == 1 else np.concatenate(windows)
    return joined[start - first * _WINDOW : stop - first * _WINDOW]


@lru_cache(maxsize=4)
def _window(stream: sampling.Stream, epoch: int, at: int) -> sampling.Indices:
    stop = min((at + 1) * _WINDOW, stream.length)
    return sampling.indices(stream, epoch, at * _WINDOW, stop)


def length_of(dataset: Any) -> int:
    """Samples in ``dataset``; raises ConfigError unless it is map-style and has some."""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"s.batches needs a dataset with __len__ and __getitem__, and a "
            f"{type(dataset).__name__} lacks them; use a map-style paddle.io.Dataset."
        )
    try:
        return len(dataset)
    except (TypeError, RuntimeError):  # IterableDataset has the methods, and they refuse
        raise ConfigError(
            f"s.batches needs a dataset with a length, and {type(dataset).__name__} has none; use "
            f"a map-style paddle.io.Dataset."
        ) from None


# ---------------------------------------------------------------- random states


def seed_all(seed: int) -> None:
    """Seeds Paddle, NumPy and Python. In a loader process the accelerators are left alone."""
    import paddle

    if paddle.io.get_worker_info() is None:
        paddle.seed(seed)
    else:
        paddle.base.core.default_cpu_generator().manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


# ---------------------------------------------------------------- collation


def collate(samples: list[Any]) -> Any:
    """Stacks samples as ``paddle.io``'s default does, into arrays: nested lists and dicts stay."""
    first = samples[0]
    if isinstance(first, np.ndarray):
        return np.stack(samples)
    if hasattr(first, "data_ptr"):
        return np.stack([sample.numpy() for sample in samples])
    if isinstance(first, Number):
        return np.array(samples)
    if isinstance(first, str | bytes):
        return samples
    if isinstance(first, Mapping):
        return {key: collate([sample[key] for sample in samples]) for key in first}
    if isinstance(first, Sequence):
        return [collate(list(fields)) for fields in zip(*samples, strict=True)]
    raise TypeError(
        f"a sample holds a {type(first).__name__}: give arrays, tensors, numbers, strings, lists "
        f"or dicts of them, or a collate_fn"
    )


def _only(items: list[Any]) -> Any:
    return items[0]


def _to_tensors(data: Any) -> Any:
    if isinstance(data, np.ndarray):
        import paddle

        return paddle.to_tensor(data)
    if isinstance(data, Mapping):
        return {key: _to_tensors(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_to_tensors(value) for value in data]
    return data
