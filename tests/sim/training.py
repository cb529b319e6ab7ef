"""Worker processes of the simulation: start, restore, join, level, step, save, pause, fail, finish.

Follows ``paddle_ft.session`` and ``paddle_ft.regroup``, with the product's own comparison of where
the ranks stand (``meeting``). What a state *is* here is the list of sample positions it was trained
on, and which groups of ranks computed it; that is what the checkers look at. The ranks themselves
step together in ``ranks.RankGroup``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from paddle_ft.errors import EXIT_COLLECTIVE, EXIT_PAUSED, CollectiveFailed
from paddle_ft.types import Recovery
from tests.sim.clock import Process
from tests.sim.task import Effect, Steps, Task

if TYPE_CHECKING:
    from tests.sim.ranks import RankGroup
    from tests.sim.world import World

Ranges = tuple[tuple[int, int], ...]
"""Sample positions [start, stop) in the order of their use, neighbours joined."""
Path = tuple[tuple[int, int], ...]
"""Groups of ranks that computed a state, each with the first step it computed, in order."""

START_S = (0.1, 0.5)
SAY_S = 0.001
"""From a worker to its agent and back. Always the same: what is said comes in order."""
RENDEZVOUS_TIMEOUT_S = 4.0
PAUSE_S = 0.02


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
    path: Path = ()
    """Two groups never compute the same state."""

    def trained(self, batch: int, run: int) -> State:
        """One step further, in the group ``run``."""
        start, stop = self.position, self.position + batch
        used, path = self.used, self.path
        if used and used[-1][1] == start:
            used = (*used[:-1], (used[-1][0], stop))
        else:
            used = (*used, (start, stop))
        if not path or path[-1][0] != run:
            path = (*path, (run, self.step + 1))
        return replace(self, step=self.step + 1, position=stop, used=used, path=path)

    def continues(self, earlier: State) -> bool:
        """Whether this is ``earlier``, or was computed from it."""
        upto = tuple(entry for entry in self.path if entry[1] <= earlier.step)
        return self.step >= earlier.step and upto == earlier.path


@dataclass(frozen=True, slots=True)
class Env:
    """What an agent tells a worker of its generation."""

    generation: int
    endpoint: str
    rank: int
    world_size: int
    in_place: bool = False
    restored_step: int = -1


@dataclass(frozen=True, slots=True)
class Order:
    """Join another group; without an ``env``: leave, there is no place any more."""

    generation: int
    env: Env | None
    at_once: bool


Phase = Literal[
    "starting", "door", "ordered", "restoring", "joining", "training", "leaving", "ended"
]
End = Literal["done", "paused", "collective", "killed"]
Why = Literal["regroup", "pause", "finish"]


class SimWorker:
    """One worker process. What it says is delivered through its agent's own process."""

    def __init__(self, world: World, owner: WorkerOwner, env: Env | None) -> None:
        """``env`` is None in reserve."""
        self.world = world
        self.owner = owner
        self.number = world.next_worker()
        self.env = env
        self.process = Process(world.clock, f"{owner.node}/w{self.number}")
        self.phase: Phase = "starting"
        self.state = State()
        self.has_state = False
        self.pause_asked = False
        self.committed_step = -1
        self.order: Order | None = None
        self.group: RankGroup | None = None
        in_place = world.plan.recovery == "in_place" and world.training.session
        self.recovery: Recovery = "in_place" if in_place else "restart"
        self._published_step = -1
        self._wait = 0
        self._in_group = False
        self._task: Task | None = None
        self._condition: Callable[[], bool] | None = None

    # ------------------------------------------------------------ seen from outside

    @property
    def rank(self) -> int:
        return self.env.rank if self.env is not None else -1

    @property
    def generation(self) -> int:
        return self.env.generation if self.env is not None else 0

    @property
    def world_size(self) -> int:
        return self.env.world_size if self.env is not None else 0

    @property
    def can_change(self) -> bool:
        return self.recovery == "in_place"

    @property
    def ordered(self) -> bool:
        if self.order is None or not (self.can_change or self.env is None):
            return False  # who waits at the door follows any
        return self.order.generation > self.generation

    @property
    def ordered_at_once(self) -> bool:
        return self.ordered and self.order is not None and self.order.at_once

    def start(self) -> None:
        self._task = Task(self.process, self._life)

    def told(self, what: Callable[..., None], *how: Any) -> None:
        """The agent says something; ``what`` is one of the methods below."""
        self.process.after(SAY_S, self._hear, what, how)

    def _hear(self, what: Callable[..., None], how: tuple[Any, ...]) -> None:
        what(*how)
        self._look()

    def hear_committed(self, step: int) -> None:
        self.committed_step = max(self.committed_step, step)

    def hear_pause(self) -> None:
        self.pause_asked = True

    def hear_restored(self, generation: int, state: State) -> None:
        if self.phase == "restoring" and generation == self.generation:
            self.state, self.has_state = state, True
            self.committed_step = state.step if state.origin else -1
            self.phase = "joining"

    def hear_order(self, order: Order) -> None:
        self.order = order
        if self.ordered_at_once and self.phase in ("joining", "training"):
            if self.group is not None:
                self.group.left(self)
            self.release(CollectiveFailed("the group is left"))

    def release(self, result: Any, delay_s: float = 0.0) -> None:
        """What this worker waits for in its group has come about, or never will."""
        if self._in_group:
            self.process.after(delay_s, self._resume, self._wait, result)

    def alarm(self) -> None:
        """A fault: it believes that a peer is lost, though all are there and well."""
        if self.group is not None and self.group.running and self._in_group:
            self.group.left(self)
            self.release(CollectiveFailed("a false alarm"))

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
        self.world.worker_gone(self, how)
        self.owner.worker_ended(self, how, exit_code, step)

    def kill(self, stopped: bool, why: str = "") -> None:
        """SIGKILL from outside, also to a frozen one."""
        if self.phase == "ended":
            return
        self.phase = "ended"
        self.process.kill()
        self.world.worker_gone(self, why or ("stopped" if stopped else "killed"))
        self.owner.worker_ended(self, "killed", -9, -1, stopped)

    # ------------------------------------------------------------ waiting

    def _resume(self, wait: int, result: Any) -> None:
        if wait == self._wait and self.phase != "ended":
            assert self._task is not None
            self._wait += 1
            self._in_group = False
            self._condition = None
            self._task.resume(result)

    def _held(self) -> None:
        """Waits for ``release``."""
        self._in_group = True
        if self.group is None:
            self.release(CollectiveFailed("no rendezvous"), RENDEZVOUS_TIMEOUT_S)
        elif self.group.over:
            self.release(CollectiveFailed("a peer was lost"), PAUSE_S)

    def _until(self, condition: Callable[[], bool]) -> Effect:
        def wait() -> None:
            self._condition = condition
            self._look()

        return wait

    def _look(self) -> None:
        if self._condition is not None and self._condition():
            self._condition = None
            self.process.after(0.0, self._resume, self._wait, None)

    # ------------------------------------------------------------ its life

    def _life(self, task: Task) -> Steps:
        yield task.sleep(self.world.clock.between(*START_S))
        if not self.world.training.session:
            self.recovery = ""
            self.state, self.has_state = State(), True
        error: CollectiveFailed | None = None
        ordered = self.env is None
        if ordered:
            self.phase = "door"
            self.owner.worker_said_hello(self, 0, -1, "")
        while True:
            if error is not None and not self.can_change:
                self.end("collective", EXIT_COLLECTIVE)
                return
            if error is not None:
                if not self.ordered_at_once:
                    self.owner.worker_lost_peer(self)
                yield task.sleep(PAUSE_S)
            if error is not None or ordered:
                self.phase = "ordered"
                yield self._until(lambda: self.ordered)
                assert self.order is not None
                if self.order.env is None:
                    self.end("paused", EXIT_PAUSED)
                    return
                self.env, self._published_step = self.order.env, -1
            error, ordered = None, False
            try:
                why: Why = yield from self._enter_and_train(task)
            except CollectiveFailed as failed:
                error = failed
                continue
            finally:
                self.group = None
                self.phase = "leaving"
            if why == "finish":
                ordered = yield from self._finish(task)
            if why == "pause":
                self.save()
                yield task.sleep(self.world.clock.between(0, 0.05))
                self.end("paused", EXIT_PAUSED, self.state.step)
            ordered = ordered or why == "regroup"
            if not ordered:
                return

    def _enter_and_train(self, task: Task) -> Steps:
        """Joins the group of its generation and steps in it; gives why that ended well.

        Raises CollectiveFailed.
        """
        env = self.env
        assert env is not None
        if self.world.training.session:
            self.owner.worker_said_hello(self, env.generation, env.rank, self.recovery)
            if not env.in_place:
                self.has_state = False
                yield from self._load()
            elif self.world.tells_restore_point:
                self.committed_step = max(self.committed_step, env.restored_step)
        self.phase = "joining"
        if self.ordered_at_once:
            raise CollectiveFailed("another group is wanted")
        group = self.world.rendezvous(self)
        while (why := (yield self._held)) == "load":
            yield from self._load()
            assert group is not None
            group.loaded(self)
        return why

    def _load(self) -> Steps:
        """Takes the state of the restore point. Raises CollectiveFailed if it is ordered away."""
        self.phase, generation = "restoring", self.generation
        self.owner.worker_wants_state(self)
        yield self._until(
            lambda: (self.phase != "restoring" and self.has_state) or self._called_away()
        )
        if self.phase == "restoring":
            raise CollectiveFailed("another group is wanted")
        assert generation == self.generation

    def _called_away(self) -> bool:
        return self.ordered_at_once if self.world.deaf_while_loading else self.ordered

    def save(self) -> None:
        """Hands a snapshot over, unless that step is there already."""
        if self._published_step != self.state.step and self.world.training.session:
            self._published_step = self.state.step
            self.owner.snapshot(self, self.state)

    def saved_at(self, step: int) -> None:
        """``step`` needs no snapshot: training starts from it."""
        self._published_step = step

    def _finish(self, task: Task) -> Steps:
        """The last checkpoint, then the end; gives whether an order came first."""
        step = self.state.step
        if self.world.training.session:
            if step not in (self.committed_step, self._published_step):
                self.save()
            if self.world.training.patient or self.can_change:
                yield self._until(lambda: self.committed_step >= step or self.ordered)
                if self.committed_step < step:
                    return True
        yield task.sleep(self.world.clock.between(0, 0.05))
        self.end("done", 0, step if self.world.training.session else -1)
        return False


class WorkerOwner:
    """What a worker needs of its agent; see ``agent.SimAgent``."""

    node: str
    me: str

    def worker_said_hello(
        self, worker: SimWorker, generation: int, rank: int, recovery: Recovery
    ) -> None:
        raise NotImplementedError

    def worker_wants_state(self, worker: SimWorker) -> None:
        raise NotImplementedError

    def worker_lost_peer(self, worker: SimWorker) -> None:
        raise NotImplementedError

    def worker_ended(
        self, worker: SimWorker, how: End, exit_code: int, step: int, stopped: bool = False
    ) -> None:
        raise NotImplementedError

    def snapshot(self, worker: SimWorker, state: State) -> None:
        raise NotImplementedError

    def buffers_free(self, generation: int) -> bool:
        raise NotImplementedError
