"""``python -m tests.sim.run --seeds 1000``: runs of the simulated cluster, checked.

--seeds N    how many, from --from on
--seed X     only this one; --trace prints what happens in it
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.sim.checkers import Broken, NoProgress, check_all
from tests.sim.clock import Clock
from tests.sim.faults import unleash
from tests.sim.plan import PROGRESS_S, QUIET_S, Plan, make_plan
from tests.sim.product import repeatable
from tests.sim.world import World


@dataclass(frozen=True, slots=True)
class Result:
    seed: int
    broken: Broken | None
    events: int
    world: World


def run(
    seed: int,
    *,
    tracing: bool = False,
    weaken: Callable[[World], None] | None = None,
    plan: Plan | None = None,
) -> Result:
    """One run from ``seed``; ``weaken`` takes something of the protocol away first."""
    logging.getLogger("paddle_ft").setLevel(logging.ERROR)
    clock = Clock(seed)
    world = World(plan or make_plan(random.Random(f"plan {seed}")), clock, tracing=tracing)
    if tracing:
        print(world.plan)
    if weaken is not None:
        weaken(world)
    unleash(world)
    broken: Broken | None = None
    with repeatable(world.nonce):
        clock.run(QUIET_S + PROGRESS_S, world.finished)
    try:
        check_all(world.history)
        if not world.finished():
            raise NoProgress(f"the job has not ended {PROGRESS_S:g} s after the last fault")
    except Broken as error:
        broken = error
    return Result(seed, broken, clock.events, world)


def told(result: Result) -> str:
    """The verdict, in words."""
    broken = result.broken
    return f"{type(broken).__name__}: {broken}" if broken else "all is well"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--trace", action="store_true")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        result = run(arguments.seed, tracing=arguments.trace)
        print(told(result))
        return 1 if result.broken else 0
    began_s, events, broken = time.process_time(), 0, 0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        result = run(seed)
        events += result.events
        if result.broken is not None:
            broken += 1
            print(f"seed {seed}: {told(result)}")
    took_s = time.process_time() - began_s
    print(f"{arguments.seeds} seeds, {broken} broken, {events} events, {took_s:.1f} s")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
