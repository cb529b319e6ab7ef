"""Every seed keeps every promise. ``PADDLE_FT_SIM_SEEDS`` says how many seeds there are."""

from __future__ import annotations

import os

import pytest

from tests.sim.run import run, told

SEEDS = int(os.environ.get("PADDLE_FT_SIM_SEEDS", "300"))
CHUNK = 50


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_no_seed_breaks_a_promise(first: int) -> None:
    results = (run(seed) for seed in range(first, min(first + CHUNK, SEEDS)))
    broken = [f"seed {r.seed}: {told(r)}" for r in results if r.broken is not None]
    assert not broken, (
        "\n".join(broken) + "\nreplay one with: python -m tests.sim.run --seed N --trace"
    )
