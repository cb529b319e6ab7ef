"""A node whose workers hang again and again gets no work until a person says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.sim import plans
from tests.sim.checkers import AskedTheBarred, BarredTooMany, Broken
from tests.sim.history import Barred, History, Write
from tests.sim.run import run, told
from tests.sim.world import World, make_config


def bars(history: History) -> list[tuple[str, bool]]:
    """Nodes that were barred by a leader (True) or taken out of quarantine (False), in order."""
    return [(f.node, not f.lifted) for f in history.facts if isinstance(f, Barred)]


def leader_at(history: History, at_s: float) -> str:
    writes = [f for f in history.facts if isinstance(f, Write) and f.at_s <= at_s]
    return next(f.value for f in reversed(writes) if f.key == "leader")


@pytest.mark.parametrize("node", ["n0", "n1", "n2"])
def test_it_is_barred_and_taken_again_when_that_is_lifted(node: str) -> None:
    """Also the node that leads: its launcher is well, and leads on."""
    result = run(1, plan=plans.hangs_again_and_again(node))
    assert result.broken is None, told(result)
    history = result.world.history
    assert bars(history) == [(node, True), (node, False)]
    bar, lift = (f for f in history.facts if isinstance(f, Barred))
    places = [
        (f.at_s, node in {m.node for m in f.value.members})
        for f in history.facts
        if isinstance(f, Write) and f.key == "generation"
    ]
    assert [there for at_s, there in places if bar.at_s < at_s < lift.at_s] == [False]
    assert places[-1][1] and places[-1][0] > lift.at_s
    assert leader_at(history, bar.at_s) == leader_at(history, lift.at_s)


def test_one_of_these_nodes_leads() -> None:
    result = run(1, plan=plans.hangs_again_and_again("n0"))
    bar = next(f for f in result.world.history.facts if isinstance(f, Barred))
    leader = leader_at(result.world.history, bar.at_s).partition(".")[0]
    assert leader in {"n0", "n1", "n2"} and bar.sender.startswith(f"{leader}.")


def test_who_is_needed_stays() -> None:
    result = run(1, plan=plans.hangs_again_and_again("n1", nodes_min=3))
    assert result.broken is None, told(result)
    assert bars(result.world.history) == []


def does_not_mind(world: World) -> None:
    world.minds_quarantine = False


def needs_nobody(world: World) -> None:
    """The leader takes it that one node is enough."""
    world.config = make_config(1, 3, 1, 1000, 2, quarantine_after=2)


@pytest.mark.parametrize(
    ("weaken", "nodes_min", "wanted"),
    [(does_not_mind, 2, AskedTheBarred), (needs_nobody, 3, BarredTooMany)],
)
def test_without_the_rule_a_promise_breaks(
    weaken: Callable[[World], None], nodes_min: int, wanted: type[Broken]
) -> None:
    plan = plans.hangs_again_and_again("n1", nodes_min)
    assert isinstance(run(1, weaken=weaken, plan=plan).broken, wanted)
