"""The training script of the benchmark; run it with ``python -m paddle_ft.launch``.

Its state is ``--mbytes`` in 50 tensors. Cases:

- ``heavy``: every byte is trained (25 layers and their momentum), a step lasts several copies;
- ``frozen``: one layer is trained in front of frozen tables, a step is shorter than a copy;
- ``sparse``: tables of which a step changes a few rows, a step is shorter than a copy;
- ``driven``: as ``heavy``, but a step is quick, and each is asked for over the socket
  ``--control`` and answered with the times of its checkpoint.

Each rank writes ``rank-<r>.json`` to ``--report``: the times of all iterations and snapshots, and
what a plain copy of the rank's share of the state takes in this process.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

import paddle_ft as ft

TENSORS = 50
EPOCH_STEPS = 10
WARM_UP_STEPS = (3, 6)
"""Snapshots that are not counted: they are the first in their buffers."""


def side(mbytes: float) -> int:
    """Width of a square layer that is one of ``TENSORS`` of ``mbytes``."""
    return int((mbytes * 1e6 / 4 / TENSORS) ** 0.5)


class Dense(nn.Layer):
    """Layers that hold half of the tensors; the optimizer's momentum is the other half."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.LayerList(
            [nn.Linear(width, width, bias_attr=False) for _ in range(TENSORS // 2)]
        )

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class Tables(nn.Layer):
    """Embedding tables, and one layer behind them that is applied several times."""

    def __init__(self, width: int, frozen: bool) -> None:
        super().__init__()
        self.rows = width * width // 64
        self.tables = nn.LayerList(
            [nn.Embedding(self.rows, 64, sparse=not frozen) for _ in range(TENSORS - 2)]
        )
        for table in self.tables:
            table.weight.stop_gradient = frozen
        self.head = nn.Linear(64, 64)
        self.body = nn.Linear(width, width, bias_attr=False)

    def forward(self, x: Any) -> Any:
        rows = (x[:, 0].abs() * 1e6).astype("int64") % self.rows
        found = self.tables[0](rows)
        for table in self.tables[1:4]:
            found = found + table(rows)
        return self.body(x) + self.head(found).mean()


class Rows(paddle.io.Dataset):
    def __init__(self, length: int, width: int) -> None:
        self._length = length
        self._rows = np.random.default_rng(0).standard_normal((64, width)).astype("float32")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self._rows[index % 64]


def build(case: str, mbytes: float) -> tuple[Any, Any]:
    width = side(mbytes)
    if case in ("heavy", "driven"):
        model: nn.Layer = Dense(width)
        trained = model.parameters()
    else:
        model = Tables(width, frozen=case == "frozen")
        trained = [p for p in model.parameters() if not p.stop_gradient]
    if case == "sparse":  # momentum would touch every row
        return model, paddle.optimizer.SGD(1e-5, parameters=trained)
    return model, paddle.optimizer.Momentum(1e-5, parameters=trained)


def copy_times(session: Any, share_bytes: int, times: int) -> list[float]:
    """Seconds that one plain copy of this rank's share takes; the ranks copy at the same time."""
    source = np.ones(share_bytes, dtype=np.uint8)
    memory = mmap.mmap(-1, share_bytes)
    target = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.memmove(target, source.ctypes.data, share_bytes)
    taken = []
    for _ in range(times):
        if session.world_size > 1:
            paddle.distributed.barrier()
        start_s = time.perf_counter()
        ctypes.memmove(target, source.ctypes.data, share_bytes)
        taken.append(time.perf_counter() - start_s)
    return taken


class Watch:
    """Notes of each snapshot: its step, its buffer, and for how long training was held for it."""

    def __init__(self, session: Any) -> None:
        self.snapshots: list[dict[str, Any]] = []
        self._recorder, self._keeper = session._saver._recorder, session._keeper
        self._acquire, self._before = self._keeper.acquire, self._recorder.before_step
        self._buffer = -1
        self._take = self._recorder.take
        self._keeper.acquire = self.acquire
        self._recorder.before_step = self.before_step
        self._recorder.take = self.take

    def acquire(self, nbytes: int, wait: bool) -> Any:
        acquired = self._acquire(nbytes, wait)
        self._buffer = acquired[0] if acquired else -1
        return acquired

    def take(self, step: int, *args: Any, **kwargs: Any) -> bool:
        taken: bool = self._take(step, *args, **kwargs)
        if taken:
            first = all(s["buffer"] != self._buffer for s in self.snapshots)
            self.snapshots.append({"step": step, "buffer": self._buffer, "first": first})
        return taken

    def before_step(self, loss: Any) -> float | None:
        held_s: float | None = self._before(loss)
        if held_s is not None:
            self.snapshots[-1]["held_s"] = held_s
        return held_s


def train_step(session: Any, model: Any, x: Any, repeat: int) -> None:
    for _ in range(repeat):
        model(x).square().mean().backward()
    session.step()


def run_free(session: Any, model: Any, batches: Iterator[Any], repeat: int) -> list[list[float]]:
    """[start, batch there, end] of every iteration, seconds."""
    times = []
    while True:
        start_s = time.perf_counter()
        x = next(batches, None)
        if x is None:
            return times
        ready_s = time.perf_counter()
        train_step(session, model, x, repeat)
        times.append([start_s, ready_s, time.perf_counter()])


def run_driven(session: Any, model: Any, batches: Iterator[Any], control: str) -> None:
    """One step and its checkpoint for each line that comes; answers when that is committed."""
    train_step(session, model, next(batches), 1)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(control)
        with connection.makefile("rw") as stream:
            stream.write("{}\n")
            stream.flush()
            for _ in stream:
                step = session.global_step
                start_s = time.perf_counter()
                x = next(batches)  # takes the snapshot
                back_s = time.perf_counter()
                session._keeper.wait_committed(step)
                end_s = time.perf_counter()
                train_step(session, model, x, 1)
                answer = {"blocked_s": back_s - start_s, "durable_s": end_s - start_s}
                stream.write(json.dumps(answer) + "\n")
                stream.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", required=True)
    parser.add_argument("--mbytes", type=float, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--samples", type=int, default=8, help="of a step, over all ranks")
    parser.add_argument("--repeat", type=int, default=1, help="passes for each step")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--control", default="")
    parser.add_argument("--paddle_save", type=Path)
    args = parser.parse_args()
    paddle.seed(0)
    model, optimizer = build(args.case, args.mbytes)
    every = ft.EveryNSteps(args.every)

    def due(facts: Any) -> bool:
        return facts.step in WARM_UP_STEPS or every(facts)

    with ft.session(model=model, optimizer=optimizer, save=due) as session:
        watch = Watch(session)
        share_bytes = int(args.mbytes * 1e6) // session.world_size
        copies = copy_times(session, share_bytes, 7)
        # A restarted job goes on with the same data set, so its length does not follow the steps.
        data = Rows(EPOCH_STEPS * args.samples, side(args.mbytes))
        epochs = args.steps // EPOCH_STEPS
        batches = session.batches(data, batch_size=args.samples, epochs=epochs)
        if args.control:
            run_driven(session, model, batches, args.control)
            times = []
        else:
            times = run_free(session, model, batches, args.repeat)
        copies += copy_times(session, share_bytes, 7)
    saved = []
    if args.paddle_save and session.rank == 0:
        for _ in range(3):
            start_s = time.perf_counter()
            paddle.save(model.state_dict(), str(args.paddle_save / "model.pdparams"))
            paddle.save(optimizer.state_dict(), str(args.paddle_save / "model.pdopt"))
            saved.append(time.perf_counter() - start_s)
    report = {
        "iterations": times, "snapshots": watch.snapshots, "copies": copies, "paddle_save": saved,
    }  # fmt: skip
    (args.report / f"rank-{session.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
