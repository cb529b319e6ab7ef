"""A training job that publishes at two steps of its loop, and at its end."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.static import InputSpec

import paddle_ft as ft


class Pictures(paddle.io.Dataset):
    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Any:
        return np.random.default_rng(index).random(64, dtype="float32"), np.int64(index % 10)


model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = paddle.optimizer.SGD(parameters=model.parameters())
spec = [InputSpec([None, 64], "float32", "image")]
with ft.session(model=model, optimizer=optimizer, save="5 steps") as s:
    for image, label in s.batches(Pictures(), 32, epochs=4, seed=1):
        loss = nn.functional.cross_entropy(model(image), label)
        loss.backward()
        s.step(loss)
        if s.global_step in (2, 7):
            s.publish("digits", spec)
    s.publish("digits", spec)
