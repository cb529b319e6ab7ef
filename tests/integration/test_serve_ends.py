"""A replica that cannot go on says so and ends; a version that will not fit is not begun."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paddle_ft.checkpoint.sign import Trust
from paddle_ft.checkpoint.store import open_store
from paddle_ft.config import Config, load
from paddle_ft.errors import EXIT_BUG, MachineError, PaddleFTError
from paddle_ft.serve import memory
from paddle_ft.serve.batching import Limits
from paddle_ft.serve.catalog import Catalog
from paddle_ft.serve.loader import Loader, as_answer, pool_settings
from paddle_ft.serve.replica import Replica
from paddle_ft.serve.types import Unavailable
from tests.integration.serve_world import DOUBLE, NumpyRunner, doubled


def config(place: Path) -> Config:
    (place / "store").mkdir()
    values: Mapping[str, Any] = {
        "serve.models": ("double",),
        "serve.cache": str(place / "cache"),
        "serve.http_port": 0,
        "serve.grpc_port": 0,
        "checkpoint.url": str(place / "store"),
    }
    return load(values, {}).config


async def for_ever(*_: object) -> None:
    await asyncio.Event().wait()


def test_a_replica_whose_http_server_has_ended_ends(tmp_path: Path) -> None:
    replica: Any = Replica(config(tmp_path))
    replica._loader.bring = for_ever

    async def story() -> None:
        replica._asked = asyncio.Event()
        await replica._front.start()
        serving = asyncio.create_task(replica._serve())
        await asyncio.sleep(0.05)
        assert not serving.done()
        replica._front._http.should_exit = True  # as a defect of the server would end it
        try:
            await asyncio.wait_for(serving, 30)
        finally:
            await replica._leave(False)

    with pytest.raises(PaddleFTError, match="HTTP server has ended by itself") as caught:
        asyncio.run(story())
    assert caught.value.exit_code == EXIT_BUG


@pytest.mark.parametrize("error", [None, KeyError("link")])
def test_a_replica_that_takes_part_no_longer_ends(tmp_path: Path, error: Exception | None) -> None:
    replica: Any = Replica(config(tmp_path))

    async def story() -> None:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        replica._group = SimpleNamespace(ended=ended)
        part = asyncio.create_task(replica._part())
        await asyncio.sleep(0.01)
        assert not part.done()
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)
        await asyncio.wait_for(part, 30)

    with pytest.raises(PaddleFTError, match="takes part in its group no longer") as caught:
        asyncio.run(story())
    assert caught.value.exit_code == EXIT_BUG
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(("free", "fits"), [(0, False), (1 << 50, True), (None, True)])
def test_a_second_version_is_begun_if_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int | None, fits: bool
) -> None:
    made = config(tmp_path)
    loader: Any = Loader(
        open_store(str(tmp_path / "store")), Trust(), tmp_path, pool_settings(made.serve)
    )
    loader.fill(catalog := Catalog(Limits(4, 0.02, 8, 2**20)))
    monkeypatch.setattr(memory, "free_bytes", lambda: free)

    async def story() -> None:
        runner: Any = NumpyRunner(DOUBLE, doubled)
        runner.pids = [os.getpid()]
        catalog.serve(runner)
        loader._look_for_room("double", "1", 1000)

    if fits:
        asyncio.run(story())
        return
    with pytest.raises(MachineError, match=r"GB of memory, and 0\.00 GB are free") as caught:
        asyncio.run(story())
    assert isinstance(as_answer(caught.value), Unavailable)


def test_the_memory_of_processes_and_what_is_free() -> None:
    mine = memory.private_bytes([os.getpid()])
    assert 2**20 < mine < 2**40
    assert memory.private_bytes([2**22 + 1]) == 0
    free = memory.free_bytes()
    assert free is not None
    assert 0 < free < 2**50
