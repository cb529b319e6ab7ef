"""Changes that any replica of a group takes, around planned promotions and without a primary."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from paddle_ft.config import EtcdConfig
from paddle_ft.serve.replicated import GroupSettings, Replicated
from paddle_ft.serve.types import NoPrimary, ServeError, Unavailable
from tests.integration.etcd_cluster import EtcdCluster
from tests.integration.serving_group import ServingGroup

pytestmark = pytest.mark.etcd


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with EtcdCluster(1) as cluster:
        yield cluster


async def settled(groups: list[Replicated]) -> Replicated:
    """The primary, once all are in sync."""
    while True:
        for group in groups:
            if group.role == "primary" and len(group.status().in_sync) == len(groups):
                return group
        await asyncio.sleep(0.01)


def test_planned_promotions_refuse_no_change_wherever_it_is_made(etcd: EtcdCluster) -> None:
    async def work() -> None:
        nodes = ("n0", "n1", "n2")
        groups = [Replicated(GroupSettings(etcd.config(), "passing", n)) for n in nodes]
        over = asyncio.Event()
        written: dict[str, int] = {}

        async def write(key: str) -> None:
            number = 0
            while not over.is_set():
                number += 1
                group = groups[number % 3]
                at = await group.put_anywhere("state", key, b"%d" % number)
                held = await group.get("state", key, at)
                assert held is not None and int(held.value) == number
                written[key] = number
                await asyncio.sleep(0.005)

        try:
            for group in groups:
                group.tell(condition="ready")
                await group.start()
            await settled(groups)
            writers = [asyncio.create_task(write(f"k{n}")) for n in range(6)]
            for _ in range(3):
                primary = await settled(groups)
                target = groups[(groups.index(primary) + 1) % 3]
                try:
                    await groups[0].promote(target.name)
                except ServeError:  # a busy machine: it was called off in time
                    continue
                before = dict(written)
                while any(written[key] < before[key] + 3 for key in before):
                    await asyncio.sleep(0.01)
            over.set()
            await asyncio.gather(*writers)
            assert len(written) == 6
        finally:
            over.set()
            for group in groups:
                await group.close()

    asyncio.run(asyncio.wait_for(work(), 60))


def test_a_change_waits_for_a_primary_and_not_for_ever() -> None:
    async def work() -> None:
        alone = Replicated(GroupSettings(EtcdConfig(endpoints=("127.0.0.1:1",)), "g", "n0"))
        began_s = time.monotonic()
        with pytest.raises(NoPrimary, match="no primary"):
            await alone.put_anywhere("state", "k", b"v")
        assert time.monotonic() - began_s > 0.9
        with pytest.raises(NoPrimary):
            await alone.put_anywhere("state", "k", b"v", timeout_s=0.05)

    asyncio.run(asyncio.wait_for(work(), 30))


@pytest.mark.slow
def test_who_has_passed_a_change_to_a_primary_that_stands_still_says_so(etcd: EtcdCluster) -> None:
    """Soon after there is another one: the client is not kept until its own limit."""

    async def work(group: ServingGroup) -> None:
        mine = Replicated(GroupSettings(etcd.config(), "still", "mine"))
        try:
            await mine.start()
            mine.tell(condition="ready")
            while len(mine.group.in_sync.names if mine.group.in_sync else ()) < 3:
                await asyncio.sleep(0.01)
            group.freeze(group.primary())
            began_s = time.monotonic()
            with pytest.raises(Unavailable, match="not known"):
                await mine.put_anywhere("state", "k", b"v", timeout_s=120)
            assert time.monotonic() - began_s < 60
            for _ in range(100):
                try:
                    await mine.put_anywhere("state", "k", b"w", timeout_s=5)
                    break
                except Unavailable:
                    await asyncio.sleep(0.05)
            else:
                pytest.fail("nobody took it")
        finally:
            await mine.close()

    with ServingGroup(etcd, 2, "still") as group:
        try:
            asyncio.run(asyncio.wait_for(work(group), 120))
        finally:
            for replica in group.replicas.values():
                group.thaw(replica)
