"""Which version a replica is to serve, and when it changes; how its share of requests grows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from paddle_ft.serve import ramp, wanted
from paddle_ft.serve.ramp import Answers, Ramp, Seen
from paddle_ft.serve.registry import Group, Promote, ReplicaRecord
from paddle_ft.serve.wanted import (
    NEWEST,
    Choice,
    Failure,
    Situation,
    choice,
    failure,
    is_turn,
    is_warm,
    step,
    to_prove,
    to_tell,
)


def group(primary: str | None = "a", level: str = "active-active", **replicas: Any) -> Group:
    """Each replica by its condition, or by its fields."""
    records = {}
    for name, fields in replicas.items():
        given = fields if isinstance(fields, dict) else {"condition": fields}
        records[name] = ReplicaRecord(name, "h", 1, 2, 3, **{"condition": "ready"} | given)
    return Group(replicas=records, primary=primary, term=5, level=level)  # type: ignore[arg-type]


DIGEST = "0a" * 32
AGREED = [
    Choice(None),
    Choice(3),
    Choice(12, True),
    Choice(3, False, DIGEST),
    Choice(3, True, DIGEST),
]


@pytest.mark.parametrize("agreed", AGREED)
def test_what_a_group_agrees_on_is_an_entry_of_its_log(agreed: Choice) -> None:
    assert choice(agreed.encode()) == agreed


@pytest.mark.parametrize(
    "data", [b"x", b"0", b"-1", b"3 nailed", b"3 pinned 0a", b"3 pinned pinned", b"\xff", b" "]
)
def test_what_names_no_version(data: bytes) -> None:
    with pytest.raises(ValueError):
        choice(data)


FAILED = Failure(3, "no", 1, again_s=10.0)


@pytest.mark.parametrize(
    ("now", "kind"),
    [
        (Situation(None), "none"),
        (Situation(None, served=3), "unload"),
        (Situation(NEWEST), "load"),
        (Situation(NEWEST, served=3), "none"),
        (Situation(3, served=3), "none"),
        (Situation(3, served=2), "load"),
        (Situation(3, served=2, turn=False), "none"),
        (Situation(3, turn=False), "load"),
        (Situation(3, served=2, failed=FAILED), "none"),
        (Situation(4, served=2, failed=FAILED), "load"),
        (Situation(3, warm=False), "fetch"),
        (Situation(3, fetched=2, warm=False), "fetch"),
        (Situation(3, fetched=3, warm=False), "none"),
        (Situation(NEWEST, fetched=3, warm=False), "none"),
        (Situation(3, fetched=3, served=3, warm=False), "cool"),
        (Situation(3, fetched=3), "load"),
    ],
)
def test_what_is_due_of_a_model(now: Situation, kind: str) -> None:
    assert step(now, 5.0).kind == kind


def test_a_version_that_failed_is_tried_again_later_each_time() -> None:
    assert step(Situation(3, served=2, failed=FAILED), 5.0).until_s == 10.0
    assert step(Situation(3, served=2, failed=FAILED), 10.0).kind == "load"
    pauses, last = [], None
    for _ in range(8):
        last = failure(last, 3, "no", False, 0.0)
        pauses.append(last.again_s)
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    assert failure(last, 4, "no", False, 0.0).again_s == 1
    assert failure(last, 3, "no", True, 0.0).again_s == wanted.HOPELESS_S


def test_replicas_change_one_after_the_other() -> None:
    def turns(**replicas: Any) -> list[str]:
        seen = group("b", **{n: {"models": {"m": v}} for n, v in replicas.items()})
        return [n for n in "abc" if is_turn(seen, n, "m", 2) and replicas.get(n) != "2"]

    assert turns(a="1", b="1", c="1") == ["b"]  # the primary is the first
    assert turns(a="1", b="2", c="1") == ["a"]
    assert turns(a="2", b="2", c="1") == ["c"]
    assert turns(a="2", b="2", c="2") == []


def test_nobody_waits_for_who_will_not_change() -> None:
    def is_turn_of_c(**fields: Any) -> bool:
        seen = group("a", a={"models": {"m": "2"}}, b=fields, c={"models": {"m": "1"}})
        return is_turn(seen, "c", "m", 2)

    assert not is_turn_of_c(models={"m": "1"})
    assert not is_turn_of_c(models={"m": "1"}, failed={"m": "1"})
    assert is_turn_of_c(models={"m": "1"}, failed={"m": "2"})
    assert is_turn_of_c(models={"m": "1"}, condition="draining")
    assert is_turn_of_c(models={"other": "1"})  # it loads what it begins with
    assert is_turn_of_c(condition="standby")


def test_a_newer_version_is_proposed_unless_the_group_is_pinned() -> None:
    assert to_prove(Choice(2), 3, None, 0.0) == 3
    assert to_prove(Choice(3), 3, None, 0.0) is None
    assert to_prove(Choice(2, pinned=True), 3, None, 0.0) is None
    assert to_prove(Choice(None), 3, None, 0.0) is None
    assert to_prove(None, 3, None, 0.0) is None
    assert to_prove(Choice(2), None, None, 0.0) is None
    assert to_prove(Choice(2), 3, FAILED, 9.0) is None
    assert to_prove(Choice(2), 3, FAILED, 10.0) == 3
    assert to_prove(Choice(2), 3, replace(FAILED, final=True), 99.0) is None
    assert to_prove(Choice(2), 4, replace(FAILED, final=True), 0.0) == 4


def test_the_primary_tells_what_it_began_with() -> None:
    assert to_tell(None, NEWEST, 4) == Choice(4)
    assert to_tell(None, 4, 4) == Choice(4, pinned=True)
    assert to_tell(None, NEWEST, None) is None
    assert to_tell(None, None, 4) is None
    assert to_tell(Choice(3), NEWEST, 4) is None


def test_cold_standbys_have_workers_when_they_are_needed() -> None:
    def warm(seen: Group, serving: str = "") -> list[str]:
        return [n for n in "abc" if is_warm(seen, n, n in serving)]

    cold = group("a", "cold-standby", a="ready", b="standby", c="standby")
    assert warm(replace(cold, level="hot-standby")) == ["a", "b", "c"]
    assert warm(cold, "a") == ["a"]
    assert warm(cold, "abc") == ["a"]  # it was active-active before
    lost = group(None, "cold-standby", b="standby", c="standby")
    assert warm(lost) == ["b"]
    assert warm(replace(lost, primary="c")) == ["c"]
    handed = group("b", "cold-standby", a="ready", b="loading", c="standby")
    assert warm(handed, "a") == ["a", "b"]  # until the new one serves
    assert warm(group("b", "cold-standby", a="ready", b="ready", c="standby"), "ab") == ["b"]
    led = group("b", "cold-standby", a="ready", b={"condition": "ready", "models": {"m": "1"}})
    assert not is_warm(led, "a", True, ["m"])
    assert is_warm(led, "a", True, ["m", "later"])  # until the new one has it, too
    assert warm(replace(cold, promote=Promote("c")), "a") == ["a", "c"]
    assert warm(replace(cold, promote=Promote("c", refused="no")), "a") == ["a"]
    fails = group("a", "cold-standby", a={"condition": "loading", "failed": {"m": "2"}},
                  b="standby", c="standby")  # fmt: skip
    assert warm(fails) == ["a", "b"]


def test_a_replica_that_comes_to_others_and_a_primary_in_place_of_a_lost_one_begin_slowly() -> None:
    alone, others = Seen(serves=True), Seen(serves=True, others=True)
    assert ramp.begins(Seen(others=True), others)
    assert not ramp.begins(others, others)
    assert not ramp.begins(Seen(), alone)
    hot = replace(others, level="hot-standby")
    led = replace(hot, leads=True, succeeded=True)
    assert ramp.begins(hot, led)
    assert not ramp.begins(hot, replace(led, succeeded=False))  # a planned promotion
    assert not ramp.begins(hot, replace(led, others=False))
    assert not ramp.begins(led, led)
    assert not ramp.begins(replace(hot, serves=False), hot)
    assert ramp.is_moot(hot)
    assert not ramp.is_moot(led)
    assert not ramp.is_moot(others)


def test_what_is_seen_of_a_group() -> None:
    found = ramp.seen(group("b", "hot-standby", b="ready", c="ready"), "b", True, "a")
    assert found == Seen("hot-standby", True, True, True, True)
    found = ramp.seen(group("b", "hot-standby", a="ready", b="ready"), "b", True, "a")
    assert not found.succeeded
    assert not ramp.seen(group("b", b="ready"), "b", True, "").succeeded
    assert not ramp.seen(group("b", b="ready", c="standby"), "b", True, "").others


def test_the_share_grows_in_steps() -> None:
    grown = Ramp(9.0)
    assert (grown.share, grown.active) == (1.0, False)
    grown.begin(0.0, Answers())
    shares = []
    for now_s in range(14):
        grown.look(float(now_s), Answers(10 * now_s, 0, 0.1 * now_s))
        shares.append(grown.share)
    assert shares == [0.1] * 3 + [0.25] * 3 + [0.5] * 3 + [1.0] * 5
    assert not grown.active
    at_once = Ramp(0.0)
    at_once.begin(0.0, Answers())
    assert at_once.share == 1.0


def test_errors_take_a_replica_back_and_it_is_tried_again_later_each_time() -> None:
    tried = Ramp(9.0)
    tried.begin(0.0, Answers(100, 50))  # what was before does not count
    tried.look(1.0, Answers(130, 52))
    assert tried.share == 0.1
    tried.look(2.0, Answers(130, 53))
    assert (tried.share, tried.why) == (0.0, "3 of 33 requests failed")
    tried.look(10.9, Answers(130, 53))
    assert tried.share == 0.0
    tried.look(11.0, Answers(130, 53))
    assert (tried.share, tried.why) == (0.1, "")
    tried.look(12.0, Answers(130, 60))
    tried.look(29.9, Answers(130, 60))
    assert tried.share == 0.0
    tried.look(30.0, Answers(130, 60))
    assert tried.share == 0.1
    tried.end()
    assert (tried.share, tried.why, tried.active) == (1.0, "", False)


def test_a_few_errors_among_many_answers_and_slow_first_ones_are_borne() -> None:
    assert not ramp.fault(Answers(1000, 40), 0.0)
    assert not ramp.fault(Answers(1, 2), 0.0)
    assert not ramp.fault(Answers(100, 0, 500.0), 0.0)
    assert ramp.fault(Answers(100, 0, 20.0), 0.04).startswith("requests took 200 ms, and 40 ms")
    assert not ramp.fault(Answers(100, 0, 5.0), 0.002)  # 48 ms more


def test_a_replica_that_slows_down_under_its_share_is_taken_back() -> None:
    tried = Ramp(9.0)
    tried.begin(0.0, Answers())
    tried.look(3.0, Answers(50, 0, 0.5))  # 10 ms each
    assert tried.share == 0.25
    tried.look(4.0, Answers(100, 0, 10.5))
    assert tried.share == 0.0
