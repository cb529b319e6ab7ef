"""A serving group under real faults: nothing acknowledged is lost, one term answers at a time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from paddle_ft.agent.net import is_local
from paddle_ft.cli import app
from tests.integration.etcd_cluster import EtcdCluster, wait_until
from tests.integration.serving_group import Refused, ReplicaProcess, ServingGroup

pytestmark = pytest.mark.etcd

TELL_S = 1.0
KILLS = int(os.environ.get("PADDLE_FT_SERVE_KILLS", "20"))
PAUSE_S = 0.02
"""Of a writer, between two changes: four make 200 a second at most."""


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with EtcdCluster(1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def three(etcd: EtcdCluster) -> Iterator[ServingGroup]:
    """Shared: three processes take seconds to start."""
    with ServingGroup(etcd, 3) as group:
        yield group


@pytest.fixture
def group(three: ServingGroup, etcd: EtcdCluster) -> Iterator[ServingGroup]:
    """Three replicas, all there and in sync; they must not be killed."""
    three.settle()
    yield three
    etcd.thaw(0)
    for replica in three.replicas.values():
        three.thaw(replica)


class Writer:
    """Puts rising numbers under its own key, on whoever takes them, and remembers the answers."""

    def __init__(self, group: ServingGroup, key: str) -> None:
        self._group = group
        self.key = key
        self.acknowledged = 0
        self.answers: list[tuple[float, float, int, int]] = []
        """Asked and answered at, term, number."""
        self.slowest_s = 0.0
        """From the first try of a number to its answer."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            began_s = time.monotonic()
            while not self._stop.is_set():
                if self._put(number):
                    self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)
                    break
                time.sleep(0.005)
            time.sleep(PAUSE_S)

    def _put(self, number: int) -> bool:
        for replica in [r for r in self._group.replicas.values() if r.alive and r.started]:
            asked_s = time.monotonic()
            try:
                term, _ = replica.ask("put", 0.5, key=self.key, value=str(number), s=0.5)
            except (Refused, OSError):
                continue
            self.answers.append((asked_s, time.monotonic(), term, number))
            self.acknowledged = number
            return True
        return False

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


def check(group: ServingGroup, writers: list[Writer]) -> None:
    """Nothing is lost, everybody has the same, and no term has answered after a later one."""
    for writer in writers:
        writer.stop()
    group.settle()
    at = group.put("end", "")
    states = [r.ask("get", key="end", at=at, s=5.0) for r in group.replicas.values()]
    assert set(states) == {""}
    items = [r.ask("items") for r in group.replicas.values()]
    assert all(found == items[0] for found in items)
    for writer in writers:
        assert writer.acknowledged > 0
        assert int(items[0][writer.key]) >= writer.acknowledged
    answers = sorted(a for w in writers for a in w.answers)
    for asked_s, _, term, _ in answers:
        # what was asked after an answer in a later term had come
        later = max((t for _, done_s, t, _ in answers if done_s < asked_s), default=0)
        assert term >= later


def killed(group: ServingGroup, victim: ReplicaProcess) -> float:
    """How long nobody has taken changes after a SIGKILL of ``victim``, which is started again."""
    began_s = time.monotonic()
    victim.kill()
    group.put("after", victim.node)
    took_s = time.monotonic() - began_s
    group.start(victim.node)
    group.replicas[victim.node].ready()
    group.settle()
    return took_s


def test_what_was_acknowledged_is_read_anywhere(group: ServingGroup) -> None:
    first = group.primary()
    at = first.ask("put", key="k", value="v", s=5.0)
    for replica in group.replicas.values():  # its own write, read anywhere
        assert replica.ask("get", key="k", at=at, s=5.0) == "v"
    other = next(r for r in group.replicas.values() if r is not first)

    def names_the_primary() -> bool:
        with pytest.raises(Refused, match="NotPrimary|NoPrimary") as refused:
            other.ask("put", key="k", value="w", s=5.0)
        return "NotPrimary" in str(refused.value)

    wait_until(names_the_primary, "it has heard who the primary is")
    with pytest.raises(Refused, match="Unavailable|NoPrimary"):
        other.ask("get", key="k", at=[at[0], at[1] + 5], s=0.1)


def test_what_was_acknowledged_survives_the_primary(etcd: EtcdCluster) -> None:
    with ServingGroup(etcd, 2, "survives", lease_ttl_s=30) as group:
        first = group.primary()
        other = next(r for r in group.replicas.values() if r is not first)
        at = first.ask("put", key="k", value="v", s=5.0)
        writer = Writer(group, "w")
        wait_until(lambda: writer.acknowledged > 3, "changes")
        took_s = killed(group, first)
        assert took_s < 10  # 0.1 s where nothing else runs; the lease would take 30
        assert group.status(first.node)["term"] > at[0]
        check(group, [writer])
        assert other.ask("get", key="k", at=None, s=1.0) == "v"

        assert other.stop() == 0  # hands over before it leaves
        assert group.put("k", "after")
        assert group.primary().node == first.node


def test_a_group_that_has_lost_all_begins_anew(etcd: EtcdCluster) -> None:
    with ServingGroup(etcd, 1, "lost", lease_ttl_s=60) as group:
        only = group.primary()
        only.ask("put", key="k", value="v", s=5.0)
        name = only.ask("status")["name"]
        only.kill()
        group.start(only.node)
        group.put("k", "after")  # its lease would have kept others away for a minute
        assert "becomes the primary without the changes that only" in group.replicas["n0"].log()
        shown = CliRunner().invoke(app, ["serving", "--etcd", etcd.endpoints[0], "--group", "lost"])
        assert f"changes that only {name} had were given up at" in shown.output


@pytest.mark.slow
@pytest.mark.skipif(not is_local("::1"), reason="this machine has no IPv6")
def test_a_group_over_ipv6(etcd: EtcdCluster) -> None:
    with ServingGroup(etcd, 2, "six", host="::1", lease_ttl_s=60) as group:
        at = group.put("k", "v")
        for replica in group.replicas.values():
            assert replica.ask("get", key="k", at=at, s=5.0) == "v"
        group.primary().kill()  # noticed where nobody listens any more
        assert group.put("k", "after")


@pytest.mark.slow
def test_a_stopping_primary_asks_one_after_another(etcd: EtcdCluster) -> None:
    with ServingGroup(etcd, 3, "leaves", lease_ttl_s=60) as group:
        first = group.primary()
        loading, ready = (r for r in group.replicas.values() if r is not first)
        loading.ask("tell", condition="loading")
        at = first.ask("put", key="k", value="v", s=5.0)
        assert first.stop() == 0
        assert group.primary() is ready
        assert ready.ask("get", key="k", at=at, s=5.0) == "v"
        loading.ask("tell", condition="ready")
        ready.kill()  # the last one that leaves gives the state up, in good order
        assert group.primary() is loading
        assert loading.stop() == 0
        group.start(first.node)
        assert group.put("k", "new")


def test_a_planned_promotion_refuses_nobody(group: ServingGroup) -> None:
    primary = group.primary()
    target = next(r for r in group.replicas.values() if r is not primary)
    with pytest.raises(Refused, match="NotPromoted"):
        target.ask("promote", target="nobody")
    refused: list[Refused] = []

    def work() -> None:  # on the old primary: what waits there is passed on
        try:
            while True:
                primary.ask("put", key="k", value="v", s=5.0)
        except Refused as error:
            refused.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    target.ask("promote", target=target.node)
    assert group.primary() is target
    for thread in threads:
        thread.join(20)
    assert [error.args[0] for error in refused] == ["NotPrimary"] * 4  # said, not lost
    assert target.node in str(refused[0])


def test_a_person_promotes(group: ServingGroup, etcd: EtcdCluster) -> None:
    where = ["--etcd", etcd.endpoints[0], "--group", "g"]

    def command(*words: str) -> tuple[int, str]:
        run = CliRunner().invoke(app, [*words, *where])
        return run.exit_code, run.output or str(run.exception)

    primary = group.primary()
    others = [r for r in group.replicas.values() if r is not primary]
    code, told = command("promote", others[0].node)
    assert code == 0 and "is the primary of g" in told
    assert group.primary() is others[0]
    assert "nobody" in command("promote", "nobody")[1]
    others[1].ask("tell", condition="loading")
    group.settle()
    time.sleep(TELL_S)  # the others have to see it
    assert "is loading" in command("promote", others[1].node)[1]
    code, told = command("promote", others[1].node, "--force")
    assert code == 0 and "lost" not in told  # it was in sync
    assert group.primary() is others[1]
    others[1].ask("tell", condition="ready")
    assert command("promote")[0] == 0  # the furthest of the others
    assert group.primary() is not others[1]
    assert "refused" not in command("serving", "--json")[1]  # no wish is left


def test_without_etcd_changes_go_on_and_nobody_is_promoted(
    group: ServingGroup, etcd: EtcdCluster
) -> None:
    primary = group.primary()
    term = group.status(primary.node)["term"]
    etcd.freeze(0)
    wait_until(lambda: group.status(primary.node)["lease_left_s"] < -1.5, "its lease has ended")
    for number in range(20):
        assert primary.ask("put", key="k", value=str(number), s=5.0)[0] == term
    others = [r for r in group.replicas.values() if r is not primary]
    assert all(r.ask("status")["role"] == "replica" for r in others)
    etcd.thaw(0)
    check(group, [])


def test_a_woken_primary_changes_nothing(group: ServingGroup) -> None:
    old = group.primary()
    writers = [Writer(group, f"w{number}") for number in range(2)]
    wait_until(lambda: all(w.acknowledged > 3 for w in writers), "changes")
    group.freeze(old)
    before = [w.acknowledged for w in writers]
    wait_until(
        lambda: all(w.acknowledged > b + 3 for w, b in zip(writers, before, strict=True)),
        "changes after the freeze",
    )
    group.thaw(old)
    check(group, writers)
    assert old.ask("status")["role"] == "replica"


def test_a_forced_promotion_gives_up_what_the_others_had(group: ServingGroup) -> None:
    primary = group.primary()
    others = [r for r in group.replicas.values() if r is not primary]
    group.put("k", "all")
    for replica in others:
        group.freeze(replica)
    try:
        primary.ask("put", key="k", value="first", s=0.1)
    except Refused:  # they are waited for
        wait_until(lambda: len(group.status(primary.node)["in_sync"]) == 1, "they are out")
    else:
        assert len(group.status(primary.node)["in_sync"]) == 1
    primary.ask("put", key="k", value="only here", s=5.0)
    group.freeze(primary)
    for replica in others:
        group.thaw(replica)
    wait_until(lambda: others[0].ask("status")["primary"] == "", "the lease has ended")
    with pytest.raises(Refused, match="Unavailable|NoPrimary"):
        others[0].ask("put", key="k", value="x", s=1.0)
    others[0].ask("promote", target=others[0].node, force=True)
    # The message that held the first may have waited for them in the kernel.
    assert others[0].ask("get", key="k", at=None, s=1.0) in ("all", "first")
    others[0].ask("put", key="k", value="new", s=5.0)
    group.thaw(primary)  # begins anew: it has what is lost
    wait_until(lambda: primary.ask("get", key="k", at=None, s=1.0) == "new", "it follows")
    check(group, [])


@pytest.mark.slow
def test_a_primary_whose_event_loop_stands_still_is_replaced(group: ServingGroup) -> None:
    old = group.primary()
    term = group.status(old.node)["term"]
    blocked = threading.Thread(target=old.ask, args=("block", 20.0), kwargs={"s": 8.0})
    blocked.start()
    assert group.put("k", "by another")[0] > term
    assert blocked.is_alive()
    blocked.join(20)
    check(group, [])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", [2, 3])
def test_nothing_is_lost_over_many_kills(etcd: EtcdCluster, size: int) -> None:
    with ServingGroup(etcd, size, f"kills{size}") as group:
        writers = [Writer(group, f"w{number}") for number in range(4)]
        wait_until(lambda: all(w.acknowledged > 3 for w in writers), "changes")
        gaps_s = [killed(group, group.primary()) for _ in range(KILLS)]
        others = [r for r in group.replicas.values() if r is not group.primary()]
        killed(group, others[0])
        check(group, writers)
        print(f"{size} replicas: without a primary for at most {max(gaps_s):.2f} s")
        print(f"slowest change {max(w.slowest_s for w in writers):.2f} s")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_planned_promotions_lose_nothing(etcd: EtcdCluster) -> None:
    with ServingGroup(etcd, 3, "planned") as group:
        writers = [Writer(group, f"w{number}") for number in range(4)]
        wait_until(lambda: all(w.acknowledged > 3 for w in writers), "changes")
        took_s = []
        for number in range(2 * KILLS):
            node = f"n{number % 3}"
            if group.primary().node != node:
                began_s = time.monotonic()
                group.replicas[node].ask("promote", target=node)
                took_s.append(time.monotonic() - began_s)
        check(group, writers)
        print(f"{len(took_s)} promotions, the slowest {max(took_s):.3f} s")
        print(f"slowest change {max(w.slowest_s for w in writers):.2f} s")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_primaries_are_frozen_and_woken(etcd: EtcdCluster) -> None:
    with ServingGroup(etcd, 3, "frozen") as group:
        writers = [Writer(group, f"w{number}") for number in range(2)]
        for _ in range(KILLS // 2):
            old = group.primary()
            before = [w.acknowledged for w in writers]
            group.freeze(old)
            wait_until(
                lambda b=before: all(w.acknowledged > n for w, n in zip(writers, b, strict=True)),
                "changes after the freeze",
            )
            group.thaw(old)
            group.settle()
        check(group, writers)
