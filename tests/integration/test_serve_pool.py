"""Real worker processes under a pool: lost, stopped, poisoned, and what is left of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddle_ft.errors import ConfigError
from paddle_ft.serve import deadline, shared, staff, worker_process
from paddle_ft.serve.forks import Forks
from paddle_ft.serve.pool import Pool
from paddle_ft.serve.predictor import Settings
from paddle_ft.serve.staff import PoolSettings, Progress
from paddle_ft.serve.types import BatchRefused, ModelError, Unavailable

ODD = '''
import os, signal, time
import numpy as np
from paddle_ft.serve.pipeline import Pipeline
from paddle_ft.serve.types import Feature, ModelError


class Odd(Pipeline):
    """Does to its process what the first number says."""

    inputs = (Feature("x", "FP32", (-1, -1)), Feature("note", "BYTES", (-1,)))
    outputs = (Feature("y", "FP32", (-1, -1)), Feature("said", "BYTES", (-1,)))
    batched = True

    def run(self, inputs, state=None):
        x, what = inputs["x"], int(inputs["x"].flat[0])
        if what == -1:
            os.kill(os.getpid(), signal.SIGKILL)
        if what == -2:
            raise ModelError("no negative numbers")
        if what == -3:
            raise ZeroDivisionError("a defect of the pipeline")
        if what == -4:
            while True:
                pass
        if what == -5:
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == -7:
            x = x.astype("f8")
        if what == -6:
            time.sleep(0.6)
        said = np.array([item * 2 for item in inputs["note"]], object)
        if what == -8:
            said = np.array([os.environ.get(item.decode(), "").encode() for item in inputs["note"]])
            said = said.astype(object)
        return {"y": x * 2, "said": said}
'''


def given(*numbers: float, note: bytes = b"ab") -> dict[str, np.ndarray[Any, Any]]:
    x = np.array([numbers], "f4")
    return {"x": x, "note": np.array([note], object)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pipeline.py").write_text(ODD)
    return tmp_path


@contextlib.asynccontextmanager
async def pool_of(folder: Path, **settings: Any) -> AsyncIterator[Pool]:
    pool = await Pool.start(folder, "odd", "3", PoolSettings(**settings))
    try:
        yield pool
    finally:
        await pool.close()


async def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s) if sys.version_info >= (3, 11) else _nothing():
        while not condition():
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def _nothing() -> AsyncIterator[None]:
    yield


async def check_answer(pool: Pool, *numbers: float) -> None:
    outputs = await pool.run(given(*numbers), 20)
    np.testing.assert_array_equal(outputs["y"], 2 * np.array([numbers], "f4"))
    assert outputs["said"].tolist() == [b"abab"]


async def begun(pool: Pool, number: float) -> asyncio.Future[Any]:
    """What comes of a batch that begins at once."""
    found: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    assert pool.begin(given(number), 20, found.set_result)
    return found


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
def test_a_batch_outlives_one_worker_and_not_two(folder: Path) -> None:
    async def story() -> None:
        told: list[Progress] = []
        pool = await Pool.start(folder, "odd", "3", PoolSettings(workers=2), told.append)
        try:
            assert told[-1].ready == told[-1].wanted == 2
            assert [p.ready for p in told] == sorted(p.ready for p in told)
            assert (pool.info.name, pool.info.version, pool.info.batched) == ("odd", "3", True)
            assert pool.idle == 2
            await check_answer(pool, 1, 2, 3)

            # Refused by the model or by its code: nobody is lost for it.
            before = pool.pids
            for number, text in (
                (-2, "no negative numbers"),
                (-3, "a defect of the pipeline"),
                (-7, "y of float64, and it is to be FP32"),
            ):
                with pytest.raises(ModelError, match=text):
                    await pool.run(given(number), 20)
            assert pool.pids[:2] == before[:2]

            for wrong, text in (
                ({"x": np.ones((1, 1), ">f8")}, "x must be FP32; it is of float64"),
                ({"y": np.ones(1)}, "takes note, x; given are note, x, y"),
            ):
                with pytest.raises(ModelError, match=text):
                    await pool.run({**given(1), **wrong}, 20)
            swapped = await pool.run({**given(1), "x": np.array([[3]], ">f4")}, 20)
            assert swapped["y"].tolist() == [[6]]

            # Killed from outside with a batch: another one does it.
            await until(lambda: len(pool.pids) == 3)
            running = asyncio.ensure_future(pool.run(given(-6, 1), 20))
            await until(lambda: pool.idle == 1)
            os.kill(pool.pids[0], signal.SIGKILL)
            assert (await running)["y"].tolist() == [[-12, 2]]
            await until(lambda: pool.replaced == 1 and len(pool.pids) == 3)

            # It kills whoever has it.
            with pytest.raises(BatchRefused, match="SIGKILL"):
                await pool.run(given(-1), 20)
            await check_answer(pool, 4)
            await until(lambda: len(pool.pids) == 3)
            assert pool.replaced == 3
        finally:
            await pool.close()

    before = descriptors()
    asyncio.run(story())
    assert descriptors() <= before


@pytest.mark.slow
def test_what_begins_at_once_outlives_one_worker_and_not_two(folder: Path) -> None:
    async def story() -> None:
        async with pool_of(folder, workers=1) as pool:
            await until(lambda: len(pool.pids) == 2)
            answer = await (await begun(pool, 3))
            assert answer["y"].tolist() == [[6]]
            assert isinstance(await (await begun(pool, -2)), ModelError)

            slow = await begun(pool, -6)
            assert not pool.begin(given(1), 20, lambda _: None)  # who has none must wait
            os.kill(pool.pids[0], signal.SIGKILL)
            assert (await slow)["y"].tolist() == [[-12]]

            await until(lambda: len(pool.pids) == 2 and pool.idle == 1)
            assert isinstance(await (await begun(pool, -1)), BatchRefused)
            await until(lambda: pool.idle == 1)
            assert not pool.begin(given(1), 20, lambda _: None)  # not before it is compared
            await check_answer(pool, 1)

    asyncio.run(story())


def test_a_stopped_worker_is_replaced_and_its_batch_answered(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[float] = []
    monkeypatch.setattr(deadline.Learnt, "note", lambda _, nbytes, took_s: learnt.append(took_s))

    async def story() -> None:
        async with pool_of(folder, workers=1) as pool:
            await until(lambda: len(pool.pids) == 2)
            await check_answer(pool, 1)
            assert len(learnt) == 1
            answer = await begun(pool, 3)
            time.sleep(1.0)  # this process stands still, and then reads an answer that is old
            assert (await answer)["y"].item() == 6
            assert max(learnt, default=0) < 0.9
            os.kill(pool.pids[0], signal.SIGSTOP)
            await asyncio.gather(*(check_answer(pool, n) for n in range(5)))
            assert pool.replaced == 1
            last = await begun(pool, -6)
        assert isinstance(await last, Unavailable)  # the pool was closed under it
        assert not pool.begin(given(1), 20, lambda _: None)

    asyncio.run(story())


@pytest.mark.slow
def test_a_worker_that_computes_for_ever_is_ended_by_what_was_learnt(folder: Path) -> None:
    async def story() -> None:
        async with pool_of(folder, workers=1, spares=2, look_s=0.05) as pool:
            await until(lambda: len(pool.pids) == 3)
            for n in range(10):
                await check_answer(pool, n)
            with pytest.raises(BatchRefused, match="takes longer than"):
                await pool.run(given(-4), 60)
            await check_answer(pool, 1)

    asyncio.run(story())


def test_who_waits_is_told_in_time_and_what_was_begun_does_no_harm(folder: Path) -> None:
    async def story() -> None:
        async with pool_of(folder, workers=1, spares=0) as pool:
            slow = asyncio.ensure_future(pool.run(given(-6), 20))
            await until(lambda: pool.idle == 0)
            with pytest.raises(Unavailable, match="free in time"):
                await pool.run(given(1), 0.05)
            slow.cancel()
            await check_answer(pool, 5)  # not what the first one had asked
            with pytest.raises(Unavailable, match=r"within 0\.1 s"):
                await pool.run(given(-6), 0.1)
            await check_answer(pool, 6)
        with pytest.raises(Unavailable, match="unloaded"):
            await pool.run(given(1), 1)

    asyncio.run(story())


def test_a_pipeline_does_not_get_the_secrets_of_its_replica(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PADDLE_FT_SERVE__ADMIN_TOKEN", "secret")
    monkeypatch.setenv("PADDLE_FT_SERVE__WORKERS", "1")

    async def story() -> None:
        async with pool_of(folder, workers=1, spares=0) as pool:
            for name, value in (("ADMIN_TOKEN", b""), ("WORKERS", b"1")):
                asked = given(-8, note=f"PADDLE_FT_SERVE__{name}".encode())
                assert (await pool.run(asked, 20))["said"].tolist() == [value]

    asyncio.run(story())


def test_a_large_batch_that_cannot_be_written_leaves_the_worker_free(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    async def story() -> None:
        async with pool_of(folder, workers=1, spares=0) as pool:
            with monkeypatch.context() as short:
                short.setattr(worker_process, "_INLINE_BYTES", 1)
                short.setattr(worker_process.shared, "write", no_memory)
                with pytest.raises(Unavailable, match="no memory"):
                    await pool.run(given(1), 20)
            await check_answer(pool, 2)

    asyncio.run(story())


@pytest.mark.parametrize("inline_bytes", [8 * 2**20, 1000])
def test_tensors_of_any_size_up_to_the_bound(
    folder: Path, monkeypatch: pytest.MonkeyPatch, inline_bytes: int
) -> None:
    monkeypatch.setattr(worker_process, "_INLINE_BYTES", inline_bytes)

    async def story() -> None:
        async with pool_of(folder, workers=1, spares=0, tensor_bytes_max=2**22) as pool:
            for size in (3, 100_000, 7, 1_000_000, 5):
                await check_answer(pool, *np.arange(size))
            with pytest.raises(ModelError, match="at most 4194304"):
                await pool.run(given(*np.zeros(1_100_000)), 20)
            with pytest.raises(ModelError, match="holds a int"):
                await pool.run({"x": np.ones((1, 1), "f4"), "note": np.array([3], object)}, 20)
            assert pool.idle == 1
            await check_answer(pool, 5)
            assert pool.replaced == 0

    asyncio.run(story())


@pytest.mark.slow
def test_a_spare_that_cannot_start_is_not_tried_without_a_pause(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staff, "_AGAIN_S", 600.0)
    monkeypatch.setattr(staff, "_AGAIN_MAX_S", 600.0)
    monkeypatch.setattr(staff, "_SPARE_AGAIN_MAX_S", 600.0)
    starts, short = tmp_path / "starts", tmp_path / "short"
    (folder / "pipeline.py").write_text(
        f"""{ODD}
open({str(starts)!r}, "a").write("x")
if os.path.exists({str(short)!r}):
    os.kill(os.getpid(), 9)
open({str(short)!r}, "w").close()
"""
    )

    async def story() -> None:
        async with pool_of(folder, workers=1) as pool:
            await until(lambda: pool.progress.failure)
            assert pool.progress.failure == "it ended by SIGKILL"
            await asyncio.sleep(0.3)
            assert starts.read_text() == "xx"
            assert len(pool._staff.workers) == 1  # nor is another one on its way
            await check_answer(pool, 1)

            # One that could be started is replaced at once, whatever the spare waits for.
            short.unlink()
            os.kill(pool.pids[0], signal.SIGKILL)
            await until(lambda: pool.replaced == 1 and pool.pids)
            assert not pool.progress.failure
            await check_answer(pool, 2)

    asyncio.run(story())


@pytest.mark.slow
def test_inputs_that_end_workers_are_known_after_the_second_time(folder: Path) -> None:
    async def story() -> None:
        async with pool_of(folder, workers=1, spares=1) as pool:
            for count in (1, 2):
                await until(lambda: len(pool.pids) == 2)
                with pytest.raises(BatchRefused, match="Another worker of odd was lost"):
                    await pool.run(given(-1), 20, again=True)
                await until(lambda: pool.replaced == count)  # noqa: B023
            with pytest.raises(BatchRefused, match="not tried again for up to 60 s"):
                await pool.run(given(-1), 20)
            assert pool.replaced == 2
            await check_answer(pool, 3)

    asyncio.run(story())


def test_a_pipeline_that_waits_for_something_is_not_taken_to_hang(folder: Path) -> None:
    async def story() -> None:
        async with pool_of(folder, workers=1, spares=0, look_s=0.1) as pool:
            for n in range(10):
                await check_answer(pool, n)
            assert (await pool.run(given(-6), 60))["y"].tolist() == [[-12]]
            assert pool.replaced == 0

    asyncio.run(story())


def test_a_worker_lost_while_it_is_given_a_batch_harms_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "_INLINE_BYTES", 10)
    written, go_on, write = threading.Event(), threading.Event(), shared.write
    still_open: list[bool] = []

    def slow(memory: shared.Memory, *args: Any) -> Any:
        written.set()
        assert go_on.wait(30)
        still_open.append(is_open(memory.descriptor))  # though its worker is gone
        return write(memory, *args)

    async def story() -> None:
        async with pool_of(folder, workers=1, spares=1) as pool:
            await until(lambda: len(pool.pids) == 2)
            monkeypatch.setattr(shared, "write", slow)
            answer = asyncio.ensure_future(pool.run(given(7, 8), 30))
            await until(written.is_set)
            os.kill(pool.pids[0], signal.SIGKILL)
            await until(lambda: pool.replaced == 1)
            go_on.set()
            assert (await answer)["y"].tolist() == [[14, 16]]
            assert all(still_open)

    before = descriptors()
    asyncio.run(story())
    assert descriptors() <= before


def test_one_that_is_not_wanted_any_more_while_it_is_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()
    still_open: list[bool] = []

    def slow(module: str, *numbers: int) -> Any:
        began.set()
        assert go_on.wait(30)
        still_open.extend(map(is_open, numbers))
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(worker_process, "popen", slow)

    async def story() -> None:
        changes: list[str] = []
        worker = worker_process.WorkerProcess(lambda each: changes.append(each.lost))
        source = worker_process.Source(folder, "odd", "3", Settings(), 2**20)
        start = asyncio.ensure_future(worker.start(source))
        await until(began.is_set)
        worker.kill("it was not wanted")
        go_on.set()
        await start
        await worker.reap()
        assert changes == ["it was not wanted"]
        assert still_open == [True] * 4

    before = descriptors()
    asyncio.run(story())
    assert descriptors() <= before


@pytest.mark.slow
def test_what_cannot_be_loaded_is_told_in_a_sentence(tmp_path: Path) -> None:
    async def start(text: str) -> None:
        (tmp_path / "pipeline.py").write_text(text)
        await Pool.start(tmp_path, "odd", "3", PoolSettings(spares=0))

    failing = ODD.replace("def run", "def setup(self): 1 / 0\n    def run")
    for text, said in (
        ("import nowhere", "cannot be imported: ModuleNotFoundError"),
        ("x = 1", "must define one class derived from Pipeline; it has none"),
        (failing, "cannot be set up: ZeroDivisionError"),
        ("import os; os.kill(os.getpid(), 9)", "before they are ready: it ended by SIGKILL"),
    ):
        with pytest.raises(ConfigError, match=said):
            asyncio.run(start(text))


def test_nothing_is_left_of_a_front_that_is_killed(
    folder: Path, wait_for: Callable[..., None]
) -> None:
    """Not even of a worker that never looks at its socket again."""
    front = f"""
        import asyncio, sys
        from pathlib import Path
        import numpy as np
        from paddle_ft.serve.pool import Pool
        from paddle_ft.serve.staff import PoolSettings

        async def main():
            pool = await Pool.start(Path({str(folder)!r}), "odd", "3", PoolSettings(workers=2))
            x, note = np.array([[-4]], "f4"), np.array([b""], object)
            asyncio.ensure_future(pool.run({{"x": x, "note": note}}, 60))
            while len(pool.pids) < 3:
                await asyncio.sleep(0.01)
            print(*pool.pids, flush=True)
            await asyncio.sleep(60)

        asyncio.run(main())
    """
    before = set(os.listdir("/dev/shm"))
    command = [sys.executable, "-c", textwrap.dedent(front)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(pids) == 3
    began_s = time.monotonic()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert time.monotonic() - began_s < 5
    mine = {name for name in set(os.listdir("/dev/shm")) - before if "tensors" in name}
    assert not mine


@pytest.mark.slow
def test_workers_are_forked_off_one_process_and_outlive_it(
    folder: Path, wait_for: Callable[..., None]
) -> None:
    def parent_of(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    async def story() -> list[int]:
        forks = Forks()
        try:
            async with pool_of(folder, forks=forks) as pool:
                await until(lambda: len(pool.pids) == 2)
                (parent,) = {parent_of(pid) for pid in pool.pids}
                assert parent_of(parent) == os.getpid()
                before = pool.pids
                with pytest.raises(BatchRefused, match="SIGKILL"):
                    await pool.run(given(-1), 20)
                await until(lambda: len(pool.pids) == 2)
                assert {parent_of(pid) for pid in pool.pids} == {parent}
                assert not any(Path(f"/proc/{pid}").exists() for pid in before)
                os.kill(parent, signal.SIGKILL)
                await check_answer(pool, 1)
                assert await forks.start([0, 0, 0, 0], lambda: False) is None  # and is made anew
                return [*before, *pool.pids, parent]
        finally:
            forks.close()

    pids = asyncio.run(story())
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
