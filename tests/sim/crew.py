"""The workers of one simulated node, and those in reserve.

Follows ``paddle_ft.agent.group`` and ``paddle_ft.agent.workers``: a worker is known by its process,
which may go through several generations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from paddle_ft.agent import supervise as local
from paddle_ft.types import Generation, Recovery, Versioned
from tests.sim.training import End, Env, Order, SimWorker

if TYPE_CHECKING:
    from tests.sim.agent import SimAgent

RESERVE_DEATHS_MAX = 3


class Crew:
    def __init__(self, agent: SimAgent) -> None:
        self._agent = agent
        self._world = agent.world
        self._workers: dict[int, local.Worker] = {}
        """By rank, what is known of them."""
        self._pool: dict[int, SimWorker] = {}
        """By rank, the processes."""
        self._channels: dict[int, int] = {}
        """By number of the process: the generation it said hello for last."""
        self._reserve: dict[int, SimWorker] = {}
        self._ready: dict[int, SimWorker] = {}
        self._reserve_deaths = 0
        self._groups: dict[int, int] = {}
        self._orders: dict[int, Order] = {}
        self.pause_told = False
        self.dismissed_s: float | None = None
        self.generation = 0

    def facts(self) -> local.Group | None:
        if not self.generation:
            return None
        workers = tuple(self._workers[rank] for rank in sorted(self._workers))
        return local.Group(self.generation, workers, self.pause_told, self.dismissed_s)

    @property
    def at_the_door(self) -> int:
        return len(self._ready)

    def alive(self) -> list[SimWorker]:
        """The current workers that have not ended."""
        return [w for w in self._pool.values() if w.phase != "ended"]

    def reserve(self) -> list[SimWorker]:
        return [w for w in self._reserve.values() if w.phase != "ended"]

    def processes(self) -> list[SimWorker]:
        return [*self._pool.values(), *self._reserve.values()]

    # ------------------------------------------------------------ one generation

    def start(self, versioned: Versioned[Generation]) -> None:
        for rank in list(self._pool):
            self._drop(rank, "stopped")
        self._workers = {}
        self._turn_to(versioned, {})

    def order(self, versioned: Versioned[Generation]) -> None:
        """The workers go on in another generation; those that cannot are replaced."""
        generation = versioned.value
        first = generation.first_rank(self._agent.me)
        turn = generation.number % generation.world_size
        stay: dict[int, int] = {}
        for slot, rank in enumerate(sorted(self._workers)):
            worker, new = self._pool.get(rank), first + slot
            worn = (
                worker is not None
                and self._groups.get(worker.number, 0) >= self._world.plan.groups_max
                and new == turn
            )
            if worker is None or not self._workers[rank].stays or worn:
                self._drop(rank, "worn" if worn else "stopped")
            else:
                stay[rank] = new
        self._pool = {new: self._pool[old] for old, new in stay.items()}
        kept = {new: self._workers[old] for old, new in stay.items()}
        self._workers = {rank: replace(w, rank=rank, lost_peer="") for rank, w in kept.items()}
        self._turn_to(versioned, stay)

    def _drop(self, rank: int, why: str) -> None:
        worker = self._pool.pop(rank, None)
        if worker is not None:
            worker.kill(stopped=True, why=why)

    def _turn_to(self, versioned: Versioned[Generation], stay: Mapping[int, int]) -> None:
        generation, agent = versioned.value, self._agent
        first = generation.first_rank(agent.me)
        ranks = range(first, first + agent.slots)
        self.generation = generation.number
        self.pause_told, self.dismissed_s = False, None
        self._orders.clear()
        going = "goes on in" if stay else "starts"
        agent.note(going, "generation", generation.number, "ranks", tuple(ranks))
        agent.turned_to(versioned, ranks)
        for rank in ranks:
            restored = generation.restore.step if generation.restore else -1
            env = Env(
                generation.number,
                generation.endpoint,
                rank,
                generation.world_size,
                generation.in_place,
                restored,
            )
            order = Order(generation.number, env, not generation.planned)
            if rank in self._workers:
                self._send_order(rank, order)
            else:
                self._fill(env, order)

    def _fill(self, env: Env, order: Order) -> None:
        self._workers[env.rank] = local.Worker(env.rank)
        self._orders[env.rank] = order
        free = [*self._ready, *(w.number for w in self.reserve())]
        if not free:
            worker = self._pool[env.rank] = SimWorker(self._world, self._agent, env)
            worker.start()
            return
        number = free[0]
        worker = self._pool[env.rank] = self._reserve.pop(number)
        self._reserve_deaths = 0
        if self._ready.pop(number, None) is not None:
            self._channels[number] = 0
            worker.told(worker.hear_order, order)

    def _send_order(self, rank: int, order: Order) -> None:
        worker = self._pool.get(rank)
        if worker is None:
            return
        self._groups[worker.number] = self._groups.get(worker.number, 0) + 1
        self._orders[rank] = order
        if worker.number in self._channels:
            worker.told(worker.hear_order, order)

    def refill(self, reserve: int) -> None:
        for worker in self.reserve()[reserve:]:
            worker.kill(stopped=True)
        if self._reserve_deaths >= RESERVE_DEATHS_MAX:
            return
        while len(self._reserve) < reserve:
            worker = SimWorker(self._world, self._agent, None)
            self._reserve[worker.number] = worker
            worker.start()

    # ------------------------------------------------------------ what they are told

    def _tell(self, what: str, *how: Any) -> None:
        for worker in self._pool.values():
            if worker.number in self._channels:
                worker.told(getattr(worker, what), *how)

    def stop(self, gently: bool, why: str) -> None:
        self.pause_told = self.pause_told or gently
        if self.alive():
            self._agent.note("stops its workers:", why)
        for worker in list(self._pool.values()):
            worker.kill(stopped=True)

    def dismiss(self, generation: int) -> None:
        self.dismissed_s = self._world.clock.now
        self._agent.note("dismisses its workers")
        self._tell("hear_order", Order(generation, None, at_once=False))

    def tell_pause(self) -> None:
        self.pause_told = True
        self._tell("hear_pause")

    def tell_committed(self, step: int) -> None:
        self._tell("hear_committed", step)

    # ------------------------------------------------------------ what happened

    def _rank_of(self, worker: SimWorker) -> int | None:
        return next((r for r, w in self._pool.items() if w is worker), None)

    def hello(self, worker: SimWorker, generation: int, rank: int, recovery: Recovery) -> None:
        mine = self._rank_of(worker)
        if mine is None:
            if generation == 0 and worker.number in self._reserve:
                self._ready[worker.number] = worker
            return
        self._channels[worker.number] = generation
        self._workers[mine] = replace(self._workers[mine], session=True, recovery=recovery)
        if mine in self._orders and generation != self.generation:
            worker.told(worker.hear_order, self._orders[mine])
        if self.pause_told:
            worker.told(worker.hear_pause)

    def lost_peer(self, worker: SimWorker) -> None:
        rank = self._rank_of(worker)
        if rank is not None and self._channels.get(worker.number) == self.generation:
            self._workers[rank] = replace(
                self._workers[rank], lost_peer="lost", lost_s=self._world.clock.now
            )

    def farewell(self, worker: SimWorker, how: End, step: int) -> None:
        rank = self._rank_of(worker)
        if rank is not None and how != "killed":
            self._workers[rank] = replace(self._workers[rank], kind=how, step=step)

    def ended(self, worker: SimWorker, how: End, exit_code: int, step: int, stopped: bool) -> None:
        number = worker.number
        self._ready.pop(number, None)
        if self._reserve.pop(number, None) is not None and not stopped:
            self._reserve_deaths += 1
        self._channels.pop(number, None)
        self._groups.pop(number, None)
        rank = self._rank_of(worker)
        if rank is None:
            return
        del self._pool[rank]
        self._workers[rank] = replace(
            self._workers[rank],
            exit_code=exit_code,
            kind="" if how == "killed" else how,
            step=step,
            stopped=stopped,
            ended_s=self._world.clock.now,
        )
