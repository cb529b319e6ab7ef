"""A replica that stood still does not teach the gateway to wait longer."""

from __future__ import annotations

from paddle_ft.serve.latency import GRPC, Learners, Try, tries_of
from paddle_ft.serve.lessons import WAIT_S, Lessons
from paddle_ft.serve.routing import Health, Timeouts

NAMES = {"a:1": "a", "b:1": "b"}


class Seen:
    """A gateway's turns, ten a second; replica a answers within 10 ms."""

    def __init__(self) -> None:
        self.lessons = Lessons(Learners(Timeouts(10, 30, 30), 0.3))
        self.now_s = 100.0
        self.health: dict[str, Health] = {"a": "ready", "b": "ready"}

    def run(self, for_s: float) -> float:
        """The read time-out after ``for_s`` more."""
        end_s = self.now_s + for_s
        while self.now_s < end_s:
            self.now_s += 0.1
            self.saw("a", 200, 0.01)
            self.lessons.step(self.now_s, NAMES, self.health)
        return self.lessons.learners.learnt().rest.read_s

    def saw(self, name: str, status: int, answer_s: float) -> None:
        tried = Try(0.0, "", f"{name}:1", status, 0.001, answer_s, answer_s)
        self.lessons.saw(tried, name, self.now_s)


def test_what_a_request_is_about() -> None:
    tail = "a:1\t200\t0.001\t0.01"
    for path, about in (
        ("/v2/models/m/infer", "m"),
        ("/v2/models/m.1/versions/2/infer", "m.1"),
        ("/v2/models/m", ""),
        ("/v2/health/ready", ""),
        ("/inference.GRPCInferenceService/ModelInfer", GRPC),
    ):
        assert [tried.about for tried in tries_of(f"1.5\t200\t{path}\t{tail}")] == [about]


def test_what_met_a_replica_that_stood_still_teaches_nothing() -> None:
    seen = Seen()
    assert seen.run(5) == 0.3
    seen.run(0.3)
    seen.saw("b", 504, 0.3)  # stopped; its check has not been given up yet
    seen.run(0.2)
    seen.health["b"] = "silent"
    assert seen.run(4) == 0.3
    for late_s in (4.3, 3.0, 1.0):  # woken, it answers what waits
        seen.saw("b", 200, late_s)
    seen.run(0.2)
    seen.health["b"] = "ready"
    assert seen.run(5) == 0.3


def test_a_replica_that_is_slow_and_there_teaches() -> None:
    seen = Seen()
    seen.run(5)
    seen.saw("b", 200, 1.0)
    assert seen.run(WAIT_S / 2) == 0.3
    assert seen.run(WAIT_S) > 2
    seen = Seen()
    seen.run(5)
    seen.saw("b", 504, 0.3)
    assert seen.run(2 * WAIT_S) > 0.5, "the time-out was too short for it"


def test_a_silence_long_ago_does_not_count() -> None:
    seen = Seen()
    seen.health["b"] = "silent"
    seen.run(3)
    seen.health["b"] = "ready"
    seen.run(5)
    seen.saw("b", 200, 1.0)
    assert seen.run(2 * WAIT_S) > 2
