"""Every comparison is needed: without any one of them, some seed breaks a promise.

The comparison is taken out of the finished transaction, on its way to etcd; the product has no
switch for it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.sim.checkers import (
    BrokeChain,
    Broken,
    BrokeSingleWriter,
    GenerationWentBack,
    HeadWentBack,
)
from tests.sim.run import run
from tests.sim.world import World

SEEDS = 600
"""Within so many seeds it must be found; most are found within ten."""


def without(kind: str, key: str) -> Callable[[World], None]:
    def weaken(world: World) -> None:
        world.network.without = (kind, key)

    return weaken


def one_identity(world: World) -> None:
    world.one_identity = True


def first_broken(weaken: Callable[[World], None], wanted: type[Broken]) -> int | None:
    for seed in range(SEEDS):
        broken = run(seed, weaken=weaken).broken
        if isinstance(broken, wanted):
            return seed
    return None


@pytest.mark.parametrize(
    ("kind", "key", "wanted"),
    [
        ("commit", "leader", BrokeSingleWriter),
        ("commit", "generation", BrokeChain),
        ("commit", "head", HeadWentBack),
        ("propose", "leader", BrokeSingleWriter),
        ("propose", "generation", GenerationWentBack),
        ("propose", "head", BrokeChain),
    ],
)
def test_no_comparison_can_be_left_out(kind: str, key: str, wanted: type[Broken]) -> None:
    assert first_broken(without(kind, key), wanted) is not None


def test_the_incarnation_cannot_be_left_out_of_the_identity() -> None:
    assert first_broken(one_identity, BrokeChain) is not None
