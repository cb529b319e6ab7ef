"""Steps whose result does not depend on how many ranks there are (``reproducible=True``).

Each batch is divided into a fixed number of logical shards (``sampling.items``); a rank goes
through its own one after another. Invariant: what is applied is a function of what the shards gave,
each by itself, and of a fixed order of additions (``summation``); who computed which shard does not
matter.

- The gradients of a shard, weighted by its part of the batch, are a term of one sum.
- Buffers and BatchNorm's statistics are at the start of each shard what they were at the start of
  the step. Of one that a shard has changed, the new value is the mean over all shards, weighted
  like the gradients and summed in float64; if it holds no floats, the first shard's. All ranks then
  have the same.

Memory beside the gradients: a copy of them for each node of the tree that the rank's shards make up
(1 where the number of ranks divides that of the shards well, some more elsewhere); while they are
summed, ``CHUNK_BYTES`` for each such node of every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from paddle_ft import sampling
from paddle_ft.checkpoint.snapshot import dtype_name, write_tensor
from paddle_ft.collective import Collective
from paddle_ft.errors import ConfigError
from paddle_ft.gradients import Words
from paddle_ft.health.phases import REDUCE
from paddle_ft.nested import Entry
from paddle_ft.sampling import Item
from paddle_ft.state import TrainingState
from paddle_ft.summation import Partial, Span, cover, total
from paddle_ft.update import LrStep, Update

SHARDS = 12
"""Divides evenly among 1, 2, 3, 4, 6 and 12 ranks."""
CHUNK_BYTES = 4 * 2**20
_FLOATS = ("float16", "bfloat16", "float32", "float64")

Floats = npt.NDArray[np.float64]


def shards_asked(reproducible: bool | int) -> int:
    """Logical shards for what the script has given; 0: none. Raises ConfigError."""
    if isinstance(reproducible, bool):
        return SHARDS if reproducible else 0
    if not isinstance(reproducible, int) or reproducible < 1:
        raise ConfigError(
            f"reproducible is {reproducible!r}: give True, or the number of logical shards of a "
            f"batch (at least 1, best a multiple of the numbers of ranks)."
        )
    return reproducible


class ReproducibleUpdate(Update):
    """``state`` tells the buffers. Raises ConfigError if the model sums its gradients itself."""

    def __init__(
        self,
        state: TrainingState,
        lr_step: LrStep,
        collective: Collective,
        parallel: bool,
        shards: int,
    ) -> None:
        if parallel:
            raise ConfigError(
                "A paddle.DataParallel sums its gradients in an order of its own; with "
                "reproducible, give the model itself to ft.session."
            )
        if state.divided:
            raise ConfigError(
                "A model that is divided among the ranks does not compute the same on another "
                "number of them; leave out reproducible, or shards."
            )
        super().__init__(state, lr_step, collective, False)
        self._shards = shards
        self._statistics = Statistics(state)
        self._item: Item | None = None
        """Handed out, and its gradients not taken yet."""
        self._forms: list[tuple[Any, Any]] = []
        """Shape and dtype of each flat gradient."""
        self._present: list[int] = []
        self._terms: Partial[list[Any]] = Partial(1, _sum, _kept)
        """Of each shard its flat gradients, and its buffers."""

    @property
    def _sums(self) -> bool:
        return True  # over the shards, also on one rank

    def handed_out(self, item: Item) -> None:
        """Raises ConfigError if the one before was not followed by ``s.step``."""
        if self._item is not None:
            raise ConfigError(
                "With reproducible, s.step belongs after each batch that is handed out; to "
                "accumulate gradients give a larger batch_size, which is worked on in shards."
            )
        self._item = item
        if item.first:
            self._present = []
            self._terms = Partial(sampling.shards_of(item.batch, self._shards), _sum, _kept)
            self._statistics.begin()

    def take(self) -> bool:
        """Raises ConfigError if there is no batch to which the gradients belong."""
        item, self._item = self._item, None
        if item is None:
            raise ConfigError(
                "With reproducible, s.step belongs after each batch of s.batches, once; take the "
                "batches from there, or leave reproducible out."
            )
        weight = item.share.weight
        present = self._gradients.gather(weight)
        flats = self._gradients.flats
        self._forms = [(flat.shape, flat.dtype) for flat in flats]
        if weight:
            values = self._statistics.take(weight, first=item.part == 0)
            self._terms.put(item.part, [*map(_wide, flats), values])
        else:  # a sample that does not count, for want of a shard
            present = [0] * len(present)
            self._statistics.put_back()
        before = self._present or [0] * len(present)
        self._present = [a + b for a, b in zip(before, present, strict=True)]
        self._gradients.clear()
        return item.last

    def gather(self, weight: float) -> list[int]:
        """Sums over the shards of all ranks; the buffers have their new values then.

        That is before the vote, which tells the others of these buffers. Gives on how many shards
        of this rank each trainable parameter has a gradient. Raises CollectiveFailed.
        """
        import paddle

        self._weight = weight
        self._collective.board.enter(REDUCE)
        sums, flats = self._terms.sums, []
        with paddle.no_grad():
            for number, (shape, dtype) in enumerate(self._forms):
                nodes = {span: values[number].reshape([-1]) for span, values in sums.items()}
                size = int(np.prod(shape, dtype=np.int64))
                whole = self._total(nodes, size, _WIDE.get(_name(dtype), dtype))
                flats.append(whole.reshape(shape).astype(dtype))
            self._gradients.flats = flats
            self._average_buffers({span: values[-1] for span, values in sums.items()})
        return self._present

    def sum(self, words: Words) -> Words:
        """Of ``words`` alone: the gradients are summed already."""
        return self._collective.sum_words(words)

    def _average_buffers(self, sums: Mapping[Span, Floats]) -> None:
        import paddle

        buffers = self._statistics
        if not buffers.any:
            return
        changed = self._collective.sum(buffers.changed)
        mask = buffers.floats_of(changed)
        nodes = {span: paddle.to_tensor(values[mask]) for span, values in sums.items()}
        means = self._total(nodes, int(mask.sum()), "float64").numpy() if mask.any() else _NOTHING
        others = buffers.others_of(changed)
        self._collective.broadcast_bytes(others, 0)  # who always has the first shard
        buffers.set(changed, means, others)

    def _total(self, nodes: Mapping[Span, Any], size: int, dtype: Any) -> Any:
        """The sum of the nodes of all ranks, flat tensors of ``size`` elements; these are ours."""
        import paddle

        collective, count = self._collective, self._terms.count
        runs = [
            sampling.spread(count, rank, collective.world_size)
            for rank in range(collective.world_size)
        ]
        spans = [cover(run.start, run.stop, count) for run in runs]
        if collective.world_size == 1:
            return nodes[0, count]
        places = max(map(len, spans))
        chunks = []
        width = max(1, CHUNK_BYTES // 8)
        for start in range(0, size, width):
            stop = min(start + width, size)
            mine = [nodes[span][start:stop] for span in spans[collective.rank]]
            mine += [paddle.zeros([stop - start], dtype)] * (places - len(mine))
            theirs = collective.all_gather(paddle.concat(mine))
            found = {
                span: theirs[rank][place * (stop - start) : (place + 1) * (stop - start)]
                for rank in range(collective.world_size)
                for place, span in enumerate(spans[rank])
            }
            chunks.append(total(found, count, _plus))
        return chunks[0] if len(chunks) == 1 else paddle.concat(chunks)

    def drop(self) -> None:
        super().drop()
        self._item = None
        self._terms = Partial(1, _sum, _kept)


def update_of(
    state: TrainingState, lr_step: LrStep, collective: Collective, parallel: bool, shards: int
) -> Update:
    """What ends the steps of a session; with ``shards``, over so many. Raises ConfigError."""
    if shards:
        return ReproducibleUpdate(state, lr_step, collective, parallel, shards)
    return Update(state, lr_step, collective, parallel)


class Statistics:
    """The buffers of a model, from the start of a step over its shards to what comes of it.

    Raises ConfigError if a forward pass puts other tensors in their place.
    """

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self._entries = _local(state)
        self._float = [dtype_name(e.tensor) in _FLOATS for e in self._entries]
        self._before: list[bytes] = []
        self._others = b""
        """What is not a float, after the first shard."""
        self.any = bool(self._entries)
        self.changed = [0] * len(self._entries)
        """On how many shards here each one was changed."""

    def begin(self) -> None:
        """A step begins."""
        if not self.any:
            return
        for entry, now in zip(self._entries, _local(self._state), strict=True):
            if entry.tensor is not now.tensor:
                raise ConfigError(
                    f"{entry.name} was replaced by another tensor since the step before, which "
                    f"reproducible cannot follow; change it in place (set_value)."
                )
        self._before = self._read()
        self._others = b""
        self.changed = [0] * len(self._entries)

    def take(self, weight: float, first: bool) -> Floats:
        """The shard's values x ``weight``; what was there before it is put back."""
        now = self._read()
        for number, (a, b) in enumerate(zip(now, self._before, strict=True)):
            self.changed[number] += a != b
        if first:
            kinds = zip(now, self._float, strict=True)
            self._others = b"".join(data for data, is_float in kinds if not is_float)
        floats = [
            entry.tensor.astype("float64").numpy().reshape(-1)
            for entry, is_float in zip(self._entries, self._float, strict=True)
            if is_float
        ]
        values: Floats = np.concatenate(floats) * weight if floats else _NOTHING
        self.put_back()
        return values

    def put_back(self) -> None:
        for entry, data in zip(self._entries, self._before, strict=True):
            write_tensor(entry.tensor, memoryview(data))

    def floats_of(self, changed: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Which elements of what ``take`` gave belong to tensors that were changed."""
        kinds = zip(self._entries, self._float, changed, strict=True)
        parts = [np.full(int(e.tensor.size), bool(c)) for e, is_float, c in kinds if is_float]
        return np.concatenate(parts) if parts else np.zeros(0, np.bool_)

    def others_of(self, changed: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Room for what is not a float; filled in where the first shard was computed."""
        kinds = zip(self._before, self._float, changed, strict=True)
        if not any(c for _, is_float, c in kinds if not is_float):
            return np.zeros(0, np.uint8)
        size = sum(len(b) for b, f in zip(self._before, self._float, strict=True) if not f)
        room: npt.NDArray[np.uint8] = np.frombuffer(self._others or bytes(size), np.uint8).copy()
        return room

    def set(self, changed: Sequence[int], means: Floats, others: npt.NDArray[np.uint8]) -> None:
        """Writes the new values of what was changed."""
        import paddle

        at, data = 0, memoryview(others.tobytes())
        for entry, before, is_float, count in zip(
            self._entries, self._before, self._float, changed, strict=True
        ):
            size = int(entry.tensor.size)
            if is_float and count:
                mean = paddle.to_tensor(means[at : at + size]).reshape(entry.tensor.shape)
                paddle.assign(mean.astype(entry.tensor.dtype), output=entry.tensor)
                at += size
            elif not is_float and data:
                write_tensor(entry.tensor, data[: len(before)])
                data = data[len(before) :]

    def _read(self) -> list[bytes]:
        return [entry.tensor.numpy().tobytes() for entry in self._entries]


_NOTHING: Floats = np.zeros(0, np.float64)
_WIDE = {"bfloat16": "float32"}
"""Sums of these are formed in those; float16 is float32 already when it comes here."""


def _local(state: TrainingState) -> list[Entry]:
    return [entry for entry in state.model_entries() if entry.scope == "local"]


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("paddle.")


def _wide(flat: Any) -> Any:
    return flat.astype("float32") if dtype_name(flat) == "bfloat16" else flat


def _kept(term: list[Any]) -> list[Any]:
    *flats, values = term
    return [*(flat.clone() for flat in flats), values]


def _sum(one: list[Any], other: list[Any]) -> list[Any]:
    """Their sums, in the memory of ``one``."""
    import paddle

    with paddle.no_grad():
        for a, b in zip(one[:-1], other[:-1], strict=True):
            a.add_(b)
    return [*one[:-1], one[-1] + other[-1]]


def _plus(one: Any, other: Any) -> Any:
    return one + other
