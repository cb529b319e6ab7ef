"""``make bench-serving``: what serving keeps to while it is hurt, and what it costs.

python -m bench.serving [--only kills-2,promote] [--trials 100] [--stops 50] [--etcd_s 300]

Each part that has ended is written into the report at once, in place of what it said of it before;
so a part can be repeated by itself.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from bench import (
    report,
    serving_faults,
    serving_hop,
    serving_ocr,
    serving_report,
    serving_speed,
)
from bench.recovery_trials import say_to_stderr
from bench.report import Row
from bench.serving_model import HERE, Model, make_model
from bench.serving_nodes import NodesApart
from bench.serving_report import Part
from bench.serving_rows import Say
from bench.serving_world import Broken, World
from bench.storage import clean
from paddle_ft.errors import PaddleFTError

LEAN = ("--spares", "0", "--threads", "1")
"""Flags of the replicas: two cores carry all of them, the clients and whatever starts again."""


class Bench:
    """The parts, each a method that gives its rows."""

    def __init__(self, folder: Path, args: argparse.Namespace, say: Say) -> None:
        self._folder, self._args, self._say = folder, args, say
        self._logs: Path | None = args.logs

    def parts(self) -> dict[str, tuple[str, Callable[[], list[Row]]]]:
        """By name: what was asked for, in words, and how it is done."""
        a = self._args
        load = f"{a.rate:g} POST/s through the gateway"
        return {
            "kills-2": (f"{a.trials} + {a.trials} kills, {load}", lambda: self._kills(2)),
            "kills-3": (f"{a.trials} + {a.trials} kills, {load}", lambda: self._kills(3)),
            "lost_node": (f"{a.cuts} times, {load}", self._lost_node),
            "stops": (f"{a.stops} times, {load}", self._stops),
            "promote": (f"{a.promotions} times, {load}", self._promote),
            "etcd-stopped": (load, lambda: self._etcd("SIGSTOP")),
            "etcd-killed": (load, lambda: self._etcd("SIGKILL")),
            "update": (f"{a.updates} times, {load}", self._update),
            "batching": (f"{a.rounds} rounds of {a.for_s:g} s", self._batching),
            "added": (f"{a.rounds} rounds of {a.calls} calls", self._added),
            "hop": (f"{a.rounds} rounds of {a.calls} calls", self._hop),
            "cost": (f"{a.rate:g} POST/s through the gateway for {2 * a.for_s:g} s", self._cost),
            "ocr": (f"{a.ocr_s:g} s", self._ocr),
        }

    def _model(self, name: str = "digits", versions: int = 1, hidden: int = 128) -> Model:
        place = self._folder / f"models-{name}-{versions}"
        place.mkdir(exist_ok=True)
        return make_model(place, name, versions, hidden)

    def _world(self, replicas: int, versions: int = 1) -> World:
        model = self._model(versions=versions)
        return World(self._folder, model, replicas, flags=LEAN, logs=self._logs)

    def _kills(self, replicas: int) -> list[Row]:
        with self._world(replicas) as world:
            return serving_faults.kills(world, self._args.trials, self._args.rate, self._say)

    def _stops(self) -> list[Row]:
        with self._world(2) as world:
            return serving_faults.stops(world, self._args.stops, self._args.rate, self._say)

    def _promote(self) -> list[Row]:
        with self._world(2) as world:
            return serving_faults.promotions(
                world, self._args.promotions, self._args.rate, self._say
            )

    def _etcd(self, how: str) -> list[Row]:
        a = self._args
        with self._world(2) as world:
            return serving_faults.etcd_away(world, how, a.etcd_s, a.rate, self._say)

    def _update(self) -> list[Row]:
        count = self._args.updates
        with self._world(2, count + 1) as world:
            return serving_faults.updates(world, count, self._args.rate, self._say)

    def _lost_node(self) -> list[Row]:
        with NodesApart(self._folder, self._model(), LEAN, self._logs) as world:
            return serving_faults.lost_node(
                world, world.cut, self._args.cuts, self._args.rate, self._say
            )

    def _batching(self) -> list[Row]:
        models = [self._model(), self._model("wide", 1, 2048)]
        return serving_speed.batching(
            self._folder, models, self._args.rounds, self._args.for_s, self._say
        )

    def _added(self) -> list[Row]:
        a = self._args
        return serving_speed.added(self._folder, self._model(), a.rounds, a.calls, self._say)

    def _hop(self) -> list[Row]:
        with self._world(2) as world:
            return serving_hop.hop(world, self._args.rounds, self._args.calls, self._say)

    def _cost(self) -> list[Row]:
        with self._world(2) as world:
            return serving_hop.cost(world, self._args.rate, 2 * self._args.for_s, self._say)

    def _ocr(self) -> list[Row]:
        return serving_ocr.ocr(self._folder, self._args.ocr_s, self._say)


def measure(name: str, options: str, work: Callable[[], list[Row]], say: Say) -> Part:
    """What cannot be measured is told in the row of the part."""
    busy = busy_share()
    begin_s, before = time.monotonic(), os.getloadavg()[0]
    at = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    try:
        rows = work()
    except (
        Broken,
        PaddleFTError,
        OSError,
        AssertionError,
        grpc.RpcError,
        subprocess.SubprocessError,
    ) as error:
        say(f"{name} cannot be measured: {error}")
        rows = serving_report.unfinished(name, str(error))
    took_s = round(time.monotonic() - begin_s, 1)
    loads = (round(before, 2), round(os.getloadavg()[0], 2))
    return Part(rows, at, took_s, loads, options, commit(), round(busy, 3))


def busy_share(for_s: float = 3.0) -> float:
    """Share of the processors in use, by whomever."""
    first = _ticks()
    time.sleep(for_s)
    second = _ticks()
    idle, whole = (b - a for a, b in zip(first, second, strict=True))
    return 1 - idle / whole


def _ticks() -> tuple[int, int]:
    """Of all processors since the start: idle ones, and all."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    ticks = [int(field) for field in fields]
    return ticks[3] + ticks[4], sum(ticks)


def commit() -> str:
    command = ["git", "-C", str(HERE.parent), "rev-parse", "--short", "HEAD"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip()


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.serving")
    parser.add_argument(
        "--trials", type=int, default=100, help="kills of the primary, and of others"
    )
    parser.add_argument("--stops", type=int, default=50)
    parser.add_argument("--promotions", type=int, default=50)
    parser.add_argument("--cuts", type=int, default=10, help="of the primary's node (root only)")
    parser.add_argument("--updates", type=int, default=5, help="versions loaded under load")
    parser.add_argument("--etcd_s", type=float, default=300.0, help="for so long etcd is away")
    parser.add_argument("--rate", type=float, default=200.0, help="POST a second under faults")
    parser.add_argument("--rounds", type=int, default=5, help="of what is measured in turn")
    parser.add_argument("--for_s", type=float, default=8.0, help="of each round of throughput")
    parser.add_argument("--calls", type=int, default=500, help="of each round of latency")
    parser.add_argument("--ocr_s", type=float, default=60.0)
    parser.add_argument("--only", default="", help="parts, or how their names begin, by commas")
    parser.add_argument("--logs", type=Path, help="where the logs of the last world are to stay")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs")
    return parser


def chosen(only: str, known: list[str]) -> list[str]:
    """In the order of ``known``; raises ValueError, naming what is not there."""
    if not only:
        return known
    wanted = only.split(",")
    for name in wanted:
        if not any(part.startswith(name) for part in known):
            raise ValueError(f"there is no part {name}: {', '.join(known)}")
    return [part for part in known if part.startswith(tuple(wanted))]


def run(args: argparse.Namespace, names: list[str], bench: Bench, say: Say) -> dict[str, Part]:
    """All that is in the report then."""
    facts: dict[str, Any] = report.machine("not used")
    known = bench.parts()
    parts = serving_report.read(args.out)
    for number, name in enumerate(names, 1):
        say(f"{name}, part {number} of {len(names)}")
        options, work = known[name]
        parts[name] = measure(name, options, work, say)
        serving_report.write(args.out, parts, facts, list(known))
    return parts


def main() -> int:
    parser = arguments()
    args = parser.parse_args()
    say = say_to_stderr(time.monotonic())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: all is removed
    with clean(Path(tempfile.gettempdir()) / f"paddle_ft-bench-{os.getpid()}") as folder:
        bench = Bench(folder, args, say)
        try:
            names = chosen(args.only, list(bench.parts()))
        except ValueError as error:
            parser.error(str(error))
        try:
            parts = run(args, names, bench, say)
        except KeyboardInterrupt:
            say("stopped; what has ended before stands in the report")
            return 130
    say(f"written to {args.out}/{serving_report.NAME}.md and .json")
    for name in names:
        for row in parts[name].rows:
            if row.reached is False:
                say(f"missed: {row.group}: {row.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
