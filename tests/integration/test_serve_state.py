"""The state of sessions and the settings of a group, over HTTP, on one replica and between two."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from urllib.parse import quote

import pytest

from paddle_ft.config import EtcdConfig
from paddle_ft.coordination.etcd_grpc import grpc
from paddle_ft.serve import grpc_messages
from paddle_ft.serve.broadcast import Append
from paddle_ft.serve.ledger import Bounds, name_of
from paddle_ft.serve.log import Entry, Position
from paddle_ft.serve.replicated import GroupSettings, Replicated
from paddle_ft.serve.sessions import GroupSessions, LocalSessions
from paddle_ft.serve.types import Sessions, TooLarge, Unavailable
from tests.integration.etcd_cluster import EtcdCluster, wait_until
from tests.integration.serve_world import DOUBLE, TOKEN, Running, doubled, front
from tests.integration.serving_group import ServingGroup

TERM = "paddle-ft-term"
SETTINGS = "/v2/admin/settings"
PATIENT = {"x-request-timeout-ms": "20000"}
ADMIN = {"Authorization": f"Bearer {TOKEN}"}


def door(session: str, key: str) -> str:
    return f"/v2/state/{quote(session, safe='')}/{quote(key, safe='')}"


# ---------------------------------------------------------------- one replica, no etcd


@pytest.fixture
def running() -> Iterator[Running]:
    with front(batch_rows_max=8) as made:
        yield made


def follower(made: Running) -> Replicated:
    """The group of ``made``, which has heard from a primary and takes part no further."""
    group = Replicated(GroupSettings(EtcdConfig(endpoints=("127.0.0.1:1",)), "g", "n0"))
    replica = group._seat.replica
    values = [(2, "a", b"1"), (2, "b", b"2"), (5, "a", bytes(range(256)))]
    entries = [
        Entry(Position(term, number), "state", name_of("s/1", key), value)
        for number, (term, key, value) in enumerate(values, 1)
    ]
    entries.append(Entry(Position(5, 4), "setting", "batch_wait_ms", b"3"))
    entries.append(Entry(Position(5, 5), "setting", "batch_wait_ms", b"many"))  # a newer version's

    def hear() -> None:
        made.front.state.join(group)
        replica.hear(Append(5, "a.1", Position(), tuple(entries), 5))
        group.applied(replica.fresh())

    made.do(hear)
    return group


def test_reads_of_a_replica_and_what_tokens_say(running: Running) -> None:
    follower(running)
    path = door("s/1", "a")
    status, headers, answer = running.ask("GET", path)
    assert (status, answer, headers[TERM]) == (200, bytes(range(256)), "5.5")
    for token, status in (("2.1", 200), ("5.3", 200), ("2.3", 409), ("2.9", 409), ("5.2", 409)):
        assert running.ask("GET", path, **{TERM: token})[0] == status, token
    assert "lost" in running.ask("GET", path, **{TERM: "2.3"})[2]["error"]
    status, headers, answer = running.ask("GET", path, X_Request_Timeout_Ms="20", **{TERM: "5.6"})
    assert (status, headers["retry-after"]) == (503, "1")
    for token in ("", "5", "5.", "-1.2", "5.6.7", "9" * 30 + ".1"):
        assert running.ask("GET", path, **{TERM: token})[0] == 400, token
    status, headers, answer = running.ask("GET", door("s/1", "c"))
    assert (status, headers[TERM], answer["error"]) == (404, "5.5", "the session has no key 'c'")


def test_what_is_refused_at_the_door(running: Running) -> None:
    path = door("s", "k")
    for method in ("GET", "PUT", "DELETE"):
        status, _, answer = running.ask(method, path, b"v")
        assert (status, "start it with --etcd" in answer["error"]) == (404, True)
    follower(running)
    assert running.ask("PUT", path, b"v")[0] == 503  # nobody is the primary
    assert running.ask("PUT", path, bytes(2**21 + 1))[0] == 413
    assert running.ask("PUT", door("s", "k" * 511), b"")[0] == 413
    for wrong in ("/v2/state/s%20s/k", "/v2/state/%ff/k", "/v2/state/s/%00", "/v2/state/s/%2E"):
        assert running.ask("PUT", wrong, b"v")[0] == 400, wrong
    for missing in ("/v2/state/s", "/v2/state/s/", "/v2/state/s/k/k"):
        assert running.ask("GET", missing)[0] == 404, missing
    status, headers, _ = running.ask("POST", path, b"v")
    assert (status, headers["allow"]) == (405, "GET, PUT, DELETE")


def test_settings_without_a_group_are_in_force_at_once(running: Running) -> None:
    running.serve(DOUBLE, doubled)
    assert running.ask("GET", SETTINGS)[0] == 401
    configured = {"batch_rows_max": 8, "batch_wait_ms": 20.0, "queue_max": 256}
    assert running.ask("GET", SETTINGS, **ADMIN)[2] == configured
    status, _, answer = running.ask(
        "PUT", SETTINGS, {"batch_rows_max": 2, "batch_wait_ms": 0}, **ADMIN
    )
    assert (status, answer) == (200, configured | {"batch_rows_max": 2, "batch_wait_ms": 0})
    assert running.ask("GET", "/v2/models/double/config")[2]["max_batch_size"] == 2
    assert running.do(lambda: running.catalog.find("double")._queue.limits.wait_max_s) == 0
    for wrong in (
        {"batch_rows_max": 0},
        {"batch_rows_max": "2"},
        {"queue_max": True},
        {"queue_max": 1.5},
        {"batch_wait_ms": -1},
        {"admin_token": "mine"},
        {"admin_token": None},
        {"queue_max": 3, "none": 1},
        [],
        7,
    ):
        status, _, answer = running.ask("PUT", SETTINGS, wrong, **ADMIN)
        assert status == 400, (wrong, answer)
    status, _, answer = running.ask("PUT", SETTINGS, {"batch_rows_max": None}, **ADMIN)
    assert answer == configured | {"batch_wait_ms": 0}
    follower(running)
    assert running.ask("GET", SETTINGS, **ADMIN)[2]["batch_wait_ms"] == 3


def test_answers_to_load_and_unload_carry_the_term(running: Running) -> None:
    path = "/v2/repository/models/echo"
    assert TERM not in running.ask("POST", f"{path}/load", {}, **ADMIN)[1]
    follower(running)
    for what in ("unload", "load"):
        status, headers, _ = running.ask("POST", f"{path}/{what}", {}, **ADMIN)
        assert (status, headers[TERM]) == (200, "5.5")
    api = grpc_messages.inference()
    with grpc.insecure_channel(running.grpc) as channel:
        for what in ("Unload", "Load"):
            method = f"/inference.GRPCInferenceService/RepositoryModel{what}"
            request = getattr(api, f"RepositoryModel{what}Request")(model_name="echo")
            call = channel.unary_unary(method, lambda m: m.SerializeToString())
            _, done = call.with_call(
                request, metadata=(("authorization", ADMIN["Authorization"]),), timeout=10
            )
            assert dict(done.trailing_metadata())[TERM] == "5.5"


def test_sessions_of_pipelines(running: Running) -> None:
    group = follower(running)
    ours: Sessions = GroupSessions(group)
    for work in (ours.put("s", {"k": b"v"}, 5), ours.get("s/1", "a")):  # which nobody can confirm
        with pytest.raises(Unavailable, match="no primary"):
            running.start(work).result(10)

    local: Sessions = LocalSessions(Bounds(session_bytes=400, session_ttl_s=1e-9))
    running.start(local.put("s", {"k": b"v"}, 5)).result(10)
    with pytest.raises(TooLarge):  # together; none of them is there then
        running.start(local.put("s", {"l": bytes(1), "m": bytes(300)}, 5)).result(10)
    assert running.start(local.get("s", "l")).result(10) is None
    assert running.start(local.get("s", "k")).result(10) is None  # too old


# ---------------------------------------------------------------- real replicas


def ask(
    port: int, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdCluster]:
    with EtcdCluster(1) as cluster:
        yield cluster


def ports(group: ServingGroup) -> tuple[int, int]:
    """The primary's HTTP port, and another's."""
    first = group.primary()
    other = next(r for r in group.replicas.values() if r is not first)
    return first.ask("address"), other.ask("address")


@pytest.mark.etcd
def test_a_client_reads_its_own_write_anywhere_also_after_the_primary_died(
    etcd: EtcdCluster,
) -> None:
    with ServingGroup(etcd, 2, "state", lease_ttl_s=30, http=True) as group:
        primary, other = ports(group)
        status, headers, _ = ask(primary, "PUT", door("s", "k/1"), b"mine")
        token = headers[TERM]
        assert (status, token.count(".")) == (200, 1)
        for port in (primary, other):
            status, found, value = ask(
                port, "GET", door("s", "k/1"), paddle_ft_term=token, **PATIENT
            )
            assert (status, value) == (200, b"mine")
            assert tuple(map(int, found[TERM].split("."))) >= tuple(map(int, token.split(".")))
        status, headers, _ = ask(other, "PUT", door("s", "k/1"), b"theirs")  # it passes it on
        found = ask(primary, "GET", door("s", "k/1"), paddle_ft_term=headers[TERM], **PATIENT)
        assert (status, found[2]) == (200, b"theirs")
        status, headers, _ = ask(primary, "DELETE", door("s", "k/1"))
        assert status == 200
        gone = ask(other, "GET", door("s", "k/1"), paddle_ft_term=headers[TERM], **PATIENT)
        assert gone[0] == 404

        change = json.dumps({"queue_max": 7}).encode()
        assert ask(other, "PUT", SETTINGS, change, **ADMIN)[0] == 421
        status, headers, text = ask(primary, "PUT", SETTINGS, change, **ADMIN)
        assert (status, json.loads(text)["queue_max"], TERM in headers) == (200, 7, True)

        written: dict[str, str] = {}

        def write() -> None:
            for number in range(10_000):
                try:
                    status, headers, _ = ask(primary, "PUT", door("w", str(number)), b"%d" % number)
                except OSError:
                    return
                if status == 200:
                    written[str(number)] = headers[TERM]

        writer = threading.Thread(target=write)
        writer.start()
        wait_until(lambda: len(written) > 20, "changes")
        group.primary().kill()
        writer.join(20)
        for key, token in written.items():
            status, _, value = ask(other, "GET", door("w", key), paddle_ft_term=token, **PATIENT)
            assert (status, value) == (200, key.encode())
        wait_until(lambda: ask(other, "PUT", door("s", "k"), b"after")[0] == 200, "a primary")
        after = ask(other, "GET", door("s", "k"))[1][TERM]
        assert int(after.split(".")[0]) > int(token.split(".")[0])
        status, _, text = ask(other, "GET", SETTINGS, **ADMIN)
        assert (status, json.loads(text)["queue_max"]) == (200, 7)


@pytest.mark.etcd
def test_pipelines_on_two_replicas_lose_no_change_of_a_session(etcd: EtcdCluster) -> None:
    """Asked in turn, each reads what the other has had put."""

    async def work() -> None:
        settings = [GroupSettings(etcd.config(), "turns", node) for node in ("n0", "n1")]
        groups = [Replicated(each) for each in settings]
        try:
            for group in groups:
                group.tell(condition="ready")
                await group.start()
            while len(groups[0].status().in_sync) < 2 or not groups[1].status().primary:
                await asyncio.sleep(0.01)
            both = [GroupSessions(group) for group in groups]
            for number in range(100):
                sessions = both[number % 2]
                assert int(await sessions.get("s", "n") or b"0") == number
                await sessions.put("s", {"n": b"%d" % (number + 1)}, 5)
            assert {key for _, key in groups[0]._seat.replica.state.items} == {name_of("s", "n")}
        finally:
            for group in groups:
                await group.close()

    asyncio.run(asyncio.wait_for(work(), 60))


@pytest.mark.slow
@pytest.mark.etcd
def test_sessions_end_on_all_replicas_and_the_full_state_says_what_to_do(
    etcd: EtcdCluster,
) -> None:
    bounds = {"session_ttl_s": 2.0, "session_bytes": 1000, "state_bytes": 1500}
    with ServingGroup(etcd, 2, "short", http=True, bounds=bounds) as group:
        primary, other = ports(group)
        assert ask(primary, "PUT", door("s", "k"), bytes(700))[0] == 200
        status, _, text = ask(primary, "PUT", door("s", "l"), bytes(700))
        assert (status, b"session_bytes_max" in text) == (413, True)
        status, _, text = ask(primary, "PUT", door("t", "l"), bytes(800))
        assert (status, b"session_ttl_s" in text) == (507, True)
        for port in (primary, other):
            wait_until(lambda port=port: ask(port, "GET", door("s", "k"))[0] == 404, "it ends")
        assert ask(primary, "PUT", door("t", "l"), bytes(800))[0] == 200
