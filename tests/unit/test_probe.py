"""``paddle-ft probe`` and ``launch --probe``, over a real etcd and real sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paddle_ft.cli import app
from paddle_ft.config import CheckpointConfig, Config, EtcdConfig, JobConfig
from paddle_ft.coordination.embedded import EmbeddedEtcd
from paddle_ft.coordination.etcd import EtcdCoordinator
from paddle_ft.coordination.schema import Keys
from paddle_ft.errors import EXIT_UNFIT, ConfigError, MachineError, MembersMissing, NodeUnfit
from paddle_ft.health import pairs, probe
from paddle_ft.health.figures import Entry, Figures, judge

FIGURES = Figures(5e10, 8e9)
KEYS = Keys("j")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PRODUCT_S", 0.02)
    monkeypatch.setattr(probe, "COPY_S", 0.02)
    monkeypatch.setattr(probe, "DISK_BYTES", 2**20)
    monkeypatch.setattr(probe, "DISK_BLOCK_BYTES", 2**18)
    monkeypatch.setattr(pairs, "BYTES", 2**18)


@pytest.fixture(scope="module")
def etcd() -> Iterator[EmbeddedEtcd]:
    with EmbeddedEtcd() as server:
        yield server


@pytest.fixture
def coordinator(etcd: EmbeddedEtcd) -> Iterator[EtcdCoordinator]:
    coordinator = EtcdCoordinator(EtcdConfig(endpoints=(etcd.endpoint,)))
    yield coordinator
    coordinator.close()


def shown(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["probe", *arguments], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.output


def test_a_node_alone_is_told_what_it_can_do(tmp_path: Path) -> None:
    told = json.loads(shown("--cache", str(tmp_path / "new"), "--json"))
    assert all(value > 0 for value in told["figures"].values()) and not told["findings"]
    assert [*(tmp_path / "new").iterdir()] == []
    text = shown()
    assert "Gflop/s" in text and "not measured" in text and "works" in text


def test_a_disk_that_refuses_or_hangs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="cannot be written"):
        probe.measure(str(tmp_path / "file"))
    released = threading.Event()
    monkeypatch.setattr(probe, "_write_and_read", lambda _: released.wait(30))
    monkeypatch.setattr(probe, "DISK_S_MAX", 0.05)
    with pytest.raises(MachineError, match="look at this disk"):
        probe.measure(str(tmp_path))
    released.set()


def test_what_is_missing_is_said_in_one_sentence() -> None:
    for arguments in (["--nodes", "2"], ["--etcd", "x:1"], ["--etcd", "x:1", "--job-id", "j",
                                                           "--nodes", "1"]):  # fmt: skip
        with pytest.raises(ConfigError):
            CliRunner().invoke(app, ["probe", *arguments], catch_exceptions=False)


@pytest.mark.etcd
def test_who_is_much_slower_than_those_before_does_not_join(
    etcd: EmbeddedEtcd, coordinator: EtcdCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(job=JobConfig(id="admitted"), checkpoint=CheckpointConfig())
    said: list[str] = []
    can = iter([FIGURES, FIGURES, Figures(2e10, 8e9), Figures(4e10, 8e9), Figures(2e10, 8e9)])
    monkeypatch.setattr(probe, "measure", lambda cache="": next(can))
    probe.admit(config, coordinator, "a", said.append)
    probe.admit(config, coordinator, "b", said.append)
    with pytest.raises(NodeUnfit, match=r"node c does not join.*matrix product: 20.0 Gflop/s"):
        probe.admit(config, coordinator, "c", said.append)
    assert "50.0 Gflop/s" in said[0]
    found = probe.figures_of_others(coordinator, Keys("admitted"), "a")
    assert found == [FIGURES], "who was not let in is no measure for others"
    probe.admit(config, coordinator, "c", said.append)
    shared = ("--etcd", etcd.endpoint, "--job-id", "admitted", "--node", "d")
    assert "bad node d" in shown(*shared, code=EXIT_UNFIT)


def measured(etcd: EmbeddedEtcd, node: str, count: int, timeout_s: float = 20.0) -> list[Entry]:
    config = EtcdConfig(endpoints=(etcd.endpoint,), lease_ttl_s=2, renew_interval_s=0.5)
    coordinator = EtcdCoordinator(config)
    try:
        return pairs.measure_pairs(
            coordinator, KEYS, config, node=node, host="127.0.0.1", count=count,
            figures=FIGURES, timeout_s=timeout_s,
        )  # fmt: skip
    finally:
        coordinator.close()


@pytest.mark.etcd
@pytest.mark.parametrize("count", [2, 3])
def test_all_read_the_same_outcome(
    etcd: EmbeddedEtcd, coordinator: EtcdCoordinator, count: int
) -> None:
    with ThreadPoolExecutor(count) as nodes:
        tables = [*nodes.map(lambda n: measured(etcd, n, count), "abc"[:count])]
    whole = [[(e.node, e.pairs) for e in table] for table in tables]
    assert all(other == whole[0] for other in whole)
    assert {e.node: {p.peer for p in e.pairs} for e in tables[0]} == {
        n: set("abc"[:count]) - {n} for n in "abc"[:count]
    }
    assert all(p.seconds > 0 for e in tables[0] for p in e.pairs)
    assert not coordinator.read(KEYS.probe).kvs, "nothing is left for the next probe"


@pytest.mark.etcd
@pytest.mark.slow
def test_a_node_that_does_not_answer_is_named(
    etcd: EmbeddedEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "PAIR_S_MAX", 0.5)
    run = pairs._Pairs.run

    def deaf(self: pairs._Pairs, rounds: object) -> tuple[object, ...]:
        return () if self._node == "b" else run(self, rounds)

    monkeypatch.setattr(pairs._Pairs, "run", deaf)
    with ThreadPoolExecutor(3) as nodes:
        tables = [*nodes.map(lambda n: measured(etcd, n, 3), "abc")]
    for table in tables:
        assert [f.nodes for f in judge(table)] == [("b",)]


class Relay:
    """One connection to ``port``, each 64 KiB of which take ``delay_s``."""

    def __init__(self, port: int, delay_s: float) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._to, self._delay_s = port, delay_s
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        to = ("127.0.0.1", self._to)
        with self._server, self._server.accept()[0] as one, socket.create_connection(to) as two:
            back = threading.Thread(target=self._pass_on, args=(two, one))
            back.start()
            self._pass_on(one, two)
            back.join()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                time.sleep(self._delay_s * len(data) / 2**16)
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@pytest.mark.etcd
def test_a_slow_link_is_told_from_a_bad_node(
    etcd: EmbeddedEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "REPEATS", 2)
    call, relays = pairs._Pairs._call, list[Relay]()

    def through_a_relay(self: pairs._Pairs, peer: str) -> socket.socket:
        slow = (self._node, peer) == ("a", "b")
        other = self._known[peer]
        relays.append(Relay(other.port, 0.05 if slow else 0.01))
        self._known = {**self._known, peer: replace(other, port=relays[-1].port)}
        return call(self, peer)

    monkeypatch.setattr(pairs._Pairs, "_call", through_a_relay)
    with ThreadPoolExecutor(3) as nodes:
        tables = [*nodes.map(lambda n: measured(etcd, n, 3), "abc")]
    for relay in relays:
        relay.thread.join(10)
    for table in tables:
        assert [f.nodes for f in judge(table)] == [("a", "b")]


@pytest.mark.etcd
def test_too_few_nodes_is_said_in_one_sentence(etcd: EmbeddedEtcd) -> None:
    with pytest.raises(MembersMissing, match="1 of 2 nodes came"):
        measured(etcd, "a", 2, timeout_s=0.3)
