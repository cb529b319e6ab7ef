"""The same job for ``torchrun``: DistributedDataParallel, saved by rank 0 every few steps."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
import torch.distributed as dist
from steplog import HIDDEN, SAMPLES, WIDTH, StepLog, parse
from torch import nn


def save(folder: str, step: int, model: Any, optimizer: Any) -> None:
    path = os.path.join(folder, "state.pt")
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, path + ".new")
    os.replace(path + ".new", path)


def load(folder: str, model: Any, optimizer: Any) -> int:
    path = os.path.join(folder, "state.pt")
    if not folder or not os.path.exists(path):
        return 0
    state = torch.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def main() -> None:
    given = parse()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
    optimizer = torch.optim.Adam(plain.parameters(), 1e-3)
    step = load(given.state, plain, optimizer)
    model = nn.parallel.DistributedDataParallel(plain)
    rows = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))
    log = StepLog(given.record)
    own = SAMPLES // world
    while step < given.steps:
        x = rows[[(step * SAMPLES + rank * own + i) % 64 for i in range(own)]]
        time.sleep(given.sleep_s)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        log.applied(rank, world, step)
        if given.state and rank == 0 and step % given.every == 0:
            save(given.state, step, plain, optimizer)


if __name__ == "__main__":
    main()
