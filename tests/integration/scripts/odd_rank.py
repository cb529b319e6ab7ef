"""A training in which one rank is odd: it takes longer for each step, or hangs once.

It hangs in the way of a script that waits for something else, once for a file ``--mark``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import paddle

import paddle_ft as ft

arguments = argparse.ArgumentParser()
arguments.add_argument("--rank", type=int, default=1)
arguments.add_argument("--steps", type=int, default=60)
arguments.add_argument("--step-s", type=float, default=0.05)
arguments.add_argument("--slower", type=float, default=1.0)
arguments.add_argument("--hang-at", type=int, default=-1)
arguments.add_argument("--mark", type=Path)
arguments.add_argument("--outputs", type=int, default=1)
given = arguments.parse_args()


class Numbers(paddle.io.Dataset):
    def __len__(self) -> int:
        return given.steps * 8

    def __getitem__(self, i: int) -> np.ndarray:
        return np.full(4, i % 7, "float32")


def waits_for_something_else() -> None:
    given.mark.touch()
    time.sleep(600)


paddle.seed(1)
model = paddle.nn.Linear(4, given.outputs)
optimizer = paddle.optimizer.SGD(1e-4, parameters=model.parameters())
with ft.session(model=model, optimizer=optimizer, save="never") as s:
    for x in s.batches(Numbers(), batch_size=8):
        loss = model(x).square().mean()
        loss.backward()
        time.sleep(given.step_s * (given.slower if s.rank == given.rank else 1.0))
        if s.rank == given.rank and s.global_step == given.hang_at and not given.mark.exists():
            waits_for_something_else()
        s.step(loss)
    if s.rank == 0:
        print(f"final step={s.global_step} restarts={s.restarts}", flush=True)
