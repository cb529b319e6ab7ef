"""`make demo`: trains twice, once undisturbed and once with a worker killed, and compares.

Ends with exit code 0 only if both runs end with the same weights, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIRECTORY = ROOT / ".demo"
CHECKPOINT_EVERY = 50
RUN_S_MAX = 300.0


@dataclass
class Run:
    """What was seen of one training."""

    name: str
    started_s: float
    step: int = 0
    steps: int = 0
    final: str = ""
    killed_s: float = 0.0
    killed_step: int = 0
    generation_s: float = 0.0
    resumed_from: int = 0
    in_place: bool = False
    resumed_s: float = 0.0

    def result(self, key: str) -> str:
        """A value of the last line, which reads ``final key=value key=value …``."""
        return dict(pair.split("=") for pair in self.final.split()[1:])[key]


class Demo:
    def __init__(self, epochs: int, seed: int) -> None:
        self.epochs = epochs
        self.dice = random.Random(seed)

    def train(self, name: str, at_step: Callable[[Run], None] = lambda run: None) -> Run:
        """Runs the digits on two ranks; ``at_step`` is called after every step it tells of."""
        home = DIRECTORY / name
        home.mkdir(parents=True)
        command = [
            *(sys.executable, "-m", "paddle_ft.launch", "--nproc_per_node", "2"),
            *("--job_id", f"demo-{name}", "--checkpoint", str(home / "checkpoints")),
            *("--checkpoint_every", str(CHECKPOINT_EVERY), "--log_dir", str(home / "log")),
            *(str(ROOT / "examples/digits/train.py"), "--log-every", "1"),
            *("--epochs", str(self.epochs)),
        ]
        run = Run(name, time.monotonic())
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        alarm = threading.Timer(RUN_S_MAX, process.kill)
        alarm.start()
        try:
            assert process.stdout is not None
            with (home / "output.txt").open("w") as output:
                for line in process.stdout:
                    output.write(line)
                    self.take(run, line, at_step)
            process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            alarm.cancel()
        if process.returncode != 0 or not run.final:
            told = (home / "output.txt").read_text().splitlines()[-15:]
            sys.exit("\n".join([f"the training {name} ended with {process.returncode}:", *told]))
        return run

    def take(self, run: Run, line: str, at_step: Callable[[Run], None]) -> None:
        now_s = time.monotonic()
        if found := re.search(r"\] step (\d+) of (\d+)", line):
            run.step, run.steps = int(found[1]), int(found[2])
            if run.generation_s and not run.resumed_s:
                run.resumed_s = now_s
                tell_recovery(run)
            if run.step % (run.steps // 5) == 0:
                say(f"  step {run.step} of {run.steps}")
            at_step(run)
        elif found := re.search(r"generation (\d+): .*?(?:the checkpoint of step (\d+)|;)", line):
            if int(found[1]) > 1:
                run.generation_s, run.resumed_from = now_s, int(found[2] or 0)
                run.in_place = "in place" in line
        elif found := re.search(r"\] (final .*)", line):
            run.final = found[1]
            say(
                f"  finished after {now_s - run.started_s:.0f} s: test accuracy "
                f"{float(run.result('accuracy')):.1%}, weights {run.result('weights')[:16]}…"
            )

    def killer(self) -> Callable[[Run], None]:
        """Kills one of the two workers at a random moment, once."""
        moment, victim = self.dice.uniform(0.2, 0.8), self.dice.randrange(2)

        def at_step(run: Run) -> None:
            if run.killed_s or run.step < moment * run.steps:
                return
            told = json.loads((DIRECTORY / run.name / "log/workers.json").read_text())
            pid = next(worker["pid"] for worker in told["workers"] if worker["rank"] == victim)
            os.kill(pid, signal.SIGKILL)
            run.killed_s, run.killed_step = time.monotonic(), run.step
            say(f"  >>> at step {run.step} rank {victim} (process {pid}) is killed")

        return at_step


def say(text: str) -> None:
    print(text, flush=True)


def tell_recovery(run: Run) -> None:
    noticed_s = run.generation_s - run.killed_s
    if run.in_place:
        say(f"      after {noticed_s:.2f} s the launcher has noticed; the other worker goes on")
        say("      as it is, and a new one takes the state from it: no step is computed")
        say("      again, no sample is used twice or left out")
    else:
        again = run.killed_step - run.resumed_from
        say(f"      after {noticed_s:.2f} s the launcher has noticed, and starts")
        say(f"      both workers anew from the checkpoint of step {run.resumed_from}:")
        say(f"      {again} steps are computed again, no sample is used twice or left out")
    say(f"      after {run.resumed_s - run.killed_s:.2f} s training goes on with step {run.step}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, help="chooses the moment and the victim")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10_000)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    demo = Demo(args.epochs, seed)

    say("1. Two worker processes train a small network on handwritten digits, undisturbed.")
    calm = demo.train("undisturbed")
    say("")
    say("2. The same again; at a random moment one of the two is killed with SIGKILL, which leaves")
    say(f"   it no chance to save anything. (--seed {seed} chooses the same moment again.)")
    hit = demo.train("killed", demo.killer())
    say("")
    say("3. The weights of the two networks, all parameters together, as sha256:")
    say(f"   undisturbed  {calm.result('weights')}")
    say(f"   killed       {hit.result('weights')}")
    if not hit.resumed_s:
        say("   but no worker was killed in time: this shows nothing. Run it again.")
        return 1
    if calm.final.split()[1:5] != hit.final.split()[1:5]:
        say(f"   They differ. Please report this, with {DIRECTORY}.")
        return 1
    say("   They are equal, bit for bit: the failure left no trace in the result.")
    say(f"   (Everything the runs wrote is in {DIRECTORY.name}/.)")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
