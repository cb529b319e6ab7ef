"""Every second of a job is counted once, whatever the events say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from paddle_ft.observe.goodput import account
from paddle_ft.observe.story import last_job
from paddle_ft.types import Event

times = st.floats(0, 100, allow_nan=False)
small = st.integers(0, 4)
anything = st.one_of(
    st.tuples(
        times, st.just("first_step"), st.fixed_dictionaries({"generation": small, "step": small})
    ),
    st.tuples(
        times,
        st.just("progress"),
        st.fixed_dictionaries(
            {"generation": small, "step": st.integers(0, 50), "step_s": times, "held_s": times}
        ),
    ),
    st.tuples(
        times,
        st.just("worker_ended"),
        st.fixed_dictionaries(
            {
                "rank": small,
                "exit_code": st.sampled_from([0, -9]),
                "signal": small,
                "stopped": st.booleans(),
            }
        ),
    ),
    st.tuples(
        times, st.just("lost_peer"), st.fixed_dictionaries({"rank": small, "generation": small})
    ),
    st.tuples(
        times,
        st.just("generation"),
        st.fixed_dictionaries({"number": small, "restarts": small, "planned": st.booleans()}),
    ),
    st.tuples(times, st.just("pause"), st.just({})),
    st.tuples(times, st.sampled_from(["leaving", "outcome", "ended", "started"]), st.just({})),
    st.tuples(times, st.just("members"), st.fixed_dictionaries({"live": small, "needed": small})),
)
histories = st.lists(st.tuples(st.sampled_from("abc"), anything), min_size=1, max_size=40)


# The last life's steps end before it began: the next generation had its first step earlier.
_STEP = {"step": 0, "step_s": 0.0, "held_s": 0.0}
EARLIER: list[Any] = [
    ("a", (0.0, "first_step", {"generation": 0, "step": 0})),
    ("b", (1.0, "progress", {"generation": 0, **_STEP})),
    ("b", (1.0, "progress", {"generation": 1, **_STEP})),
]


@example(EARLIER, False)
@given(histories, st.booleans())
def test_every_second_is_counted_once(
    history: list[tuple[str, tuple[float, str, dict[str, Any]]]], in_order: bool
) -> None:
    """Whatever the events say, in whatever order, also nonsense."""
    if in_order:
        history.sort(key=lambda entry: entry[1][0])
    events = [Event(run, kind, s, s, fields) for run, (s, kind, fields) in history]
    result = account(events)
    assert all(s >= 0 for s in result.seconds.values())
    assert sum(result.seconds.values()) == pytest.approx(result.wall_s, abs=1e-6)
    assert 0 <= result.goodput <= 1
    assert all(f.detection_s >= 0 and f.recovery_s >= 0 for f in result.faults)
    last_job(events)
