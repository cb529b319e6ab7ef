"""The same job for torchft: one replica, of one process.

TORCHFT_LIGHTHOUSE names the lighthouse.
``--timeout_s``: of its collectives and of its quorum.
"""

from __future__ import annotations

import argparse
import logging
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from steplog import HIDDEN, SAMPLES, WIDTH, StepLog, parse
from torch import nn
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--replica", required=True)
    parser.add_argument("--timeout_s", type=float, default=60.0)
    given = parse(parser)
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
    adam = torch.optim.Adam(plain.parameters(), 1e-3)

    def load_state(state: dict[str, Any]) -> None:
        plain.load_state_dict(state["model"])
        adam.load_state_dict(state["optimizer"])

    def state() -> dict[str, Any]:
        return {"model": plain.state_dict(), "optimizer": adam.state_dict()}

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    timeout = timedelta(seconds=given.timeout_s)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timeout),
        load_state_dict=load_state,
        state_dict=state,
        min_replica_size=1,
        timeout=timeout,
        quorum_timeout=max(timeout, timedelta(seconds=60)),
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        replica_id=f"replica-{given.replica}",
    )
    model = DistributedDataParallel(manager, plain)
    optimizer = Optimizer(manager, adam)
    rows = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))
    log = StepLog(given.record)
    while manager.current_step() < given.steps:
        before = manager.current_step()
        time.sleep(given.sleep_s)
        optimizer.zero_grad()
        rank, world = manager.participating_rank() or 0, max(manager.num_participants(), 1)
        own = SAMPLES // world
        x = rows[[(before * SAMPLES + rank * own + i) % 64 for i in range(own)]]
        model(x).square().mean().backward()
        optimizer.step()
        if manager.current_step() > before:
            rank = manager.participating_rank()
            if rank is not None:
                log.applied(rank, manager.num_participants(), manager.current_step())


if __name__ == "__main__":
    main()
