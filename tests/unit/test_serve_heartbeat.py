"""Where a replica listens and is found, and when its lease ends."""

from __future__ import annotations

import asyncio
import socket

import pytest

from paddle_ft.agent import net
from paddle_ft.config import EtcdConfig
from paddle_ft.errors import ConfigError
from paddle_ft.serve import elect
from paddle_ft.serve.member import with_heartbeat
from paddle_ft.serve.participant import GroupSettings
from paddle_ft.serve.replicated import Replicated


def test_a_lease_ends_after_the_misses() -> None:
    etcd = with_heartbeat(EtcdConfig(), 5.0, 3)
    assert (etcd.lease_ttl_s, etcd.renew_interval_s) == (15, 5.0)
    assert with_heartbeat(EtcdConfig(rpc_timeout_s=0.5), 0.2, 2).lease_ttl_s == 2
    with pytest.raises(ConfigError, match="heartbeat_s"):
        with_heartbeat(EtcdConfig(rpc_timeout_s=3.0), 1.0, 2)


def test_addresses() -> None:
    assert net.endpoint("10.0.0.1", 80) == "10.0.0.1:80"
    assert net.endpoint("fd00::1", 80) == "[fd00::1]:80"
    assert net.is_local("127.0.0.1")
    assert not net.is_local(net.ELSEWHERE)
    assert len(net.place()) == 4


def test_a_port_that_is_taken_is_named() -> None:
    etcd = EtcdConfig(endpoints=("127.0.0.1:1",))  # it is not asked

    async def start() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            group = Replicated(GroupSettings(etcd, "g", "n", peer_port=port))
            with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
                await group.start()
            await group.close()

    asyncio.run(start())


def test_two_processes_with_one_given_name_are_refused() -> None:
    first = net.NodeName("serving-t", "one", alone=True)
    try:
        with pytest.raises(ConfigError, match="one"):
            net.NodeName("serving-t", "one", alone=True)
    finally:
        first.release()
    net.NodeName("serving-t", "one", alone=True).release()


def test_who_has_been_outlived() -> None:
    names = ["a.1f-1", "a.1f-2", "a.2f-1", "b.1f-1", "old"]
    assert elect.outlived("a.1f-2", names) == ("a.1f-1",)
    assert elect.outlived("old", names) == ()  # of a version without places
