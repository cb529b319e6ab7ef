"""A node whose workers hang again and again is not asked any more, if the job can do without it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paddle_ft.config import HealthConfig
from paddle_ft.coordination import schema
from paddle_ft.coordination.kv import KeyValue
from paddle_ft.coordination.schema import JobState, Keys
from paddle_ft.health.judge import HealthRecord, Row, Verdict, Waiting
from paddle_ft.health.pace import Pace
from paddle_ft.health.phases import COMPUTE
from paddle_ft.health.quarantine import due
from paddle_ft.types import NodeRecord, Versioned, encode
from tests.unit.members import member

CONFIG = HealthConfig(quarantine_after=3, quarantine_window_s=100)
NOW_S = 1000.0


def job(**blamed: tuple[float, ...]) -> JobState:
    """Nodes and when workers of theirs were ended."""
    nodes, health = {}, {}
    for revision, (name, times) in enumerate(blamed.items(), 1):
        record = NodeRecord(member(name))
        nodes[record.member.id] = Versioned(record, revision, revision)
        told = HealthRecord(1, blamed=times)
        health[record.member.id] = Versioned(told, revision, revision)
    return JobState(nodes=nodes, health=health)


def test_three_hangs_within_the_window_are_too_many() -> None:
    state = job(a=(), b=(950.0, 960.0, 970.0))
    assert due(state, NOW_S, CONFIG, 1) == ("b", "3 of its workers hung within 1.66667 min")


@pytest.mark.parametrize(
    ("state", "nodes_min"),
    [
        (job(a=(), b=(960.0, 970.0)), 1),
        (job(a=(), b=(10.0, 960.0, 970.0)), 1),
        (job(a=(), b=(950.0, 960.0, 970.0)), 2),
    ],
    ids=["too few", "too long ago", "the job needs it"],
)
def test_otherwise_it_stays(state: JobState, nodes_min: int) -> None:
    assert due(state, NOW_S, CONFIG, nodes_min) is None


def test_it_can_be_switched_off() -> None:
    state = job(a=(), b=(950.0, 960.0, 970.0))
    never = HealthConfig(quarantine_after=0)
    assert due(state, NOW_S, never, 1) is None


RECORD = HealthRecord(
    4,
    (Row(0, COMPUTE, 3, False, 1.5, "stopped"),),
    (Verdict("hung", 0, 4, 1.5, "why"),),
    Waiting(4, 0.7),
    (Pace(0, 0.05, 0.5, 0.01),),
    (1.0,),
)


def test_what_a_node_tells_is_read_back() -> None:
    keys = Keys("j")
    kv = KeyValue(f"{keys.health}a.1", encode(RECORD), 5, 6)
    assert schema.parse(keys, [kv]).health == {"a.1": Versioned(RECORD, 5, 6)}


def test_figures_that_always_change_are_no_news() -> None:
    later = replace(
        RECORD,
        rows=(),
        waiting=Waiting(4, 1.7),
        verdicts=(replace(RECORD.verdicts[0], since_s=2.5),),
        paces=(Pace(0, 0.051, 0.5, 0.015),),
    )
    assert RECORD.says_as(later)
    for news in (
        {"generation": 5},
        {"waiting": None},
        {"waiting": Waiting(5, 0.7)},
        {"verdicts": ()},
        {"blamed": (1.0, 2.0)},
        {"paces": (Pace(0, 0.06, 0.5, 0.01),)},
        {"paces": ()},
    ):
        assert not RECORD.says_as(replace(RECORD, **news)), news
