"""A session that publishes by rules: what is asked for, given up, made up for and told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from paddle_ft.errors import ConfigError, StoreUnavailable
from paddle_ft.serve.handoff import Publishing


class Session(Publishing):
    """Rank 0 at ``step``, with a model that exports to nothing."""

    def __init__(self, place: Path, rank: int = 0) -> None:
        self._context = cast(
            Any,
            SimpleNamespace(
                env=None,
                store_url=str(place / "store"),
                collective=SimpleNamespace(rank=rank),
                board=SimpleNamespace(phase=0, enter=lambda _: None),
            ),
        )
        self.told: list[tuple[str, int]] = []
        self._keeper = cast(
            Any,
            SimpleNamespace(
                saves=True,
                committed_step=-1,
                published=lambda name, version, _: self.told.append((name, version)),
            ),
        )
        self._state = cast(Any, SimpleNamespace(model=None))
        self._position = cast(Any, SimpleNamespace(step=0))
        self._streams = cast(Any, SimpleNamespace(in_loop=True))
        self._cut_short = False
        self._handoffs = []

    def _save_last(self) -> None:
        self._keeper.committed_step = self._position.step

    def at(self, step: int, saved: bool = False, **measured: float) -> None:
        """What happens between that step and the next."""
        self._position.step = step
        if measured:
            self.measured(**measured)
        self._publish_due(saved)

    @property
    def waiting(self) -> list[int]:
        return [handoff.step for handoff in self._handoffs if handoff.waits]


class Shop:
    """Stands for ``serve.publish``: gives numbers to what is published, or fails."""

    def __init__(self) -> None:
        self.published: list[Any] = []
        self.fails = False
        self.gate = threading.Event()
        self.gate.set()

    def publish(self, _folder: str, name: str, url: str, *, source: Any, **_: Any) -> Any:
        assert self.gate.wait(20)
        if self.fails:
            raise StoreUnavailable("the store is away")
        self.published.append(source)
        ref = SimpleNamespace(name=name, version=len(self.published))
        return SimpleNamespace(ref=ref, store_url=url)


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Shop:
    made = Shop()
    monkeypatch.setattr("paddle_ft.serve.publish.publish", made.publish)
    monkeypatch.setattr("paddle_ft.serve.export.export_layer", lambda *_: "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return made


def test_a_version_waits_for_a_checkpoint_and_asks_for_one(
    shop: Shop, tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    session = Session(tmp_path)
    session.publish_when("digits", "3 steps")
    for step in (1, 2):
        session.at(step)
    assert not session.waiting
    assert not session._wants_saving
    session.at(3)
    assert session._wants_saving
    session.at(4, saved=True)
    assert not session._wants_saving
    assert session.waiting == [3]
    session._keeper.committed_step = 4
    wait_for(lambda: session.told == [("digits", 1)])
    session.at(6, saved=True)  # that very step is on its way
    assert not session._wants_saving
    session._save_last()
    session._finish_publishing()
    assert shop.published == [{"step": 3}, {"step": 6}]
    assert not list(tmp_path.glob("paddle_ft-publish-*"))


def test_the_last_step_is_published_once_by_rule_and_by_hand(shop: Shop, tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.publish_when("digits", "3 steps")
    session._position.step, session._streams.in_loop = 3, False
    assert cast(Any, session.publish("digits")).ref.version == 1
    assert cast(Any, session.publish("digits")).ref.version == 1
    assert cast(Any, session.publish("digits", outputs=("scores",))).ref.version == 2
    assert len(shop.published) == 2


def test_a_later_version_makes_up_for_one_that_failed_and_the_last_error_is_raised(
    shop: Shop, tmp_path: Path
) -> None:
    session = Session(tmp_path)
    session.publish_when("digits", "1 steps")
    session._keeper.committed_step = 9
    shop.fails = True
    session.at(1)
    session._join_publishing()
    shop.fails = False
    session.at(2)
    session._finish_publishing()
    assert shop.published == [{"step": 2}]
    shop.fails = True
    session.at(3)
    with pytest.raises(StoreUnavailable, match="the store is away"):
        session._finish_publishing()


def test_who_leaves_still_stores_what_is_committed_and_nothing_else(
    shop: Shop, tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    session = Session(tmp_path)
    session.publish_when("digits", "1 steps")
    shop.gate.clear()
    session.at(1)
    session._keeper.committed_step = 1
    session.at(2)
    opened = threading.Timer(0.3, shop.gate.set)
    opened.start()
    session._abandon_publishing()
    opened.join()
    wait_for(lambda: not session.waiting)
    assert shop.published == [{"step": 1}]


def test_other_ranks_publish_nothing_and_what_is_measured_counts_once(
    shop: Shop, tmp_path: Path
) -> None:
    from paddle_ft.policies import OnBetter

    other, first = Session(tmp_path, rank=1), Session(tmp_path)
    for session in (other, first):
        session._keeper.committed_step = 9
        session.publish_when("digits", OnBetter("accuracy"))
        session.at(1, accuracy=0.5)
        session.at(2)
        session.at(3, accuracy=0.4)
        session._finish_publishing()
    assert other.told == []
    assert shop.published == [{"step": 1, "measured accuracy": "0.5"}]
    with pytest.raises(ConfigError, match="does not say when to publish"):
        first.publish_when("digits", "daily")
