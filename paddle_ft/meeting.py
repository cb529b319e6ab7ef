"""What the ranks of a new group find out about each other before they go on. Pure.

Ranks meet with what they have in memory: survivors with the state of the step they stand at, others
with nothing. The vote that precedes a step can end well on one rank and badly on another, so
survivors may be one step apart. All go on from the furthest: nothing is applied twice, and nothing
that any rank has applied is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NOTHING = -1
"""Step of a rank that has no state."""


@dataclass(frozen=True, slots=True)
class Meeting:
    step: int
    """Where all go on; NOTHING if nobody has a state, which must come from a checkpoint then."""
    source: int
    """Rank that gives its state to those in need; 0 if nobody has one."""
    in_need: tuple[int, ...]
    """Ranks behind ``step``, or without a state."""


def standing(rank: int, world_size: int, step: int) -> list[int]:
    """What ``rank`` says; the sum over all ranks is what ``meet`` takes."""
    return [step - NOTHING if r == rank else 0 for r in range(world_size)]


def meet(said: Sequence[int]) -> Meeting:
    """What the summed ``standing`` of all ranks comes to."""
    steps = [number + NOTHING for number in said]
    furthest = max(steps)
    source = steps.index(furthest)
    if furthest == NOTHING:
        return Meeting(NOTHING, 0, ())
    return Meeting(furthest, source, tuple(r for r, step in enumerate(steps) if step < furthest))


def whose_own_state(rank: int, world_size_before: int) -> int:
    """The rank whose own state (BatchNorm statistics) ``rank`` of a newly formed group takes on.

    As when a checkpoint is loaded: its own number's, or on a larger world rank r mod the old one.
    """
    return rank % world_size_before
