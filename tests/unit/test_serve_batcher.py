"""The queue in front of a runner: every request that is taken ends once, with what is its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from paddle_ft.serve.batcher import Batcher, DeadlineExceeded, Overloaded
from paddle_ft.serve.batching import Limits
from paddle_ft.serve.catalog import Catalog
from paddle_ft.serve.types import BatchRefused, ModelError, ServeError, Tensors, Unavailable
from tests.integration.serve_world import DOUBLE, NumpyRunner, doubled


def on_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 20))

    run.__name__ = test.__name__
    return run


def rows(*values: float) -> Tensors:
    return {"x": np.array(values, np.float32).reshape(-1, 1)}


def held(**limits: Any) -> tuple[Batcher, NumpyRunner]:
    """A batcher whose one worker is held back by a gate."""
    runner = NumpyRunner(DOUBLE, doubled, gate=asyncio.Event())
    return Batcher(runner, Limits(**limits)), runner


async def outcome(future: asyncio.Future[Tensors]) -> Any:
    try:
        return (await future)["y"].ravel().tolist()
    except (ServeError, asyncio.CancelledError) as error:
        return type(error)


async def outcomes(*futures: asyncio.Future[Tensors]) -> list[Any]:
    return [await outcome(future) for future in futures]


async def reached(runner: NumpyRunner, batches: int) -> None:
    while len(runner.batches) < batches:
        await asyncio.sleep(0)


class Beginner(NumpyRunner):
    """Takes what it can at once, without a task of the batcher's."""

    def begin(
        self, inputs: Tensors, timeout_s: float, done: Callable[[Tensors | Exception], None]
    ) -> bool:
        if not self.idle:
            return False
        self.running += 1

        async def work() -> Tensors:
            self.running -= 1  # from here on it is the count of ``run``
            return await self.run(inputs, timeout_s)

        task = asyncio.ensure_future(work())
        task.add_done_callback(lambda _: done(task.exception() or task.result()))  # type: ignore[arg-type]
        return True


@on_loop
async def test_what_begins_at_once_ends_once_with_what_is_its_own() -> None:
    runner = Beginner(DOUBLE, doubled, gate=asyncio.Event())
    batcher = Batcher(runner, Limits())
    first = batcher.submit(rows(1), 9)
    await reached(runner, 1)
    late = batcher.submit(rows(2), 0.01)
    others = [batcher.submit(rows(value), 9) for value in (3, 13, 4)]
    assert await outcome(late) is DeadlineExceeded
    runner.gate.set()
    assert await outcomes(first, *others) == [[2], [6], ModelError, [8]]
    assert runner.batches == [1, 3, 1, 1, 1]
    alone = batcher.submit(rows(13), 9)
    assert await outcome(alone) is ModelError
    assert (batcher.waiting, batcher.figures.rows, batcher.figures.success.count) == (0, 3, 3)


@on_loop
async def test_who_waits_for_a_worker_is_joined_and_gets_its_own_rows() -> None:
    batcher, runner = held()
    first = batcher.submit(rows(1), 9)
    await reached(runner, 1)
    others = [batcher.submit(rows(*values), 9) for values in ((2,), (3, 4), (5,), (6,))]
    runner.gate.set()
    assert await outcomes(first, *others) == [[2], [4], [6, 8], [10], [12]]
    assert runner.batches == [1, 4, 1]
    assert (batcher.figures.rows, batcher.figures.batches) == (6, 3)
    await batcher.close(1)
    assert runner.closed


@on_loop
async def test_one_that_is_refused_fails_alone() -> None:
    batcher, runner = held()
    first = batcher.submit(rows(1), 9)
    await reached(runner, 1)
    others = [batcher.submit(rows(value), 9) for value in (2, 13, 4)]
    runner.gate.set()
    assert await outcomes(first, *others) == [[2], [4], ModelError, [8]]
    assert runner.batches == [1, 3, 1, 1, 1]


@on_loop
async def test_nothing_waits_while_workers_are_idle() -> None:
    runner = NumpyRunner(DOUBLE, doubled, workers=3, gate=asyncio.Event())
    batcher = Batcher(runner, Limits())
    futures = [batcher.submit(rows(value), 9) for value in range(4)]
    await reached(runner, 3)
    assert runner.batches == [1, 1, 1]
    assert batcher.waiting == 1
    runner.gate.set()
    assert await outcomes(*futures) == [[0], [2], [4], [6]]


@on_loop
async def test_expired_and_cancelled_requests_do_not_run() -> None:
    batcher, runner = held()
    first = batcher.submit(rows(1), 9)
    await reached(runner, 1)
    late, gone, good = (batcher.submit(rows(v), s) for v, s in ((2, 0.01), (3, 9), (4, 9)))
    gone.cancel()
    assert await outcome(late) is DeadlineExceeded
    runner.gate.set()
    assert await outcomes(first, gone, good) == [[2], asyncio.CancelledError, [8]]
    assert runner.batches == [1, 1]


@on_loop
async def test_a_deadline_holds_while_the_batch_runs() -> None:
    batcher, runner = held()
    assert await outcome(batcher.submit(rows(1), 0.02)) is DeadlineExceeded
    runner.gate.set()
    assert await outcome(batcher.submit(rows(2), 9)) == [4]


@on_loop
async def test_statistics_do_not_grow_with_what_clients_send() -> None:
    batcher = Batcher(NumpyRunner(DOUBLE, doubled), Limits(rows_max=4))
    for count in range(1, 200):
        await batcher.submit(rows(*range(100, 100 + count)), 9)
    found = batcher.figures.rows_of_batches
    assert {kind: each.count for kind, each in found.items()} == {
        1: 1, 2: 1, 3: 1, 4: 1, 8: 4, 16: 8, 32: 16, 64: 32, 128: 64, 256: 71
    }  # fmt: skip


@on_loop
async def test_a_full_queue_says_so() -> None:
    batcher, runner = held(queue_max=2)
    futures = [batcher.submit(rows(1), 9)]
    await reached(runner, 1)
    futures += [batcher.submit(rows(value), 9) for value in (2, 3)]
    with pytest.raises(Overloaded) as caught:
        batcher.submit(rows(4), 9)
    assert (caught.value.status, batcher.figures.refused) == (429, 1)
    runner.gate.set()
    assert await outcomes(*futures) == [[2], [4], [6]]


@on_loop
async def test_each_of_a_batch_that_ended_workers_is_given_to_one_more() -> None:
    given: list[tuple[int, bool]] = []

    class Noting(NumpyRunner):
        async def run(
            self, inputs: Tensors, timeout_s: float, session: str = "", again: bool = False
        ) -> Tensors:
            given.append((len(inputs["x"]), again))
            await super().run(inputs, timeout_s)
            if 17 in inputs["x"]:
                raise BatchRefused("two workers were lost")
            return doubled(inputs)

    runner = Noting(DOUBLE, doubled, gate=asyncio.Event())
    batcher = Batcher(runner, Limits())
    first = batcher.submit(rows(1), 9)
    await reached(runner, 1)
    others = [batcher.submit(rows(value), 9) for value in (2, 17, 4)]
    assert runner.gate is not None
    runner.gate.set()
    assert await outcomes(first, *others) == [[2], [4], BatchRefused, [8]]
    assert given == [(1, False), (3, False), (1, True), (1, True), (1, True)]


@on_loop
async def test_requests_of_sessions_are_not_joined() -> None:
    for stateful, batches in ((True, [1, 1, 1, 2]), (False, [1, 4])):
        batcher, runner = held()
        runner.info = replace(DOUBLE, stateful=stateful)
        first = batcher.submit(rows(1), 9, "a")
        await reached(runner, 1)
        others = [batcher.submit(rows(2), 9, session) for session in ("a", "b", "", "")]
        assert runner.gate is not None
        runner.gate.set()
        assert await outcomes(first, *others) == [[2], [4], [4], [4], [4]]
        assert sorted(runner.batches) == batches


@pytest.mark.parametrize("how", ["cancelled", "late", "closed"])
def test_what_a_session_has_given_up_ends_before_it_changes_anything(how: str) -> None:
    @on_loop
    async def check() -> None:
        put: list[float] = []

        def counted(inputs: Tensors) -> Tensors:
            put.append(inputs["x"][0, 0])
            return doubled(inputs)

        runner = NumpyRunner(replace(DOUBLE, stateful=True), counted, gate=asyncio.Event())
        batcher = Batcher(runner, Limits())
        given_up = batcher.submit(rows(1), 0.05 if how == "late" else 9, "a")
        await reached(runner, 1)
        if how == "cancelled":
            given_up.cancel()
        if how == "closed":
            await batcher.close(0.0)
        else:
            other = batcher.submit(rows(2), 9, "b")  # begins by itself once there is room
            await reached(runner, 2)
        assert runner.gate is not None
        runner.gate.set()
        if how != "closed":
            assert await outcome(other) == [4.0]
        assert put == ([] if how == "closed" else [2.0])
        kind = {"cancelled": asyncio.CancelledError, "late": DeadlineExceeded}.get(how, Unavailable)
        assert await outcome(given_up) is kind
        while runner.running:
            await asyncio.sleep(0)

    check()


@on_loop
async def test_a_defect_of_the_runner_ends_as_an_error() -> None:
    def broken(inputs: Tensors) -> Tensors:
        raise TypeError("a defect")

    for function, found in ((broken, ServeError), (lambda _: {}, ServeError)):
        batcher = Batcher(NumpyRunner(DOUBLE, function), Limits())
        futures = [batcher.submit(rows(value), 9) for value in (1, 2)]
        assert await outcomes(*futures) == [found, found]


@on_loop
async def test_outputs_without_a_row_for_each_are_not_given_to_the_wrong_one() -> None:
    def summed(inputs: Tensors) -> Tensors:
        return {"y": inputs["x"].sum(axis=0, keepdims=True)}

    runner = NumpyRunner(DOUBLE, summed, gate=asyncio.Event())
    batcher = Batcher(runner, Limits())
    first = batcher.submit(rows(1), 9)
    await reached(runner, 1)
    others = [batcher.submit(rows(value), 9) for value in (2, 3)]
    runner.gate.set()
    assert await outcomes(first, *others) == [[1], [2], [3]]


@on_loop
async def test_a_worker_that_comes_back_by_itself_is_seen() -> None:
    runner = NumpyRunner(DOUBLE, doubled, workers=0)
    batcher = Batcher(runner, Limits())
    future = batcher.submit(rows(1), 9)
    await asyncio.sleep(0)
    runner.workers = 1
    assert await outcome(future) == [2]


@on_loop
async def test_a_version_that_is_replaced_finishes_what_it_has_taken() -> None:
    catalog = Catalog(Limits(), drain_s=9)
    runner = NumpyRunner(DOUBLE, doubled, gate=asyncio.Event())
    catalog.serve(runner)
    taken = [catalog.find("double").submit(rows(value), 9) for value in (1, 2)]
    new = NumpyRunner(type(DOUBLE)("double", "2", "numpy", DOUBLE.inputs, DOUBLE.outputs), doubled)
    catalog.serve(new)
    leaving = asyncio.create_task(catalog.retire("double", "1"))
    assert await outcome(catalog.find("double").submit(rows(5), 9)) == [10]
    assert [(e.version, e.state) for e in catalog.index()] == [("2", "READY"), ("1", "UNLOADING")]
    assert catalog.ready()
    runner.gate.set()
    assert await outcomes(*taken) == [[2], [4]]
    await leaving
    assert runner.closed and not new.closed
    assert len(new.batches) == 1


@on_loop
async def test_a_batcher_that_closes_takes_nothing_and_waits_only_so_long() -> None:
    batcher, _ = held()
    taken = batcher.submit(rows(1), 9)
    closing = asyncio.create_task(batcher.close(0.01))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        batcher.submit(rows(1), 9)
    await closing
    assert await outcome(taken) is Unavailable


@pytest.mark.parametrize("begun", [True, False])
def test_a_batch_that_is_given_up_leaves_nobody_without_an_answer(begun: bool) -> None:
    @on_loop
    async def check() -> None:
        batcher, runner = held()
        futures = [batcher.submit(rows(value), 9) for value in (1, 2)]
        if begun:
            await reached(runner, 1)
        for task in asyncio.all_tasks():
            if "Batcher._run" in repr(task):
                task.cancel()  # as the end of the loop does
        assert await outcome(futures[0]) is Unavailable
        assert runner.gate is not None
        runner.gate.set()
        assert await outcome(futures[1]) == [4.0]
        await batcher.close(5)

    check()
