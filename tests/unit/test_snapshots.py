"""The agent's memory of its workers' state: kept until the next workers have theirs (A5, B4)."""

from __future__ import annotations

import queue
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddle_ft.agent.ipc import Channel, SnapshotReady
from paddle_ft.agent.snapshots import PartWritten, SnapshotKeeper, StateFailed
from paddle_ft.checkpoint.room import CheckpointRoom
from paddle_ft.config import Config
from paddle_ft.coordination.actions import Commit
from paddle_ft.coordination.schema import Fences
from paddle_ft.failpoints import switched
from paddle_ft.types import CommitRef, Generation, Head, ImageInfo, Member
from tests.unit.checkpoint_job import Array, array_of, images

WORLD = 2
BUFFERS = 2


class Node:
    """One agent's snapshots with two workers, and a leader that commits each part."""

    def __init__(self, root: Path) -> None:
        self.store, self.memory = root / "store", root / "memory"
        self.memory.mkdir()
        settings = {"checkpoint": {"url": str(self.store), "block_bytes": 65536}}
        self.room = CheckpointRoom.open(Config.model_validate(settings))
        self.room.bind(lambda value: value)
        self.events: queue.Queue[Any] = queue.Queue()
        self.keeper = SnapshotKeeper(self.room, self.memory, BUFFERS, self.events.put)
        self.ends = socket.socketpair()
        self.channel = Channel(self.ends[0])
        self.head: Head | None = None
        self.paths: dict[int, tuple[str, ...]] = {}
        self.generation = 0

    def begin(self, restore: CommitRef | None = None, *, in_place: bool = False) -> None:
        self.generation += 1
        sequence = self.head.newest.sequence if self.head else 0
        member = Member("n", "a", "h", WORLD, (1, 2, 3))
        generation = Generation(self.generation, (member,), "h:1", restore)
        if in_place:
            generation = replace(generation, since=(1,))
        self.keeper.begin(generation, "n.a", range(WORLD), sequence, {})

    def save(self, step: int, state: dict[str, Array], buffer: int) -> CommitRef:
        self.copy(step, state, buffer)
        event = self.events.get(timeout=20)
        assert isinstance(event, PartWritten), event
        head = self.head
        lineage = (head.newest, *head.lineage) if head else ()
        ref = self.room.store_manifest(
            Commit(
                generation=self.generation, step=step, parts=(event.part,), head=head,
                sequence=len(lineage) + 1, base=lineage[0] if lineage else None,
                lineage=lineage, obsolete=(), fences=Fences(1, 1, 1),
            )
        )  # fmt: skip
        self.head = Head(ref, lineage, self.room.identity)
        self.keeper.committed(ref)
        return ref

    def copy(self, step: int, state: dict[str, Array], buffer: int) -> None:
        for rank, (info, data) in enumerate(images(state, {}, step, WORLD, block_bytes=65536)):
            self.fill(rank, buffer, data)
            message = SnapshotReady(buffer, replace(info, step=step))
            self.keeper.arrived(self.generation, self.channel, message)

    def fill(self, rank: int, buffer: int, data: memoryview) -> None:
        if rank not in self.paths:
            self.paths[rank] = self.keeper.allocate(self.generation, rank, 4 * data.nbytes).paths
        with open(self.paths[rank][buffer], "r+b") as file:
            file.write(data)

    def loaded(self) -> dict[str, Array]:
        """What both ranks start from."""
        replies = [self.keeper.wait_restored(self.generation, rank) for rank in range(WORLD)]
        self.paths.clear()
        states = []
        for reply in replies:
            assert reply is not None
            assert reply.path is not None
            assert isinstance(reply.info, ImageInfo)
            raw = Path(reply.path).read_bytes()
            states.append({t.name: array_of(t, raw) for t in reply.info.tensors})
        assert all(np.array_equal(states[0][n], states[1][n]) for n in states[0])
        return states[0]

    def held_bytes(self) -> int:
        return sum(p.stat().st_size for p in self.memory.iterdir())

    def close(self) -> None:
        self.keeper.close()
        self.channel.close()
        self.ends[1].close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.close()


def state_of(value: int) -> dict[str, Array]:
    rng = np.random.default_rng(value)
    return {
        "dense": rng.standard_normal(200_000).astype(np.float32),
        "frozen": np.arange(100_000, dtype=np.int64),
    }


def equal(one: dict[str, Array], other: dict[str, Array]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


def sources(caplog: pytest.LogCaptureFixture) -> list[float]:
    """MB from memory, cache and store, as the newest line about it says."""
    [*_, line] = [m for m in caplog.messages if m.startswith("restored step")]
    words = line.replace(",", "").split()
    return [round(float(w), 1) for w in words if w.replace(".", "").isdigit()]


def test_workers_start_again_from_memory(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    node.begin()
    node.save(1, state_of(1), 0)
    ref = node.save(2, state_of(2), 1)
    shutil.rmtree(node.store / "data")  # not needed
    node.begin(ref)
    assert equal(node.loaded(), state_of(2))
    assert sources(caplog) == [1.6, 0.0, 0.0]


def test_workers_that_were_to_go_on_in_place_and_are_gone_start_from_memory_too(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    node.begin()
    ref = node.save(1, state_of(1), 0)
    training = node.held_bytes()
    shutil.rmtree(node.store / "data")  # not needed
    node.begin(ref, in_place=True)
    node.begin(ref, in_place=True)
    assert equal(node.loaded(), state_of(1))
    assert sources(caplog) == [1.6, 0.0, 0.0]
    node.keeper.taken(node.generation, 0)
    node.keeper.taken(node.generation, 1)
    node.save(2, state_of(2), 0)
    assert node.held_bytes() == training


def test_who_has_its_state_from_another_worker_does_not_keep_the_old_buffers(node: Node) -> None:
    node.begin()
    ref = node.save(1, state_of(1), 0)
    training = node.held_bytes()
    node.begin(ref, in_place=True)
    node.paths.clear()
    node.save(2, state_of(2), 0)
    assert node.held_bytes() == training


def test_a_buffer_that_is_used_again_is_not_believed(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    node.begin()
    ref = node.save(1, state_of(1), 0)
    for rank, (_, data) in enumerate(images(state_of(9), {}, 2, WORLD, block_bytes=65536)):
        node.fill(rank, 0, data[: data.nbytes // 2])  # the worker dies while it copies
    node.begin(ref)
    assert equal(node.loaded(), state_of(1))
    memory, cache, store = sources(caplog)
    assert memory > 0
    assert cache == 0
    assert store > 0


def test_an_older_checkpoint_takes_what_is_still_the_same(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    node.begin()
    ref = node.save(1, state_of(1), 0)
    node.save(2, state_of(2), 0)
    node.begin(ref)
    assert equal(node.loaded(), state_of(1))
    assert sources(caplog) == [0.8, 0.0, 0.8]


def test_workers_that_fail_before_they_have_their_state_do_not_lose_it(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    node.begin()
    ref = node.save(1, state_of(1), 0)
    manifest = node.store / ref.manifest
    aside = manifest.rename(manifest.with_suffix(".aside"))
    node.room._manifests.clear()
    node.begin(ref)
    assert node.events.get(timeout=20).damaged
    aside.rename(manifest)
    node.begin(ref)
    assert equal(node.loaded(), state_of(1))
    assert sources(caplog) == [1.6, 0.0, 0.0]


@pytest.mark.parametrize(("error", "code"), [("ConfigError", 2), ("CheckpointDamaged", 0)])
def test_a_snapshot_that_cannot_be_saved_is_told_and_frees_its_buffer(
    node: Node, error: str, code: int, wait_for: Callable[..., None]
) -> None:
    """What another try may mend has no exit code; the workers start again."""
    node.begin()
    with switched(f"part.objects=raise:{error}"):
        node.copy(10, state_of(1), 0)
        event = node.events.get(timeout=20)
    assert isinstance(event, StateFailed), event
    assert (event.generation, event.damaged, event.exit_code) == (1, False, code)
    wait_for(lambda: node.keeper.pending_step == -1)
    assert node.save(20, state_of(2), 0).step == 20


def test_memory_is_what_is_stated(node: Node) -> None:
    node.begin()
    total = sum(a.nbytes for a in state_of(1).values())
    ref = node.save(1, state_of(1), 0)
    node.save(2, state_of(2), 1)
    # The workers asked for buffers of 4 x their share.
    training = BUFFERS * 4 * total
    assert training <= node.held_bytes() <= training + 4096
    node.begin(ref)
    node.loaded()
    assert total <= node.held_bytes() <= total + 4096  # the buffers have gone
    node.keeper.taken(node.generation, 0)
    assert node.held_bytes() > 0
    node.keeper.taken(node.generation, 0)
    node.keeper.taken(node.generation - 1, 1)
    assert node.held_bytes() > 0
    node.keeper.taken(node.generation, 1)
    assert node.held_bytes() == 0


def test_a_beginning_without_a_restore_point_frees_everything(node: Node) -> None:
    node.begin()
    node.save(1, state_of(1), 0)
    node.begin()
    assert node.held_bytes() == 0
