"""What a script can do wrong, one after another in one process: what was raised, as JSON lines."""

import json
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
from paddle import nn

import paddle_ft as ft

assert zlib  # loaded before paddle, for 2.6.2
DATA = paddle.io.TensorDataset([paddle.randn([10, 4])])


class Endless(paddle.io.IterableDataset):
    def __iter__(self) -> Any:
        yield np.zeros(4)


class Holds:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def set_state_dict(self, state: Any) -> None:
        self.value = state


def session(optimizer_of: Any = None, scheduler: Any = None, **more: Any) -> Any:
    net = nn.Linear(4, 2)
    parameters = [*net.parameters(), *(optimizer_of.parameters() if optimizer_of else [])]
    optimizer = paddle.optimizer.SGD(0.1, parameters)
    return ft.session(model=net, optimizer=optimizer, lr_scheduler=scheduler, **more)


def in_session(act: Callable[[Any], Any]) -> Callable[[], None]:
    def run() -> None:
        with session() as s:
            act(s)

    return run


def two_loops(s: Any) -> None:
    outer = s.batches(DATA, batch_size=2)
    next(outer)
    next(s.batches(DATA, batch_size=2))
    next(outer)


def late_register(s: Any) -> None:
    next(s.batches(DATA, batch_size=2))
    s.register("late", Holds({}))


def twice(s: Any) -> None:
    s.register("a", Holds({}))
    s.register("a", Holds({}))


def plateau() -> None:
    session(scheduler=paddle.optimizer.lr.ReduceOnPlateau(0.1))


def exact(act: Callable[[Any, Any], Any]) -> Callable[[], None]:
    def run() -> None:
        with session(reproducible=2) as s:
            act(s, s.batches(DATA, batch_size=4))

    return run


def one_step_too_many(s: Any, batches: Any) -> None:
    next(batches)
    s.step()
    s.step()


def no_step(s: Any, batches: Any) -> None:
    next(batches)
    next(batches)


def parallel() -> None:
    net = paddle.DataParallel(nn.Linear(4, 2))
    optimizer = paddle.optimizer.SGD(0.1, net.parameters())
    with ft.session(model=net, optimizer=optimizer, reproducible=True):
        pass


MISUSES: dict[str, Callable[[], Any]] = {
    "lr_step": lambda: session(lr_step="often"),
    "plateau": plateau,
    "save": lambda: session(save="sometimes"),
    "no shards": lambda: session(reproducible=-1),
    "shards without batches": exact(lambda s, _: s.step()),
    "two steps of a shard": exact(one_step_too_many),
    "no step of a shard": exact(no_step),
    "shards of DataParallel": parallel,
    "foreign parameters": lambda: session(optimizer_of=nn.Linear(2, 2)),
    "endless dataset": in_session(lambda s: s.batches(Endless(), batch_size=2)),
    "no dataset": in_session(lambda s: s.batches(iter([1]), batch_size=2)),
    "empty dataset": in_session(lambda s: s.batches([], batch_size=2)),
    "batch size": in_session(lambda s: s.batches(DATA, batch_size=0)),
    "two loops": in_session(two_loops),
    "late register": in_session(late_register),
    "registered twice": in_session(twice),
    "slash": in_session(lambda s: s.register("a/b", Holds({}))),
    "no state_dict": in_session(lambda s: s.register("a", object())),
    "not JSON": in_session(lambda s: s.register("a", Holds({"x": [1, {2, 3}]}))),
    "array of texts": in_session(lambda s: s.register("a", Holds({"x": np.array(["a", "b"])}))),
    "same path": in_session(
        lambda s: s.register("a", Holds({"x/y": np.ones(1), "x": {"y": np.ones(1)}}))
    ),
}


def main() -> None:
    for kind, act in MISUSES.items():
        said = "nothing"
        try:
            act()
        except ft.ConfigError as error:
            said = str(error)
        sys.stdout.write(json.dumps({"kind": kind, "said": said}) + "\n")


main()
