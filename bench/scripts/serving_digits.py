"""Exports versions of a perceptron for digits, and tells what each gives for some rows.

python serving_digits.py FOLDER VERSIONS HIDDEN

FOLDER/1, FOLDER/2 … hold inference files, FOLDER/samples.json the rows and scores.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from paddle.static import InputSpec

assert zlib  # loaded before paddle, for 2.6.2
folder, versions, hidden = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
x = np.random.default_rng(0).random((8, 64), dtype="float32")
scores = []
for version in range(1, versions + 1):
    paddle.seed(version)
    layers = [nn.Linear(64, hidden), nn.ReLU()]
    if hidden > 1024:
        layers += [nn.Linear(hidden, hidden), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(hidden, 10))
    net.eval()
    prefix = str(folder / str(version) / "model")
    paddle.jit.save(net, prefix, input_spec=[InputSpec([None, 64], "float32", "image")])
    scores.append(net(paddle.to_tensor(x)).numpy().tolist())
(folder / "samples.json").write_text(json.dumps({"x": x.tolist(), "scores": scores}))
