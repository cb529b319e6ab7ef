"""The ranks that met at one rendezvous: they find out where they stand, level, and step together.

No rank takes a step without all others, as with data-parallel training. A step, the meeting and the
hand-over of a state can each end well on some ranks and badly on others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from paddle_ft import meeting
from paddle_ft.errors import CollectiveFailed
from tests.sim.clock import Clock
from tests.sim.training import RENDEZVOUS_TIMEOUT_S, SimWorker, State, Training

if TYPE_CHECKING:
    from tests.sim.world import World

STEP_S = (0.15, 0.35)
TRANSFER_S = (0.02, 0.5)
COLLECTIVE_TIMEOUT_S = 2.0
"""A rank whose neighbour is frozen or cut off learns of it only then; with gloo it is 30 s."""


class RankGroup:
    def __init__(self, world: World, number: int, generation: int, world_size: int) -> None:
        self._world = world
        self._clock: Clock = world.clock
        self._training: Training = world.training
        self.number = number
        self.generation = generation
        self.world_size = world_size
        self.ranks: dict[int, SimWorker] = {}
        self.running = False
        self.over = False
        self._levelled = False
        self._loading: set[int] = set()
        self._stuck_since_s: float | None = None
        self._save_due = False
        self._left: set[int] = set()

    def _workers(self) -> list[SimWorker]:
        return [self.ranks[r] for r in sorted(self.ranks)]

    # ------------------------------------------------------------ coming together

    def join(self, worker: SimWorker) -> None:
        assert not self.running
        self.ranks[worker.rank] = worker
        worker.group = self
        if len(self.ranks) == self.world_size:
            self.running = True
            self._clock.after(self._clock.between(0.005, 0.05), self._meet)
        elif len(self.ranks) == 1:
            self._clock.after(RENDEZVOUS_TIMEOUT_S, self._rendezvous_over)

    def _rendezvous_over(self) -> None:
        if not self.running and not self.over:
            self._fail()

    def left(self, worker: SimWorker) -> None:
        """``worker`` was ordered away: the group is broken, for the others too."""
        if worker.number in self._left or self.over:
            return
        self._left.add(worker.number)
        if self.running:
            self._partial()

    def _meet(self) -> None:
        """As ``regroup._level``: the ranks compare, and who is behind takes what it lacks."""
        if not self._goes(self._meet):
            return
        workers = self._workers()
        env = workers[0].env
        assert env is not None
        if not env.in_place:
            self._level(workers, meeting.NOTHING)
            return
        self._world.met(self, workers)
        said = [0] * self.world_size
        for worker in workers:
            if worker.state.step < env.restored_step and self._world.minds_restore_point:
                worker.has_state = False
            step = worker.state.step if worker.has_state else meeting.NOTHING
            own = meeting.standing(worker.rank, self.world_size, step)
            said = [a + b for a, b in zip(said, own, strict=True)]
        met = self._world.meet(said)
        if met.step == meeting.NOTHING:
            self._loading = set(self.ranks)
            for worker in workers:
                worker.release("load")
            self._clock.after(0.25, self._look_at_loading)
        elif met.in_need:
            for rank in met.in_need if self._world.forgets_early else ():
                self.ranks[rank].has_state = False
            self._world.snare("hand-over", workers)
            wait_s = self._clock.between(*TRANSFER_S)
            self._clock.after(wait_s, self._hand_over, met.source, met.in_need)
        else:
            self._level(workers, met.step)

    def _hand_over(self, source: int, in_need: tuple[int, ...]) -> None:
        if self.over:
            return
        state = self.ranks[source].state
        if any(not w.process.alive for w in self._workers()):
            if self._clock.chance(0.3):  # the last broadcast came through to some
                self._give(state, [r for r in in_need if self._clock.chance(0.5)])
            self._fail()
        elif self._goes(lambda: self._hand_over(source, in_need)):
            self._give(state, in_need)
            self._level(self._workers(), state.step)

    def _give(self, state: State, ranks: tuple[int, ...] | list[int]) -> None:
        for rank in ranks:
            worker = self.ranks[rank]
            if worker.process.alive:
                worker.state, worker.has_state = state, True

    def _look_at_loading(self) -> None:
        if self._loading and self._goes(self._look_at_loading):
            self._clock.after(0.25, self._look_at_loading)

    def loaded(self, worker: SimWorker) -> None:
        """``worker`` has loaded the checkpoint, since nobody had a state."""
        self._loading.discard(worker.rank)
        if not self._loading and not self.over:
            self._level(self._workers(), meeting.NOTHING)

    def _level(self, workers: list[SimWorker], step: int) -> None:
        self._levelled = True
        self._world.formed(self, workers)
        for worker in workers:
            worker.phase = "training"
            if step == meeting.NOTHING:
                worker.saved_at(worker.state.step)
        self._clock.after(self._clock.between(*STEP_S), self._step)

    # ------------------------------------------------------------ stepping

    def _step(self) -> None:
        if not self._goes(self._step):
            return
        workers = self._workers()
        if any(w.ordered for w in workers):
            self._end(workers, "regroup")
        elif any(w.pause_asked for w in workers):
            self._end(workers, "pause")
        elif workers[0].state.step >= self._training.steps:
            self._end(workers, "finish")
        else:
            self._train(workers)
            step = workers[0].state.step
            self._save_due = self._save_due or self._due(step)
            if self._save_due and all(w.owner.buffers_free(w.generation) for w in workers):
                self._save_due = False
                for worker in workers:
                    worker.save()
            self._clock.after(self._clock.between(*STEP_S), self._step)

    def _end(self, workers: list[SimWorker], why: str) -> None:
        self.over = True
        for worker in workers:
            worker.release(why)

    def _train(self, workers: list[SimWorker]) -> None:
        for worker in workers:
            worker.state = worker.state.trained(self._training.batch, self.number)
        self._world.applied(self, workers)

    def _due(self, step: int) -> bool:
        return self._training.session and step % self._training.save_every == 0

    # ------------------------------------------------------------ failing

    def _goes(self, again: Callable[[], None]) -> bool:
        """Whether what is under way comes about now; else it is tried again, or has failed."""
        if self.over:
            return False
        workers = self._workers()
        if any(not w.process.alive for w in workers):
            self._partial()
            return False
        if self._together(workers):
            self._stuck_since_s = None
            return True
        now_s = self._clock.now
        if self._stuck_since_s is None:
            self._stuck_since_s = now_s
        if now_s - self._stuck_since_s >= COLLECTIVE_TIMEOUT_S:
            self._fail()
        else:
            self._clock.after(0.25, again)
        return False

    def _together(self, workers: list[SimWorker]) -> bool:
        if any(w.process.frozen for w in workers):
            return False
        nodes = sorted({w.owner.node for w in workers})
        connected = self._world.connected
        return all(connected(a, b) for i, a in enumerate(nodes) for b in nodes[i + 1 :])

    def _partial(self) -> None:
        """A rank is lost within a step: some of the others may have come through it."""
        workers = self._workers()
        last = self._training.steps
        pauses = any(w.pause_asked for w in workers)
        through: list[SimWorker] = []
        if self._levelled and self._together(workers) and not pauses and self._clock.chance(0.4):
            through = [
                w
                for w in workers
                if w.process.alive and w.state.step < last and self._clock.chance(0.5)
            ]
        if through:
            self._train(through)
        regroups = any(w.ordered and not w.ordered_at_once for w in through)
        for worker in through:
            if regroups:
                worker.release("regroup")
            elif self._due(worker.state.step) and worker.number not in self._left:
                worker.save()
        self._fail()

    def _fail(self) -> None:
        """All who are left learn of it: a neighbour of the lost at once, others at the time-out."""
        self.over = True
        for worker in self._workers():
            if worker.group is self and worker.number not in self._left:
                quick = self._clock.chance(0.5)
                delay_s = self._clock.between(0.01, 0.1) if quick else COLLECTIVE_TIMEOUT_S
                worker.release(CollectiveFailed("a peer was lost"), delay_s)
