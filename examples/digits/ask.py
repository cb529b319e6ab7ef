"""Asks a replica that serves the digits of ``train.py``, by nothing but HTTP and JSON.

    python ask.py [http://127.0.0.1:8000]

The last line says how many of the test images it knows, and by which version.
"""

from __future__ import annotations

import json
import sys
import urllib.request

import numpy as np
from sklearn.datasets import load_digits

TEST_SAMPLES = 360
ROWS = 30


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    data = load_digits()
    part = np.random.default_rng(0).permutation(len(data.target))[:TEST_SAMPLES]
    images = (data.images[part] / 16.0).astype("float32")
    labels, right, version = data.target[part], 0, ""
    for start in range(0, len(part), ROWS):
        rows = images[start : start + ROWS]
        image = {"name": "image", "datatype": "FP32", "shape": [len(rows), 1, 8, 8]}
        body = json.dumps({"inputs": [image | {"data": rows.ravel().tolist()}]}).encode()
        with urllib.request.urlopen(f"{url}/v2/models/digits/infer", body, timeout=30) as reply:
            answer = json.load(reply)
        scores = np.reshape(answer["outputs"][0]["data"], [len(rows), 10])
        right += int((scores.argmax(1) == labels[start : start + ROWS]).sum())
        version = answer["model_version"]
    print(f"right={right} of={len(part)} version={version}")


if __name__ == "__main__":
    main()
