"""Joining, overhead, many faults in one job, and goodput: what is not one fault and its end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench.recovery_analysis import (
    growth_pause,
    intervals,
    latest,
    median,
    percentile,
    useful_share,
)
from bench.recovery_jobs import Job, PaddleFT, PaddleLaunch, Stuck, TorchFT, Torchrun
from bench.recovery_kinds import EVERY, TORCHFT_TUNED, fresh
from bench.recovery_trials import Outcome, Say, kill_worker, one
from bench.report import Row

GROUP = "Joining, and what it costs when nothing fails"
LOST = "Many faults in one job"
MBYTES = 400.0
JOIN_TIMEOUT_S = 60.0
NEVER = ("--checkpoint_every", "never")


def _started(job: Job) -> None:
    """Raises Stuck, with the job closed."""
    try:
        job.start()
        job.await_steady()
    except BaseException:
        job.close()
        raise


# ---------------------------------------------------------------- joining


def join_pauses(parent: Path, mbytes: float, times: int) -> tuple[list[float], list[float], int]:
    """(pauses of the survivor less a step, times of a broadcast, failures); seconds.

    Two nodes run, one of them is killed, and a prepared node takes its place in the group. Nothing
    is saved meanwhile, for checkpoints hold training up, too. Broadcasts take turns with the joins,
    in the same groups.
    """
    arguments = ("--mbytes", str(mbytes)) if mbytes else ()
    job = PaddleFT(fresh(parent), 2, nodes=2, flags=NEVER, arguments=arguments)
    pauses: list[float] = []
    failures = 0
    _started(job)
    try:
        step_s = median(intervals(job.lines))
        for _ in range(times):
            victim = next(u for u in job.members() if u != job.leader())
            at_s = job.kill_unit(victim)
            if not job.wait(lambda at_s=at_s: _alone(job, at_s, 5), JOIN_TIMEOUT_S):
                failures += 1
                break
            pids = set(latest(job.lines).values())
            since_s = time.monotonic()
            job.start_unit(victim)
            try:
                job.await_steady(JOIN_TIMEOUT_S)
            except Stuck:
                failures += 1
                break
            pauses.append(growth_pause(job.lines, pids, since_s) - step_s)
        broadcasts = broadcast_times(job.record)
    finally:
        job.close()
    return pauses, broadcasts, failures


def broadcast_times(record: Path) -> list[float]:
    """Seconds until all ranks had it; without the first one of each group."""
    groups: dict[str, list[list[float]]] = {}
    for path in sorted(record.glob("broadcast-*.txt")):
        _, generation, _ = path.stem.split("-")
        groups.setdefault(generation, []).append([float(w) for w in path.read_text().split()])
    return [max(each) for ranks in groups.values() for each in list(zip(*ranks, strict=True))[1:]]


def _alone(job: Job, since_s: float, steps: int) -> bool:
    recent = [x for x in job.lines if x.at_s > since_s]
    return sum(x.world == 1 for x in recent) >= steps


def joining(parent: Path, times: int, say: Say) -> list[Row]:
    say("joining")
    rows = []
    for name, mbytes in (("small model", 0.0), (f"{MBYTES:.0f} MB of state", MBYTES)):
        try:
            pauses, broadcasts, failures = join_pauses(parent, mbytes, times)
        except Stuck as stuck:
            pauses, broadcasts, failures = [], [], 1
            say(f"  {stuck}")
        goal = 2.0 if mbytes else 0.5
        failed = f"{failures} of {len(pauses) + failures} failed"
        rows.append(
            Row(
                GROUP,
                f"a prepared node joins, {name}: pause of those that are there",
                "s",
                pauses,
                limit=broadcasts,
                limit_name="one broadcast" if mbytes else "",
                goal=goal,
                note=failed if failures else "",
            )
        )
        say(f"  {name}: {[round(p, 3) for p in pauses]}, broadcast {broadcasts}")
    return rows


# ---------------------------------------------------------------- overhead


def overhead(parent: Path, rounds: int, seconds: float, say: Say) -> list[Row]:
    """A step of the session loop and of the plain one, in runs that take turns: medians of the time
    it takes, and the processor time of the workers, which other work on the machine changes less.
    """
    say("overhead")
    ours, plain = Steps(), Steps()
    makes: tuple[tuple[Steps, Callable[[], Job]], ...] = (
        (ours, lambda: PaddleFT(fresh(parent), 2, flags=NEVER)),
        (plain, lambda: PaddleLaunch(fresh(parent), 2)),
    )
    for _ in range(rounds):
        for found, make in makes:
            job = make()
            _started(job)
            try:
                found.watch(job, seconds)
            finally:
                job.close()
    say(f"  ours {ours}, plain {plain}")
    name = "a step of 50 ms, 2 ranks, session loop"
    limit_name = "plain loop with one all-reduce, paddle.distributed.launch"
    note = f"{seconds:g} s each, in turn"
    return [
        Row(GROUP, name, "ms", ours.wall_ms, plain.wall_ms, limit_name, goal=1.01, note=note),
        Row(GROUP, f"{name}: processor time of a worker", "ms", ours.cpu_ms, plain.cpu_ms,
            limit_name, note=f"launchers not counted; {note}"),
    ]  # fmt: skip


@dataclass
class Steps:
    """What the steps of a loop took; one value for each run."""

    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)

    def watch(self, job: Job, seconds: float) -> None:
        pids = set(latest(job.lines).values())
        since_s, cpu_s = time.monotonic(), processor_s(pids)
        job.wait(lambda: False, seconds)
        cpu_s = processor_s(pids) - cpu_s
        recent = [x for x in job.lines if x.at_s > since_s]
        self.wall_ms.append(1e3 * median(intervals(recent)))
        self.cpu_ms.append(1e3 * cpu_s / len(recent))


def processor_s(pids: Iterable[int]) -> float:
    """What all threads that ``pids`` have now have used."""
    tasks = [task for pid in pids for task in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(task.read_text().split()[0]) for task in tasks) * 1e-9


# ---------------------------------------------------------------- many faults


@dataclass
class Held:
    """What a process holds."""

    threads: int
    descriptors: int
    rss_bytes: int

    @classmethod
    def of(cls, pid: int) -> Held | None:
        with suppress(OSError, ValueError):
            status = Path(f"/proc/{pid}/status").read_text().splitlines()
            values = dict(line.split(":", 1) for line in status)
            rss_bytes = int(values.get("VmRSS", "0 kB").split()[0]) * 1024
            return cls(int(values["Threads"]), len(os.listdir(f"/proc/{pid}/fd")), rss_bytes)
        return None


def sample(job: Job) -> dict[str, Held]:
    """The launcher, and of all workers the most of each."""
    workers = [h for pid in latest(job.lines).values() if (h := Held.of(pid)) is not None]
    launcher = Held.of(job.units[0].pid)
    found = {"launcher": launcher} if launcher is not None else {}
    if workers:
        found["worker"] = Held(
            max(h.threads for h in workers),
            max(h.descriptors for h in workers),
            max(h.rss_bytes for h in workers),
        )
    return found


def many_faults(parent: Path, kills: int, say: Say) -> list[Row]:
    """``kills`` workers of one job, one after another: how soon it goes on, and what its processes
    hold before and after.
    """
    say(f"{kills} faults in one job")
    job = PaddleFT(fresh(parent), 2, spares=1, flags=EVERY)
    _started(job)
    step_s = median(intervals(job.lines))
    outcome = Outcome(LOST, "paddle_ft", "--spares 1", 2)
    samples = [sample(job)]
    try:
        for number in range(kills):
            if not one(job, outcome, kill_worker, 30.0):
                say(f"  it did not go on after {number + 1} kills")
                break
            if number % 10 == 9 or number == kills - 1:
                samples.append(sample(job))
    finally:
        job.close()
    beyond = [max(found.new_s - step_s, 0.0) for found in outcome.found]
    rows = [
        Row(LOST, "kills survived, of one job", "", [len(beyond)], goal=kills, sense=">="),
        Row(LOST, "steps done again, in all", "", [sum(f.redone for f in outcome.found)], goal=0),
    ]
    for share, goal in ((0.5, 0.15), (0.99, 0.5)):
        name = f"until the first new step, beyond a step, p{100 * share:g}"
        rows.append(Row(LOST, name, "s", [percentile(beyond, share)], goal=goal))
    for who in ("launcher", "worker"):
        seen = [s[who] for s in samples if who in s]
        if len(seen) < 2:
            continue
        for what, scale in (("threads", 1.0), ("descriptors", 1.0), ("rss_bytes", 1e-6)):
            values = [getattr(h, what) * scale for h in seen]
            unit = "MB" if what == "rss_bytes" else ""
            told = "memory" if unit else what
            rows.append(
                Row(
                    LOST,
                    f"{who}: {told} after, at most",
                    unit,
                    [max(values[1:])],
                    limit=values[:1],
                    limit_name="before",
                )
            )
    return rows


# ---------------------------------------------------------------- goodput


def goodput(parent: Path, seconds: float, every_s: float, torch: bool, say: Say) -> Row:
    """Share of useful time with a worker killed every ``every_s``; peers for a quarter of it."""
    say(f"goodput, {seconds:g} s")
    makes: list[tuple[str, Callable[[], Job]]] = [
        ("paddle_ft", lambda: PaddleFT(fresh(parent), 2, spares=1, flags=EVERY))
    ]
    if torch:
        tuned = {"lighthouse_flags": TORCHFT_TUNED, "timeout_s": 1.0}
        makes += [
            ("torchft tuned", lambda: TorchFT(fresh(parent), 2, **tuned)),
            ("torchrun", lambda: Torchrun(fresh(parent), 2)),
        ]
    found: dict[str, list[float]] = {}
    for name, make in makes:
        try:
            lasts_s = seconds if name == "paddle_ft" else seconds / 4
            found[name] = [100 * _goodput(make(), lasts_s, every_s)]
        except Stuck as stuck:
            found[name] = [0.0]
            say(f"  {name}: {stuck}")
        say(f"  {name}: {found[name]}")
    ours = found.pop("paddle_ft")
    return Row(
        LOST, f"goodput, a kill every {every_s:g} s for {seconds:g} s, 2 ranks", "%", ours,
        peers=found, goal=97.0, sense=">=",
        note="steps that count once, by the ranks they were made on, × an undisturbed step / time",
    )  # fmt: skip


def _goodput(job: Job, seconds: float, every_s: float) -> float:
    _started(job)
    try:
        begin_s = time.monotonic()
        job.wait(lambda: False, 5.0)
        step_s = median(intervals(x for x in job.lines if x.at_s > begin_s))
        begin_s = time.monotonic()
        next_s = begin_s + every_s / 2
        while (now_s := time.monotonic()) < begin_s + seconds:
            if now_s >= next_s:
                pids: dict[int, int] = latest(job.lines)
                if pids:
                    job.hurt_worker(rank=max(pids))
                next_s += every_s
            until_s = min(next_s, begin_s + seconds)
            job.wait(lambda until_s=until_s: time.monotonic() >= until_s, every_s + 1)
            if not job.alive():
                break
        end_s = begin_s + seconds
        return useful_share(job.lines, begin_s, end_s, step_s, job.ranks)
    finally:
        job.close()
