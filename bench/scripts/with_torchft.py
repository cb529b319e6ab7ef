"""The same job for torchft: one replica, of one process.

The quorum of a step is asked for at its beginning and found beside it, as torchft advises. The
gradients are summed by ``Manager.allreduce``, as one tensor: in its own wrapper for DDP a peer
that is lost during the all-reduce ends the survivor's process, too (AssertionError in
``_comm_hook``, torchft of October 2026), and the whole job begins again at step 0.

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
from torchft import Manager, Optimizer, ProcessGroupGloo


def reduce(manager: Any, parameters: list[Any]) -> None:
    """Averages the gradients; if a peer is lost the manager takes note, and nothing is applied."""
    flat = torch.cat([p.grad.reshape(-1) for p in parameters])
    manager.allreduce(flat).wait()
    at = 0
    for p in parameters:
        p.grad.copy_(flat[at : at + p.numel()].view_as(p))
        at += p.numel()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--replica", required=True)
    parser.add_argument("--timeout_s", type=float, default=60.0)
    given = parse(parser)
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
    adam = torch.optim.Adam(model.parameters(), 1e-3)

    def load_state(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["optimizer"])

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": adam.state_dict()}

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
    optimizer = Optimizer(manager, adam)
    rows = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))
    log = StepLog(given.record)
    while manager.current_step() < given.steps:
        before = manager.current_step()
        optimizer.zero_grad()  # asks for the quorum, which is found beside the step
        time.sleep(given.sleep_s)
        rank, world = manager.participating_rank() or 0, max(manager.num_participants(), 1)
        own = SAMPLES // world
        x = rows[[(before * SAMPLES + rank * own + i) % 64 for i in range(own)]]
        model(x).square().mean().backward()
        reduce(manager, list(model.parameters()))
        optimizer.step()
        if manager.current_step() > before:
            rank = manager.participating_rank()
            if rank is not None:
                log.applied(rank, manager.num_participants(), manager.current_step())


if __name__ == "__main__":
    main()
