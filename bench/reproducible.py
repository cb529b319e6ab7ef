"""What ``reproducible`` costs: steps with and without it, in turn, in the same processes.

    .venv/bin/python -m bench.reproducible          # some two minutes; prints a table in Markdown

Models: ``mlp`` (790,000 parameters, 96 samples a step) and ``small`` (19,000 parameters and a
BatchNorm, 96 samples a step), for which the overhead of each pass is nearly everything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from paddle_ft.agent.net import free_ports

MODES: tuple[bool | int, ...] = (False, 4, 12)
ROUNDS = 2
WARM_UP_STEPS = 3
TIMEOUT_S = 300


def model_of(kind: str) -> tuple[Any, int, int]:
    """A model, its inputs and the samples of a step."""
    from paddle import nn

    if kind == "mlp":
        width = 512
        layers = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.GELU())]
        return nn.Sequential(*layers), width, 96
    small = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1D(128), nn.ReLU(), nn.Linear(128, 64))
    return small, 64, 96


def measure(kind: str, mode: bool | int, steps: int) -> list[float]:
    """Milliseconds of each step."""
    import numpy as np
    import paddle

    import paddle_ft as ft

    model, width, batch_size = model_of(kind)
    rows = np.random.RandomState(0).randn(batch_size, width).astype("float32")
    data = paddle.io.TensorDataset([rows])
    optimizer = paddle.optimizer.Adam(1e-3, parameters=model.parameters())
    times = []
    with ft.session(model=model, optimizer=optimizer, reproducible=mode) as s:
        start_s = time.perf_counter()
        for (x,) in s.batches(data, batch_size=batch_size, epochs=steps + WARM_UP_STEPS):
            loss = (model(x) ** 2).mean()
            loss.backward()
            if s.step(loss):
                now_s = time.perf_counter()
                times.append((now_s - start_s) * 1e3)
                start_s = now_s
    return times[WARM_UP_STEPS:]


def work(kind: str, steps: int) -> None:
    """One rank: all modes in turn."""
    times: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for mode in MODES:
            times.setdefault(str(int(mode)), []).extend(measure(kind, mode, steps))
    if os.environ.get("PADDLE_TRAINER_ID", "0") == "0":
        medians = {mode: statistics.median(values) for mode, values in times.items()}
        sys.stdout.write(json.dumps(medians) + "\n")


def run(kind: str, world_size: int, steps: int) -> dict[str, float]:
    """Median milliseconds of a step, by number of shards."""
    endpoints = [f"127.0.0.1:{port}" for port in free_ports("127.0.0.1", world_size + 1)]
    master, *own = endpoints
    processes = []
    for rank in range(world_size):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if world_size > 1:
            env |= {
                "PADDLE_MASTER": master,
                "PADDLE_TRAINER_ID": str(rank),
                "PADDLE_TRAINERS_NUM": str(world_size),
                "PADDLE_CURRENT_ENDPOINT": own[rank],
                "PADDLE_TRAINER_ENDPOINTS": ",".join(own),
                "PADDLE_DISTRI_BACKEND": "gloo",
            }
        command = [sys.executable, "-m", "bench.reproducible", "--rank-of", kind]
        command += ["--steps", str(steps)]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    result: dict[str, float] = json.loads(outputs[0].splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rank-of", help="(a rank of the benchmark itself)")
    given = parser.parse_args()
    if given.rank_of:
        work(given.rank_of, given.steps)
        return
    shards = [int(mode) for mode in MODES if mode]
    titles = "".join(f" {n} shards | × |" for n in shards)
    sys.stdout.write(f"| model | ranks | off, ms |{titles}\n")
    sys.stdout.write("| --- | --- | --- |" + " --- | --- |" * len(shards) + "\n")
    for kind in ("mlp", "small"):
        for world_size in given.worlds:
            times = run(kind, world_size, given.steps)
            off = times["0"]
            cells = "".join(f" {times[str(n)]:.3g} | {times[str(n)] / off:.2f} |" for n in shards)
            sys.stdout.write(f"| {kind} | {world_size} | {off:.3g} |{cells}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
