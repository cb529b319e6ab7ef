"""The workers of this node's current generation, seen from the loop.

Invariant: what is kept here is about one generation; messages and ends of earlier ones are
dropped at the door.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from paddle_ft.agent import ipc
from paddle_ft.agent.beacon import Beacon, Reading
from paddle_ft.agent.console import Console
from paddle_ft.agent.snapshots import SnapshotKeeper, StateFailed
from paddle_ft.agent.supervise import Group, Worker
from paddle_ft.agent.worker_env import SESSION_VARIABLE, SessionEnv, worker_env
from paddle_ft.agent.workers import WorkerEnded, WorkerPool, WorkerSpec
from paddle_ft.config import Config
from paddle_ft.types import CommitRef, Generation, Versioned, encode

HEARD_OUT_S = 1.0
"""How long after a worker's end its connection may stay open before the end counts all the same."""


@dataclass(frozen=True, slots=True)
class Said:
    """Event: a worker's Hello or Farewell, or None when its connection has closed."""

    generation: int
    rank: int
    channel: ipc.Channel
    message: ipc.Hello | ipc.Farewell | None


class WorkerGroup:
    """Starts, tells, stops and describes the workers.

    Args:
        emit: takes Said and WorkerEnded from other threads.
    """

    def __init__(
        self,
        config: Config,
        command: Sequence[str],
        run_dir: Path,
        snapshots: SnapshotKeeper,
        console: Console,
        emit: Callable[[Said | WorkerEnded], None],
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._snapshots = snapshots
        self._console = console
        self._emit = emit
        self._socket = str(run_dir / "agent.sock")
        self._listener: ipc.Listener | None = None
        self._pool = WorkerPool(
            command, Path(config.job.log_dir), config.job.spares, emit, console.worker_line
        )
        self._workers: dict[int, Worker] = {}
        self._channels: dict[int, ipc.Channel] = {}
        self._ended: dict[int, WorkerEnded] = {}
        self._beacons: dict[int, Beacon] = {}
        self._pause_told = False
        self._since_s = time.monotonic()
        self.generation = 0
        """Number of the generation whose workers were started last; 0 before the first."""
        self.generation_revision = 0
        self.restore_failed = ""
        self.restore_fatal = 0

    def listen(self) -> None:
        self._listener = ipc.Listener(self._socket, self._on_message)

    def facts(self) -> Group | None:
        """What ``supervise`` looks at; None before the first generation."""
        if not self.generation:
            return None
        for event in list(self._ended.values()):
            if time.monotonic() - event.at_s > HEARD_OUT_S:  # a child it forked holds the socket
                self._channels.pop(event.rank, None)
                self.ended(self._ended.pop(event.rank))
        workers = tuple(self._workers[rank] for rank in sorted(self._workers))
        return Group(self.generation, workers, self._pause_told)

    def start(self, versioned: Versioned[Generation], me: str, sequence: int) -> None:
        """Starts this node's workers of a generation, and loads its restore point.

        ``sequence`` is that of the head.
        """
        generation = versioned.value
        first = generation.first_rank(me)
        ranks = range(first, first + self._config.job.nproc_per_node)
        self.generation, self.generation_revision = generation.number, versioned.mod_revision
        self.restore_failed, self.restore_fatal, self._pause_told = "", 0, False
        self._workers = {rank: Worker(rank) for rank in ranks}
        self._channels.clear()
        self._ended.clear()
        self._beacons.clear()
        self._snapshots.begin(
            generation.number, me, ranks, generation.world_size, generation.restore, sequence
        )
        self._console.generation(generation, me)
        self._pool.start(
            generation.number,
            [self._spec(generation, me, slot, rank) for slot, rank in enumerate(ranks)],
        )

    def _spec(self, generation: Generation, me: str, slot: int, rank: int) -> WorkerSpec:
        path = self._run_dir / f"beacon-{rank}"
        self._beacons[rank] = Beacon.create(path)
        checkpoint = self._config.checkpoint
        session = SessionEnv(
            job=self._config.job.id,
            generation=generation.number,
            restarts=generation.restarts,
            socket=self._socket,
            beacon=str(path),
            mode=checkpoint.mode,
            block_bytes=checkpoint.block_bytes,
            when=checkpoint.when,
            mtbf_s=(time.monotonic() - self._since_s) / generation.restarts
            if generation.restarts
            else 0.0,
        )
        env = dict(worker_env(generation, me, slot, devices=self._config.job.devices))
        env[SESSION_VARIABLE] = encode(session).decode()
        return WorkerSpec(rank, env)

    def stop(self, gently: bool) -> None:
        """Ends the workers. ``gently`` is for scripts that cannot save: that is their pause."""
        self._pause_told = self._pause_told or gently
        self._pool.stop(gently=gently)

    def tell_pause(self, reason: str) -> None:
        self._pause_told = True
        for channel in self._channels.values():
            channel.send(ipc.PauseRequest(reason))

    def ask_to_save(self, number: int) -> None:
        """Passes a signal on to the workers, whose rules may want to save on it."""
        for channel in self._channels.values():
            channel.send(ipc.SaveRequest(number))

    def tell_committed(self, commit: CommitRef) -> None:
        if commit.generation == self.generation:
            for channel in self._channels.values():
                channel.send(ipc.Committed(commit.step, commit.sequence))

    def refill(self) -> None:
        self._pool.refill()

    def reading(self) -> Reading | None:
        """Where the worker that is furthest is."""
        readings = [beacon.read() for beacon in self._beacons.values()]
        return max(readings, key=lambda r: r.step, default=None)

    # ------------------------------------------------------------ what happened

    def ended(self, event: WorkerEnded) -> None:
        """A process has ended; it counts once everything it had said before has been heard."""
        if event.generation != self.generation:
            return
        if event.rank in self._channels:
            self._ended[event.rank] = event
            return
        self._pool.reap(event.rank)
        self._workers[event.rank] = replace(
            self._workers[event.rank],
            exit_code=event.exit_code,
            stopped=event.stopped,
            ended_s=event.at_s,
        )

    def said(self, event: Said) -> None:
        worker = self._workers.get(event.rank)
        if worker is None or event.generation != self.generation:
            return
        message = event.message
        if message is None:
            if self._channels.get(event.rank) is event.channel:
                del self._channels[event.rank]
                if event.rank in self._ended:
                    self.ended(self._ended.pop(event.rank))
        elif isinstance(message, ipc.Hello):
            self._channels[event.rank] = event.channel
            self._workers[event.rank] = replace(worker, session=True)
            if self._pause_told:
                event.channel.send(ipc.PauseRequest("the job pauses"))
        else:
            self._workers[event.rank] = replace(
                worker,
                kind=message.kind,
                reason=message.reason,
                fatal_code=message.exit_code,
                step=message.step,
            )

    def cannot_restore(self, event: StateFailed) -> None:
        if event.generation == self.generation:
            self.restore_failed, self.restore_fatal = event.reason, event.exit_code
            self._console.say(event.reason)

    def _on_message(self, channel: ipc.Channel, message: ipc.ToAgent | ipc.ToWorker | None) -> None:
        """Runs on the connection's thread: a worker waits here for its state, nobody else."""
        if isinstance(message, ipc.Hello):
            channel.rank, channel.generation = message.rank, message.generation
        generation, rank = channel.generation, channel.rank
        if message is None or isinstance(message, ipc.Hello | ipc.Farewell):
            self._emit(Said(generation, rank, channel, message))
        elif isinstance(message, ipc.RestoreRequest):
            reply = self._snapshots.wait_restored(generation, rank)
            if reply is not None:
                channel.send(reply)
        elif isinstance(message, ipc.RestoreTaken):
            self._snapshots.taken(generation, rank)
        elif isinstance(message, ipc.Allocate):
            channel.send(self._snapshots.allocate(generation, rank, message.nbytes))
        elif isinstance(message, ipc.SnapshotReady):
            self._snapshots.arrived(generation, channel, message)

    def close(self) -> None:
        self._pool.close()
        if self._listener is not None:
            self._listener.close()
