"""How long training is held up by a checkpoint, in real jobs."""

from __future__ import annotations

import itertools
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.drive import Job, Line
from bench.report import Row
from bench.storage import settle

GROUP = "Stall of the training loop"
EVERY = 20
STEPS_BEFORE = 10
"""Iterations of a job that are not counted."""


@dataclass
class Case:
    """A job and what came out of it; seconds, over all ranks and rounds."""

    name: str
    script: str
    ranks: int
    steps: int
    samples: int
    repeat: int
    goal: float
    stalls: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)
    """Percent of the time of whole periods."""
    paddle_save: list[float] = field(default_factory=list)
    means: list[float] = field(default_factory=list)


def cases() -> list[Case]:
    return [
        Case("long steps, 1 rank", "heavy", 1, 90, 8, 1, 0.2),
        Case("long steps, 2 ranks, sharded", "heavy", 2, 50, 8, 1, 0.2),
        Case("short steps, frozen tables, 1 rank", "frozen", 1, 130, 64, 1, 1.1),
        Case("short steps, frozen tables, 2 ranks, sharded", "frozen", 2, 130, 64, 1, 1.1),
        Case("short steps, sparse tables, 1 rank", "sparse", 1, 130, 64, 1, 1.1),
    ]


def add(case: Case, report: dict[str, Any]) -> None:
    """Takes what one rank of one job has written into ``case``."""
    lengths = [end - start for start, _, end in report["iterations"]]
    base = statistics.median(lengths[STEPS_BEFORE:])
    case.copies += report["copies"]
    case.steps_s.append(base)
    case.paddle_save += report["paddle_save"]
    marks = [s["step"] for s in report["snapshots"]]
    for snapshot in report["snapshots"]:
        at = snapshot["step"]
        if at + 1 >= len(lengths):
            continue
        stall = sum(lengths[at : at + 2]) - 2 * base
        if snapshot["first"] or at < STEPS_BEFORE:
            case.first.append(stall)
        else:
            case.stalls.append(stall)
            case.held.append(snapshot.get("held_s", 0.0))
    for start, end in itertools.pairwise(marks):
        if start >= STEPS_BEFORE and end - start >= EVERY // 2:
            quiet = statistics.median(lengths[(start + end) // 2 : end])
            case.lost.append(100 * (sum(lengths[start:end]) / (quiet * (end - start)) - 1))
    whole = [m for m in marks if m >= STEPS_BEFORE]
    case.means.append(statistics.mean(lengths[whole[0] : whole[-1]]))


def run_job(folder: Path, case: Case, mbytes: float, *flags: str, steps: int = 0) -> list[Any]:
    arguments = [
        "--case", case.script, "--mbytes", str(mbytes), "--steps", str(steps or case.steps),
        "--samples", str(case.samples), "--repeat", str(case.repeat), "--every", str(EVERY),
        "--paddle_save", str(folder),
    ]  # fmt: skip
    try:
        job = Job(folder, arguments, case.ranks, flags)
        job.start()
        return job.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(
    folder: Path, mbytes: float, rounds: int, torch: Line | None, say: Callable[[str], None]
) -> list[Row]:
    ours = cases()
    long_one = ours[0]
    never: list[float] = []
    peers: dict[str, list[float]] = {"torch.save": [], "DCP async_save": []}
    for number in range(rounds):
        for case in ours:
            say(f"stall, round {number + 1} of {rounds}: {case.name}")
            for report in run_job(folder / "job", case, mbytes):
                add(case, report)
            _ask_torch(torch, peers, int(mbytes * 1e6))
            if case is long_one:
                say(f"stall, round {number + 1} of {rounds}: the same without checkpoints")
                flags = ("--checkpoint_every", "never")
                report = run_job(folder / "job", case, mbytes, *flags, steps=60)[0]
                lengths = [end - start for start, _, end in report["iterations"]]
                never.append(statistics.mean(lengths[EVERY:]))
    peers = {"paddle.save": long_one.paddle_save, **peers}
    rows = [row for case in ours for row in rows_of(case, peers if case is long_one else {})]
    rows.insert(4, _against_never(long_one, never))
    return rows


def _ask_torch(torch: Line | None, peers: dict[str, list[float]], nbytes: int) -> None:
    if torch is None:
        return
    settle(2 * nbytes)
    peers["torch.save"].append(1e3 * torch.ask(do="torch_save")["blocked_s"])
    settle(2 * nbytes)
    peers["DCP async_save"].append(1e3 * torch.ask(do="dcp", stager="plain")["blocked_s"])


def rows_of(case: Case, peers: dict[str, list[float]]) -> list[Row]:
    copies = [1e3 * s for s in case.copies]
    step_ms = 1e3 * statistics.median(case.steps_s)
    length = step_ms / statistics.median(copies)
    peers = {
        name: [1e3 * s for s in values] if name == "paddle.save" else values
        for name, values in peers.items()
    }
    first_ms = 1e3 * statistics.median(case.first) if case.first else float("nan")
    note = (
        f"a step lasts {step_ms:.0f} ms, {length:.1f} copies; the first snapshot in a buffer, "
        f"which is not counted, costs {first_ms:.0f} ms"
    )
    if case.goal < 1 and length < 4:
        note += "; TOO SHORT for this goal"
    if case.ranks > 1:
        note += "; the copy is that of a rank's share, all ranks at once"
    held = Row(
        GROUP, case.name, "ms", [1e3 * s for s in case.held], copies, "memcpy", peers, case.goal,
        note=note,
    )  # fmt: skip
    slower = Row(
        GROUP, f"{case.name}: that and what the steps around it ran slower", "ms",
        [1e3 * s for s in case.stalls], copies, "memcpy",
    )  # fmt: skip
    lost = Row(
        GROUP, f"{case.name}: share of training time lost, every {EVERY} steps", "%", case.lost,
        goal=0.5 if case.goal < 1 else None,
        note="each period of a checkpoint against the quiet second half of the same period: the "
        "copy, and the cores that hashing and writing take from training",
    )  # fmt: skip
    stood = Row(
        GROUP, f"{case.name}: share of training time stood still, every {EVERY} steps", "%",
        [100 * s / (EVERY * statistics.median(case.steps_s)) for s in case.held],
        goal=0.5 if case.goal < 1 else None,
    )  # fmt: skip
    return [held, slower, stood, lost]


def _against_never(case: Case, never: list[float]) -> Row:
    lost = [100 * (a / b - 1) for a, b in zip(case.means, never, strict=True)]
    return Row(
        GROUP, f"{case.name}: share of training time lost, against --checkpoint_every never", "%",
        lost, goal=0.5,
        note="mean step of two jobs that ran one after the other; the range shows how far this can "
        "be trusted",
    )  # fmt: skip
