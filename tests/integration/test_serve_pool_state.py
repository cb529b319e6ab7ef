"""Pipelines in real worker processes that keep something for each session."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from paddle_ft.cli import app
from paddle_ft.serve.batcher import Batcher, DeadlineExceeded
from paddle_ft.serve.batching import Limits
from paddle_ft.serve.pool import Pool
from paddle_ft.serve.publish import publish
from paddle_ft.serve.staff import PoolSettings
from paddle_ft.serve.turns import Turns
from paddle_ft.serve.types import (
    ModelError,
    NotPrimary,
    TooLarge,
    Unavailable,
)
from tests.integration.etcd_cluster import EtcdCluster
from tests.integration.replica_world import ReplicaProcess, replica

COUNTER = '''
import os, signal
from pathlib import Path
import numpy as np
from paddle_ft.serve.pipeline import Pipeline
from paddle_ft.serve.types import Feature, ModelError


class Counter(Pipeline):
    """Counts the requests of a session; what else, the first number says."""

    inputs = (Feature("x", "INT64", (-1,)),)
    outputs = (Feature("n", "INT64", (-1,)),)
    batched = True

    def run(self, inputs, state):
        what = int(inputs["x"][0])
        n = int(state.get("n") or b"0") + 1
        state.put("n", b"%d" % n)
        assert state.get("n") == b"%d" % n
        if what == -1:
            raise ModelError("not now")
        if what == -2 and not (first := Path("FIRST")).exists():
            first.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if what == -3:
            state.put("much", bytes(2**20 + 1))
        if what == -4:
            state.put("much", bytes(range(256)) * 3000)
        if what == -5:
            assert state.get("much") == bytes(range(256)) * 3000
        if what == -6:
            for key in range(100):
                state.get(str(key))
        if what == -7:
            state.put("", b"")
        return {"n": np.array([n] * len(inputs["x"]))}
'''


class Kept:
    """``Sessions`` in a dict; ``failure`` is what ``put`` meets."""

    def __init__(self) -> None:
        self.items: dict[tuple[str, str], bytes] = {}
        self.puts = 0
        self.failure: Exception | None = None
        self.unreadable: Exception | None = None
        self.asked = 0
        self.gate = asyncio.Event()
        """Holds readers back while it is not set."""
        self.gate.set()

    async def get(self, session: str, key: str) -> bytes | None:
        self.asked += 1
        await asyncio.sleep(0.001)
        await self.gate.wait()
        if self.unreadable is not None:
            raise self.unreadable
        return self.items.get((session, key))

    async def put(self, session: str, changes: Mapping[str, bytes], timeout_s: float) -> None:
        await asyncio.sleep(0.001)
        if self.failure is not None:
            raise self.failure
        self.items |= {(session, key): value for key, value in changes.items()}
        self.puts += len(changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pipeline.py").write_text(COUNTER.replace("FIRST", str(tmp_path / "first")))
    return tmp_path


@contextlib.asynccontextmanager
async def pool_of(
    folder: Path, kept: Kept | None, workers: int = 1, turns: Turns | None = None
) -> AsyncIterator[Pool]:
    settings = PoolSettings(workers=workers)
    pool = await Pool.start(folder, "counter", "1", settings, sessions=kept, turns=turns)
    try:
        yield pool
    finally:
        await pool.close()


async def count(pool: Pool, session: str, what: int = 1) -> int:
    outputs = await pool.run({"x": np.array([what])}, 30, session)
    assert set(outputs) == {"n"}
    return int(outputs["n"][0])


def test_a_session_counts_its_requests_once_each(folder: Path) -> None:
    async def story() -> None:
        kept = Kept()
        async with pool_of(folder, kept, workers=2) as pool:
            assert pool.info.stateful
            asked = [count(pool, session) for session in "aababaaa"]
            found = await asyncio.gather(*asked)
            assert found == [1, 2, 1, 3, 2, 4, 5, 6]
            assert kept.items == {("a", "n"): b"6", ("b", "n"): b"2"}

            # Its worker dies after it has put: another one does it, and it counts once.
            assert await count(pool, "a", -2) == 7
            assert (folder / "first").exists()
            assert kept.items["a", "n"] == b"7"
            assert kept.puts == 9

            # Values larger than a message.
            await count(pool, "a", -4)
            await count(pool, "a", -5)
            assert len(kept.items["a", "much"]) == 768_000
            assert len(pool._turns) == 0

    asyncio.run(story())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@pytest.mark.slow
def test_a_request_that_is_given_up_puts_nothing(folder: Path) -> None:
    async def story() -> None:
        kept, x = Kept(), {"x": np.array([1])}
        async with pool_of(folder, kept, workers=2) as pool:
            batcher = Batcher(pool, Limits())
            kept.gate.clear()
            computes = batcher.submit(x, 30, "a")
            await until(lambda: kept.asked == 1)
            waits = batcher.submit(x, 30, "a")
            await until(lambda: len(pool._turns._waiting["a"]) == 1)
            computes.cancel()  # as the gateway does when it asks another replica
            waits.cancel()
            again = batcher.submit(x, 30, "a")
            await until(lambda: kept.asked == 2)
            kept.gate.set()
            assert (await again)["n"].tolist() == [1]
            await until(lambda: pool._running == 0)  # its worker is through with it, too
            assert (kept.puts, kept.asked, len(pool._turns)) == (1, 2, 0)

            kept.gate.clear()
            late = batcher.submit(x, 0.01, "a")
            with pytest.raises(DeadlineExceeded):
                await late
            kept.gate.set()
            assert (await batcher.submit(x, 30, "a"))["n"].tolist() == [2]
            await until(lambda: pool._running == 0)
            assert (kept.puts, batcher.waiting) == (2, 0)

    asyncio.run(asyncio.wait_for(story(), 60))


@pytest.mark.slow
def test_two_versions_take_turns_at_a_session(folder: Path) -> None:
    async def story() -> None:
        kept, turns = Kept(), Turns()
        async with (
            pool_of(folder, kept, turns=turns) as old,
            pool_of(folder, kept, turns=turns) as new,
        ):
            kept.gate.clear()
            asked = [asyncio.ensure_future(count(pool, "a")) for pool in (old, new)]
            await until(lambda: kept.asked == 1 and len(turns._waiting["a"]) == 1)
            kept.gate.set()
            assert await asyncio.gather(*asked) == [1, 2]

    asyncio.run(asyncio.wait_for(story(), 60))


def test_what_is_refused_changes_nothing_and_is_told(folder: Path) -> None:
    async def story() -> None:
        kept = Kept()
        async with pool_of(folder, kept) as pool:
            for what, text in (
                (-1, "not now"),
                (-3, "may put 1048576 bytes"),
                (-6, "may ask for 64 keys"),
                (-7, "A key is a text of 1 to 128 bytes"),
            ):
                with pytest.raises(ModelError, match=text):
                    await count(pool, "a", what)
            with pytest.raises(ModelError, match="names none: send X-Session-Id"):
                await count(pool, "")
            assert not kept.puts

            for error in (NotPrimary("b", "host:1"), TooLarge("full"), Unavailable("nobody")):
                kept.failure = error
                with pytest.raises(type(error)) as found:
                    await count(pool, "a")
                assert found.value is error
            kept.failure = None
            for defect, told in ((Unavailable("behind"), "behind"), (KeyError(), "cannot be read")):
                kept.unreadable = defect
                with pytest.raises(Unavailable, match=told):
                    await count(pool, "a")
            kept.unreadable = None
            assert not kept.items
            assert await count(pool, "a") == 1
            assert pool.replaced == 0

    asyncio.run(story())


def test_a_replica_of_no_group_says_that_it_keeps_nothing(folder: Path) -> None:
    async def story() -> None:
        async with pool_of(folder, None) as pool:
            with pytest.raises(ModelError, match="in no group that could keep it"):
                await count(pool, "a")

    asyncio.run(story())


def test_turns_come_in_order_and_go_on_without_who_has_given_up() -> None:
    async def story() -> None:
        turns, order = Turns(), list[int]()
        loop = asyncio.get_running_loop()
        go_on = asyncio.Event()

        async def one(number: int, timeout_s: float = 30.0) -> None:
            async with turns.turn("a", loop.time() + timeout_s):
                order.append(number)
                await go_on.wait()

        tasks = [asyncio.ensure_future(one(number)) for number in range(5)]
        late = asyncio.ensure_future(one(9, 0.0))
        await asyncio.sleep(0)
        tasks[1].cancel()
        with pytest.raises(Unavailable, match="has not ended in time"):
            await late
        async with turns.turn("b", loop.time()):
            go_on.set()
        tasks[0].add_done_callback(lambda _: tasks[2].cancel())  # as its turn has just come
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order in ([0, 3, 4], [0, 2, 3, 4])
        assert not len(turns)

    asyncio.run(story())


@pytest.mark.slow
@pytest.mark.etcd
def test_a_group_keeps_a_session_over_the_death_of_its_primary(
    tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "pipeline.py").write_text(COUNTER)
    publish(tmp_path / "pipeline", "counter", str(tmp_path / "store"))

    def ask(replica: ReplicaProcess, session: str) -> int | str:
        tensor = {"name": "x", "datatype": "INT64", "shape": [1], "data": [1]}
        headers = {"X-Session-Id": session}
        path = "/v2/models/counter/infer"
        status, _, answer = replica.ask("POST", path, {"inputs": [tensor]}, **headers)
        return answer["outputs"][0]["data"][0] if status == 200 else str(answer["error"])

    def flags(node: str) -> list[str]:
        group = ["--etcd", etcd.endpoints[0], "--group", "counters", "--spares", "0"]
        return [*group, "--node", node]

    with EtcdCluster(1) as etcd:
        first = ReplicaProcess(tmp_path, *flags("first"), models=["counter"])
        try:
            wait_for(lambda: ask(first, "warm") == 1)
            with replica(tmp_path, *flags("second"), models=["counter"]) as second:
                wait_for(lambda: ask(second, "other") == 1)
                # By the one that is not the primary, which reads what it has had put.
                assert [ask(second, "a") for _ in range(10)] == list(range(1, 11))
                assert "a session is 1 to 128 visible" in str(ask(second, "a b"))
                wait_for(lambda: "second" in in_sync(etcd))
                first.kill()
                wait_for(lambda: isinstance(ask(second, "alive"), int))
                assert [ask(second, "a") for _ in range(3)] == [11, 12, 13]
        finally:
            first.kill()


def in_sync(etcd: EtcdCluster) -> list[str]:
    place = ["--etcd", etcd.endpoints[0], "--group", "counters", "--json"]
    done = CliRunner().invoke(app, ["serving", *place])
    assert done.exit_code == 0, done.output
    return [name.partition(".")[0] for name in json.loads(done.output)["in_sync"]["names"]]
