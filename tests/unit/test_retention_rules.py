"""``checkpoint.keep`` as text, and what the leader keeps by it."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddle_ft.checkpoint.retention import (
    KeepAny,
    KeepBest,
    KeepEvery,
    KeepLast,
    kept_lineage,
    metrics_of,
    next_head,
    parse,
    rule_of,
)
from paddle_ft.checkpoint.room import CheckpointRoom
from paddle_ft.config import CheckpointConfig, Config
from paddle_ft.errors import ConfigError
from paddle_ft.recorder import metrics_of as metrics_of_loss
from paddle_ft.types import CommitRef, Head, decode, encode


def ref(sequence: int, step: int, loss: float | None = None) -> CommitRef:
    metrics = () if loss is None else (("loss", loss),)
    return CommitRef(sequence, step, 1, f"m{sequence}", "", metrics)


def committed(keep: str, steps: list[tuple[int, float | None]]) -> list[int]:
    """The steps that head keeps after all ``steps`` were committed, each with its loss."""
    head: Head | None = None
    rule = parse(keep)
    for number, (step, loss) in enumerate(steps, 1):
        lineage = kept_lineage(head, head.newest if head else None, step, rule)
        head = Head(ref(number, step, loss), lineage, "store")
    assert head
    return [c.step for c in (head.newest, *head.lineage)]


def test_the_text_and_what_it_means() -> None:
    assert parse("last 3") == KeepLast(3)
    assert parse("every 1000 steps") == parse(" every  1000 ") == KeepEvery(1000)
    assert parse("best loss 1") == parse("lowest loss 1") == KeepBest("loss", 1)
    assert parse("highest accuracy 2") == KeepBest("accuracy", 2, highest=True)
    assert parse("last 3, every 1000 steps,best loss 1") == KeepAny(
        (KeepLast(3), KeepEvery(1000), KeepBest("loss", 1))
    )


@pytest.mark.parametrize(
    "text",
    [" ", "last", "last 0", "last -1", "last x", "last 3,", "every step", "best 3", "best loss",
     "keep 3", "last 3; best loss 1", "every 0 steps", "last 99999999999"],
)  # fmt: skip
def test_other_text_is_refused_when_the_job_starts(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.keep .* is not one of") as caught:
        CheckpointRoom.open(Config(checkpoint=CheckpointConfig(url=str(tmp_path), keep=text)))
    assert "\n" not in str(caught.value)


def test_keep_last_is_the_rule_if_there_is_no_other() -> None:
    assert rule_of(CheckpointConfig(keep_last=4)) == KeepLast(4)
    assert rule_of(CheckpointConfig(keep_last=4, keep="every 5")) == KeepEvery(5)


def test_the_leader_keeps_what_the_rules_want() -> None:
    steps = [(10 * i, 1.0 / i) for i in range(1, 13)]
    assert committed("last 3", steps) == [120, 110, 100]
    # What the new one continues stays, too: parts that are being written refer to it.
    assert committed("last 1", steps) == [120, 110]
    assert committed("every 50 steps", steps) == [120, 110, 100, 50, 10]
    worse = [(10, 0.1), *((10 * i, 1.0) for i in range(2, 9))]
    assert committed("best loss 1", worse) == [80, 70, 10]
    assert committed("last 2, best loss 1", worse) == [80, 70, 10]
    assert committed("last 2", worse) == [80, 70]


def test_the_best_goes_once_it_is_outdone() -> None:
    steps = [(1, 0.5), (2, 0.9), (3, 0.4), (4, 0.9), (5, 0.9)]
    assert committed("best loss 1", steps[:3]) == [3, 2, 1]  # the loss of 3 counts from now on
    assert committed("best loss 1", steps) == [5, 4, 3]


def test_without_a_metric_nothing_is_the_best() -> None:
    assert committed("best loss 2", [(i, None) for i in range(1, 6)]) == [5, 4]


def test_what_was_damaged_is_not_part_of_the_chain() -> None:
    head = Head(ref(4, 40), (ref(3, 30), ref(2, 20), ref(1, 10)), "store")
    lineage = kept_lineage(head, ref(2, 20), 50, KeepLast(3))
    assert [c.step for c in lineage] == [20, 10]
    assert kept_lineage(head, None, 50, KeepLast(3)) == ()
    assert kept_lineage(None, None, 50, KeepLast(3)) == ()


@given(
    st.lists(st.tuples(st.integers(1, 9), st.floats(0, 9) | st.none()), min_size=2, max_size=30),
    st.sampled_from(["last 2", "every 7 steps", "best loss 2", "last 3, every 10, best loss 1"]),
)
def test_nothing_the_rule_wants_is_ever_dropped(
    gaps: list[tuple[int, float | None]], keep: str
) -> None:
    rule, head, step = parse(keep), None, 0
    for number, (gap, loss) in enumerate(gaps, 1):
        step += gap
        newest = ref(number, step, loss)
        lineage = kept_lineage(head, head.newest if head else None, step, rule)
        wanted = next_head(head, newest, rule, "store").lineage
        assert set(wanted) <= set(lineage)
        if head:
            assert head.newest == lineage[0]
        head = Head(newest, lineage, "store")
        sequences = [c.sequence for c in (newest, *lineage)]
        assert all(a > b for a, b in pairwise(sequences))


def test_metrics_travel_with_the_reference() -> None:
    meta = {"metrics": {"loss": 0.25, "b": 1, "nan": math.nan, "inf": math.inf, "text": "x"}}
    metrics = metrics_of(meta)
    assert metrics == (("b", 1.0), ("loss", 0.25))
    assert metrics_of({}) == metrics_of({"metrics": [1]}) == ()
    head = Head(ref(2, 7, 0.1 + 0.2), (ref(1, 3),), "store")
    assert decode(Head, encode(head)) == head
    old = encode(head).replace(b',"metrics":[["loss",0.30000000000000004]]', b"")
    assert decode(Head, old).newest == ref(2, 7)


def test_the_loss_of_a_step() -> None:
    assert metrics_of_loss(None) == metrics_of_loss(math.nan) == {}
    assert metrics_of_loss(0.5) == {"loss": 0.5}
