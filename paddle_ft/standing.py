"""Where a session is, for the script to read: its place in the job, in the data and in time."""

from __future__ import annotations

from paddle_ft.collective import Collective
from paddle_ft.context import Context
from paddle_ft.progress import Position
from paddle_ft.streams import Streams


class Standing:
    """The part of a session that only tells."""

    _context: Context
    _collective: Collective
    _position: Position
    _streams: Streams

    @property
    def rank(self) -> int:
        """Of this process among all of the job, from 0."""
        return self._collective.rank

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return self._collective.world_size

    @property
    def global_step(self) -> int:
        """Steps applied since the beginning of the job, over all restarts."""
        return self._position.step

    @property
    def epoch(self) -> int:
        """Epoch of the batch that was handed out last, from 0."""
        return self._position.epoch

    @property
    def weight(self) -> float:
        """What the batch that was handed out last counts on this rank: its part of the global one.

        0.0 if it is a sample that is only there to keep step with the other ranks.
        """
        return self._streams.batch_weight

    @property
    def generation(self) -> int:
        """How often the group of processes was formed, counted by the job."""
        return self._context.generation

    @property
    def restarts(self) -> int:
        """How many generations were because of a failure."""
        return self._context.restarts
