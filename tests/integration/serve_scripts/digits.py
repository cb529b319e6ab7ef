"""Trains, publishes within the loop and after it, loads and serves; tells of it in JSON lines.

python digits.py DIRECTORY
"""

from __future__ import annotations

import asyncio
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.static import InputSpec

import paddle_ft as ft
from paddle_ft.checkpoint.store import open_store
from paddle_ft.errors import ConfigError
from paddle_ft.serve.folder import load
from paddle_ft.serve.pool import Pool
from paddle_ft.serve.predictor import Predictor, Settings
from paddle_ft.serve.publish import publish
from paddle_ft.serve.staff import PoolSettings
from paddle_ft.serve.types import ModelError

assert zlib  # loaded before paddle, for 2.6.2
PLACE = Path(sys.argv[1])
SPEC = [InputSpec([None, 64], "float32", "image")]
NAMES = ("scores", "digit")


class Net(nn.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(64, 128), nn.BatchNorm1D(128)
        self.drop, self.last = nn.Dropout(0.2), nn.Linear(128, 10)

    def forward(self, image: Any) -> Any:
        hidden = self.drop(nn.functional.relu(self.norm(self.first(image))))
        scores = self.last(hidden)
        return scores, scores.argmax(-1)


class Pictures(paddle.io.Dataset):
    def __init__(self) -> None:
        super().__init__()
        self.images = np.random.default_rng(0).random((96, 64), dtype="float32")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index], np.int64(index % 10)


def train(name: str, published: bool) -> Net:
    """Two epochs of three steps; what is published at step 2 changes nothing."""
    paddle.seed(7)
    model = Net()
    optimizer = paddle.optimizer.Adam(parameters=model.parameters())
    with ft.session(
        model=model, optimizer=optimizer, checkpoint=str(PLACE / name), save="3 steps"
    ) as s:
        for image, label in s.batches(Pictures(), 32, epochs=2, seed=1):
            loss = nn.functional.cross_entropy(model(image)[0], label)
            loss.backward()
            s.step(loss)
            if published and s.global_step == 2:
                assert s.publish("digits", SPEC, outputs=NAMES) is None
        if published:
            done = s.publish("digits", SPEC, outputs=NAMES)
            assert done is not None
            tell("published", version=done.ref.version, new=done.nbytes_new, all=done.nbytes)
    return model


def tell(event: str, **values: Any) -> None:
    print(json.dumps({"event": event, **values}), flush=True)


def weights(model: Net) -> list[bytes]:
    return [value.numpy().tobytes() for value in model.state_dict().values()]


async def serve(folder: Path, x: Any, exact: bool) -> dict[str, Any]:
    settings = PoolSettings(workers=1, spares=0, predictor=Settings(threads=1, exact=exact))
    pool = await Pool.start(folder, "digits", "2", settings)
    try:
        outputs = await pool.run({"image": x}, 60)
        for wrong in (x[:, :3], x.astype("float64"), x[:0]):
            try:
                await pool.run({"image": wrong}, 60)
            except ModelError:
                continue
            raise AssertionError("wrong inputs were taken")
        again = await pool.run({"image": x}, 60)
        assert all((again[name] == outputs[name]).all() for name in outputs)
        tell("info", info=str(pool.info), batched=pool.info.batched)
        return outputs
    finally:
        await pool.close()


def main() -> None:
    model, plain = train("published", True), train("plain", False)
    tell("trained", same=weights(model) == weights(plain), training=model.training)
    store = open_store(str(PLACE / "published"))
    versions = {n: load(store, "digits", n, PLACE / "cache") for n in (1, 2)}
    tell("loaded", source={n: v.manifest.source for n, v in versions.items()})

    x = Pictures().images[:5]
    model.eval()
    scores, digit = (t.numpy() for t in model(paddle.to_tensor(x)))
    for exact in (True, False):
        outputs = asyncio.run(serve(versions[2].folder, x, exact))
        assert outputs["digit"].tolist() == digit.tolist()
        off = float(np.abs(outputs["scores"] - scores).max())
        tell("served", exact=exact, off=off)
    before = Predictor(versions[1].folder, "digits", "1", Settings(exact=True)).run({"image": x})
    tell("before", differs=bool((before["scores"] != scores).any()))
    try:
        publish(Net(), "digits", str(PLACE / "published"))
    except ConfigError as error:
        tell("refused", text=str(error))


main()
