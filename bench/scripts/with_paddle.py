"""The same job as a plain loop, for ``paddle.distributed.launch``: one all-reduce of all gradients.

With ``--state`` rank 0 saves every few steps, and a worker that starts goes on from there.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn
from steplog import HIDDEN, SAMPLES, WIDTH, StepLog, parse


def save(folder: str, step: int, model: Any, optimizer: Any) -> None:
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    path = os.path.join(folder, "state.pdparams")
    paddle.save(state, path + ".new")
    os.replace(path + ".new", path)


def load(folder: str, model: Any, optimizer: Any) -> int:
    path = os.path.join(folder, "state.pdparams")
    if not folder or not os.path.exists(path):
        return 0
    state = paddle.load(path)
    model.set_state_dict(state["model"])
    optimizer.set_state_dict(state["optimizer"])
    return int(state["step"])


def reduce(parameters: list[Any], world: int) -> None:
    flat = paddle.concat([p.grad.reshape([-1]) for p in parameters])
    dist.all_reduce(flat)
    at = 0
    for p in parameters:
        p.grad.set_value((flat[at : at + p.size] / world).reshape(p.shape))
        at += p.size


def main() -> None:
    given = parse()
    dist.init_parallel_env()
    rank, world = dist.get_rank(), dist.get_world_size()
    paddle.seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
    optimizer = paddle.optimizer.Adam(1e-3, parameters=model.parameters())
    step = load(given.state, model, optimizer)
    rows = np.random.default_rng(0).standard_normal((64, WIDTH)).astype("float32")
    log = StepLog(given.record)
    own = SAMPLES // world
    while step < given.steps:
        x = paddle.to_tensor(rows[[(step * SAMPLES + rank * own + i) % 64 for i in range(own)]])
        time.sleep(given.sleep_s)
        model(x).square().mean().backward()
        reduce(model.parameters(), world)
        optimizer.step()
        optimizer.clear_grad()
        step += 1
        log.applied(rank, world, step)
        if given.state and rank == 0 and step % given.every == 0:
            save(given.state, step, model, optimizer)


if __name__ == "__main__":
    main()
