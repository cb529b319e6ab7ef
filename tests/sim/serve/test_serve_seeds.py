"""Every seed keeps every promise of a serving group; without any one of its rules, some break.

``PADDLE_FT_SERVE_SEEDS`` says how many; ``python -m tests.sim.serve.run`` runs more.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.sim.serve.run import first_broken, made, told

SEEDS = int(os.environ.get("PADDLE_FT_SERVE_SEEDS", "5"))
WITHIN = 300
"""So many seeds must find what is wrong; it is looked for first where it was found before."""


def test_no_seed_breaks_a_promise() -> None:
    done: Counter[str] = Counter()
    for seed in range(SEEDS):
        group = made(seed)
        assert not (why := told(group)), (
            f"seed {seed}: {why}\nreplay: python -m tests.sim.serve.run --from {seed} --seeds 1"
        )
        done += Counter(group.done)
        done["acknowledged"] += group.history.acknowledgements
    assert done["acknowledged"] > 100 * SEEDS
    for fault in ("kill", "freeze", "cut_etcd", "cut_pair", "etcd", "handed over", "installed"):
        assert done[fault] > 0, fault


@pytest.mark.parametrize(
    ("rule", "likely"),
    [
        ("election", 3),  # only who is in sync stands
        ("replicas", 4),  # who is in sync must have it
        ("reads", 0),  # a read waits for what its session wrote
        ("terms", 13),  # a lower term is refused
        ("deadline", 6),  # who cannot renew its lease must be confirmed by the others
    ],
)
def test_every_rule_is_needed(rule: str, likely: int) -> None:
    assert first_broken(rule, range(WITHIN), likely) is not None
