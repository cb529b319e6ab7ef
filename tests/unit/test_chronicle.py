"""What a launcher writes down: everything that is new, once; with real pages and a real record."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from paddle_ft.agent import ipc
from paddle_ft.agent.beacon import Beacon
from paddle_ft.agent.chronicle import Chronicle
from paddle_ft.agent.group import Said
from paddle_ft.agent.workers import WorkerEnded
from paddle_ft.config import Config, JobConfig
from paddle_ft.coordination.schema import JobState
from paddle_ft.observe.events import read
from paddle_ft.types import (
    CommitRef,
    Generation,
    Head,
    NodeRecord,
    NodeStatus,
    Outcome,
    Pause,
    Versioned,
)
from tests.unit.members import member

A, B = (member(name) for name in "ab")
ME = A.id


@dataclass
class Group:
    """What a chronicle looks at of the workers: their generation, processes and pages."""

    generation: int = 0
    processes: dict[int, int] = field(default_factory=dict)
    pages: dict[int, Beacon] = field(default_factory=dict)

    def pids(self) -> Mapping[int, int]:
        return dict(self.processes)

    def beacons(self) -> Mapping[int, Beacon]:
        return dict(self.pages)


class Story:
    """A chronicle, and what it has written."""

    def __init__(self, directory: Path) -> None:
        self.group = Group()
        self.directory = directory
        config = Config(job=JobConfig(id="j", log_dir=str(directory), nodes_max=2))
        self.chronicle = Chronicle(config, "a", self.group)  # type: ignore[arg-type]

    def turn(self, generation: int, *ranks: int) -> None:
        """The workers are those of another generation."""
        self.group.generation = generation
        self.group.processes = {rank: 100 + rank for rank in ranks}
        self.group.pages = {
            rank: Beacon.create(self.directory / f"page-{generation}-{rank}") for rank in ranks
        }

    def look(self, state: JobState) -> None:
        self.chronicle.look(state, ME)

    def told(self, *kinds: str) -> list[tuple[str, dict[str, Any]]]:
        assert self.chronicle.log.flush()
        return [(e.kind, dict(e.fields)) for e in read([self.directory]) if e.kind in kinds]

    def kinds(self, *kinds: str) -> list[str]:
        return [kind for kind, _ in self.told(*kinds)]


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    story = Story(tmp_path)
    yield story
    story.chronicle.close()


def job(**more: Any) -> JobState:
    nodes = {
        member.id: Versioned(NodeRecord(member, NodeStatus()), revision, revision)
        for revision, member in enumerate((A, B), 1)
    }
    return JobState(**{"nodes": nodes, "leader": Versioned(ME, 3, 3), **more})


def running(number: int = 1, **more: Any) -> JobState:
    made = Generation(number, (A, B), "127.0.0.1:1", reason="the job begins")
    return job(generation=Versioned(made, 10 + number, 10 + number), **more)


def test_what_is_new_is_told_once(story: Story) -> None:
    for _ in range(3):
        story.look(job())
    story.look(running())
    told = story.told("started", "registered", "members", "leader", "generation")
    assert [kind for kind, _ in told] == [
        "started", "registered", "members", "leader", "generation",
    ]  # fmt: skip
    assert told[0][1]["job"] == "j" and told[2][1] == {"live": 2, "needed": 1}
    generation = told[-1][1]
    assert (generation["number"], generation["members"]) == (1, [A.id, B.id])
    assert generation["here"] and generation["reason"] == "the job begins"


def test_changes_of_the_job_are_told(story: Story) -> None:
    story.look(running())
    failed = NodeRecord(B, NodeStatus(state="failed", generation=1, reason="rank 1 was killed"))
    state = running()
    nodes = {**state.nodes, B.id: Versioned(failed, 2, 9)}
    story.look(replace(state, nodes=nodes))
    story.look(replace(state, pause=Versioned(Pause(1, "node c joins"), 20, 20)))
    story.look(replace(state, quarantine=frozenset({"b"})))
    story.look(replace(state, quarantine=frozenset()))
    leaving = {**state.nodes, A.id: Versioned(NodeRecord(A, NodeStatus(), True), 1, 21)}
    story.look(replace(state, nodes=leaving))
    story.look(replace(state, outcome=Versioned(Outcome(0, "done"), 22, 22)))
    told = story.told("trouble", "pause", "quarantine", "leaving", "outcome")
    assert [kind for kind, _ in told] == [
        "trouble", "pause", "quarantine", "trouble", "quarantine", "leaving", "outcome",
    ]  # fmt: skip
    by_kind = [fields for kind, fields in told if kind == "trouble"]
    assert by_kind[0]["reason"] == "node b: rank 1 was killed" and by_kind[0]["lost"] == []
    assert by_kind[1]["reason"] == "node b is in quarantine"
    assert [f["nodes"] for kind, f in told if kind == "quarantine"] == [["b"], []]


def test_only_commits_of_this_run_are_told(story: Story) -> None:
    old, new = (CommitRef(n, 10 * n, n, f"m{n}", "d") for n in (1, 2))
    story.look(running(head=Versioned(Head(old), 5, 5)))
    story.turn(2, 0)
    story.look(running(2, head=Versioned(Head(old), 5, 5)))
    assert story.told("commit") == []
    story.look(running(2, head=Versioned(Head(new, (old,)), 6, 6)))
    assert story.told("commit") == [("commit", {"generation": 2, "step": 20, "sequence": 2})]


def test_workers_are_started_once_and_ordered_into_the_next_group(story: Story) -> None:
    story.turn(1, 0, 1)
    for _ in range(2):
        story.look(running())
    story.turn(2, 0, 1)
    story.group.processes[1] = 999
    for _ in range(2):
        story.look(running(2))
    told = story.told("worker_started", "order")
    assert [(kind, f["rank"], f["pid"], f["generation"]) for kind, f in told] == [
        ("worker_started", 0, 100, 1),
        ("worker_started", 1, 101, 1),
        ("order", 0, 100, 2),
        ("worker_started", 1, 999, 2),
    ]


def test_the_pages_tell_when_the_group_stood_and_how_far_it_is(story: Story) -> None:
    story.turn(1, 0, 1)
    story.look(running())
    first, second = story.group.pages.values()
    first.write(4, 0.0, 0, 32)
    story.look(running())
    assert story.kinds("formed") == [], "one of them is not there yet"
    second.write(4, 0.0, 0, 32)
    story.look(running())
    ((_, formed),) = story.told("formed")
    assert (formed["generation"], formed["step"]) == (1, 4)
    second.write(5, 0.1, 0, 40)
    for _ in range(2):
        story.look(running())
    ((_, step),) = story.told("first_step")
    assert (step["generation"], step["step"]) == (1, 5)


def test_the_last_step_of_a_generation_is_told_when_it_ends(story: Story) -> None:
    """Also where the workers step on after the next generation is known, until they hear of it."""
    story.turn(1, 0)
    (page,) = story.group.pages.values()
    page.write(0, 0.0, 0, 0)
    page.write(1, 0.0, 0, 8)
    story.look(running())
    page.write(2, 0.0, 0, 16, held_s=0.25)
    story.chronicle.took(WorkerEnded(100, 0, -9, False, page.read().at_s + 0.1))
    page.write(3, 0.0, 0, 24)
    story.turn(2, 0)
    story.look(running(2))
    told = story.told("progress", "worker_ended")
    steps = [f["step"] for kind, f in told if kind == "progress" and f["generation"] == 1]
    assert steps == sorted(steps) and steps[-1] == 3 and 2 in steps
    (ended,) = (fields for kind, fields in told if kind == "worker_ended")
    assert (ended["rank"], ended["signal"], ended["stopped"]) == (0, 9, False)
    assert next(f["held_s"] for kind, f in told if kind == "progress" and f["step"] == 2) == 0.25


def test_what_workers_say_is_told(story: Story) -> None:
    near, far = socket.socketpair()
    channel = ipc.Channel(near)
    channel.generation, channel.rank, channel.pid = 3, 1, 7
    for message in (
        ipc.Hello(1, 3, 7, "in_place"),
        ipc.LostPeer("connection reset"),
        ipc.Farewell("done", step=9),
        None,
    ):
        story.chronicle.took(Said(channel, message))
    channel.close()
    far.close()
    told = story.told("hello", "lost_peer", "farewell")
    assert [kind for kind, _ in told] == ["hello", "lost_peer", "farewell"]
    assert all((fields["rank"], fields["pid"]) == (1, 7) for _, fields in told)
    assert told[0][1]["recovery"] == "in_place" and told[1][1]["generation"] == 3
    assert (told[2][1]["why"], told[2][1]["step"]) == ("done", 9)
