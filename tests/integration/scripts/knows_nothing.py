"""A script for paddle.distributed.launch: fleet, DataParallel, and not a word of paddle_ft.

Rank 1 kills itself in its first life, in the middle of training.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import paddle
import paddle.distributed as dist
from paddle.distributed import fleet

fleet.init(is_collective=True)
first_life = Path(sys.argv[1])
paddle.seed(1)
model = paddle.DataParallel(paddle.nn.Linear(4, 1))
optimizer = paddle.optimizer.SGD(0.01, parameters=model.parameters())
for step in range(20):
    x = paddle.ones([2, 4]) * (dist.get_rank() + 1)
    loss = ((model(x) - 1.0) ** 2).mean()
    loss.backward()
    optimizer.step()
    optimizer.clear_grad()
    if step == 10 and dist.get_rank() == 1 and not first_life.exists():
        first_life.touch()
        os.kill(os.getpid(), signal.SIGKILL)
total = paddle.to_tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
print(
    f"rank={dist.get_rank()} world={dist.get_world_size()} sum={total.item():g} "
    f"local={os.environ['PADDLE_RANK_IN_NODE']}",
    flush=True,
)
