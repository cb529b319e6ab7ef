"""A small training with everything that makes resuming hard; what it used is written down.

Each rank appends a line of JSON for each step that it tries to ``<record>/<rank>-<pid>.jsonl``:
generation, step, ids of its samples. The last line on rank 0 holds a hash of the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import paddle

import paddle_ft as ft

arguments = argparse.ArgumentParser()
arguments.add_argument("--record", type=Path, required=True)
arguments.add_argument("--samples", type=int, default=100)
arguments.add_argument("--batch-size", type=int, default=8)
arguments.add_argument("--epochs", type=int, default=3)
arguments.add_argument("--width", type=int, default=16)
arguments.add_argument("--delay", type=float, default=0.0)
arguments.add_argument("--fail-at", type=int, default=-1)
arguments.add_argument("--reproducible", type=int, default=0)
arguments.add_argument("--parallel", action="store_true")
given = arguments.parse_args()


class Numbers(paddle.io.Dataset):
    def __init__(self) -> None:
        random = np.random.RandomState(0)
        self.x = random.randn(given.samples, 8).astype("float32")
        self.y = (self.x.sum(1, keepdims=True) > 0).astype("float32")

    def __len__(self) -> int:
        return given.samples

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.x[i], self.y[i], np.int64(i)


paddle.seed(7)
model = paddle.nn.Sequential(
    paddle.nn.Linear(8, given.width),
    paddle.nn.BatchNorm1D(given.width),
    paddle.nn.ReLU(),
    paddle.nn.Dropout(0.2),
    paddle.nn.Linear(given.width, 1),
)
if given.parallel:
    paddle.distributed.init_parallel_env()
    model = paddle.DataParallel(model)
schedule = paddle.optimizer.lr.CosineAnnealingDecay(1e-2, T_max=40)
optimizer = paddle.optimizer.Adam(
    schedule,
    parameters=model.parameters(),
    grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0),
)
loss_of = paddle.nn.BCEWithLogitsLoss()
given.record.mkdir(parents=True, exist_ok=True)

with ft.session(
    model=model,
    optimizer=optimizer,
    lr_scheduler=schedule,
    reproducible=given.reproducible or False,
) as s:
    with (given.record / f"{s.rank}-{os.getpid()}.jsonl").open("a") as record:
        for x, y, ids in s.batches(
            Numbers(), batch_size=given.batch_size, epochs=given.epochs, shuffle=True, seed=3
        ):
            if s.global_step == given.fail_at:
                raise ValueError("a bug in the script")
            loss = loss_of(model(x), y)
            loss.backward()
            time.sleep(given.delay)
            used = ids.numpy().tolist() if s.weight else []
            line = {"generation": s.generation, "step": s.global_step + 1, "ids": used}
            record.write(json.dumps(line) + "\n")
            record.flush()
            s.step(loss)
    if s.rank == 0:
        digest = hashlib.sha256()
        for tensor in [*model.state_dict().values()]:
            digest.update(tensor.numpy().tobytes())
        print(
            f"final step={s.global_step} weights={digest.hexdigest()} world={s.world_size} "
            f"restarts={s.restarts} paddle={paddle.distributed.get_world_size()} "
            f"group={paddle.distributed.is_initialized()}",
            flush=True,
        )
