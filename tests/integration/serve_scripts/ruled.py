"""A training job that publishes by rules; beside each version that is due, the same by hand.

python ruled.py DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.static import InputSpec

import paddle_ft as ft
from paddle_ft.serve.export import export_layer

PLACE = Path(sys.argv[1])
VALUES = {3: 0.5, 6: 0.4, 7: 0.9}


class Pictures(paddle.io.Dataset):
    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Any:
        return np.random.default_rng(index).random(64, dtype="float32"), np.int64(index % 10)


class Net(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(64, 32), nn.BatchNorm1D(32)
        self.drop, self.last, self.unused = nn.Dropout(0.2), nn.Linear(32, 10), nn.Linear(3, 3)
        self.register_buffer("scale", paddle.full([1], 2.0))

    def forward(self, image: Any) -> Any:
        hidden = self.drop(nn.functional.relu(self.norm(self.first(image))))
        return self.last(hidden) * self.scale


model = Net()
optimizer = paddle.optimizer.SGD(parameters=[*model.first.parameters(), *model.last.parameters()])
spec = [InputSpec([None, 64], "float32", "image")]
with ft.session(model=model, optimizer=optimizer, save="never") as s:
    s.publish_when("often", "5 steps", spec)
    s.publish_when("best", ft.OnBetter("accuracy"), spec)
    for image, label in s.batches(Pictures(), 32, epochs=4, seed=1):
        loss = nn.functional.cross_entropy(model(image), label)
        loss.backward()
        s.step(loss)
        if s.global_step in VALUES:
            s.measured(accuracy=VALUES[s.global_step])
        if s.rank == 0 and s.global_step in (3, 5, 7, 10, 12):
            export_layer(model, PLACE / f"by-hand-{s.global_step}", spec)
    s.publish("often", spec)
    s.publish("often", spec)
