"""A predictor without a server around it, timed when asked to; lines of JSON.

python serving_bare.py FOLDER SHAPE...

{"calls": 500} -> {"s": [...]}; {"for_s": 5} -> {"rows_per_s": 100}
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from pathlib import Path

import numpy as np

from paddle_ft.serve.predictor import Predictor, Settings

assert zlib
shape = [int(size) for size in sys.argv[2:]]
bare = Predictor(Path(sys.argv[1]), "bare", "1", Settings())
(handle,) = bare._handles.values()
(output,) = (bare._predictor.get_output_handle(n) for n in bare._outputs.values())
x = np.random.default_rng(0).random(shape, dtype="float32")


def call() -> float:
    """Seconds from an array to an array."""
    begin_s = time.perf_counter()
    handle.copy_from_cpu(x)
    bare._predictor.run()
    output.copy_to_cpu()
    return time.perf_counter() - begin_s


warm_s = time.perf_counter() + 2.0
for _ in range(200):
    call()
    if time.perf_counter() > warm_s:
        break
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if "calls" in asked:
        print(json.dumps({"s": [call() for _ in range(asked["calls"])]}), flush=True)
        continue
    begin_s, count = time.perf_counter(), 0
    while (took_s := time.perf_counter() - begin_s) < asked["for_s"]:
        call()
        count += shape[0]
    print(json.dumps({"rows_per_s": count / took_s}), flush=True)
