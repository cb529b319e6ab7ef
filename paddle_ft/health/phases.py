"""What a rank can be doing, and the records of it that others judge. Pure values.

Invariant: a number here is what stands on the board of a rank (``health.board``), so that it is
never given another meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

NOTHING, JOINING, LOADING, DATA, COMPUTE, REDUCE, OPTIMIZER, OUTSIDE, LOOSE, SAVING, OVER = range(
    11
)

NAMES = (
    "has not begun",
    "forms the group",
    "loads the state",
    "waits for data",
    "computes",
    "sums the gradients",
    "applies the step",
    "is between two steps",
    "is in the script, which has a loop of its own",
    "saves",
    "has ended its session",
)
"""By phase, to be said of a rank."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one rank; times in seconds."""

    number: int
    """Of its last collective in its group, plus 1: the same on all ranks."""
    total_s: float
    """Since the step before."""
    busy_s: float
    """Without what was spent inside collectives, between steps and on saving."""
    reduce_s: float
    """Inside collectives: waiting for others, and the reduction itself."""
    data_s: float
    outside_s: float
    saving_s: float
    share: float
    """Of the global batch; 0.0 if it is not known."""


@dataclass(frozen=True, slots=True)
class Call:
    """One collective of one rank, CLOCK_MONOTONIC of the node."""

    number: int
    entered_s: float
    left_s: float
    """0.0 while it is inside."""


@dataclass(frozen=True, slots=True)
class Look:
    """A board at one instant; its fields are not all of the same one."""

    phase: int
    since_s: float
    """CLOCK_MONOTONIC of entering the phase."""
    entered: int
    """Number of the collective it entered last, counted from 1 in each group; 0 before."""
    left: int
    """Of the one it left last."""
    steps: int
    """Steps done in this group."""
    changed_s: float = 0.0
    """CLOCK_MONOTONIC of what was written last; 0.0: nothing was."""

    @property
    def inside(self) -> bool:
        return self.left < self.entered
