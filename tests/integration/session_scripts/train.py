"""A training run with everything whose state can be lost: Adam, cosine rate, dropout, BatchNorm,
shuffling, noise from all three generators, gradient clipping.

``PFT_TEST`` holds a JSON object of options; every line printed is a JSON object.
"""

import hashlib
import json
import os
import random
import signal
import time
import zlib
from typing import Any

import numpy as np
import paddle
from paddle import nn

import paddle_ft as ft

assert zlib  # loaded before paddle, for 2.6.2
OPTIONS = {
    "samples": 50,
    "batch_size": 8,
    "epochs": 2,
    "optimizer": "Adam",
    "workers": 0,
    "width": 16,
    "seed": 3,
    "die_at": -1,
    "die_rank": 0,
    "fail_at": -1,
    "swap_at": -1,
    "step_s": 0.0,
    "freeze_until": -1,
    "register": False,
    "scale": 0,
    "calls": False,
    "lr_step": "step",
    "streams": 1,
    "layers_before": 0,
    "data_parallel": False,
    "unused": False,
    **json.loads(os.environ.get("PFT_TEST", "{}")),
}


def tell(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


class Data(paddle.io.Dataset):
    def __init__(self, samples: int) -> None:
        generator = np.random.RandomState(0)
        self.x = generator.randn(samples, 8).astype("float32")
        self.y = (self.x.sum(1, keepdims=True) > 0).astype("float32")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        noise = np.random.rand() + random.random()
        return self.x[i] + np.float32(0.01 * noise), self.y[i], i


class Net(nn.Layer):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.norm = nn.BatchNorm1D(width)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(width, 1)
        if OPTIONS["unused"]:
            self.spare = nn.Linear(4, 4)
        if OPTIONS["calls"]:
            self.register_buffer("calls", paddle.zeros([2], dtype="int64"))
            self.register_buffer("fixed", paddle.full([3], 0.1))

    def forward(self, x: Any) -> Any:
        if OPTIONS["calls"]:
            paddle.assign(self.calls + x.shape[0], output=self.calls)
        x = x + 0.01 * paddle.randn(x.shape)
        return self.last(self.drop(self.norm(nn.functional.relu(self.first(x)))))


class Counter:
    """Something of the user's own."""

    def __init__(self) -> None:
        self.seen: dict[Any, Any] = {"steps": 0, "mean": paddle.zeros([3]), 7: (1.5, float("inf"))}

    def state_dict(self) -> Any:
        return self.seen

    def set_state_dict(self, state: Any) -> None:
        self.seen = state


def weights_hash(*things: Any) -> str:
    digest = hashlib.sha256()
    for thing in things:
        for _, value in sorted(thing.items()):
            if hasattr(value, "numpy"):
                digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:16]


def swap_weights(net: Any) -> None:
    """As an evaluation with averaged weights does it."""
    own = [p.numpy() for p in net.parameters()]
    for p in net.parameters():
        p.set_value(paddle.zeros_like(p))
    time.sleep(0.2)
    for p, value in zip(net.parameters(), own, strict=True):
        p.set_value(value)


def make_optimizer(model: Any) -> Any:
    schedule = paddle.optimizer.lr.CosineAnnealingDecay(1e-2, T_max=20)
    kinds = paddle.optimizer
    clip = nn.ClipGradByGlobalNorm(1.0)
    arguments = {"parameters": model.parameters(), "grad_clip": clip}
    name = OPTIONS["optimizer"]
    if name == "SGD-constant":
        return None, kinds.SGD(0.05, **arguments)
    return schedule, getattr(kinds, name)(schedule, **arguments)


def main() -> None:
    for _ in range(OPTIONS["layers_before"]):
        nn.Linear(2, 2)  # shifts Paddle's automatic names
    paddle.seed(int(os.environ.get("PADDLE_TRAINER_ID", "0")))  # ranks need not agree
    net = Net(OPTIONS["width"])
    model = net
    if OPTIONS["data_parallel"]:
        paddle.distributed.init_parallel_env()
        model = paddle.DataParallel(net)
    schedule, optimizer = make_optimizer(model)
    data = Data(OPTIONS["samples"])
    counter = Counter()
    scaler = paddle.amp.GradScaler(enable=False) if OPTIONS["register"] else None
    if OPTIONS["scale"]:
        scaler = paddle.amp.GradScaler(init_loss_scaling=OPTIONS["scale"], incr_every_n_steps=4)
    with ft.session(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        lr_step=OPTIONS["lr_step"],
        **OPTIONS.get("session", {}),
    ) as s:
        tell(
            event="begin",
            step=s.global_step,
            rank=s.rank,
            world=s.world_size,
            generation=s.generation,
            restarts=s.restarts,
        )
        if OPTIONS["register"]:
            s.register("counter", counter)
        if scaler is not None:
            s.register("scaler", scaler)
        for number in range(OPTIONS["streams"]):
            for x, y, ids in s.batches(
                data,
                batch_size=OPTIONS["batch_size"],
                epochs=OPTIONS["epochs"],
                shuffle=True,
                seed=OPTIONS["seed"] + number,
                num_workers=OPTIONS["workers"],
            ):
                net.first.weight.stop_gradient = s.global_step < OPTIONS["freeze_until"]
                loss = nn.functional.binary_cross_entropy_with_logits(model(x), y)
                (scaler.scale(loss) if OPTIONS["scale"] else loss).backward()
                used = ids.tolist() if s.weight else []
                if s.global_step == OPTIONS["fail_at"] and s.rank == OPTIONS["die_rank"]:
                    raise ValueError("the script's own mistake")
                if s.global_step == OPTIONS["die_at"] and s.rank == OPTIONS["die_rank"]:
                    os.kill(os.getpid(), signal.SIGKILL)
                step = s.global_step + 1
                if s.step(loss, scaler=scaler):
                    counter.seen["steps"] += 1
                    counter.seen["mean"] += 0.5
                tell(
                    event="step",
                    step=step,
                    rank=s.rank,
                    epoch=s.epoch,
                    ids=used,
                    stream=number,
                    lr=optimizer.get_lr(),
                    loss=float(loss),
                )
                time.sleep(OPTIONS["step_s"])
        tell(event="loop over", rank=s.rank)
    tell(
        event="end",
        step=s.global_step,
        rank=s.rank,
        weights=weights_hash(dict(net.named_parameters())),
        all=weights_hash(net.state_dict(), optimizer.state_dict()),
        seen=repr(counter.seen["steps"])
        + repr(counter.seen["mean"].tolist())
        + repr(counter.seen[7]),
    )


if __name__ == "__main__":
    main()
