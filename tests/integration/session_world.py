"""Real workers over gloo, and a small agent in the test's own process.

``Agent`` is the agent's end of ``paddle_ft.agent.ipc`` with committed checkpoints kept in memory:
what a session does can be tested without launcher, etcd or store.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from paddle_ft.agent import ipc
from paddle_ft.agent.beacon import Beacon
from paddle_ft.agent.net import free_ports
from paddle_ft.agent.worker_env import SESSION_VARIABLE, SessionEnv
from paddle_ft.checkpoint.plan import aligned, image_bytes
from paddle_ft.types import ImageInfo, TensorSpec

ROOT = Path(__file__).parents[2]
TRAIN = Path(__file__).parent / "session_scripts" / "train.py"


def python_26() -> str:
    """The interpreter with Paddle 2.6.2; skips the test if there is none."""
    default = ROOT / ".venv-2.6" / "bin" / "python"
    path = os.environ.get("PADDLE_FT_PYTHON_26", str(default))
    if not Path(path).exists():
        pytest.skip(f"no Paddle 2.6.2: PADDLE_FT_PYTHON_26 or {default} is needed")
    return path


@dataclass
class Saved:
    """A committed checkpoint: the images of all ranks."""

    images: dict[int, tuple[ImageInfo, bytes]]

    @property
    def info(self) -> ImageInfo:
        return self.images[0][0]

    def image_for(self, rank: int) -> tuple[ImageInfo, bytes]:
        """All replicated tensors, and the local ones of ``rank`` modulo the old world size."""
        donor = rank % self.info.world_size
        specs: list[TensorSpec] = []
        data = bytearray()
        for owner, (info, content) in sorted(self.images.items()):
            for spec in info.tensors:
                if spec.scope == "local" and owner != donor:
                    continue
                data.extend(bytes(aligned(len(data)) - len(data)))
                specs.append(replace(spec, offset=len(data)))
                data.extend(content[spec.offset : spec.offset + spec.nbytes])
        info = replace(self.info, rank=rank, tensors=tuple(specs))
        return info, bytes(data)

    def tensor(self, name: str, rank: int = 0) -> bytes:
        info, data = self.image_for(rank)
        pieces = sorted((s for s in info.tensors if s.name == name), key=lambda s: s.start)
        return b"".join(data[s.offset : s.offset + s.nbytes] for s in pieces)


@dataclass
class Agent:
    """Serves the workers of one generation."""

    world_size: int
    start: Saved | None = None
    when: str = "never"
    mode: str = "sharded"
    block_bytes: int = 4096
    buffers: int = 2
    generation: int = 1
    restarts: int = 0
    pause_after: int = -1
    """Asks for a pause as soon as this step is published."""
    hold: bool = False
    """Neither releases nor commits anything before ``let_go``."""
    committed: list[Saved] = field(default_factory=list)
    farewells: dict[int, ipc.Farewell] = field(default_factory=dict)
    published: list[tuple[int, int]] = field(default_factory=list)

    def __enter__(self) -> Agent:
        self.directory = Path(tempfile.mkdtemp(prefix="paddle_ft-agent-"))
        self._lock = threading.RLock()
        self._channels: dict[int, ipc.Channel] = {}
        self._rank_of: dict[int, int] = {}
        self._paths: dict[int, tuple[str, ...]] = {}
        self._arrived: dict[int, dict[int, tuple[int, ImageInfo, bytes]]] = {}
        for rank in range(self.world_size):
            Beacon.create(self.directory / f"beacon-{rank}")
        self._gone = threading.Semaphore(0)
        self._listener = ipc.Listener(str(self.directory / "socket"), self._on_message)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for channel in self._channels.values():
            channel.close()
        shutil.rmtree(self.directory)

    def env(self, rank: int) -> dict[str, str]:
        session = SessionEnv(
            job="test",
            generation=self.generation,
            restarts=self.restarts,
            socket=str(self.directory / "socket"),
            beacon=str(self.directory / f"beacon-{rank}"),
            mode=self.mode,
            block_bytes=self.block_bytes,
            when=self.when,
            recovery="restart",
        )
        return {SESSION_VARIABLE: json.dumps(asdict(session))}

    def beacon(self, rank: int) -> Any:
        return Beacon(self.directory / f"beacon-{rank}").read()

    @property
    def newest(self) -> Saved:
        return self.committed[-1]

    def pause(self, reason: str = "test") -> None:
        with self._lock:
            for channel in self._channels.values():
                channel.send(ipc.PauseRequest(reason))

    def settle(self) -> None:
        """Returns once everything that the workers have sent is dealt with; they have ended."""
        for _ in range(len(self._channels)):
            assert self._gone.acquire(timeout=20), "a worker is still connected"

    def let_go(self) -> None:
        with self._lock:
            self.hold = False
            for step in sorted(self._arrived):
                self._commit_if_whole(step)

    def _on_message(self, channel: ipc.Channel, message: object) -> None:
        with self._lock:
            if isinstance(message, ipc.Hello):
                self._channels[message.rank] = channel
                self._rank_of[id(channel)] = message.rank
            elif isinstance(message, ipc.RestoreRequest):
                channel.send(self._restored(message.rank))
            elif isinstance(message, ipc.Allocate):
                channel.send(ipc.Allocated(self._allocate(message)))
            elif isinstance(message, ipc.SnapshotReady):
                self._take(self._rank_of[id(channel)], message)
            elif isinstance(message, ipc.Farewell):
                self.farewells[self._rank_of[id(channel)]] = message
            elif message is None and id(channel) in self._rank_of:
                self._gone.release()

    def _restored(self, rank: int) -> ipc.RestoreReply:
        if self.start is None:
            return ipc.RestoreReply(None, None, -1, self.generation)
        info, data = self.start.image_for(rank)
        path = self.directory / f"restore-{rank}"
        path.write_bytes(data)
        return ipc.RestoreReply(str(path), info, 1, self.generation)

    def _allocate(self, message: ipc.Allocate) -> tuple[str, ...]:
        paths = []
        for index in range(self.buffers):
            path = self.directory / f"snapshot-{message.rank}-{index}"
            path.write_bytes(bytes(message.nbytes))
            paths.append(str(path))
        self._paths[message.rank] = tuple(paths)
        return tuple(paths)

    def _take(self, rank: int, message: ipc.SnapshotReady) -> None:
        content = Path(self._paths[rank][message.buffer]).read_bytes()
        assert len(content) >= image_bytes(message.info.tensors)
        step = message.info.step
        self.published.append((step, rank))
        arrived = self._arrived.setdefault(step, {})
        arrived[rank] = (message.buffer, message.info, content)
        if step == self.pause_after:
            self.pause()
        self._commit_if_whole(step)

    def _commit_if_whole(self, step: int) -> None:
        arrived = self._arrived[step]
        if self.hold or len(arrived) < self.world_size:
            return
        self.committed.append(Saved({r: (info, data) for r, (_, info, data) in arrived.items()}))
        for rank, (buffer, _, _) in arrived.items():
            self._channels[rank].send(ipc.Released(buffer))
            self._channels[rank].send(ipc.Committed(step, len(self.committed)))
        self._arrived[step] = {}


@dataclass
class Result:
    """How one worker ended."""

    code: int
    lines: list[dict[str, Any]]
    errors: str

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("event") == kind]

    @property
    def end(self) -> dict[str, Any]:
        (line,) = self.events("end")
        return line


def group_of(leader: int) -> list[int]:
    """The processes of a process group."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == leader:
            members.append(int(stat.parent.name))
    return members


def end_group_of(leader: int) -> None:
    """Kills a process group, and removes what Paddle's loader processes leave in shared memory."""
    members = group_of(leader)
    if members:
        os.killpg(leader, signal.SIGKILL)
    for pid in members:
        for path in Path("/dev/shm").glob(f"paddle_{pid}_*"):
            path.unlink(missing_ok=True)


class Workers:
    """The processes of one generation; ends what is left of them on leaving."""

    def __init__(
        self,
        world_size: int,
        agent: Agent | None = None,
        *,
        python: str = sys.executable,
        command: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        port, *ports = free_ports("127.0.0.1", world_size + 1)
        endpoints = [f"127.0.0.1:{p}" for p in ports]
        self.processes = []
        for rank in range(world_size):
            environment = {
                **{k: v for k, v in os.environ.items() if not k.startswith("PADDLE_")},
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "PFT_TEST": json.dumps(options),
                **({} if agent is None else agent.env(rank)),
                **(env or {}),
            }
            if world_size > 1:
                environment |= {
                    "PADDLE_MASTER": f"127.0.0.1:{port}",
                    "PADDLE_TRAINER_ID": str(rank),
                    "PADDLE_TRAINERS_NUM": str(world_size),
                    "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
                    "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
                    "PADDLE_DISTRI_BACKEND": "gloo",
                }
            default = [python, "-u", "-m", "paddle_ft.agent.bootstrap", str(TRAIN)]
            self.processes.append(
                subprocess.Popen(
                    list(command or default),
                    env=environment,
                    cwd=str(ROOT),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            try:
                end_group_of(process.pid)
            except ProcessLookupError:
                pass
            process.communicate()

    def results(self, timeout_s: float = 90.0) -> list[Result]:
        """How they ended, in rank order; a peer's loss is noticed by gloo itself."""
        outputs: list[tuple[str, str]] = [("", "")] * len(self.processes)

        def collect(index: int) -> None:
            process = self.processes[index]
            try:
                outputs[index] = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                pass

        def end_group(process: subprocess.Popen[str]) -> None:
            """As the agent does: what a worker has started ends with it."""
            try:
                process.wait(timeout_s)
                end_group_of(process.pid)
            except (subprocess.TimeoutExpired, ProcessLookupError):
                pass

        threads = [threading.Thread(target=collect, args=(i,)) for i in range(len(self.processes))]
        threads += [threading.Thread(target=end_group, args=(p,)) for p in self.processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout_s + 5)
        return [
            Result(
                process.returncode,
                [json.loads(line) for line in out.splitlines() if line.startswith("{")],
                err,
            )
            for process, (out, err) in zip(self.processes, outputs, strict=True)
        ]


def run(world_size: int, agent: Agent | None = None, **options: Any) -> list[Result]:
    """Runs the training script to its end on ``world_size`` ranks."""
    with Workers(world_size, agent, **options) as workers:
        results = workers.results()
    if agent is not None:
        agent.settle()
    return results


def succeeded(results: list[Result]) -> list[Result]:
    for result in results:
        assert result.code == 0, result.errors[-2000:]
    return results


def used_ids(*runs: tuple[list[Result], int]) -> list[int]:
    """Sample ids of steps applied and kept: of each run those up to the step it counts to."""
    ids: list[int] = []
    for results, last_step in runs:
        for result in results:
            for line in result.events("step"):
                if line["step"] <= last_step:
                    ids += line["ids"]
    return ids
