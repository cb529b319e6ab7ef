"""Publishes two versions of a classifier of digits; tells in JSON what each gives for some rows.

python two_digits.py STORE
"""

from __future__ import annotations

import json
import sys
import zlib
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.static import InputSpec

from paddle_ft.serve.publish import publish

assert zlib  # loaded before paddle, for 2.6.2


class Net(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 128), nn.Linear(128, 10)

    def forward(self, image: Any) -> Any:
        return self.last(nn.functional.relu(self.first(image)))


x = np.random.default_rng(0).random((3, 64), dtype="float32")
scores = []
for seed in (1, 2):
    paddle.seed(seed)
    net = Net()
    net.eval()
    spec = [InputSpec([None, 64], "float32", "image")]
    publish(net, "digits", sys.argv[1], input_spec=spec, outputs=("scores",))
    scores.append(net(paddle.to_tensor(x)).numpy().tolist())
print(json.dumps({"x": x.tolist(), "scores": scores}))
