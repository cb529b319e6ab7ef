"""``python -m tests.sim.serve.run --seeds 1000``: runs of a simulated serving group, checked.

--seeds N       how many, from --from on
--without RULE  leave a rule out, and stop at the first seed that breaks a promise
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.sim.serve.group import Group
from tests.sim.serve.history import Broken


def made(seed: int, without: str = "") -> Group:
    """With disasters every fourth time: the others keep every promise without exception."""
    return Group(seed, without=without, disasters=seed % 4 == 3)


def told(group: Group) -> str:
    """What it breaks; "" if nothing."""
    try:
        group.run()
    except Broken as error:
        return str(error)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--without", default="")
    arguments = parser.parse_args()
    began_s, broken, done = time.process_time(), 0, Counter[str]()
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        group = made(seed, arguments.without)
        why = told(group)
        done += Counter(group.done)
        done["acknowledged"] += group.history.acknowledgements
        done["terms"] += len(group.history.leaders)
        if why:
            broken += 1
            print(f"seed {seed}: {why}", flush=True)
            if arguments.without:
                break
    took_s = time.process_time() - began_s
    counted = ", ".join(f"{name} {number}" for name, number in sorted(done.items()))
    print(f"{arguments.seeds} seeds, {broken} broken, {took_s:.1f} s: {counted}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
