"""What waits and what runs, under a made-up clock."""

from __future__ import annotations

import random
from collections.abc import Hashable
from dataclasses import dataclass, field

import pytest

from paddle_ft.serve.batching import Item, Limits, Queue

LIMITS = Limits(rows_max=4, wait_max_s=0.02, queue_max=64, queue_bytes_max=1000)


def item(
    key: int, rows: int = 1, kind: Hashable = "a", now_s: float = 0.0, deadline_s: float = 99.0
) -> Item:
    return Item(key, kind, rows, 10, now_s, deadline_s)


def queue(*items: Item, limits: Limits = LIMITS) -> Queue:
    found = Queue(limits)
    assert all(found.add(i) for i in items)
    return found


def keys(queue: Queue, now_s: float = 0.0, idle: int = 1) -> list[int]:
    return [i.key for i in queue.take(now_s, idle).batch]


def test_nothing_waits_while_a_worker_is_idle() -> None:
    assert keys(queue(item(1))) == [1]


def test_what_came_while_all_were_busy_runs_together() -> None:
    waiting = queue(*(item(k) for k in range(6)))
    assert keys(waiting, idle=0) == []
    assert keys(waiting) == [0, 1, 2, 3]
    assert keys(waiting) == [4, 5]


def test_rows_count_and_not_requests() -> None:
    waiting = queue(item(1, rows=3), item(2, rows=2), item(3, rows=1))
    assert keys(waiting) == [1]  # 3 would fit, but would overtake 2
    assert keys(waiting) == [2, 3]


def test_a_request_with_more_rows_than_a_batch_runs_alone() -> None:
    waiting = queue(item(1, rows=9), item(2))
    assert keys(waiting) == [1]
    assert keys(waiting) == [2]


def test_other_shapes_are_not_joined_and_none_joins_nobody() -> None:
    waiting = queue(item(1), item(2, kind="b"), item(3), item(4, kind=None), item(5, kind=None))
    assert [keys(waiting) for _ in range(4)] == [[1, 3], [2], [4], [5]]


def test_a_full_batch_goes_first_until_somebody_has_waited_too_long() -> None:
    items = [item(1, kind="b"), *(item(k, now_s=0.001) for k in range(2, 8))]
    assert keys(queue(*items), now_s=0.01) == [2, 3, 4, 5]
    assert keys(queue(*items), now_s=0.03) == [1]


def test_expired_and_cancelled_requests_do_not_run() -> None:
    waiting = queue(item(1, deadline_s=1.0), item(2), item(3))
    assert waiting.cancel(2)
    assert not waiting.cancel(2)
    decision = waiting.take(1.0, 1)
    assert [i.key for i in decision.expired] == [1]
    assert [i.key for i in decision.batch] == [3]
    assert not len(waiting) and waiting.size_bytes == 0


def test_it_wakes_for_the_next_deadline_while_all_are_busy() -> None:
    waiting = queue(item(1, deadline_s=5.0), item(2, deadline_s=3.0))
    assert waiting.take(0.0, 0).wake_s == 3.0
    decision = waiting.take(3.0, 0)
    assert [i.key for i in decision.expired] == [2]


def test_a_batch_that_failed_runs_again_one_by_one_before_the_others() -> None:
    waiting = queue(*(item(k) for k in range(4)))
    failed = waiting.take(0.0, 1).batch
    assert waiting.add(item(9))
    waiting.again(failed)
    assert [keys(waiting) for _ in range(5)] == [[0], [1], [2], [3], [9]]


def test_the_queue_is_bounded_in_requests_and_in_bytes() -> None:
    waiting = Queue(Limits(queue_max=2, queue_bytes_max=25))
    assert waiting.add(item(1))
    assert waiting.add(item(2))
    assert not waiting.add(item(3))
    waiting = Queue(Limits(queue_max=9, queue_bytes_max=25))
    assert [waiting.add(item(k)) for k in range(3)] == [True, True, False]
    assert Queue(Limits(queue_bytes_max=1)).add(item(1))  # whatever is alone


@dataclass
class World:
    """Workers that take their time, clients that come, leave and send what fails."""

    seed: int
    now_s: float = 0.0
    running: list[tuple[float, tuple[Item, ...]]] = field(default_factory=list)
    outcomes: dict[int, str] = field(default_factory=dict)

    def run(self) -> None:
        rng = random.Random(self.seed)
        limits = Limits(4, 0.02, queue_max=16, queue_bytes_max=100)
        waiting, workers, asked = Queue(limits), rng.randint(1, 3), 0
        bad = {key for key in range(200) if rng.random() < 0.1}
        while asked < 200 or self.running or len(waiting):
            self.now_s += rng.choice([0.0, 0.001, 0.01])
            if asked < 200 and rng.random() < 0.6:
                kind = rng.choice(["a", "a", "a", "b", None])
                lasts_s = rng.choice([0.01, 0.1, 1.0])
                new = item(asked, rng.randint(1, 5), kind, self.now_s, self.now_s + lasts_s)
                self.outcomes[asked] = "waits" if waiting.add(new) else "refused"
                asked += 1
            if asked and rng.random() < 0.05 and waiting.cancel(key := rng.randrange(asked)):
                assert self.outcomes[key] == "waits"
                self.outcomes[key] = "cancelled"
            for end in [r for r in self.running if r[0] <= self.now_s]:
                self.running.remove(end)
                self.ended(waiting, end[1], bad)
            self.begin(waiting, workers, rng)
            assert not len(waiting) or len(self.running) == workers  # nothing waits for nothing
        assert waiting.size_bytes == 0
        assert set(self.outcomes) == set(range(200))
        for key, outcome in self.outcomes.items():
            assert outcome in ("refused", "cancelled", "expired", "failed" if key in bad else "ok")

    def begin(self, waiting: Queue, workers: int, rng: random.Random) -> None:
        while True:
            decision = waiting.take(self.now_s, workers - len(self.running))
            for late in decision.expired:
                assert self.outcomes[late.key] == "waits" and late.deadline_s <= self.now_s
                self.outcomes[late.key] = "expired"
            batch = decision.batch
            if not batch:
                return
            assert all(i.deadline_s > self.now_s for i in batch)
            assert len(batch) == 1 or sum(i.rows for i in batch) <= 4
            assert len({i.signature for i in batch}) == 1
            assert len(batch) == 1 or not any(i.alone for i in batch)
            self.running.append((self.now_s + rng.choice([0.001, 0.02]), batch))

    def ended(self, waiting: Queue, batch: tuple[Item, ...], bad: set[int]) -> None:
        if not bad & {i.key for i in batch}:
            for good in batch:
                assert self.outcomes[good.key] == "waits"
                self.outcomes[good.key] = "ok"
        elif len(batch) == 1:
            self.outcomes[batch[0].key] = "failed"
        else:
            waiting.again(batch)


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_every_request_has_one_outcome_and_only_bad_ones_fail(first: int) -> None:
    for seed in range(first, first + 50):
        World(seed).run()
