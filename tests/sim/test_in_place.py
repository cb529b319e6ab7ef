"""Going on in place and starting anew come to the same result; the paths in between are taken."""

from __future__ import annotations

import pytest

from tests.sim import plans
from tests.sim.history import Applied, Formed, Gone, Saved
from tests.sim.plan import Plan
from tests.sim.run import Result, run, told
from tests.sim.training import Ranges

SEEDS = range(12)


def used(result: Result) -> Ranges:
    """The samples behind the last committed state, in the order of their use."""
    assert result.broken is None, told(result)
    newest = result.world.history.heads()[-1].newest.manifest
    facts = result.world.history.facts
    (saved,) = (f for f in facts if isinstance(f, Saved) and f.manifest == newest)
    return saved.states[0].used


def disturbed(seed: int) -> Plan:
    return (
        plans.hand_overs_that_break(),
        plans.ends_that_are_disturbed(3.3 + 0.1 * seed),
        plans.leaving_while_loading(6.5 + 0.1 * seed),
        plans.out_for_one_generation(4.0),
    )[seed % 4]


@pytest.mark.parametrize("seed", SEEDS)
def test_both_ways_end_with_the_same_samples_in_order(seed: int) -> None:
    plan = disturbed(seed)
    in_place = run(seed, plan=plan)
    anew = run(seed, plan=plans.with_recovery(plan, "restart"))
    assert used(in_place) == used(anew)


def test_in_place_no_step_is_done_twice_for_a_false_alarm() -> None:
    faults = tuple(plans.fault("false alarm", 3.0 + i, f"n{i % 2}") for i in range(4))
    result = run(3, plan=plans.replace(plans.CALM, faults=faults))
    assert result.broken is None, told(result)
    facts = result.world.history.facts
    whole = [f.state.step for f in facts if isinstance(f, Applied) and len(f.workers) == 2]
    assert whole == sorted(set(whole))
    assert sum(isinstance(f, Formed) for f in facts) > 1
    assert {f.how for f in facts if isinstance(f, Gone)} <= {"done", "stopped"}


def test_a_node_joins_and_leaves_without_a_checkpoint() -> None:
    plan = plans.replace(
        plans.CALM, nodes=3, nodes_min=1, nodes_max=3, starts_s=(0.1, 0.2, 3.0), save_every=100,
        faults=(plans.fault("terminate", 6.0, "n1", lasts_s=9.0),),
    )  # fmt: skip
    result = run(1, plan=plan)
    assert result.broken is None, told(result)
    generations = result.world.history.generations()
    assert sum(g.planned for g in generations) >= 2
    heads = [h.newest.step for h in result.world.history.heads()]
    assert heads == [plan.steps]
