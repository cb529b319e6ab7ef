"""What an agent keeps of workers and nodes that are no more: nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from paddle_ft.agent.beacon import Beacon
from paddle_ft.agent.console import Console
from paddle_ft.agent.group import WorkerGroup
from paddle_ft.agent.snapshots import SnapshotKeeper
from paddle_ft.agent.workers import WorkerEnded
from paddle_ft.checkpoint.room import CheckpointRoom
from paddle_ft.config import Config
from paddle_ft.coordination.schema import JobState
from paddle_ft.health.judge import HealthRecord
from paddle_ft.health.monitor import HealthMonitor, _Known
from paddle_ft.health.stacks import path_of
from paddle_ft.observe.events import EventLog
from paddle_ft.types import Versioned


class Node:
    """An agent's view of workers, none of which was started here."""

    def __init__(self, directory: Path) -> None:
        self.run_dir, memory = directory / "run", directory / "memory"
        self.run_dir.mkdir()
        memory.mkdir()
        given = {
            "job": {"log_dir": str(directory)},
            "checkpoint": {"url": str(directory / "store")},
            "health": {"enabled": False},  # the test looks itself
        }
        config = Config.model_validate(given)
        self.console, self.events = Console("a", quiet=True), EventLog(directory, "a")
        self.snapshots = SnapshotKeeper(CheckpointRoom.open(config), memory, 1, self.ignore)
        self.group = WorkerGroup(
            config, [], self.run_dir, self.snapshots, self.console, self.ignore
        )
        self.monitor = HealthMonitor(
            config, "a", self.run_dir, self.group, self.events, lambda: None
        )

    def ignore(self, event: object) -> None:
        pass

    def close(self) -> None:
        self.group.close()
        self.snapshots.close()
        self.events.close()
        self.console.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.close()


@pytest.mark.parametrize("rank", [0, None])
def test_no_file_stays_of_a_worker_that_has_ended(node: Node, rank: int | None) -> None:
    other = path_of(node.run_dir, 42420)
    for path in (path_of(node.run_dir, 4242), other):
        path.write_text("")
    node.group.ended(WorkerEnded(4242, rank, -9, False, 0.0))
    assert list(node.run_dir.iterdir()) == [other]


def test_nodes_that_have_gone_and_ended_workers_that_hung_are_forgotten(node: Node) -> None:

    for number in range(1, 20):
        told = {f"b.{number}": Versioned(HealthRecord(1), number, number)}
        node.monitor._others(JobState(health=told), "a.1", 1)
    assert list(node.monitor._seen) == ["b.19"]
    page = node.run_dir / "page"
    Beacon.create(page)
    node.monitor._accused |= {4242, os.getpid()}
    node.monitor._sample(_Known(1, {0: os.getpid()}, {0: page}))
    assert node.monitor._accused == {os.getpid()}
