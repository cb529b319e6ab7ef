"""The state that a rank gives to others of its group, on both versions of Paddle."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.integration.session_world import Workers, python_26, succeeded

SCRIPT = Path(__file__).parent / "session_scripts" / "hand_over.py"
pytestmark = [pytest.mark.paddle, pytest.mark.slow]


@pytest.mark.parametrize("version", ["this Paddle", "Paddle 2.6.2"])
def test_who_is_in_need_ends_with_the_same_bytes_and_nobody_else_is_touched(version: str) -> None:
    python = sys.executable if version == "this Paddle" else python_26()
    with Workers(3, command=[python, str(SCRIPT)]) as workers:
        source, newcomer, behind = (r.lines[-1] for r in succeeded(workers.results()))
    for line in (newcomer, behind):
        assert [what for what, holds in line["checks"].items() if not holds] == []
    assert behind["digest"] == source["digest"] != newcomer["digest"]
    assert len({source["first"], newcomer["first"], behind["first"]}) == 3
