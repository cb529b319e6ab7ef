"""The workers of this node's current generation, and those in reserve, seen from the loop.

Invariant: a worker is known by its process, which may go through several generations; messages and
ends of processes that are not among the current ones are dropped at the door.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from paddle_ft.agent import ipc
from paddle_ft.agent.beacon import Beacon, Reading
from paddle_ft.agent.console import Console
from paddle_ft.agent.snapshots import SnapshotKeeper, StateFailed
from paddle_ft.agent.supervise import Group, Worker
from paddle_ft.agent.worker_env import SESSION_VARIABLE, SessionEnv, sealed_env, worker_env
from paddle_ft.agent.workers import WorkerEnded, WorkerPool, WorkerSpec
from paddle_ft.checkpoint.room import url_of
from paddle_ft.config import Config
from paddle_ft.health import stacks
from paddle_ft.types import CommitRef, Generation, Recovery, Versioned, encode

HEARD_OUT_S = 1.0
"""How long after a worker's end its connection may stay open before the end counts all the same."""
GROUPS_MAX = 50
"""Through so many groups a worker goes before it is replaced: Paddle never frees one."""


@dataclass(frozen=True, slots=True)
class Said:
    """Event: what a worker says of itself, or None when its connection has closed."""

    channel: ipc.Channel
    message: ipc.Hello | ipc.LostPeer | ipc.Farewell | None


class WorkerGroup:
    """Starts, tells, orders, stops and describes the workers.

    Args:
        emit: takes Said, WorkerEnded and Published from other threads.
    """

    def __init__(
        self,
        config: Config,
        command: Sequence[str],
        run_dir: Path,
        snapshots: SnapshotKeeper,
        console: Console,
        emit: Callable[[Said | WorkerEnded | ipc.Published], None],
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._snapshots = snapshots
        self._console = console
        self._emit = emit
        self._socket = str(run_dir / "agent.sock")
        self._listener: ipc.Listener | None = None
        self._pool = WorkerPool(command, Path(config.job.log_dir), emit, console.worker_line)
        self._workers: dict[int, Worker] = {}
        self._rank_of: dict[int, int] = {}
        """By process id."""
        self._channels: dict[int, ipc.Channel] = {}
        """By process id."""
        self._ready: dict[int, ipc.Channel] = {}
        """By process id, of those that wait at the door of their session."""
        self._ended: dict[int, WorkerEnded] = {}
        """By process id: ends that count once the connection is heard out."""
        self._groups: dict[int, int] = {}
        """By process id: how many groups it has been ordered into."""
        self._orders: dict[int, ipc.Order] = {}
        """By rank: for workers that come to their session later, or were on their way to it."""
        self._beacons: dict[int, Beacon] = {}
        """By rank; another dict for each generation."""
        self._pause_told = False
        self._dismissed_s: float | None = None
        self._since_s = time.monotonic()
        self.generation = 0
        """Number of the generation whose workers were started last; 0 before the first."""
        self.generation_revision = 0
        self.restore_failed = ""
        self.restore_fatal = 0
        self._told: Recovery = ""
        """What a worker has said last that it can do when the group changes."""

    def listen(self) -> None:
        self._listener = ipc.Listener(self._socket, self._on_message)

    def facts(self) -> Group | None:
        """What ``supervise`` looks at; None before the first generation."""
        for event in list(self._ended.values()):
            if time.monotonic() - event.at_s > HEARD_OUT_S:  # a child it forked holds the socket
                self._channels.pop(event.pid, None)
                self.ended(self._ended.pop(event.pid))
        if not self.generation:
            return None
        workers = tuple(self._workers[rank] for rank in sorted(self._workers))
        stepping = any(beacon.read().first_s for beacon in self._beacons.values())
        pause, dismissed_s = self._pause_told, self._dismissed_s
        return Group(self.generation, workers, pause, dismissed_s, self._told, stepping)

    @property
    def at_the_door(self) -> int:
        """Processes in reserve that have said they are ready."""
        return len(self._ready)

    # ------------------------------------------------------------ one generation

    def start(self, versioned: Versioned[Generation], me: str, sequence: int) -> None:
        """Starts this node's workers of a generation, and sees to its restore point.

        ``sequence`` is that of the head.
        """
        for rank in list(self._workers):
            self._pool.drop(rank)  # ended all of them, but some may not have been reaped
        self._workers, self._rank_of = {}, {}
        self._turn_to(versioned, me, sequence, {})

    def order(self, versioned: Versioned[Generation], me: str, sequence: int) -> None:
        """The workers go on in another generation; those that cannot are replaced."""
        generation = versioned.value
        first = generation.first_rank(me)
        turn = generation.number % generation.world_size
        # Its state is elsewhere, too: nobody is dead, or another worker here has it.
        spared = generation.planned or sum(w.stays for w in self._workers.values()) > 1
        stay: dict[int, int] = {}
        for slot, rank in enumerate(sorted(self._workers)):
            pid, new = self._pool.pid(rank), first + slot
            worn = self._groups.get(pid or 0, 0) >= GROUPS_MAX and new == turn
            if pid is None or not self._workers[rank].stays or (worn and spared):
                self._pool.drop(rank)
            else:
                stay[rank] = new
        self._pool.rename(stay)
        kept = {new: self._workers[old] for old, new in stay.items()}
        self._workers = {rank: replace(w, rank=rank, lost_peer="") for rank, w in kept.items()}
        self._rank_of = {pid: r for r in self._workers if (pid := self._pool.pid(r)) is not None}
        self._turn_to(versioned, me, sequence, stay)

    def _turn_to(
        self,
        versioned: Versioned[Generation],
        me: str,
        sequence: int,
        stay: Mapping[int, int],
    ) -> None:
        """``stay``: old and new ranks of workers that go on."""
        generation = versioned.value
        first = generation.first_rank(me)
        ranks = range(first, first + self._config.job.nproc_per_node)
        self.generation, self.generation_revision = generation.number, versioned.mod_revision
        self.restore_failed, self.restore_fatal = "", 0
        self._pause_told, self._dismissed_s = False, None
        self._orders.clear()
        self._beacons = {}
        self._snapshots.begin(generation, me, ranks, sequence, stay)
        self._console.generation(generation, me)
        for slot, rank in enumerate(ranks):
            spec = self._spec(generation, me, slot, rank)
            order = ipc.Order(generation.number, dict(spec.env), not generation.planned)
            if rank in self._workers:
                self._send_order(rank, order)
            else:
                self._fill(generation.number, spec, order)
        self._pool.write_pids(generation.number, list(self._ready))

    def _fill(self, generation: int, spec: WorkerSpec, order: ipc.Order) -> None:
        """Gives ``rank`` a worker: who waits at the door, else a new one."""
        self._workers[spec.rank] = Worker(spec.rank)
        self._orders[spec.rank] = order
        pid = self._pool.candidate(self._ready)
        if pid is None:
            pid = self._pool.start(generation, spec)
        else:
            self._pool.take(pid, spec.rank)
            channel = self._ready.pop(pid, None)
            if channel is not None:
                self._channels[pid] = channel
                channel.send(order)
        self._rank_of[pid] = spec.rank

    def _send_order(self, rank: int, order: ipc.Order) -> None:
        pid = self._pool.pid(rank)
        if pid is None:
            return
        self._groups[pid] = self._groups.get(pid, 0) + 1
        self._orders[rank] = order  # it may be between two connections
        channel = self._channels.get(pid)
        if channel is not None:
            channel.send(order)

    def _session(self, generation: int, beacon: str) -> SessionEnv:
        checkpoint = self._config.checkpoint
        return SessionEnv(
            job=self._config.job.id,
            generation=generation,
            restarts=0,
            socket=self._socket,
            beacon=beacon,
            mode=checkpoint.mode,
            block_bytes=checkpoint.block_bytes,
            when=checkpoint.when,
            recovery=self._config.job.recovery,
            store=url_of(self._config),
        )

    def _spec(self, generation: Generation, me: str, slot: int, rank: int) -> WorkerSpec:
        path = self._run_dir / f"beacon-{generation.number}-{rank}"
        self._beacons[rank] = Beacon.create(path)
        for old in self._run_dir.glob(f"beacon-{generation.number - 2}-*"):
            old.unlink(missing_ok=True)
        restarts = generation.restarts
        session = replace(
            self._session(generation.number, str(path)),
            restarts=restarts,
            mtbf_s=(time.monotonic() - self._since_s) / restarts if restarts else 0.0,
            in_place=generation.in_place,
            restored_step=generation.restore.step if generation.restore else -1,
        )
        env = dict(worker_env(generation, me, slot, devices=self._config.job.devices))
        env[SESSION_VARIABLE] = encode(session).decode()
        return WorkerSpec(rank, env)

    def refill(self, spares: int, reserve: int, generation: Generation | None) -> None:
        """Keeps ``spares`` and ``reserve`` processes ready; see ``reserve.spares_due``."""
        env: dict[str, str] = {}
        if reserve and generation is not None:
            env = dict(sealed_env(generation))
            waits = replace(self._session(0, ""), waits=True)
            env[SESSION_VARIABLE] = encode(waits).decode()
        self._pool.refill(spares, reserve, env)

    # ------------------------------------------------------------ what they are told

    def stop(self, gently: bool) -> None:
        """Ends the workers. ``gently`` is for scripts that cannot save: that is their pause."""
        self._pause_told = self._pause_told or gently
        self._pool.stop(gently=gently)

    def blame(self, rank: int, pid: int, reason: str) -> None:
        """Ends a worker that hangs; nothing if ``rank`` is another process by now."""
        if self._rank_of.get(pid) == rank and self._workers[rank].exit_code is None:
            self._workers[rank] = replace(self._workers[rank], reason=reason)
            self._pool.kill(rank)

    def dismiss(self, generation: int) -> None:
        """The workers leave at the step after which their group goes on without them."""
        self._dismissed_s = time.monotonic()
        for channel in self._members():
            channel.send(ipc.Order(generation, {}, at_once=False, dismissed=True))

    def tell_pause(self, reason: str) -> None:
        self._pause_told = True
        for channel in self._members():
            channel.send(ipc.PauseRequest(reason))

    def ask_to_save(self, number: int) -> None:
        """Passes a signal on to the workers, whose rules may want to save on it."""
        for channel in self._members():
            channel.send(ipc.SaveRequest(number))

    def tell_committed(self, commit: CommitRef) -> None:
        if commit.generation == self.generation:
            for channel in self._members():
                channel.send(ipc.Committed(commit.step, commit.sequence))

    def _members(self) -> list[ipc.Channel]:
        return [channel for pid, channel in self._channels.items() if pid in self._rank_of]

    def beacons(self) -> Mapping[int, Beacon]:
        """By rank, of the generation whose workers run; the mapping of an earlier one stays."""
        return self._beacons

    def pids(self) -> Mapping[int, int]:
        """Process ids by rank."""
        return {rank: pid for pid, rank in self._rank_of.items()}

    def reading(self) -> Reading | None:
        """Where the worker that is furthest is."""
        readings = [beacon.read() for beacon in self._beacons.values()]
        return max(readings, key=lambda r: r.step, default=None)

    # ------------------------------------------------------------ what happened

    def ended(self, event: WorkerEnded) -> None:
        """A process has ended; it counts once everything it had said before has been heard."""
        self._ready.pop(event.pid, None)
        if event.pid in self._channels:
            self._ended[event.pid] = event
            return
        self._pool.reap(event)
        stacks.remove(self._run_dir, event.pid)
        self._groups.pop(event.pid, None)
        rank = self._rank_of.pop(event.pid, None)
        if rank is not None:
            self._workers[rank] = replace(
                self._workers[rank],
                exit_code=event.exit_code,
                stopped=event.stopped,
                ended_s=event.at_s,
                at_step=self._step_of(rank),
            )

    def _step_of(self, rank: int) -> int:
        return self._beacons[rank].read().step if rank in self._beacons else 0

    def said(self, event: Said) -> None:
        channel, message = event.channel, event.message
        rank = self._rank_of.get(channel.pid)
        if message is None:
            if self._ready.get(channel.pid) is channel:
                del self._ready[channel.pid]
            if self._channels.get(channel.pid) is channel:
                del self._channels[channel.pid]
                if channel.pid in self._ended:
                    self.ended(self._ended.pop(channel.pid))
        elif isinstance(message, ipc.Hello):
            self._hello(channel, message, rank)
        elif rank is None:
            return
        elif isinstance(message, ipc.LostPeer):
            if channel.generation == self.generation:
                worker, at_step = self._workers[rank], self._step_of(rank)
                self._workers[rank] = replace(
                    worker, lost_peer=message.reason, lost_s=time.monotonic(), at_step=at_step
                )
        else:
            self._workers[rank] = replace(
                self._workers[rank],
                kind=message.kind,
                reason=message.reason,
                fatal_code=message.exit_code,
                step=message.step,
            )

    def _hello(self, channel: ipc.Channel, message: ipc.Hello, rank: int | None) -> None:
        if rank is None:
            if message.generation == 0 and channel.pid in self._pool.reserve():
                self._ready[channel.pid] = channel
                self._pool.write_pids(self.generation, list(self._ready))
            return  # else of a process that has been given up
        self._channels[channel.pid] = channel
        self._workers[rank] = replace(self._workers[rank], session=True, recovery=message.recovery)
        self._told = message.recovery or self._told
        if rank in self._orders and message.generation != self.generation:
            channel.send(self._orders[rank])
        if self._pause_told:
            channel.send(ipc.PauseRequest("the job pauses"))

    def cannot_restore(self, event: StateFailed) -> None:
        if event.generation == self.generation:
            self.restore_failed, self.restore_fatal = event.reason, event.exit_code
            self._console.say(event.reason)

    def _on_message(self, channel: ipc.Channel, message: ipc.ToAgent | ipc.ToWorker | None) -> None:
        """Runs on the connection's thread: a worker waits here for its state, nobody else."""
        if isinstance(message, ipc.Hello):
            channel.rank, channel.generation = message.rank, message.generation
            channel.pid = message.pid
        generation, rank = channel.generation, channel.rank
        if message is None or isinstance(message, ipc.Hello | ipc.LostPeer | ipc.Farewell):
            self._emit(Said(channel, message))
        elif isinstance(message, ipc.RestoreRequest):
            reply = self._snapshots.wait_restored(generation, rank)
            if reply is not None:
                channel.send(reply)
        elif isinstance(message, ipc.ShardsRequest):
            reply = self._snapshots.read_boxes(generation, rank, message.boxes)
            if reply is not None:
                channel.send(reply)
        elif isinstance(message, ipc.RestoreTaken):
            self._snapshots.taken(generation, rank)
        elif isinstance(message, ipc.Allocate):
            channel.send(self._snapshots.allocate(generation, rank, message.nbytes))
        elif isinstance(message, ipc.SnapshotReady):
            self._snapshots.arrived(generation, channel, message)
        elif isinstance(message, ipc.Published):
            self._emit(message)

    def close(self) -> None:
        self._pool.close()
        if self._listener is not None:
            self._listener.close()
