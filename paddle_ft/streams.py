"""The loops of a training script over its data: which one runs, where it stands, what it weighs.

Invariant: ``position`` is that of the batches handed out; at the end of a round of the loop it is
where a resumed run goes on. A round whose step was not applied can be done again (``rewind``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from paddle_ft import sampling
from paddle_ft.collective import Collective
from paddle_ft.errors import ConfigError
from paddle_ft.feed import Feed, length_of
from paddle_ft.health.phases import COMPUTE, DATA, LOOSE
from paddle_ft.progress import Position


class Streams:
    """The calls of ``Session.batches``, numbered in their order.

    ``weighted``: gradients can be weighted, so the ranks' slices may be of any size. With
    ``shards``, each batch is handed out in that many logical shards. The collective's board is told
    when data is waited for, and when it is there.
    """

    def __init__(
        self, collective: Collective, weighted: bool, position: Position, shards: int = 0
    ) -> None:
        """Raises CheckpointMismatch if the job was begun with other ``shards``."""
        position.divide(shards)
        self.position = position
        self.in_loop = False
        """A batch was handed out and the next one has not been asked for."""
        self.weight = 1.0 / collective.world_size
        """What this rank's gradients of the last step count in those of the global batch."""
        self._rank = collective.rank
        self._world_size = collective.world_size
        self._weighted = weighted
        self._shards = shards
        self._board = collective.board
        self._calls = 0
        self._feed: Feed | None = None
        self._round: list[sampling.Item] = []
        self._begun_at = replace(position)
        """Where the round began."""

    def resize(self, rank: int, world_size: int) -> None:
        """From the next batch on, the slices are those of ``rank`` of ``world_size``."""
        if self._world_size != world_size:
            self.weight = 1.0 / world_size
        self._rank, self._world_size = rank, world_size

    def rewind(self) -> None:
        """The batches since the last applied step are handed out again."""
        self.move_to(self._begun_at)

    def move_to(self, position: Position) -> None:
        """Goes on from ``position``, in place of where it stood."""
        for field in fields(position):
            setattr(self.position, field.name, getattr(position, field.name))
        self.position.divide(self._shards)
        self._round.clear()

    @property
    def open_batches(self) -> int:
        """Batches handed out since the last step."""
        return len(self._round)

    @property
    def item(self) -> sampling.Item:
        """What was handed out last; no step has ended since."""
        return self._round[-1]

    @property
    def batch_weight(self) -> float:
        """What the batch that was handed out last counts."""
        return self._round[-1].share.weight if self._round else self.weight

    def open(
        self, dataset: Any, batch_size: int, epochs: int, shuffle: bool, seed: int, **loading: Any
    ) -> tuple[int, Feed]:
        """Number and feed of the next stream; ``loading`` is for ``Feed``.

        Raises ConfigError, and CheckpointMismatch if the job has begun this stream differently.
        """
        number = self._calls
        self._calls += 1
        try:
            length = length_of(dataset)
            plan = sampling.Stream(length, batch_size, epochs, bool(shuffle), int(seed))
        except ValueError as error:
            raise ConfigError(f"s.batches: {error}.") from None
        smallest = length % batch_size or min(batch_size, length)
        if smallest < self._world_size and not self._weighted:
            raise ConfigError(
                f"The last batch of an epoch has {smallest} samples for {self._world_size} ranks, "
                f"which paddle.DataParallel cannot weight; use another batch_size, or give the "
                f"model itself to ft.session, which averages the gradients then."
            )
        if self.position.stream == number:
            self.position.check(plan)
        loading |= {"rank": self._rank, "world_size": self._world_size, "shards": self._shards}
        return number, Feed(dataset, plan, **loading)

    def run(self, number: int, feed: Feed, between_rounds: Callable[[], bool]) -> Iterator[Any]:
        """The data of stream ``number`` from where the job stands; nothing if it is over.

        ``between_rounds()``: whether the job stands elsewhere now, or has other ranks.
        """
        again = True
        while again:
            if self.position.stream > number:
                return
            again = False
            self._board.enter(DATA)
            for data in self._run(number, feed.of(self._rank, self._world_size)):
                yield data
                if again := between_rounds():
                    self.kill()
                    break
                self._board.enter(DATA)
        self._board.enter(LOOSE)

    def _run(self, number: int, feed: Feed) -> Iterator[Any]:
        position = self.position
        if position.stream < number:
            position.turn_to(number)
        position.plan = feed.stream
        self._feed = feed
        for item, data in feed.run(position.batch, position.epoch, position.offset):
            if position.stream != number:
                raise ConfigError(
                    "Two loops over s.batches run at the same time, which cannot be resumed; join "
                    "the datasets with paddle.io.ComposeDataset and use one loop."
                )
            if not self._round:
                self._begun_at = replace(position)
            if item.first:
                position.advance(item.batch)
            self._round.append(item)
            self.in_loop = True
            self._board.loose = False
            self._board.enter(COMPUTE)
            try:
                yield data
            finally:
                self.in_loop, self._board.loose = False, True

    def kill(self) -> None:
        """Ends what loads data beside this process, which is about to end."""
        if self._feed is not None:
            self._feed.kill()

    def close_round(self) -> bool:
        """Weighs the gradients of the batches since the last step; whether they end an epoch.

        Without a batch since then (two steps with one batch) the weight stays what it was.
        """
        if not self._round:
            return False
        mine = sum(i.share.stop - i.share.start for i in self._round if i.share.weight)
        self.weight = mine / sum(i.batch.size for i in self._round if i.first)
        ends_epoch = self._round[-1].batch.last
        self._round.clear()
        return ends_epoch

    def applied(self) -> None:
        """The step of the round that was closed has been applied."""
        self._begun_at = replace(self.position)
