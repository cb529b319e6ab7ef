"""Who is named as slow: a rank that is made so, soon; and nobody in undisturbed steps."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench.recovery_analysis import median
from bench.recovery_jobs import Job, PaddleFT, Stuck
from bench.recovery_kinds import EVERY, fresh
from bench.recovery_trials import Say
from bench.report import Row

GROUP = "Who is slow"
RANKS = 2
SOON_STEPS = 20
NAMED_TIMEOUT_S = 10.0
CLEARED_TIMEOUT_S = 20.0
SETTLE_S = 5.0
"""A job is left alone for so long before it is watched, or a rank is made slower."""
STEP_S_MAX = 1.0


@dataclass
class Stragglers:
    """What came of making ranks slower."""

    steps: list[int] = field(default_factory=list)
    """That the rank had done until it was named, and nobody else."""
    wrong: int = 0


def straggle(job: PaddleFT, trials: int) -> Stragglers:
    """Makes one rank after another 30 % slower at random moments, each until it is named."""
    found = Stragglers()
    for _ in range(trials):
        job.wait(lambda: False, SETTLE_S + random.random())
        rank = random.randrange(job.ranks)
        mark = job.record / f"slower-{rank}"
        at_s = _now(job)
        mark.touch()
        named = job.wait(lambda at_s=at_s: bool(_named(job, at_s)), NAMED_TIMEOUT_S)
        told = _named(job, at_s)
        if named and {r for r, _ in told} == {rank}:
            since = [x for x in job.lines if x.rank == rank and at_s < x.at_s <= told[0][1]]
            found.steps.append(len(since))
        else:
            found.wrong += 1
        mark.unlink()
        job.wait(lambda at_s=at_s: _all_cleared(job, at_s), CLEARED_TIMEOUT_S)
    return found


def _now(job: Job) -> float:
    job.tend()
    return time.monotonic()


def _named(job: PaddleFT, after_s: float) -> list[tuple[int, float]]:
    return [(rank, at_s) for rank, slower, at_s in job.paces(after_s) if slower]


def _all_cleared(job: PaddleFT, after_s: float) -> bool:
    last = {rank: slower for rank, slower, _ in job.paces(after_s)}
    return not any(last.values())


def undisturbed(job: PaddleFT, steps: int) -> tuple[int, list[tuple[int, float]]]:
    """(steps made, ranks that were named in them and when) while nothing is done to the job."""
    job.wait(lambda: False, SETTLE_S)
    at_s, before = _now(job), len(job.lines)

    def done() -> int:
        return (len(job.lines) - before) // job.ranks

    job.wait(lambda: done() >= steps, steps * STEP_S_MAX)
    return done(), _named(job, at_s)


def health(parent: Path, trials: int, steps: int, say: Say) -> list[Row]:
    """Rows of both; the jobs are of two ranks and steps of 50 ms."""
    say(f"who is slow: {trials} stragglers, {steps} undisturbed steps")
    job = PaddleFT(fresh(parent), RANKS, flags=EVERY)
    try:
        job.start()
        job.await_steady()
        found = straggle(job, trials)
        made, named = undisturbed(job, steps)
    except Stuck as stuck:
        say(f"  {stuck}")
        return [Row(GROUP, "stragglers named", "%", [0.0], goal=100.0, sense=">=", note=str(stuck))]
    finally:
        job.close()
    right = len(found.steps)
    note = f"named rightly in {right} of {trials}"
    if found.steps:
        note += f", after {median(found.steps):g} steps (p50), at most {max(found.steps)}"
    say(f"  {note}; {len(named)} false namings in {made} steps: {named}")
    rows = [
        Row(GROUP, "one of 2 ranks 30 % slower from a random moment on: named rightly", "%",
            [100.0 * right / trials], goal=100.0, sense=">=", note=note),
        Row(GROUP, "steps until it is named, the most of all trials", "",
            [float(max(found.steps, default=10**6))], goal=float(SOON_STEPS)),
    ]  # fmt: skip
    links = sum(rank < 0 for rank, _ in named)
    rows.append(
        Row(GROUP, f"false namings in {made} undisturbed steps of 50 ms", "",
            [float(len(named) if made >= steps else 10**6)], goal=0.0,
            note=f"{len(named) - links} of ranks, {links} of links")
    )  # fmt: skip
    return rows
