"""Worker processes as state machines: start, restore, join, step, save, pause, fail, finish.

The ranks of one generation meet at a rendezvous and step together from then on, as data-parallel
ranks do: no rank can take a step without all others. What a state *is* here is the list of
sample positions it was trained on; that is what the checkers look at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from paddle_ft.errors import EXIT_COLLECTIVE, EXIT_PAUSED
from tests.sim.clock import Clock, Process

if TYPE_CHECKING:
    from tests.sim.world import World

Ranges = tuple[tuple[int, int], ...]
"""Sample positions [start, stop) in the order of their use, neighbours joined."""

START_S = (0.1, 0.5)
STEP_S = (0.15, 0.35)
RENDEZVOUS_TIMEOUT_S = 4.0
COLLECTIVE_TIMEOUT_S = 2.0
"""A rank whose neighbour is frozen or cut off learns of it only then; with gloo it is 30 s."""


@dataclass(frozen=True, slots=True)
class Training:
    """What all ranks compute."""

    steps: int
    batch: int
    save_every: int
    session: bool
    patient: bool
    """The last checkpoint is waited for before the workers leave."""


@dataclass(frozen=True, slots=True)
class State:
    """Weights of one rank (``used``: what they have been trained on) and its sample position."""

    step: int = 0
    position: int = 0
    used: Ranges = ()
    origin: str = ""
    """Manifest this was restored from; "" for the beginning."""
    run: int = 0
    """The group of ranks that computed it: two groups never compute the same state."""

    def trained(self, batch: int) -> State:
        start, stop = self.position, self.position + batch
        used = self.used
        if used and used[-1][1] == start:
            used = (*used[:-1], (used[-1][0], stop))
        else:
            used = (*used, (start, stop))
        return replace(self, step=self.step + 1, position=stop, used=used)


Phase = Literal["starting", "restoring", "joining", "training", "ended"]
End = Literal["done", "paused", "collective", "killed"]


class SimWorker:
    """One rank. ``agent`` callbacks are delivered through the agent's own process."""

    def __init__(
        self,
        world: World,
        owner: WorkerOwner,
        rank: int,
        generation: int,
        endpoint: str,
        world_size: int,
    ) -> None:
        self.world = world
        self.owner = owner
        self.rank = rank
        self.generation = generation
        self.endpoint = endpoint
        self.world_size = world_size
        self.process = Process(world.clock, f"{owner.node}/r{rank}g{generation}")
        self.phase: Phase = "starting"
        self.state = State()
        self.pause_asked = False
        self.committed_step = -1
        self.group: RankGroup | None = None

    def start(self) -> None:
        self.process.after(self.world.clock.between(*START_S), self._hello)

    def _hello(self) -> None:
        self.phase = "restoring"
        if self.world.training.session:
            self.owner.worker_said_hello(self)
        else:
            self._join(State())

    def restored(self, state: State) -> None:
        """The agent has the state to start from."""
        self.process.after(0.01, self._join, state)

    def _join(self, state: State) -> None:
        if self.phase != "restoring":
            return
        self.phase = "joining"
        self.state = state
        self.committed_step = state.step if state.origin else -1
        self.world.rendezvous(self)

    def committed(self, step: int) -> None:
        self.process.after(0.001, self._committed, step)

    def _committed(self, step: int) -> None:
        self.committed_step = step

    def ask_pause(self) -> None:
        self.process.after(0.001, self._pause)

    def _pause(self) -> None:
        self.pause_asked = True

    def end(self, how: End, exit_code: int, step: int = -1, delay_s: float = 0.0) -> None:
        """The process ends by itself; its agent reaps it a little later."""
        if delay_s:
            self.process.after(delay_s, self.end, how, exit_code, step)
            return
        if self.phase == "ended" or not self.process.alive:
            return
        self.phase = "ended"
        self.process.kill()
        self.world.note(self.process.name, "worker ends", how, step)
        self.owner.worker_ended(self, how, exit_code, step)

    def kill(self, stopped: bool) -> None:
        """SIGKILL from outside, also to a frozen one."""
        if self.phase == "ended":
            return
        self.phase = "ended"
        self.process.kill()
        self.owner.worker_ended(self, "killed", -9, -1, stopped)


class WorkerOwner:
    """What a worker needs of its agent; see ``agent.SimAgent``."""

    node: str

    def worker_said_hello(self, worker: SimWorker) -> None:
        raise NotImplementedError

    def worker_ended(
        self, worker: SimWorker, how: End, exit_code: int, step: int, stopped: bool = False
    ) -> None:
        raise NotImplementedError

    def snapshot(self, worker: SimWorker, state: State) -> None:
        raise NotImplementedError

    def buffers_free(self, generation: int) -> bool:
        raise NotImplementedError


class RankGroup:
    """The ranks that met at one rendezvous."""

    def __init__(
        self,
        clock: Clock,
        training: Training,
        number: int,
        world_size: int,
        connected: Callable[[str, str], bool],
    ) -> None:
        self._clock = clock
        self._training = training
        self._connected = connected
        self.number = number
        self.world_size = world_size
        self.ranks: dict[int, SimWorker] = {}
        self.running = False
        self.over = False
        self._stuck_since_s: float | None = None
        self._saved_step = -1
        self._save_due = False

    def join(self, worker: SimWorker) -> None:
        assert not self.running
        self.ranks[worker.rank] = worker
        worker.group = self
        if len(self.ranks) == self.world_size:
            self._begin()
        elif len(self.ranks) == 1:
            self._clock.after(RENDEZVOUS_TIMEOUT_S, self._rendezvous_over)

    def _rendezvous_over(self) -> None:
        if not self.running and not self.over:
            self._fail("the rendezvous timed out")

    def _begin(self) -> None:
        self.running = True
        for worker in self.ranks.values():
            worker.phase = "training"
            worker.state = replace(worker.state, run=self.number)
        self._saved_step = next(iter(self.ranks.values())).state.step
        self._clock.after(self._clock.between(*STEP_S), self._step)

    def _step(self) -> None:
        if self.over:
            return
        workers = [self.ranks[r] for r in sorted(self.ranks)]
        if any(not w.process.alive for w in workers):
            self._partial(workers)
            return
        if not self._together(workers):
            now = self._clock.now
            if self._stuck_since_s is None:
                self._stuck_since_s = now
            if now - self._stuck_since_s >= COLLECTIVE_TIMEOUT_S:
                self._fail("the collective timed out")
            else:
                self._clock.after(0.25, self._step)
            return
        self._stuck_since_s = None
        last = self._training.steps
        if any(w.pause_asked for w in workers):
            self._save(workers)
            for worker in workers:
                worker.end("paused", EXIT_PAUSED, worker.state.step, self._clock.between(0, 0.05))
            self.over = True
            return
        if workers[0].state.step >= last:
            self._finish(workers, last)
            return
        for worker in workers:
            worker.state = worker.state.trained(self._training.batch)
        step = workers[0].state.step
        if self._due(step):
            self._save_due = True
        if self._save_due and all(w.owner.buffers_free(w.generation) for w in workers):
            self._save(workers)
        self._clock.after(self._clock.between(*STEP_S), self._step)

    def _due(self, step: int) -> bool:
        return self._training.session and step % self._training.save_every == 0

    def _finish(self, workers: list[SimWorker], last: int) -> None:
        self._save(workers)
        waiting: list[SimWorker] = []
        if self._training.session and self._training.patient:
            waiting = [w for w in workers if w.committed_step < last and w.phase != "ended"]
        step = last if self._training.session else -1
        for worker in workers:
            if worker not in waiting:
                worker.end("done", 0, step, self._clock.between(0, 0.05))
        if waiting:
            self._clock.after(0.1, self._finish, waiting, last)
        else:
            self.over = True

    def _save(self, workers: list[SimWorker]) -> None:
        step = workers[0].state.step
        self._save_due = False
        if step == self._saved_step or not self._training.session:
            return
        self._saved_step = step
        for worker in workers:
            worker.owner.snapshot(worker, worker.state)

    def _together(self, workers: list[SimWorker]) -> bool:
        if any(w.process.frozen for w in workers):
            return False
        nodes = sorted({w.owner.node for w in workers})
        return all(self._connected(a, b) for i, a in enumerate(nodes) for b in nodes[i + 1 :])

    def _partial(self, workers: list[SimWorker]) -> None:
        """A rank died within a step: some of the others may have come through it."""
        alive = [w for w in workers if w.process.alive]
        if self._clock.chance(0.3):
            for worker in alive:
                if self._clock.chance(0.5) and worker.state.step < self._training.steps:
                    worker.state = worker.state.trained(self._training.batch)
                    if self._due(worker.state.step):
                        worker.owner.snapshot(worker, worker.state)
        self._fail("a peer was lost")

    def _fail(self, why: str) -> None:
        """All who are left fail: a neighbour of the dead at once, others at the time-out."""
        self.over = True
        for worker in [self.ranks[r] for r in sorted(self.ranks)]:
            if worker.process.alive:
                quick = self._clock.chance(0.5)
                delay = self._clock.between(0.01, 0.1) if quick else COLLECTIVE_TIMEOUT_S
                worker.end("collective", EXIT_COLLECTIVE, worker.state.step, delay)
