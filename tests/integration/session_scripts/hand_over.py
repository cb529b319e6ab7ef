"""Rank 0 gives its state to rank 1, which has none, and then to rank 2, which keeps what it has
until all is there. Prints what each rank had in the end, and what had to hold on the way.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import numpy as np
import paddle

from paddle_ft import transfer
from paddle_ft.checkpoint.snapshot import nbytes_of
from paddle_ft.collective import Collective
from paddle_ft.local_state import LocalState
from paddle_ft.nested import Entry
from paddle_ft.state import TrainingState


class Model(paddle.nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.table = paddle.nn.Embedding(4300, 1000)  # of two pieces
        self.norm = paddle.nn.BatchNorm1D(8)
        self.linear = paddle.nn.Linear(8, 1000)

    def forward(self, x: Any) -> Any:
        return self.linear(self.norm(x)) + self.table(paddle.to_tensor([7]))


class Counter:
    def __init__(self) -> None:
        self.seen = paddle.zeros([3])

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def set_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def digest(entries: list[Entry]) -> str:
    found = hashlib.sha256()
    for entry in sorted(entries, key=lambda e: e.name):
        if entry.scope != "local" and nbytes_of(entry.tensor):
            found.update(entry.name.encode() + entry.tensor.numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    paddle.distributed.init_parallel_env()
    collective = Collective.from_environment()
    rank = collective.rank
    paddle.seed(rank)
    model, counter = Model(), Counter()
    optimizer = paddle.optimizer.Adam(0.1, parameters=model.parameters())
    state = TrainingState(model, optimizer)
    state.register("counter", counter, None)
    local = LocalState(state)
    agreed = np.stack([np.full(local.width, 100 + r) for r in range(3)])
    checks = {}

    def train() -> None:
        model(paddle.ones([4, 8])).square().mean().backward()
        optimizer.step()
        optimizer.clear_grad()
        counter.seen = counter.seen + 1.5

    def give(step: int) -> None:
        transfer.give(collective, state.entries(), step, {"state": state.meta()}, agreed)

    if rank == 1:  # as who waits for its place does
        state.prepare()
        transfer.rehearse(state.entries(), state.places)
    before = digest(state.entries())
    if rank == 0:
        train()
        give(1)
    elif rank == 1:
        address = model.table.weight.data_ptr()
        image, there = transfer.take(collective, 0, rank, state.places)
        checks["large ones are there"] = "optimizer/table.weight/moment1" in there
        state.restore(image, there)
        state.restore_registered(image)
        checks["in its old memory"] = model.table.weight.data_ptr() == address
        checks["counter"] = counter.seen.numpy().tolist() == [1.5] * 3
        checks["its own row"] = bool((local.read() == 101).all())
    else:
        transfer.attend(collective, 0)
        checks["untouched"] = digest(state.entries()) == before
    if rank == 0:
        train()
        give(2)
    elif rank == 1:
        transfer.attend(collective, 0)
    else:
        image, there = transfer.take(collective, 0, rank, lambda image: {})
        checks["kept until all is there"] = digest(state.entries()) == before and not there
        state.restore(image)
        state.restore_registered(image)
        checks["its own row"] = bool((local.read() == 102).all())
    print(json.dumps({"digest": digest(state.entries()), "first": before, "checks": checks}))
    paddle.distributed.barrier()
    sys.stdout.flush()


if __name__ == "__main__":
    main()
