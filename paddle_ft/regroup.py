"""How a worker gets into the group of its generation, and from there into the next one.

Invariant: when ``first`` or ``next`` returns, all ranks of the group stand at the same step with
the same state, each with its own part of it (``local_state``) as it was at that step; a rank that
cannot be brought there has raised.

    first   cold, or from a checkpoint: every rank loads it; ranks in place: from one that has it
    next    the group is left, at once if it is broken; the ranks of the new one compare where they
            stand, and who is behind takes the state of who is furthest
"""

from __future__ import annotations

import time
from collections.abc import Container
from dataclasses import replace
from typing import Any

from paddle_ft import transfer
from paddle_ft.checkpoint.snapshot import Image
from paddle_ft.collective import Collective
from paddle_ft.context import Context
from paddle_ft.errors import EXIT_PAUSED, CollectiveFailed
from paddle_ft.exits import Leave, say
from paddle_ft.gloo import GlooGroups, has_other_groups
from paddle_ft.health.phases import JOINING, LOADING, LOOSE, OUTSIDE
from paddle_ft.keeper import Keeper
from paddle_ft.local_state import LocalState, Words
from paddle_ft.meeting import NOTHING, meet, standing
from paddle_ft.progress import Position
from paddle_ft.rehearsal import rehearse
from paddle_ft.state import TrainingState
from paddle_ft.types import Recovery

_PAUSE_S = 0.02


class Membership:
    """This worker's way through the generations."""

    def __init__(self, context: Context, state: TrainingState, parallel: bool) -> None:
        """``parallel``: the model is a ``paddle.DataParallel``, which keeps its first group."""
        self.local = LocalState(state)
        self.position = Position()
        """Where the state stands that this worker has."""
        self.image: Image | None = None
        """What the state was put back from, until ``started``."""
        self.started = False
        """The script has registered what belongs to its state."""
        self._has_state = False
        """False also while only a part of it has come."""
        self._own_row = 0
        """This worker's row of ``local.agreed``."""
        self._context = context
        self._state = state
        self._collective: Collective = context.collective
        self._can_change = (
            context.env is not None
            and context.env.recovery == "in_place"
            and not parallel
            and _on_cpu(state)
            and _in_no_group()
            and self.local.fits
            and not state.divided
        )
        self._exchanges = self._can_change
        """The ranks tell each other of their own state; the same on all of them, from the start."""
        if self._can_change:
            self._collective.groups = GlooGroups()
        self.keeper: Keeper = context.connect()

    @property
    def recovery(self) -> Recovery:
        """What can be done with this worker when the group changes."""
        return "in_place" if self._can_change else "restart"

    @property
    def ordered(self) -> bool:
        """There is an order for another group, to be followed after this step at the latest."""
        order = self.keeper.order
        return self._can_change and order is not None and order.generation > self._generation

    @property
    def ordered_at_once(self) -> bool:
        order = self.keeper.order
        return self.ordered and order is not None and order.at_once

    @property
    def _generation(self) -> int:
        env = self._context.env
        return 0 if env is None or env.waits else env.generation

    def cannot_change(self) -> None:
        """From now on, another group means another process."""
        if self._can_change:
            self._can_change = False
            self._tell()

    def check_own_state(self) -> None:
        """Looks whether the script has changed buffers since the ranks agreed on them."""
        if self._can_change and not self.local.is_as_agreed(self._own_row):
            say("the script changes buffers between steps: a lost worker means a restart then")
            self.cannot_change()

    def broken(self, error: CollectiveFailed) -> None:
        """The group is broken: the agent is told, unless it knows already."""
        if not self.ordered_at_once:
            self.keeper.lost_peer(str(error))

    # ------------------------------------------------------------ from group to group

    def first(self) -> None:
        """Joins the first group; the state is in model and optimizer then. Raises PaddleFTError."""
        env = self._context.env
        waits = env is not None and env.waits
        if self._can_change:  # others will wait for this
            if waits:
                self._state.prepare()
            transfer.rehearse(self._state.entries(), self._state.places)
        if waits:
            rehearse()
            self.keeper.join(-1, 0, 0, "")
            self._take_order()
        try:
            self._enter()
        except CollectiveFailed as error:
            if not self._can_change:
                raise
            self._follow(error)

    def next(self, position: Position) -> None:
        """Follows the orders until this worker is in a group that stands.

        ``position``: where its state stands. What a forward pass of a step that was not applied has
        changed of this rank's own state is taken back. Raises Leave if it is dismissed,
        CollectiveFailed if the script has made groups of its own, which cannot be formed again.
        """
        self.position = replace(position)
        if has_other_groups():
            self.cannot_change()
            raise CollectiveFailed("The script has made process groups of its own.")
        if self._has_state:
            self.local.put_back(self._own_row)
        self._follow(None)

    def _follow(self, error: CollectiveFailed | None) -> None:
        while True:
            if error is not None:
                self.broken(error)
                time.sleep(_PAUSE_S)
            self._take_order()
            try:
                self._enter()
                return
            except CollectiveFailed as failed:
                error = failed

    def _take_order(self) -> None:
        order = self.keeper.wait_order(self._generation)
        if order.dismissed:
            self.keeper.close("paused", "there is no place for it any more", EXIT_PAUSED)
            raise Leave(EXIT_PAUSED)
        self._context.take(order.env)

    def _tell(self) -> None:
        rank, world_size = self._collective.rank, self._collective.world_size
        self.keeper.join(rank, world_size, self._generation, self.recovery)

    # ------------------------------------------------------------ one group

    def _enter(self) -> None:
        env, collective = self._context.env, self._collective
        self._tell()
        in_place = env is not None and env.in_place
        if not in_place:
            self._load()
        elif env is not None:  # or the last step, if that is committed, would be waited for again
            self.keeper.committed_step = max(self.keeper.committed_step, env.restored_step)
        self._join()
        if in_place:
            self._level()  # in it ranks wait for each other, and for who gives the state
        else:
            collective.check_same(self.position.step, "step to start from")
        if not self._has_state:
            collective.broadcast_all(self._state.shared_tensors())
            self._has_state = True
        self.agree(collective.sum_words(self.own_words()))
        board = self._context.board
        board.enter(LOOSE if board.loose else OUTSIDE)

    def own_words(self) -> Words:
        """This rank's own state in its place, to be summed over the ranks."""
        if not self._exchanges:
            return self.local.nothing
        return self.local.placed(self._collective.rank, self._collective.world_size)

    def agree(self, words: Words) -> None:
        """All ranks have heard of each other's own state: ``words`` are the sums of it."""
        if not self._exchanges:
            return
        self.local.agree(words, self._collective.world_size)
        self._own_row = self._collective.rank

    def _join(self) -> None:
        env = self._context.env
        self._context.board.enter(JOINING)
        if self._collective.groups is None or env is None:
            self._collective.join()
            return
        self._collective.join_next(env.generation)
        if has_other_groups():
            self.cannot_change()

    def _load(self) -> None:
        """Takes the state of the checkpoint the generation starts from, if there is one."""
        self._has_state, self.position = False, Position()
        before = self._context.board.phase
        self._context.board.enter(LOADING)
        image = self.keeper.restore()
        if image is not None:
            self._put(image)
        else:
            self._state.start_afresh()
        self._context.board.enter(before)

    def _put(self, image: Image, there: Container[str] = ()) -> None:
        self._state.restore(image, there)
        if self.started:
            self._state.restore_registered(image)
        else:
            self.image = image
        step = image.info.step
        self.position = Position.from_meta(image.info.meta.get("position", {}), step)
        self._has_state = True

    def _level(self) -> None:
        """Who is behind takes the state of who is furthest; if nobody has any, all load it."""
        env, collective, rank = self._context.env, self._collective, self._collective.rank
        assert env is not None
        if self.position.step < env.restored_step:
            self._has_state = False  # not in a job that keeps its rules
        step = self.position.step if self._has_state else NOTHING
        met = meet(collective.sum(standing(rank, collective.world_size, step)))
        if met.step == NOTHING:
            self._load()
            collective.check_same(self.position.step, "step to start from")
        elif met.in_need and rank == met.source:
            meta = {"position": self.position.to_meta(), "state": self._state.meta()}
            entries = self._state.entries()
            transfer.give(collective, entries, met.step, meta, self.local.agreed)
        elif rank in met.in_need:
            # What it has stays what it has until all is there: the source may be lost meanwhile.
            places = _nowhere if self._has_state else self._state.places
            image, there = transfer.take(collective, met.source, rank, places)
            self._has_state = False  # while it is being put
            self._put(image, there)
            say(f"rank {rank} has the state of step {met.step} from rank {met.source}")
        elif met.in_need:
            transfer.attend(collective, met.source)


def _nowhere(image: Image) -> dict[str, Any]:
    """For ``transfer``: no tensor may be overwritten before all is there."""
    return {}


def _on_cpu(state: TrainingState) -> bool:
    return all(t.place.is_cpu_place() for t in state.model_tensors().values())


def _in_no_group() -> bool:
    """The script has not joined a group by itself."""
    import paddle.distributed as dist

    return not dist.is_initialized()
