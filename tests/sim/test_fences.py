"""Every comparison is needed: without any one of them, some seed breaks a promise.

The comparison is taken out of the finished transaction, on its way to etcd; the product has no
switch for it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from paddle_ft.meeting import Meeting
from tests.sim import plans
from tests.sim.checkers import (
    BrokeChain,
    Broken,
    BrokeSingleWriter,
    GenerationWentBack,
    HeadWentBack,
    LostStep,
    NoProgress,
    SteppedApart,
)
from tests.sim.run import run
from tests.sim.world import World

SEEDS = 600
"""Within so many seeds it must be found; it is looked for first where it was found before."""


def without(kind: str, key: str) -> Callable[[World], None]:
    def weaken(world: World) -> None:
        world.network.without = (kind, key)

    return weaken


def one_identity(world: World) -> None:
    world.one_identity = True


def everybody_as_they_stand(world: World) -> None:
    """The ranks of a new group do not compare where they stand."""
    world.meet = lambda said: Meeting(max(0, max(said) - 1), 0, ())


def without_since(world: World) -> None:
    """Workers of whatever age go on with whatever they have."""
    world.minds_restore_point = False
    world.minds_since = False


def forgets_early(world: World) -> None:
    world.forgets_early = True


def does_not_tell(world: World) -> None:
    world.tells_restore_point = False


def first_broken(
    weaken: Callable[[World], None], wanted: type[Broken], likely: int = 0
) -> int | None:
    for seed in (likely, *range(SEEDS)):
        broken = run(seed, weaken=weaken).broken
        if isinstance(broken, wanted):
            return seed
    return None


@pytest.mark.parametrize(
    ("kind", "key", "wanted", "likely"),
    [
        ("commit", "leader", BrokeSingleWriter, 10),
        ("commit", "generation", BrokeChain, 0),
        ("commit", "head", HeadWentBack, 26),
        ("propose", "leader", BrokeSingleWriter, 142),
        ("propose", "generation", GenerationWentBack, 8),
        ("propose", "head", BrokeChain, 127),
    ],
)
def test_no_comparison_can_be_left_out(
    kind: str, key: str, wanted: type[Broken], likely: int
) -> None:
    assert first_broken(without(kind, key), wanted, likely) is not None


def test_the_incarnation_cannot_be_left_out_of_the_identity() -> None:
    assert first_broken(one_identity, BrokeChain, 5) is not None


def test_ranks_cannot_go_on_without_comparing_where_they_stand() -> None:
    assert first_broken(everybody_as_they_stand, SteppedApart) is not None


def test_a_state_is_not_given_up_before_another_is_there() -> None:
    broken = run(0, weaken=forgets_early, plan=plans.hand_overs_that_break()).broken
    assert isinstance(broken, LostStep)


def test_workers_that_have_missed_a_generation_cannot_go_on() -> None:
    plan = plans.out_for_one_generation(3.0 + 0.02 * 77)
    assert run(77, plan=plan).broken is None
    broken = run(77, weaken=without_since, plan=plan).broken
    assert isinstance(broken, BrokeChain)


def test_who_goes_on_at_the_last_step_must_know_that_it_is_committed() -> None:
    assert isinstance(run(17, weaken=does_not_tell).broken, NoProgress)
