"""What ranks have to agree on untold: the order of their tensors, and when buffers change."""

from __future__ import annotations

from typing import Any

import pytest

from paddle_ft import sampling
from paddle_ft.collective import Collective
from paddle_ft.errors import ConfigError
from paddle_ft.reproducible import ReproducibleUpdate
from paddle_ft.state import TrainingState

paddle = pytest.importorskip("paddle")
pytestmark = [
    pytest.mark.paddle,
    pytest.mark.filterwarnings("ignore:When training, we now always track"),
]


def net() -> Any:
    nn = paddle.nn
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1D(4), nn.Linear(4, 2))


def groups(model: Any) -> list[dict[str, Any]]:
    """As one writes them: weights, and without decay what has one dimension."""
    parameters = model.parameters()
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


def state_of(model: Any) -> TrainingState:
    return TrainingState(model, paddle.optimizer.AdamW(parameters=groups(model)))


def test_slots_come_in_one_order_whether_trained_or_made_ahead() -> None:
    trained = state_of(model := net())
    model(paddle.ones([6, 3])).square().mean().backward()
    trained.optimizer.step()
    ahead = state_of(net())
    ahead.prepare()
    names = [entry.name for entry in trained.entries()]
    assert names == [entry.name for entry in ahead.entries()]
    assert sum(name.startswith("optimizer/") for name in names) >= 4 * 6


def test_an_optimizer_around_another_one_is_refused() -> None:
    model = net()
    inner = paddle.optimizer.Adam(parameters=model.parameters())
    with pytest.raises(ConfigError, match="give ft.session the inner optimizer"):
        TrainingState(model, paddle.incubate.LookAhead(inner))


def test_buffers_have_their_new_values_before_the_ranks_tell_each_other_of_them() -> None:
    model = net()
    state = TrainingState(model, paddle.optimizer.SGD(parameters=model.parameters()))
    update = ReproducibleUpdate(state, "manual", Collective(0, 1), False, 2)
    batch = next(iter(sampling.batches(sampling.Stream(8, 8, 1, False, 0), 0, 0)))
    before = model[1]._mean.numpy().copy()
    for item in sampling.items(0, batch, 0, 1, 2):
        update.handed_out(item)
        model(paddle.rand([4, 3])).square().mean().backward()
        ends = update.take()
    assert ends and (model[1]._mean.numpy() == before).all()
    update.gather(1.0)
    assert not (model[1]._mean.numpy() == before).all()
