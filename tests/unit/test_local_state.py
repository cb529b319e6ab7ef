"""What each rank has for itself is known to all, and put back as it was."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from paddle_ft.local_state import LocalState
from paddle_ft.state import TrainingState

pytestmark = pytest.mark.paddle


def local_of(width: int) -> tuple[paddle.nn.Layer, LocalState]:
    model = paddle.nn.Sequential(paddle.nn.Linear(3, width), paddle.nn.BatchNorm1D(width))
    optimizer = paddle.optimizer.SGD(0.1, parameters=model.parameters())
    return model, LocalState(TrainingState(model, optimizer))


def test_the_sum_of_what_ranks_place_holds_each_of_them() -> None:
    """Also where the bytes are no whole number of words, and a value is -0.0 or nan."""
    ranks = [local_of(5) for _ in range(3)]
    for rank, (model, _) in enumerate(ranks):
        model[1]._mean.set_value(np.array([rank, -0.0, np.nan, 1e-40, -rank], "float32"))
    before = [local.read().tobytes() for _, local in ranks]
    total = sum(local.placed(rank, 3) for rank, (_, local) in enumerate(ranks))
    for _, local in ranks:
        assert isinstance(total, np.ndarray)
        local.agree(total, 3)
    model, local = ranks[0]
    assert local.is_as_agreed(0)
    assert not local.is_as_agreed(1)
    for rank in range(3):
        local.put_back(rank)
        assert local.read().tobytes() == before[rank]
    model[1]._variance.set_value(np.ones(5, "float32") * 7)
    assert not local.is_as_agreed(2)


def test_a_model_without_any_costs_nothing() -> None:
    model = paddle.nn.Linear(2, 2)
    optimizer = paddle.optimizer.SGD(0.1, parameters=model.parameters())
    local = LocalState(TrainingState(model, optimizer))
    assert local.placed(0, 4).size == 0
    local.agree(local.nothing, 4)
    assert local.is_as_agreed(0)
    local.put_back(0)


def test_what_is_too_large_for_every_step_is_not_told() -> None:
    class Large(paddle.nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.linear = paddle.nn.Linear(2, 2)
            self.register_buffer("table", paddle.zeros([300_000]))

    model = Large()
    optimizer = paddle.optimizer.SGD(0.1, parameters=model.parameters())
    assert not LocalState(TrainingState(model, optimizer)).fits
    assert local_of(5)[1].fits
