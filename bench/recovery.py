"""``make bench-recovery``: what a fault costs, ours and the peers', measured in one run.

python -m bench.recovery [--trials 10] [--slow_trials 2] [--only worker,node,…] [--faults 500]

``make soak`` has the rows of long jobs (``--soak``).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from bench import recovery_health, recovery_kinds, recovery_more, recovery_report, report
from bench.drive import HERE, TORCH_PYTHON
from bench.recovery_jobs import has_torchft
from bench.recovery_kinds import Kind
from bench.recovery_trials import Outcome, Say, run, say_to_stderr
from bench.storage import clean

PARTS = {
    "worker": recovery_kinds.WORKER,
    "node": recovery_kinds.NODE,
    "hang": recovery_kinds.HANG,
    "restart": recovery_kinds.RESTART,
    "health": "",
    "join": "",
    "overhead": "",
}
SOAK = {"health": "", "many": "", "goodput": ""}
"""Those of jobs that last for a quarter of an hour each."""


def torch_versions() -> str:
    """Versions of what is in .venv-torch, as its own metadata tell."""
    if not TORCH_PYTHON.exists():
        return "not installed"
    found = []
    for folder in (TORCH_PYTHON.parent.parent / "lib").glob("python*/site-packages"):
        for d in metadata.distributions(path=[str(folder)]):
            if d.metadata["Name"] in ("torch", "torchft"):
                found.append(f"{d.metadata['Name']} {d.version}")
    return " and ".join(sorted(found)).removeprefix("torch ")


class Report:
    """The result so far; written anew after each row, so that a stop loses one at most."""

    def __init__(self, folder: Path, name: str, begin_s: float) -> None:
        self._name = name
        self.outcomes: list[Outcome] = []
        self.rows: list[report.Row] = []
        self.loads = [os.getloadavg()[0]]
        self._folder, self._begin_s = folder, begin_s
        self._facts = report.machine(torch_versions())

    def write(self) -> None:
        took_s = time.monotonic() - self._begin_s
        found = (self.outcomes, self.rows, self.loads)
        recovery_report.write(self._folder, self._name, self._facts, *found, took_s)
        self.loads.append(os.getloadavg()[0])


def faults(
    result: Report, folder: Path, parts: list[str], args: argparse.Namespace, say: Say
) -> None:
    """The rows of single faults."""
    groups = {PARTS.get(p, "") for p in parts}
    for kind in recovery_kinds.kinds(folder):
        outcome = kind.outcome
        if outcome.group not in groups or str(outcome.ranks) not in args.ranks.split(","):
            continue
        if args.ours and outcome.name != "paddle_ft":
            continue
        result.outcomes.append(outcome)
        if outcome.not_run:
            say(f"  {outcome.name}: {outcome.not_run}")
        else:
            ours = outcome.name == "paddle_ft" and (outcome.goal_s is not None or outcome.hangs)
            quick = args.trials if ours else args.peer_trials or args.trials
            run_kind(kind, args.slow_trials if kind.slow else quick, say)
        result.write()


def run_kind(kind: Kind, trials: int, say: Say) -> None:
    say(f"{kind.outcome.group}: {kind.outcome.name}, {kind.outcome.settings}")
    run(kind.outcome, kind.make, kind.fault, trials, kind.timeout_s, say)


def more(
    result: Report, folder: Path, parts: list[str], args: argparse.Namespace, say: Say
) -> None:
    """The rows that are not of one fault."""
    torch = has_torchft() and not args.ours
    work = {
        "health": lambda: recovery_health.health(
            folder, args.stragglers, args.undisturbed_steps, say
        ),
        "join": lambda: recovery_more.joining(folder, args.joins, say),
        "overhead": lambda: recovery_more.overhead(folder, args.rounds, 10.0, say),
        "many": lambda: recovery_more.many_faults(folder, args.faults, say),
        "goodput": lambda: [recovery_more.goodput(folder, args.goodput_s, 30.0, torch, say)],
    }
    for part, measure in work.items():
        if part in parts:
            result.rows += measure()
            result.write()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.recovery")
    parser.add_argument("--trials", type=int, default=10, help="faults of each quick row")
    parser.add_argument("--peer_trials", type=int, default=0, help="of rows without a goal")
    parser.add_argument("--slow_trials", type=int, default=2, help="of rows that take minutes")
    parser.add_argument("--faults", type=int, default=30, help="in the one job of many (500)")
    parser.add_argument("--goodput_s", type=float, default=60.0, help="of each system (600)")
    parser.add_argument(
        "--stragglers", type=int, default=10, help="ranks that are made slower (20)"
    )
    parser.add_argument(
        "--undisturbed_steps", type=int, default=500, help="in which nobody is to be named (10000)"
    )
    parser.add_argument("--joins", type=int, default=3, help="nodes that join, one after another")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each loop for the overhead")
    parser.add_argument("--ranks", default="2,3", help="sizes of the jobs that are hurt")
    parser.add_argument("--ours", action="store_true", help="leave the peers out")
    parser.add_argument("--soak", action="store_true", help="the long jobs, in place of the others")
    parser.add_argument("--only", default="", help="parts, separated by commas")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs")
    args = parser.parse_args()
    known = SOAK if args.soak else PARTS
    parts = args.only.split(",") if args.only else list(known)
    if unknown := set(parts) - set(known):
        parser.error(f"there is no part {min(unknown)}: {', '.join(known)}")
    begin_s = time.monotonic()
    say = say_to_stderr(begin_s)
    name = "soak" if args.soak else "bench-recovery"
    result = Report(args.out, name, begin_s)
    with clean(Path(tempfile.gettempdir()) / f"paddle_ft-bench-{os.getpid()}") as folder:
        faults(result, folder, parts, args, say)
        more(result, folder, parts, args, say)
    say(f"written to {args.out}/{name}.md and .json")
    missed = [f"{o.name}, {o.settings}" for o in result.outcomes if o.reached is False]
    for name in (*missed, *(row.name for row in result.rows if row.reached is False)):
        say(f"missed: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
