"""Sums gradients of every kind over the ranks and compares with what they must be, bit for bit."""

import json
import sys
import zlib
from typing import Any

import numpy as np
import paddle

from paddle_ft.collective import Collective
from paddle_ft.errors import ConfigError
from paddle_ft.gradients import ALONE_BYTES, Gradients

assert zlib  # loaded before paddle, for 2.6.2
LARGE = ALONE_BYTES // 4
SHAPES = {
    "float32": [[3], [2, 5], [LARGE], [LARGE + 1, 1], [1]],
    "float64": [[4], [2, 2]],
    "float16": [[8], [LARGE]],
}


def parameters() -> list[Any]:
    made = []
    for dtype, shapes in SHAPES.items():
        for shape in shapes:
            made.append(paddle.create_parameter(shape, dtype))
    return made


def value(rank: int, number: int, shape: list[int], dtype: str) -> Any:
    """Small integers: their weighted sums are exact in every dtype."""
    size = int(np.prod(shape))
    return ((np.arange(size) % 7 + 4 * rank + number) % 11).reshape(shape).astype(dtype)


def main() -> None:
    collective = Collective.from_environment()
    collective.join()
    rank, world = collective.rank, collective.world_size
    weights = [0.5, 0.25, 0.25][:world] if world == 3 else [0.75, 0.25]
    params = parameters()
    frozen = paddle.create_parameter([3], "float32")
    frozen.stop_gradient = True
    gradients = Gradients([*params, frozen], collective)
    for round_ in range(3):
        absent_here, absent_everywhere = 1, 4  # numbers of parameters
        large_absent_here = 2
        for number, p in enumerate(params):
            gone = number == absent_everywhere or (
                rank == 0 and number in (absent_here, large_absent_here)
            )
            grad = value(rank, number, p.shape, str(p.dtype).removeprefix("paddle."))
            p.clear_gradient(False)
            if not gone:
                p.grad = paddle.to_tensor(grad)
        if round_ == 2 and rank == 1:  # a rank that does not count may even have nan
            weights = [1.0, 0.0, 0.0][:world]
            for p in params:
                if p.grad is not None:
                    p.grad = p.grad * float("nan")
        elif round_ == 2:
            weights = [1.0, 0.0, 0.0][:world]
        present = gradients.gather(weights[rank])
        more = [0] * (round_ * 400)  # too many to ride along with them, in the end
        words = np.array([*present, 2**62 + rank, -5, 7 * rank, *more], dtype=np.int64)
        sums = gradients.sum(words)
        told = [int(word) for word in sums[len(present) : len(present) + 3]]
        whole = world * 2**62 + sum(range(world))
        assert told == [(whole + 2**63) % 2**64 - 2**63, -5 * world, 7 * sum(range(world))]
        gradients.finish(sums[: len(present)].tolist())
        check(params, weights, world, absent_everywhere, (absent_here, large_absent_here))
        assert frozen.grad is None
    sparse(collective)
    sys.stdout.write(json.dumps({"rank": rank, "ok": True}) + "\n")


def check(
    params: list[Any], weights: list[float], world: int, nowhere: int, not_on_0: tuple[int, int]
) -> None:
    for number, p in enumerate(params):
        if number == nowhere:
            assert p.grad is None
            continue
        dtype = str(p.dtype).removeprefix("paddle.")
        expected = np.zeros(p.shape)
        for rank in range(world):
            if weights[rank] and not (rank == 0 and number in not_on_0):
                expected += weights[rank] * value(rank, number, p.shape, dtype).astype("float64")
        found = p.grad.numpy().astype("float64")
        assert str(p.grad.dtype) == str(p.dtype)
        np.testing.assert_array_equal(found, expected, err_msg=f"parameter {number}")


def sparse(collective: Collective) -> None:
    layer = paddle.nn.Embedding(5, 2, sparse=True)
    layer(paddle.to_tensor([1])).sum().backward()
    said = ""
    try:
        Gradients(layer.parameters(), collective).gather(0.5)
    except ConfigError as error:
        said = str(error)
    assert "sparse=False" in said


main()
