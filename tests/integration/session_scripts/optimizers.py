"""Saves and restores every optimizer in memory, and trains on: one JSON line for each.

The restored model is made after other layers, so all of Paddle's automatic names differ.
"""

import hashlib
import json
import sys
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import paddle
from paddle import nn

from paddle_ft.checkpoint.plan import image_bytes, share
from paddle_ft.checkpoint.snapshot import Image, Snapshot, Source
from paddle_ft.slots import make_slots
from paddle_ft.state import TrainingState
from paddle_ft.types import ImageInfo, TensorSpec

assert zlib  # loaded before paddle, for 2.6.2

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p, lr: paddle.optimizer.SGD(lr, p),
    "Momentum": lambda p, lr: paddle.optimizer.Momentum(lr, 0.9, p),
    "Momentum, several tensors at once": lambda p, lr: paddle.optimizer.Momentum(
        lr, 0.9, p, use_multi_tensor=True
    ),
    "Adam": lambda p, lr: paddle.optimizer.Adam(lr, parameters=p),
    "Adam, named": lambda p, lr: paddle.optimizer.Adam(lr, parameters=p, name="mine"),
    "Adam, several tensors at once": lambda p, lr: paddle.optimizer.Adam(
        lr, parameters=p, use_multi_tensor=True
    ),
    "AdamW, clipped": lambda p, lr: paddle.optimizer.AdamW(
        lr, parameters=p, weight_decay=0.1, grad_clip=nn.ClipGradByGlobalNorm(0.5)
    ),
    "AdamW, groups": lambda p, lr: paddle.optimizer.AdamW(
        lr, parameters=[{"params": p[:2]}, {"params": p[2:], "learning_rate": 0.5}]
    ),
    "AdamW, master weights": lambda p, lr: paddle.optimizer.AdamW(
        lr, parameters=p, multi_precision=True
    ),
    "Lamb": lambda p, lr: paddle.optimizer.Lamb(lr, parameters=p),
    "RMSProp": lambda p, lr: paddle.optimizer.RMSProp(lr, parameters=p, momentum=0.9),
    "Adagrad": lambda p, lr: paddle.optimizer.Adagrad(lr, parameters=p),
    "Adamax": lambda p, lr: paddle.optimizer.Adamax(lr, parameters=p),
    "Adadelta": lambda p, lr: paddle.optimizer.Adadelta(lr, parameters=p),
    "a model whose state_dict converts": lambda p, lr: paddle.optimizer.Adam(lr, parameters=p),
    "one of the user's own": lambda p, lr: Own(p),
}


class Own:
    """An optimizer that Paddle does not know."""

    def __init__(self, parameters: Any) -> None:
        self.parameters = parameters
        self.sums: dict[str, Any] = {}
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        with paddle.no_grad():
            for p in self.parameters:
                total = self.sums.setdefault(p.name + ".sum", paddle.zeros_like(p))
                total.add_(p.grad)
                p.subtract_(total * (0.01 / self.steps))

    def clear_grad(self) -> None:
        for p in self.parameters:
            p.clear_gradient(False)

    def state_dict(self) -> Any:
        return {**self.sums, "steps": self.steps, "LR_Scheduler": {}}

    def set_state_dict(self, state: Any) -> None:
        self.steps = state["steps"]
        self.sums = {k: v for k, v in state.items() if k.endswith(".sum")}


def convert(state: Any) -> None:
    for key, tensor in state.items():
        state[key] = tensor.astype("float64")


def make(kind: str) -> tuple[Any, Any, Any]:
    paddle.seed(1)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    if "master" in kind:
        net.to(dtype="bfloat16")
    if "converts" in kind:  # as amp.decorate does with save_dtype
        net.register_state_dict_hook(convert)
    schedule = paddle.optimizer.lr.LinearWarmup(
        paddle.optimizer.lr.CosineAnnealingDecay(0.01, 9), 3, 0.0, 0.01
    )
    return net, OPTIMIZERS[kind](net.parameters(), schedule), schedule


def train(net: Any, optimizer: Any, schedule: Any, first: int, last: int) -> None:
    for step in range(first, last):
        x = np.random.RandomState(step).randn(5, 4).astype("float32")
        if net[0].weight.dtype == paddle.float32:
            net(paddle.to_tensor(x)).sum().backward()
            optimizer.step()
            optimizer.clear_grad()
        else:
            pretend(net, optimizer, schedule, x)
        schedule.step()


def pretend(net: Any, optimizer: Any, schedule: Any, x: Any) -> None:
    """A step of an optimizer that has no kernel for this dtype on the CPU."""
    state = TrainingState(net, optimizer, schedule)
    make_slots(optimizer, net.parameters())
    for entry in state.entries():
        if entry.name.startswith("optimizer/"):
            entry.tensor.add_(paddle.to_tensor(float(x[0, 0])))


def image_of(state: TrainingState) -> Image:
    entries = state.entries()
    pieces = share([e.spec() for e in entries], 0, 1, 4096)
    memory = memoryview(bytearray(max(1, image_bytes(pieces))))
    sources = [
        (Source.of(entry.tensor, piece.start, piece.nbytes, piece.offset), entry.changes)
        for entry, piece in zip(entries, pieces, strict=True)
    ]
    intact = []
    Snapshot(memory, sources, intact.append).wait()
    assert intact == ["intact"]
    meta = json.loads(json.dumps({"state": state.meta()}))
    return Image(ImageInfo(3, 0, 1, pieces, meta), memory)


def digest(state: TrainingState) -> str:
    sha = hashlib.sha256()
    for entry in sorted(state.entries(), key=lambda e: e.name):
        sha.update(entry.name.encode())
        sha.update(np.asarray(entry.tensor.numpy()).tobytes())
    return sha.hexdigest()


def keys(net: Any, optimizer: Any) -> list[str]:
    """Of the optimizer's state, with numbers in place of its parameters' automatic names."""
    found = []
    for key in optimizer.state_dict():
        at = next((n for n, p in enumerate(net.parameters()) if key.startswith(p.name)), None)
        found.append(key if at is None else f"{at}{key[len(net.parameters()[at].name) :]}")
    return sorted(found)


def prepared(kind: str, beginning: Image, image: Image, straight: tuple[str, list[str]]) -> bool:
    """Whether slots that were made ahead change nothing: what comes has them all, or none, or only
    those of some parameters, or nothing comes.
    """
    part = Image(replace(image.info, tensors=first_layer_of(image)), image._data)
    for comes, first in ((image, 3), (beginning, 0), (None, 0), (part, 3)):
        net, optimizer, schedule = make(kind)
        state = TrainingState(net, optimizer, schedule)
        state.prepare()
        if comes is not None:
            state.places(comes)
            state.restore(comes)
        else:
            state.start_afresh()
        names = [] if comes is None else sorted(comes.names())
        if comes is not None and sorted(e.name for e in state.entries()) != names:
            return False
        train(net, optimizer, schedule, first, 6)
        if keys(net, optimizer) != straight[1] or (
            comes is not part and digest(state) != straight[0]
        ):
            return False
    return True


def first_layer_of(image: Image) -> tuple[TensorSpec, ...]:
    """As of a job in which the second layer has not been trained yet."""
    return tuple(t for t in image.info.tensors if not t.name.startswith("optimizer/2."))


def main() -> None:
    for kind in OPTIMIZERS:
        net, optimizer, schedule = make(kind)
        state = TrainingState(net, optimizer, schedule)
        beginning = image_of(state)
        train(net, optimizer, schedule, 0, 3)
        image = image_of(state)
        train(net, optimizer, schedule, 3, 6)
        straight = digest(state)
        straight_keys = keys(net, optimizer)

        nn.Linear(3, 3)
        net, optimizer, schedule = make(kind)
        resumed = TrainingState(net, optimizer, schedule)
        resumed.restore(image)
        again = image_of(resumed)  # before a step: nothing of what was restored may be missing
        same_image = sorted(again.names()) == sorted(image.names()) and all(
            bytes(again.read(n)) == bytes(image.read(n)) for n in image.names()
        )
        train(net, optimizer, schedule, 3, 6)
        line = {
            "kind": kind,
            "tensors": len(image.names()),
            "same_image": same_image,
            "same_result": digest(resumed) == straight,
            "same_prepared": prepared(kind, beginning, image, (straight, straight_keys)),
        }
        sys.stdout.write(json.dumps(line) + "\n")


main()
