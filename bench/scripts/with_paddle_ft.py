"""The job of the recovery benchmark under ``paddle_ft.launch``.

With ``--parallel`` the model is a ``paddle.DataParallel``, whose workers cannot go on in place.
With ``--mbytes`` the state has tables of that size that are not trained, and what a broadcast of it
takes is measured soon after each change of the group.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn
from steplog import HIDDEN, SAMPLES, WIDTH, StepLog, parse

import paddle_ft as ft

BROADCASTS = 3
SLOWER = 0.3
"""By so much a rank is that finds the file ``slower-<rank>`` among the step logs."""
AFTER_STEPS = 3


class Rows(paddle.io.Dataset):
    def __init__(self, length: int) -> None:
        self._length = length
        self._rows = np.random.default_rng(0).standard_normal((64, WIDTH)).astype("float32")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self._rows[index % 64]


class Model(nn.Layer):
    def __init__(self, mbytes: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
        if mbytes:
            rows = int(mbytes * 1e6 / 4 / 1000 / 50)
            self.tables = nn.LayerList([nn.Embedding(rows, 1000) for _ in range(50)])
            for table in self.tables:
                table.weight.stop_gradient = True

    def forward(self, x: Any) -> Any:
        return self.body(x)


class Broadcasts:
    """Seconds of one broadcast of ``mbytes``, several times, in each group of more than one rank.

    All ranks of a group come to the same step after it was formed.
    """

    def __init__(self, session: Any, mbytes: float, record: str) -> None:
        self._session, self._nbytes = session, int(mbytes * 1e6)
        self._record = Path(record)
        self._generation, self._due_step = 0, 0

    def applied(self) -> None:
        session = self._session
        if session.generation != self._generation:
            self._generation, self._due_step = session.generation, session.global_step + AFTER_STEPS
        if self._nbytes and session.world_size > 1 and session.global_step == self._due_step:
            taken = " ".join(f"{self._time():.5f}" for _ in range(BROADCASTS))
            name = f"broadcast-{session.generation}-{session.rank}.txt"
            (self._record / name).write_text(taken)

    def _time(self) -> float:
        tensor = paddle.ones([self._nbytes], dtype="uint8")
        paddle.distributed.barrier()
        start_s = time.perf_counter()
        paddle.distributed.broadcast(tensor, 0)
        return time.perf_counter() - start_s


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parallel", action="store_true")
    given = parse(parser)
    paddle.seed(0)
    model: Any = Model(given.mbytes)
    if given.parallel:
        paddle.distributed.init_parallel_env()
        model = paddle.DataParallel(model)
    trained = [p for p in model.parameters() if not p.stop_gradient]
    optimizer = paddle.optimizer.Adam(1e-3, parameters=trained)
    log, rows = StepLog(given.record), Rows(given.steps * SAMPLES)
    with ft.session(model=model, optimizer=optimizer) as session:
        broadcasts = Broadcasts(session, given.mbytes, given.record)
        for x in session.batches(rows, batch_size=SAMPLES):
            begin_s = time.perf_counter()
            time.sleep(given.sleep_s)
            model(x).square().mean().backward()
            if os.path.exists(f"{given.record}/slower-{session.rank}"):
                time.sleep(SLOWER * (time.perf_counter() - begin_s))
            if session.step():
                log.applied(session.rank, session.world_size, session.global_step)
                broadcasts.applied()


if __name__ == "__main__":
    main()
