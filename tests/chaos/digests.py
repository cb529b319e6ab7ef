"""A training that writes down, on its own, a digest of its state after every step.

Each rank appends lines ``STEP DIGEST`` to ``<record>/<rank>-<pid>``. The digest covers parameters
and optimizer, and is of the arrays in the order of their names, as ``digest_of`` takes it. To
``<record>/samples/<rank>-<pid>.jsonl`` it appends which samples it uses in each step that it tries.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHAPES = (8, 48, 1)


def digest_of(arrays: Mapping[str, Any]) -> str:
    """Of names, shapes and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def written(record: Path) -> dict[int, set[str]]:
    """The digests of each step; more than one means that the training is not what it was."""
    found: dict[int, set[str]] = {}
    for path in record.glob("*-*"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # a killed worker may have cut its last line
                step, digest = line.split()
                found.setdefault(int(step), set()).add(digest)
    return found


def used(record: Path) -> dict[int, list[int]]:
    """The samples of each step that went into the weights, sorted.

    A step that was tried again counts as it was tried last: before, it was not applied.
    """
    tried: dict[int, dict[int, list[int]]] = {}
    for path in (record / "samples").glob("*.jsonl"):
        for text in path.read_text().splitlines():
            if text.endswith("}"):  # a killed worker may have cut its last line
                line = json.loads(text)
                by_generation = tried.setdefault(line["step"], {})
                by_generation.setdefault(line["generation"], []).extend(line["ids"])
    return {step: sorted(by[max(by)]) for step, by in sorted(tried.items())}


def arrays_of(model: Any, optimizer: Any) -> dict[str, Any]:
    """Parameters and what the optimizer has for each, by the names that they are saved under."""
    arrays = {f"model/{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    state = optimizer.state_dict()
    for name, parameter in model.named_parameters():
        prefix = f"{parameter.name}_"
        for key in state:
            if key.startswith(prefix):
                kind = key.removeprefix(prefix).removesuffix("_0")
                arrays[f"optimizer/{name}/{kind}"] = state[key].numpy()
    return arrays


def main() -> None:
    import numpy as np
    import paddle

    import paddle_ft as ft

    parser = argparse.ArgumentParser()
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=100_000)
    parser.add_argument("--delay", type=float, default=0.01)
    parser.add_argument("--shards", type=int, default=0)
    given = parser.parse_args()
    samples = given.record / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    rows = np.random.RandomState(0).randn(100, SHAPES[0]).astype("float32")

    class Numbers(paddle.io.Dataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, i: int) -> tuple[Any, Any, Any]:
            return rows[i], (rows[i].sum(keepdims=True) > 0).astype("float32"), np.int64(i)

    paddle.seed(7)
    model = paddle.nn.Sequential(
        paddle.nn.Linear(SHAPES[0], SHAPES[1]),
        paddle.nn.ReLU(),
        paddle.nn.Dropout(0.2),
        paddle.nn.Linear(SHAPES[1], SHAPES[2]),
    )
    optimizer = paddle.optimizer.Adam(1e-3, parameters=model.parameters())
    loss_of = paddle.nn.BCEWithLogitsLoss()
    with (
        ft.session(model=model, optimizer=optimizer, reproducible=given.shards or False) as s,
        (given.record / f"{s.rank}-{os.getpid()}").open("a") as record,
        (samples / f"{s.rank}-{os.getpid()}.jsonl").open("a") as tried,
    ):
        for x, y, ids in s.batches(
            Numbers(), batch_size=8, epochs=given.epochs, shuffle=True, seed=3
        ):
            loss = loss_of(model(x), y)
            loss.backward()
            time.sleep(given.delay)
            mine = ids.numpy().tolist() if s.weight else []
            line = {"generation": s.generation, "step": s.global_step + 1, "ids": mine}
            tried.write(json.dumps(line) + "\n")
            tried.flush()
            if s.step(loss):
                record.write(f"{s.global_step} {digest_of(arrays_of(model, optimizer))}\n")
                record.flush()


if __name__ == "__main__":
    main()
