"""What a snapshot copies at once, before the next step, and beside the steps that follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import paddle
import pytest

from paddle_ft.checkpoint.snapshot import Image, Snapshot, Source
from paddle_ft.keeper import NullKeeper
from paddle_ft.recorder import Recorder
from paddle_ft.state import TrainingState
from paddle_ft.types import Changes, ImageInfo

pytestmark = pytest.mark.paddle


class Memory(NullKeeper):
    """One buffer after the other; what was published is in ``images``."""

    def __init__(self) -> None:
        super().__init__()
        self.images: dict[int, Image] = {}
        self.given_back: list[int] = []
        self._buffers: list[memoryview] = []

    def acquire(self, nbytes: int, wait: bool) -> tuple[int, memoryview] | None:
        self._buffers.append(memoryview(bytearray(nbytes)))
        return len(self._buffers) - 1, self._buffers[-1]

    def publish(self, buffer: int, info: ImageInfo) -> None:
        self.images[info.step] = Image(info, self._buffers[buffer])

    def give_back(self, buffer: int) -> None:
        self.given_back.append(buffer)


class World:
    """A model with a table that is not trained, and the kinds of copies that were made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.table, self.head = paddle.nn.Embedding(50, 20), paddle.nn.Linear(20, 3)
        self.table.weight.stop_gradient = True
        model = paddle.nn.Sequential(self.table, self.head)
        optimizer = paddle.optimizer.SGD(0.1, parameters=self.head.parameters())
        self.keeper = Memory()
        state = TrainingState(model, optimizer)
        self.recorder = Recorder(
            self.keeper, state, rank=0, world_size=1, mode="rank0", block_bytes=64
        )
        self.kinds: dict[str, Changes] = {}
        make = self.recorder._sources

        def sources(entries: Any, beside: bool) -> list[tuple[Source, Changes]]:
            made = make(entries, beside)
            names = {id(e.tensor): e.name for e in entries}
            self.kinds = {names[id(s.tensor)]: kind for s, kind in made}
            return made

        monkeypatch.setattr(self.recorder, "_sources", sources)

    def save(self, step: int) -> Mapping[str, Changes]:
        assert self.recorder.take(step, {}, wait=True, beside=True)
        self.recorder.before_step(None)
        self.recorder.wait_copied()
        return self.kinds

    def saved(self, step: int) -> bytes:
        """The table in the snapshot of ``step``."""
        return bytes(self.keeper.images[step].read("model/0.weight"))


def test_what_has_been_the_same_twice_is_copied_beside_the_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    assert world.save(1)["model/0.weight"] == "any time"
    assert world.save(2) == {
        "model/0.weight": "seldom",
        "model/1.weight": "in step",
        "model/1.bias": "in step",
    }
    assert (
        bytes(world.keeper.images[2].read("model/0.weight")) == world.table.weight.numpy().tobytes()
    )
    world.table.weight.set_value(paddle.ones([50, 20]))  # not counted by Paddle as a change
    assert world.save(3)["model/0.weight"] == "any time"
    assert world.save(4)["model/0.weight"] == "seldom"
    assert (
        bytes(world.keeper.images[4].read("model/0.weight"))
        == paddle.ones([50, 20]).numpy().tobytes()
    )


def test_what_changes_while_it_is_copied_beside_is_copied_at_once_from_then_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    world = World(monkeypatch)
    world.save(1)
    copy = Snapshot._copied

    def late(snapshot: Snapshot, sources: list[Source]) -> bool:
        if sources and sources[0].tensor is world.table.weight:
            world.table.weight.set_value(paddle.full([50, 20], 7.0))
        return copy(snapshot, sources)

    monkeypatch.setattr(Snapshot, "_copied", late)
    assert world.save(2)["model/0.weight"] == "seldom"
    assert list(world.keeper.images) == [1]
    assert world.keeper.given_back == [1]
    assert world.save(3)["model/0.weight"] == "any time"
    assert world.save(4)["model/0.weight"] == "any time"
    assert list(world.keeper.images) == [1, 3, 4]
    assert capfd.readouterr().err == ""


def test_rows_written_in_a_way_that_paddle_does_not_count_are_in_no_snapshot_of_an_earlier_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    before = world.table.weight.numpy()
    world.save(1)
    copy = Snapshot._copied

    def late(snapshot: Snapshot, sources: list[Source]) -> bool:
        if sources and sources[0].tensor is world.table.weight:
            after = before.copy()
            after[1, 3] += 1.0  # none of the words that are looked at
            world.table.weight.set_value(after)
        return copy(snapshot, sources)

    monkeypatch.setattr(Snapshot, "_copied", late)
    assert world.save(2)["model/0.weight"] == "seldom"
    assert world.keeper.given_back == [1]
    assert world.save(3)["model/0.weight"] == "any time"
    assert world.saved(1) == before.tobytes()
    assert world.saved(3) == world.table.weight.numpy().tobytes() != before.tobytes()
    assert list(world.keeper.images) == [1, 3]


def thrown_away(world: World, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of ``step`` is begun and given up before it is done."""
    real = Snapshot._copied

    def stopped(snapshot: Snapshot, sources: list[Source]) -> bool:
        snapshot._stop.wait(20)
        return real(snapshot, sources)

    monkeypatch.setattr(Snapshot, "_copied", stopped)
    assert world.recorder.take(step, {}, wait=True, beside=True)
    world.recorder.abandon()
    monkeypatch.setattr(Snapshot, "_copied", real)


def test_after_a_copy_that_was_thrown_away_what_changes_seldom_is_copied_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    world.save(1)
    thrown_away(world, 2, monkeypatch)
    assert world.save(3)["model/0.weight"] == "any time"
    assert world.save(4)["model/0.weight"] == "seldom"
    assert list(world.keeper.images) == [1, 3, 4]


def test_a_copy_that_is_thrown_away_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    world = World(monkeypatch)
    world.save(1)
    thrown_away(world, 2, monkeypatch)
    assert world.save(3)["model/1.weight"] == "in step"
    assert list(world.keeper.images) == [1, 3]
    assert capfd.readouterr().err == ""
