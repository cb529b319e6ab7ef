"""Faults in running jobs, one after another: what each cost, and which were not survived."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from bench.recovery_analysis import (
    Resumption,
    intervals,
    longest_pause,
    median,
    percentile,
    resumption,
    slowest_calm,
)
from bench.recovery_jobs import Job, PaddleFT, Stuck

Say = Callable[[str], None]
LINES_MAX = 2000
"""Steps of all ranks that are kept when the next fault comes: all are gone through again and again,
which must not become a load on what is measured.
"""
FULL_TIMEOUT_S = 25.0
"""How long the world may take to be whole again before the job is given up for further trials."""

NAMED_TIMEOUT_S = 3.0
"""A hang is written down after the stacks of all ranks are, for which who was stopped goes on."""


@dataclass
class Outcome:
    """What the trials of one kind came to; seconds."""

    group: str
    name: str
    settings: str
    ranks: int
    found: list[Resumption] = field(default_factory=list)
    failures: int = 0
    """Trials that did not resume in time; those of a job that did not even start are among them."""
    timeout_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    """An undisturbed step, of each job."""
    joins: list[float] = field(default_factory=list)
    """Longest pause of those that were there while a node came, less a step."""
    goal_s: tuple[float, float] | None = None
    """Of p50 and p99, beyond one step; see ``anew``."""
    anew: bool = False
    """Workers start from the last commit, and do steps again: the goal is of the first of these."""
    hangs: bool = False
    """The fault is a hang: somebody has to name the one that does."""
    noticed: list[float] = field(default_factory=list)
    """Seconds after which the right one was named, and nobody else."""
    misnamed: int = 0
    named_goals_s: list[float] = field(default_factory=list)
    """Within what it was to be named, of each of ``noticed``."""
    note: str = ""
    not_run: str = ""

    @property
    def late(self) -> int:
        """How often it was named later than it was to be."""
        return sum(s > g for s, g in zip(self.noticed, self.named_goals_s, strict=True))

    @property
    def trials(self) -> int:
        return len(self.found) + self.failures

    def beyond(self) -> list[float]:
        """Seconds from the fault to a new step on all ranks, less an undisturbed step."""
        step_s = median(self.step_s) if self.step_s else 0.0
        return [r.new_s - step_s for r in self.found]

    @property
    def reached(self) -> bool | None:
        """None where there is no goal, or nothing was run."""
        if self.hangs and self.trials:
            wrong = self.late or self.misnamed or self.failures
            return not wrong and bool(self.noticed)
        if self.goal_s is None or not self.trials:
            return None
        beyond = self.beyond()
        if self.failures or (not self.anew and any(r.redone for r in self.found)):
            return False
        p50, p99 = self.goal_s
        measured = [r.again_s for r in self.found] if self.anew else beyond
        return percentile(measured, 0.5) <= p50 and percentile(measured, 0.99) <= p99

    def to_json(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "name": self.name,
            "settings": self.settings,
            "ranks": self.ranks,
            "trials": self.trials,
            "failures": self.failures,
            "timeout_s": self.timeout_s,
            "step_s": [round(s, 4) for s in self.step_s],
            "new_step_s": [round(r.new_s, 4) for r in self.found],
            "full_world_s": [None if r.full_s is None else round(r.full_s, 4) for r in self.found],
            "any_step_s": [round(r.again_s, 4) for r in self.found],
            "steps_redone": [r.redone for r in self.found],
            "join_pause_s": [round(j, 4) for j in self.joins],
            "noticed_s": [round(s, 4) for s in self.noticed],
            "noticed_goals_s": [round(s, 4) for s in self.named_goals_s],
            "misnamed": self.misnamed,
            "goal_s": self.goal_s,
            "reached": self.reached,
            "note": self.note,
            "not_run": self.not_run,
        }


Fault = Callable[[Any], float]


def kill_worker(job: Job) -> float:
    return job.hurt_worker()


def stop_worker(job: Job) -> float:
    return job.hurt_worker(signal.SIGSTOP)


def kill_node(job: Job) -> float:
    return job.kill_unit(random.choice(sorted(job.units)))


def kill_member(job: PaddleFT) -> float:
    """A node that has a place and does not lead."""
    leader = job.leader()
    return job.kill_unit(random.choice([u for u in job.members() if u != leader]))


def kill_leader(job: PaddleFT) -> float:
    return job.kill_unit(job.leader())


def run(
    outcome: Outcome,
    make: Callable[[], Job],
    fault: Fault,
    trials: int,
    timeout_s: float,
    say: Say,
) -> Outcome:
    """``trials`` faults; what does not resume within ``timeout_s`` is a failure and a new job."""
    outcome.timeout_s = timeout_s
    job: Job | None = None
    try:
        while outcome.trials < trials:
            if job is None:
                job = start(make, outcome)
                if job is None:
                    say(f"  {outcome.name}, {outcome.ranks} ranks: does not start")
                    continue
            if not one(job, outcome, fault, timeout_s):
                job.close()
                job = None
    finally:
        if job is not None:
            job.close()
    say(f"  {outcome.name} ({outcome.settings}), {outcome.ranks} ranks: {in_short(outcome)}")
    return outcome


def start(make: Callable[[], Job], outcome: Outcome) -> Job | None:
    """A job that runs on all ranks; None, and a failure, if it does not come to that."""
    job = make()
    try:
        job.start()
        job.await_steady()
    except Stuck as stuck:
        outcome.failures += 1
        outcome.note = str(stuck).partition(";")[0]
        job.close()
        return None
    except BaseException:
        job.close()
        raise
    outcome.step_s.append(median(intervals(job.lines)))
    return job


def one(job: Job, outcome: Outcome, fault: Fault, timeout_s: float) -> bool:
    """One fault; gives whether the job is fit for another one."""
    del job.lines[:-LINES_MAX]
    time.sleep(random.uniform(0.0, 0.06))  # at any moment of a step
    at_s = fault(job)
    resumed = job.wait(lambda: resumption(job.lines, at_s) is not None, timeout_s)
    found = resumption(job.lines, at_s)
    if not resumed or found is None:
        outcome.failures += 1
        return False
    if outcome.hangs and isinstance(job, PaddleFT):
        note_hang(job, outcome, at_s)
    whole = bring_back(job, outcome, at_s)
    found = resumption(job.lines, at_s)
    assert found is not None
    outcome.found.append(found)
    job.disturbed.append((at_s, at_s + (found.full_s or found.new_s)))
    if not whole:
        return False
    try:
        job.await_steady(FULL_TIMEOUT_S)
    except Stuck:
        return False
    return True


def bring_back(job: Job, outcome: Outcome, at_s: float) -> bool:
    """Starts launchers that were killed; whether the world becomes as large as it was."""
    for unit, process in list(job.units.items()):
        if process.poll() is not None and not job.restart_units:
            job.start_unit(unit)

    def whole() -> bool:
        found = resumption(job.lines, at_s)
        return found is not None and found.full_s is not None

    came = job.wait(whole, FULL_TIMEOUT_S)
    found = resumption(job.lines, at_s)
    if came and found is not None and found.full_s is not None:
        note_join(job, outcome, at_s, found)
    return came


def note_join(job: Job, outcome: Outcome, at_s: float, found: Resumption) -> None:
    """Where the world was smaller for a while: how long those that were there paused for the join.

    A little more is waited for than the first step of the whole world.
    """
    assert found.full_s is not None
    if found.full_s - found.new_s < 0.2:
        return
    job.wait(lambda: False, 0.3)
    pids = {x.pid for x in job.lines if at_s < x.at_s <= at_s + found.new_s}
    pause_s = longest_pause(job.lines, pids, at_s + found.new_s)
    with suppress(ValueError):
        outcome.joins.append(max(pause_s - median(outcome.step_s), 0.0))


def note_hang(job: PaddleFT, outcome: Outcome, at_s: float) -> None:
    """Whether the one that was stopped was named, and nobody else, and after how long."""
    job.wait(lambda: bool(job.named(at_s)), NAMED_TIMEOUT_S)
    told = job.named(at_s)
    if {pid for pid, _ in told} == {job.victim}:
        outcome.noticed.append(told[0][1] - at_s)
        so_far = [x for x in job.lines if x.at_s < at_s]
        outcome.named_goals_s.append(3 * slowest_calm(so_far, job.disturbed) + 1.0)
    else:
        outcome.misnamed += 1


def told_of_hangs(outcome: Outcome) -> str:
    """ "" if it is not about hangs."""
    if not outcome.hangs or not outcome.trials:
        return ""
    s = outcome.noticed
    if not s:
        return f"named rightly in 0 of {outcome.trials}; "
    goals = outcome.named_goals_s
    return (
        f"named rightly in {len(s)} of {outcome.trials}, after {percentile(s, 0.5):.2f} s (p50), "
        f"{max(s):.2f} s (max), later than the goal in {outcome.late}: 1 s and 3 times the slowest "
        f"undisturbed step of the job so far, {percentile(goals, 0.5):.2f} s (p50), "
        f"{min(goals):.2f} to {max(goals):.2f} s; "
    )


def first_again(outcome: Outcome) -> str:
    """When all ranks stepped again, be it a step that had been applied before; "" if in place."""
    if not outcome.anew or not outcome.found:
        return ""
    again = [r.again_s for r in outcome.found]
    p50, p99 = percentile(again, 0.5), percentile(again, 0.99)
    return f"all ranks step again: p50 {p50:.3f} s, p99 {p99:.3f} s, max {max(again):.3f} s; "


def in_short(outcome: Outcome) -> str:
    if not outcome.found:
        return f"0 of {outcome.trials} resumed"
    new = [r.new_s for r in outcome.found]
    return (
        f"p50 {percentile(new, 0.5):.3f} s, max {max(new):.3f} s, {first_again(outcome)}"
        f"{outcome.failures} of {outcome.trials} failed"
    )


def say_to_stderr(begin_s: float) -> Say:
    def say(what: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - begin_s:4.0f} s] {what}\n")

    return say
