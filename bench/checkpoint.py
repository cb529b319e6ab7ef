"""``make bench-checkpoint``: everything that is said of checkpoints, measured in one run.

python -m bench.checkpoint [--mbytes 400] [--rounds 2] [--only stall,durable,…] [--out docs]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from bench import longrun, memory, report, stall, storage, volume
from bench.drive import HERE, torch_peer

PARTS = ("stall", "durable", "throughput", "bytes", "longrun", "memory")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoint")
    parser.add_argument("--mbytes", type=float, default=400.0, help="size of the state")
    parser.add_argument("--rounds", type=int, default=2, help="how often each job is run")
    parser.add_argument("--repeat", type=int, default=5, help="how often all else is run")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--folder", type=Path, help="where to write (the temporary directory)")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs")
    args = parser.parse_args()
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {min(unknown)}: {', '.join(PARTS)}")
    begin_s = time.monotonic()

    def say(what: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - begin_s:4.0f} s] {what}\n")

    facts = report.machine("not installed")
    rows: list[report.Row] = []
    parent = args.folder or Path(tempfile.gettempdir())
    with (
        storage.clean(parent / f"paddle_ft-bench-{os.getpid()}") as folder,
        torch_peer(folder, args.mbytes) as torch,
    ):
        if torch is not None:
            facts["packages"]["torch"] = torch.ask(do="facts")["torch"]
            for _ in range(2):
                torch.ask(do="dcp", stager="plain")
        if "stall" in parts:
            rows += stall.measure(folder, args.mbytes, args.rounds, torch, say)
        if "durable" in parts:
            rows += storage.measure_durable(folder, args.mbytes, args.repeat, torch, say)
        if "throughput" in parts:
            rows += storage.measure_throughput(folder, args.mbytes, args.repeat, say)
        if "bytes" in parts:
            rows += volume.measure(folder, args.mbytes, say)
        if "longrun" in parts:
            rows += longrun.measure(folder, args.mbytes, say)
        if "memory" in parts:
            rows += memory.measure(folder, args.mbytes, say)
    report.write(args.out, facts, rows, time.monotonic() - begin_s)
    say(f"written to {args.out}/bench-checkpoint.md and .json")
    missed = [row.name for row in rows if row.reached is False]
    for name in missed:
        say(f"missed: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
