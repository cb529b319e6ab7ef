"""Real etcd members are killed, frozen and cut off under load; nothing acknowledged is lost."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import pytest

from paddle_ft.config import EtcdConfig
from paddle_ft.coordination.etcd import EtcdCoordinator, LeaseKeeper
from paddle_ft.coordination.kv import Compare, Event, KeyValue, Put, Snapshot, Transaction
from paddle_ft.errors import EtcdUnavailable, PaddleFTError
from tests.integration.etcd_cluster import HOST, EtcdCluster, wait_until

pytestmark = pytest.mark.etcd

PREFIX = "/paddle_ft/faults/"
T = TypeVar("T")


class Writer(threading.Thread):
    """Counts one key up, each time by a transaction that compares its mod_revision.

    It is the only writer of its key, so etcd may refuse a transaction only because of an earlier
    one of its own whose outcome was not known.
    """

    def __init__(self, client: EtcdCoordinator, key: str) -> None:
        super().__init__(daemon=True)
        self.client = client
        self.key = key
        self.stop = threading.Event()
        self.acknowledged: dict[int, bytes] = {}
        self.unknown = 0
        self.slowest_s = 0.0
        self.problem = ""

    def run(self) -> None:
        try:
            self._write()
        except (AssertionError, PaddleFTError) as error:  # the test looks at `problem`
            self.problem = f"{self.key}: {error!r}"

    def _write(self) -> None:
        number, revision = 0, 0
        in_doubt = False
        while not self.stop.is_set():
            value = b"%d" % number
            txn = Transaction(
                (Compare(self.key, "mod_revision", revision),), (Put(self.key, value),)
            )
            try:
                result = self._timed(partial(self.client.transact, txn))
                if result.succeeded:
                    revision = result.revision
                    self.acknowledged[revision] = value
                    number += 1
                    in_doubt = False
                    continue
                if not in_doubt:
                    self.problem = f"{self.key}: refused {value!r} without a reason"
                    return
            except EtcdUnavailable:
                self.unknown += 1
            in_doubt = True
            with contextlib.suppress(EtcdUnavailable):
                number, revision = self._look_again(number, revision)

    def _look_again(self, number: int, revision: int) -> tuple[int, int]:
        kvs = self._timed(lambda: self.client.read(self.key)).kvs
        if kvs and kvs[0].mod_revision != revision:
            assert kvs[0].value == b"%d" % number, f"{number} at {revision}, but read {kvs[0]}"
            return number + 1, kvs[0].mod_revision
        return number, revision

    def _timed(self, call: Callable[[], T]) -> T:
        start = time.monotonic()
        try:
            return call()
        finally:
            self.slowest_s = max(self.slowest_s, time.monotonic() - start)


class Watcher:
    def __init__(self, client: EtcdCoordinator) -> None:
        self.events: list[Event] = []
        self.resets: list[Snapshot] = []
        start = client.read(PREFIX).revision
        self.cancel = client.watch(
            PREFIX, start, lambda _, events: self.events.extend(events), self.resets.append
        )


class Load:
    """Three writers and a watch, and the judgement on what they saw."""

    def __init__(self, config: EtcdConfig) -> None:
        self.config = config
        self.watching = EtcdCoordinator(config)
        self.watcher = Watcher(self.watching)
        self.clients = [EtcdCoordinator(config) for _ in range(3)]
        self.writers = [Writer(c, f"{PREFIX}{i}") for i, c in enumerate(self.clients)]
        for writer in self.writers:
            writer.start()

    def goes_on(self) -> None:
        """Returns once every writer has written five times from now on, and the watch saw it."""
        goals = [len(w.acknowledged) + 5 for w in self.writers]

        def reached() -> bool:
            for writer in self.writers:
                assert writer.is_alive(), writer.problem
            return all(len(w.acknowledged) >= g for w, g in zip(self.writers, goals, strict=True))

        wait_until(reached, "the writers go on")
        last = max(max(w.acknowledged) for w in self.writers)
        wait_until(lambda: self._seen_up_to(last), "the watch goes on")

    def _seen_up_to(self, revision: int) -> bool:
        events = self.watcher.events
        return bool(events) and events[-1].kv.mod_revision >= revision

    def finish(self) -> None:
        for writer in self.writers:
            writer.stop.set()
        for writer in self.writers:
            writer.join(30)
            assert not writer.is_alive()
            assert not writer.problem
            assert writer.slowest_s < self.config.call_timeout_s + 1.0
        wait_until(self._watch_has_caught_up, "the watch has caught up")
        check_nothing_lost(
            {r: v for w in self.writers for r, v in w.acknowledged.items()}, self.watcher.events
        )
        assert self.watcher.resets == []

    def _watch_has_caught_up(self) -> bool:
        newest = max(kv.mod_revision for kv in self.watching.read(PREFIX).kvs)
        return self._seen_up_to(newest)

    def close(self) -> None:
        for writer in self.writers:
            writer.stop.set()
        for client in (self.watching, *self.clients):
            client.close()


def check_nothing_lost(acknowledged: dict[int, bytes], events: list[Event]) -> None:
    """Every acknowledged write was delivered, and every event once and in order."""
    revisions = [e.kv.mod_revision for e in events]
    assert revisions == sorted(set(revisions)), "an event came twice or out of order"
    delivered = {e.kv.mod_revision: e.kv.value for e in events}
    assert acknowledged.items() <= delivered.items(), "an acknowledged write was not delivered"
    last: dict[str, int] = {}
    for event in events:
        number = int(event.kv.value)
        assert number == last.get(event.kv.key, -1) + 1, "a write of the chain is missing"
        last[event.kv.key] = number


@pytest.fixture
def three() -> Iterator[EtcdCluster]:
    with EtcdCluster(3) as cluster:
        yield cluster


@pytest.fixture
def one() -> Iterator[EtcdCluster]:
    with EtcdCluster(1) as cluster:
        yield cluster


@pytest.fixture
def load(three: EtcdCluster) -> Iterator[Load]:
    load = Load(three.config())
    yield load
    load.close()


def test_the_checker_sees_a_lost_a_doubled_and_a_swapped_event() -> None:
    def event(revision: int, number: int) -> Event:
        return Event(False, KeyValue("k", b"%d" % number, 1, revision))

    good = [event(2, 0), event(3, 1), event(4, 2)]
    check_nothing_lost({2: b"0", 4: b"2"}, good)
    for bad in (good[:2], [good[0], good[2]], [good[0], *good], [good[1], good[0], good[2]]):
        with pytest.raises(AssertionError):
            check_nothing_lost({2: b"0", 4: b"2"}, bad)


def test_the_leader_is_killed_under_load(three: EtcdCluster, load: Load) -> None:
    load.goes_on()
    for _ in range(2):
        victim = three.leader()
        three.kill(victim)
        load.goes_on()
        three.start(victim)
        three.wait_healthy()
    load.goes_on()
    load.finish()


@pytest.mark.parametrize("who", ["leader", "the one all clients talk to"])
def test_a_frozen_member_is_left_and_comes_back(three: EtcdCluster, load: Load, who: str) -> None:
    load.goes_on()
    victim = three.leader() if who == "leader" else 0
    three.freeze(victim)
    load.goes_on()
    three.thaw(victim)
    three.wait_healthy()
    load.goes_on()
    load.finish()


def test_a_watch_leaves_a_frozen_member_with_the_calls(three: EtcdCluster) -> None:
    """A stream alone notices after some 6 s; here a call that timed out takes it along."""
    client, other = EtcdCoordinator(three.config()), EtcdCoordinator(three.config())
    watcher = Watcher(client)
    try:
        client.transact(put("a"))
        wait_until(lambda: bool(watcher.events), "the watch stands")
        three.freeze(0)
        client.read(PREFIX)
        eventually(lambda: other.transact(put("b")))
        written = time.monotonic()
        wait_until(lambda: len(watcher.events) == 2, "the watch has moved")
        assert time.monotonic() - written < 2.0
    finally:
        client.close()
        other.close()


def test_every_member_is_restarted_in_turn(three: EtcdCluster, load: Load) -> None:
    load.goes_on()
    for victim in range(3):
        three.kill(victim)
        load.goes_on()
        three.start(victim)
        three.wait_healthy()
    load.finish()


def test_without_a_majority_nothing_is_promised_and_then_all_goes_on(three: EtcdCluster) -> None:
    client = EtcdCoordinator(three.config(call_timeout_s=2.0))
    watcher = Watcher(client)
    try:
        first = client.transact(put("a"))
        for victim in (0, 1):
            three.kill(victim)
        for call in (lambda: client.read(PREFIX), lambda: client.transact(put("b"))):
            with pytest.raises(EtcdUnavailable):
                call()
        three.start(0)
        three.wait_healthy()
        second = eventually(lambda: client.transact(put("c")))
        wait_until(lambda: watcher.events[-1].kv.mod_revision == second.revision, "the last event")
        values = [e.kv.value for e in watcher.events]
        assert values[0] == b"a"
        assert values[-1] == b"c"
        assert values.count(b"a") == values.count(b"c") == 1
        assert first.revision < second.revision
    finally:
        client.close()


def test_a_single_server_restarts_under_a_watch_and_a_lease(one: EtcdCluster) -> None:
    client = EtcdCoordinator(one.config(call_timeout_s=1.0))
    lost: list[bool] = []
    keeper = LeaseKeeper(
        client,
        ttl_s=5,
        renew_interval_s=0.2,
        safety_margin_s=1.0,
        on_lost=lambda: lost.append(True),
    )
    watcher = Watcher(client)
    try:
        lease = keeper.start()
        client.transact(Transaction((), (Put(PREFIX + "leased", b"0", lease),)))
        written = [b"0"]
        for number in (b"1", b"2", b"3"):
            one.kill(0)
            with pytest.raises(EtcdUnavailable):
                client.read(PREFIX)
            before = keeper.deadline()
            one.start(0)
            eventually(partial(client.transact, put(number.decode())))
            written.append(number)
            wait_until(partial(later, keeper, before + 0.1), "the lease is renewed")
        wait_until(lambda: len(watcher.events) >= len(written), "all events")
        assert [e.kv.value for e in watcher.events] == written
        assert watcher.resets == []
        assert not lost
        assert {kv.lease for kv in client.read(PREFIX).kvs} == {0, lease}
    finally:
        keeper.close()
        client.close()


IDLE = """
import sys, time
from paddle_ft.config import EtcdConfig
from paddle_ft.coordination import etcd_connection
from paddle_ft.coordination.etcd import EtcdCoordinator

quick = {"grpc.keepalive_time_ms": 1100}
etcd_connection._OPTIONS = tuple({**dict(etcd_connection._OPTIONS), **quick}.items())
client = EtcdCoordinator(EtcdConfig(endpoints=(sys.argv[1],)))
client.ping()
time.sleep(7)  # six pings, while grpc sends one a second at most
client.ping()
client.close()
"""


@pytest.mark.slow
def test_etcd_does_not_hang_up_on_a_connection_without_calls(one: EtcdCluster) -> None:
    """It takes four pings within two hours for an attack, while no call is under way."""
    done = subprocess.run(
        [sys.executable, "-c", IDLE, one.endpoints[0]],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"GRPC_VERBOSITY": "info"},
    )
    assert done.returncode == 0, done.stderr
    assert "too_many_pings" not in done.stderr


def test_a_watch_that_breaks_while_it_catches_up_misses_nothing(one: EtcdCluster) -> None:
    """etcd sends a backlog in parts of a thousand revisions, whose headers are ahead of them."""
    client = EtcdCoordinator(one.config())
    numbers = range(2500)

    def write(part: range) -> None:
        for number in part:
            # Large enough that the parts do not all fit into the connection's buffers.
            value = b"%d" % number + b" " * 8000
            assert client.transact(Transaction((), (Put(f"{PREFIX}{number}", value),))).succeeded

    seen: list[int] = []
    killed = threading.Event()

    def on_events(_: int, events: tuple[Event, ...]) -> None:
        seen.extend(e.kv.mod_revision for e in events)
        if not killed.is_set():
            one.kill(0)
            killed.set()

    try:
        start = client.read(PREFIX).revision
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write, [numbers[i::4] for i in range(4)]))
        client.watch(PREFIX, start, on_events, lambda _: None)
        wait_until(killed.is_set, "the first part")
        assert 0 < len(seen) < len(numbers), "it did not break while it caught up"
        one.start(0)
        wait_until(lambda: len(seen) >= len(numbers), "the rest")
        assert seen == list(range(start + 1, start + 1 + len(numbers)))
    finally:
        client.close()


def later(keeper: LeaseKeeper, deadline: float) -> bool:
    return keeper.deadline() > deadline


def put(value: str) -> Transaction:
    return Transaction((), (Put(PREFIX + value, value.encode()),))


def eventually(call: Callable[[], T]) -> T:
    """The result of ``call`` once etcd is back."""
    for _ in range(20):
        try:
            return call()
        except EtcdUnavailable:
            continue
    raise AssertionError("etcd did not come back")


class TestUnreachable:
    """Every call ends within ``call_timeout_s`` and says in one sentence where it looked."""

    @pytest.fixture
    def silent(self) -> Iterator[str]:
        """Accepts connections and never says a word, as a frozen server does."""
        with socket.socket() as server:
            server.bind((HOST, 0))
            server.listen()
            yield f"{HOST}:{server.getsockname()[1]}"

    @pytest.fixture
    def closed(self) -> str:
        with socket.socket() as server:
            server.bind((HOST, 0))
            return f"{HOST}:{server.getsockname()[1]}"

    @pytest.mark.parametrize("kind", ["closed", "silent", "no-such-host.invalid:2379"])
    def test_all_calls_end_in_time(self, kind: str, request: pytest.FixtureRequest) -> None:
        endpoint = request.getfixturevalue(kind) if ":" not in kind else kind
        config = EtcdConfig(
            endpoints=(endpoint,), rpc_timeout_s=0.3, call_timeout_s=1.0, lease_ttl_s=5
        )
        client = EtcdCoordinator(config)
        cancel = client.watch(PREFIX, 1, lambda *_: None, lambda _: None)
        try:
            calls = (
                client.ping,
                lambda: client.read(PREFIX),
                lambda: client.transact(put("a")),
                lambda: client.grant(5),
                lambda: client.keep_alive(1),
                lambda: client.revoke(1),
            )
            start = time.monotonic()
            with ThreadPoolExecutor(len(calls)) as pool:
                errors = [f.exception() for f in [pool.submit(call) for call in calls]]
            assert time.monotonic() - start < config.call_timeout_s + 1.0
            for error in errors:
                assert isinstance(error, EtcdUnavailable)
                assert endpoint in str(error)
                assert "\n" not in str(error)
                assert "check that it runs" in str(error)
        finally:
            cancel()
            client.close()

    @pytest.mark.parametrize("kind", ["closed", "silent", "no-such-host.invalid:2379"])
    def test_one_that_answers_is_enough(
        self, one: EtcdCluster, kind: str, request: pytest.FixtureRequest
    ) -> None:
        endpoint = request.getfixturevalue(kind) if ":" not in kind else kind
        seen: list[Event] = []
        clients = [
            EtcdCoordinator(one.config(endpoints=(endpoint, *one.endpoints))) for _ in range(3)
        ]
        writing, reading, watching = clients
        try:
            # Certainly not sent to the first one, so the write is not in doubt.
            assert writing.transact(put("a")).succeeded
            assert reading.read(PREFIX).kvs[0].value == b"a"
            watching.watch(PREFIX, 1, lambda _, events: seen.extend(events), lambda _: None)
            wait_until(lambda: bool(seen), "the watch found the one that answers")
        finally:
            for client in clients:
                client.close()

    def test_a_closed_client_says_so(self, one: EtcdCluster) -> None:
        client = EtcdCoordinator(one.config())
        client.ping()
        client.close()
        client.close()
        with pytest.raises(EtcdUnavailable, match="closed"):
            client.read(PREFIX)
