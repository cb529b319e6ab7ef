"""``reproducible``: the weights do not depend on how many ranks there were, nor on how often that
changed. Batches of 8 samples, 5 in the last; 6 logical shards."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests.integration.session_world import (
    Agent,
    Result,
    Saved,
    python_26,
    run,
    succeeded,
    used_ids,
)

pytestmark = pytest.mark.paddle

OPTIONS: dict[str, Any] = {
    "session": {"reproducible": 6},
    "samples": 29,
    "register": True,
    "calls": True,
    "unused": True,
}
STEPS = 8


def lives(
    *worlds: tuple[int, int], python: str = sys.executable, **options: Any
) -> tuple[list[tuple[list[Result], int]], Saved]:
    """Runs one after another, each from the last one's checkpoint: (world size, step to die at)."""
    start: Saved | None = None
    runs = []
    for world_size, die_at in worlds:
        with Agent(world_size, start=start, when="1") as agent:
            results = run(world_size, agent, python=python, die_at=die_at, **OPTIONS, **options)
            if die_at < 0:
                succeeded(results)
            start = agent.newest
        runs.append((results, start.info.step))
    assert start is not None
    return runs, start


def ends(results: list[Result]) -> set[tuple[str, str, int]]:
    return {(r.end["all"], r.end["seen"], r.end["step"]) for r in results}


def test_a_changed_world_ends_bit_for_bit_as_a_fixed_one() -> None:
    """Adam, dropout, BatchNorm, noise, a counter in a buffer, a registered object; 3 ranks, 2.

    The checkpoint is refused where the sums would be others.
    """
    fixed = succeeded(run(1, **OPTIONS))
    runs, saved = lives((3, 2), (2, -1))
    assert ends(runs[-1][0]) == ends(fixed)
    assert 0 < runs[0][1] < STEPS
    assert saved.info.meta["position"]["shards"] == 6
    assert sorted(used_ids(*runs)) == sorted([*range(29), *range(29)])
    assert len(fixed[0].events("step")) == 2 * (3 * 6 + 5)
    with Agent(1, start=saved) as agent:
        (result,) = run(1, agent, **{**OPTIONS, "session": {}})
    assert result.code != 0
    assert "with reproducible=6, and now the script has it off" in result.errors
    assert "Traceback" not in result.errors


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("more", [{}, {"scale": 64, "workers": 1}], ids=["plain", "scaled, loaded"])
def test_4_3_2_4_ranks(more: dict[str, Any]) -> None:
    """The one with a GradScaler and loader processes equals its own fixed run."""
    fixed = succeeded(run(2, **OPTIONS, **more))
    runs, _ = lives((4, 2), (3, 4), (2, 6), (4, -1), **more)
    assert len({step for _, step in runs}) == 4
    assert ends(runs[-1][0]) == ends(fixed)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_more_ranks_than_shards_and_also_on_paddle_26() -> None:
    """4 shards of the last batch's 5 samples … and a fifth rank that only takes part."""
    python = python_26()
    options = {**OPTIONS, "session": {"reproducible": 2}, "python": python}
    fixed = succeeded(run(1, **options))
    wide = succeeded(run(3, **options))
    assert ends(wide) == ends(fixed)
    assert all(line["ids"] == [] for line in wide[2].events("step"))
