"""What a replica does about each of its models, over a catalog of numpy functions."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paddle_ft.checkpoint.sign import Trust
from paddle_ft.checkpoint.store import open_store
from paddle_ft.config import EtcdConfig
from paddle_ft.errors import CheckpointDamaged, StoreUnavailable
from paddle_ft.serve import wanted
from paddle_ft.serve.batching import Limits
from paddle_ft.serve.broadcast import Append
from paddle_ft.serve.catalog import Catalog
from paddle_ft.serve.follow import Following
from paddle_ft.serve.loader import Loader, Wanted
from paddle_ft.serve.log import Position
from paddle_ft.serve.reconcile import Model, Models
from paddle_ft.serve.registry import Group, ReplicaRecord
from paddle_ft.serve.replicated import GroupSettings, Replicated
from paddle_ft.serve.staff import PoolSettings
from paddle_ft.serve.tensors import BadRequest
from paddle_ft.serve.types import NotPrimary
from paddle_ft.serve.wanted import Choice
from tests.integration.serve_world import DOUBLE, NumpyRunner, doubled


def loader(place: Path) -> Any:
    made = Loader(open_store(str(place)), Trust(), place, PoolSettings())
    made.fill(Catalog(Limits(4, 0.02, 8, 2**20)))
    return made


async def nothing_more(_: Model, __: float) -> float:
    return float("inf")


def test_a_replica_that_is_told_to_serve_a_model_no_more_does_that_once(tmp_path: Path) -> None:
    """It is the group that says so: this replica was not asked by anybody to unload."""

    async def story() -> None:
        made = loader(tmp_path)
        made.catalog.serve(runner := NumpyRunner(DOUBLE, doubled))
        models, unload, asked = Models(made, 0.0, nothing_more), made.unload, []

        async def counted(name: str) -> None:
            asked.append(name)
            assert len(asked) < 10, "it goes round without end"
            await unload(name)

        made.unload = counted
        models.model("double").choice = Choice(None)
        running = asyncio.create_task(models.run())
        while not (runner.closed or running.done()):
            await asyncio.sleep(0.005)
        assert not running.done(), running.exception()
        assert asked == ["double"]
        await models.stop()
        running.cancel()

    asyncio.run(asyncio.wait_for(story(), 30))


def test_a_load_that_fails_does_not_forget_a_model_that_another_one_waits_for(
    tmp_path: Path,
) -> None:
    async def story() -> None:
        made = loader(tmp_path)

        async def bring(wanted: Wanted, extra: bool = False) -> None:
            await asyncio.sleep(0.01)
            if wanted.version == 9:
                raise BadRequest("there is no version 9", 404)
            made.catalog.serve(NumpyRunner(DOUBLE, doubled))

        made.bring = bring
        following = Following(made)
        loads = (following.load("double", {"version": number}) for number in ("9", "1"))
        failed, done = await asyncio.gather(*loads, return_exceptions=True)
        assert isinstance(failed, BadRequest)
        assert done is None
        model = following._models.get("double")
        assert model is not None
        assert model.choice == Choice(1, pinned=True)
        # But of what nobody could load nothing is kept.
        with pytest.raises(BadRequest):
            await following.load("x", {"version": "9"})
        assert following._models.get("x") is None

    asyncio.run(asyncio.wait_for(story(), 30))


def test_another_version_of_the_same_number_is_not_taken_for_the_groups(tmp_path: Path) -> None:
    """From another store; the loader refuses it by its digest, and says why."""

    async def story() -> None:
        made, asked = loader(tmp_path), asyncio.get_running_loop().create_future()

        async def bring(wanted: Wanted, extra: bool = False) -> None:
            if not asked.done():
                asked.set_result(wanted)
            raise CheckpointDamaged("it is not that version")

        made.bring, made.digest = bring, lambda _: "0a" * 32
        made.catalog.serve(NumpyRunner(DOUBLE, doubled))
        following: Any = Following(made)
        model = following._models.model("double")
        model.choice = Choice(1, digest="0b" * 32)
        running = asyncio.create_task(following.run([]))
        assert await asked == Wanted("double", 1, "0b" * 32)
        while not following.failures:
            await asyncio.sleep(0.005)
        assert "not that version" in following.reason
        await following.stop()
        running.cancel()

    asyncio.run(asyncio.wait_for(story(), 30))


def test_a_version_that_was_taken_up_at_the_second_try_is_looked_at_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wanted, "AGAIN_S", 0.01)

    async def story() -> None:
        made, tries, looks = loader(tmp_path), 0, 0
        made.catalog.serve(NumpyRunner(DOUBLE, doubled))

        async def bring(_: Wanted, extra: bool = False) -> None:
            nonlocal tries
            tries += 1
            if tries == 1:
                raise StoreUnavailable("the store does not answer")
            made.catalog.serve(NumpyRunner(replace(DOUBLE, version="2"), doubled))
            await made.catalog.retire("double", "1")

        made.bring = bring
        following: Any = Following(made)
        lead = following._models._lead

        async def counted(model: Model, now_s: float) -> float:
            nonlocal looks
            looks += 1
            assert looks < 50, "it goes round without end"
            until_s: float = await lead(model, now_s)
            return until_s

        following._models._lead = counted
        model = following._models.model("double")
        model.choice, model.found = Choice(1), 2
        running = asyncio.create_task(following.run([]))
        while model.choice != Choice(2):
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        assert not running.done(), running.exception()
        assert (tries, made.catalog.served) == (2, {"double": "2"})
        await following.stop()
        running.cancel()

    asyncio.run(asyncio.wait_for(story(), 30))


def test_a_change_is_passed_on_to_a_primary_with_an_address_of_ipv6() -> None:
    async def story() -> None:
        etcd = EtcdConfig(endpoints=("127.0.0.1:1",))
        group: Any = Replicated(GroupSettings(etcd, "g", "n"))
        record = ReplicaRecord("p.0-1", "fd00::7", 8000, 8001, 9000)
        group._party.seat.group = Group(replicas={record.name: record}, primary=record.name)
        now_s = time.monotonic()
        group._party.seat.hear(Append(1, record.name, Position(), (), 0, now_s), now_s)
        asked = []

        async def put(*given: Any) -> Any:
            raise NotPrimary(record.name, "")

        async def passed_on(name: str, address: str, *_: object) -> str:
            asked.append((name, address))
            return "there"

        group.put, group._party.peers.put = put, passed_on
        assert await group.put_anywhere("state", "k", b"v") == "there"
        assert asked == [(record.name, "[fd00::7]:9000")]
        group._party._threads.shutdown(wait=False)
        group._party.member.coordinator.close()

    asyncio.run(asyncio.wait_for(story(), 30))
