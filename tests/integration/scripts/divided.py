"""A table divided by rows, a matrix divided by columns, each with Adam's moments, and a vector that
the script itself updates; what is computed of an element does not depend on who has it.

At the end each rank writes what it has to ``<record>/<name>-<rank>-<start>.npy``.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path

import numpy as np
import paddle

import paddle_ft as ft

ROWS, COLUMNS = 12, 6

arguments = argparse.ArgumentParser()
arguments.add_argument("--record", type=Path, required=True)
arguments.add_argument("--epochs", type=int, required=True)
arguments.add_argument("--die-at", type=int, default=-1)
arguments.add_argument("--late", action="store_true", help="only the vector is divided")
given = arguments.parse_args()

RANK = int(os.environ.get("PADDLE_TRAINER_ID", "0"))
WORLD = int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))


def mine(count: int) -> tuple[int, int]:
    return count * RANK // WORLD, count * (RANK + 1) // WORLD


class Model(paddle.nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        top, bottom = mine(ROWS)
        left, right = mine(COLUMNS)
        zeros = paddle.nn.initializer.Constant(0.0)
        self.table = self.create_parameter([bottom - top, 4], default_initializer=zeros)
        self.matrix = self.create_parameter([3, right - left], default_initializer=zeros)
        self.head = self.create_parameter([2], default_initializer=zeros)
        self.goals = [
            paddle.to_tensor(np.arange(ROWS * 4, dtype="float32").reshape(ROWS, 4)[top:bottom]),
            paddle.to_tensor(
                np.arange(3 * COLUMNS, dtype="float32").reshape(3, COLUMNS)[:, left:right].copy()
            ),
        ]

    def forward(self) -> paddle.Tensor:
        parts = [self.head.sum()] if given.late else [self.head.sum(), self.table, self.matrix]
        if given.late:
            return parts[0]
        return parts[0] + sum(
            ((part - goal) ** 2).sum() for part, goal in zip(parts[1:], self.goals, strict=True)
        )


model = Model()
optimizer = paddle.optimizer.Adam(0.1, parameters=model.parameters())
starts = {"table": (mine(ROWS)[0], 0), "matrix": (0, mine(COLUMNS)[0]), "vector": mine(ROWS)[:1]}
shards = {
    "table": ft.ShardOf(starts["table"], (ROWS, 4)),
    "matrix": ft.ShardOf(starts["matrix"], (3, COLUMNS)),
}
vector = paddle.zeros([mine(ROWS)[1] - mine(ROWS)[0]], dtype="float64")

with ft.session(model=model, optimizer=optimizer, shards=None if given.late else shards) as s:
    s.register_shard("vector", vector, start=starts["vector"], whole=(ROWS,))
    for _ in s.batches(list(range(4)), batch_size=4, epochs=given.epochs):
        model().backward()
        if given.die_at == s.global_step and s.rank == WORLD - 1 and not s.restarts:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        s.step()
        numbers = paddle.arange(*mine(ROWS), dtype="float64")
        paddle.assign(vector * 0.5 + numbers + s.global_step, output=vector)
    given.record.mkdir(parents=True, exist_ok=True)
    moments = {
        f"{kind}_{name}": optimizer._accumulators[kind][parameter.name]
        for kind in ("moment1", "moment2")
        for name, parameter in (("table", model.table), ("matrix", model.matrix))
        if not given.late
    }
    found = {"table": model.table, "matrix": model.matrix, "vector": vector, **moments}
    for name, tensor in found.items():
        np.save(given.record / f"{name}-{s.rank}.npy", tensor.numpy())
    print(f"ended step={s.global_step} world={s.world_size} restarts={s.restarts}", flush=True)
