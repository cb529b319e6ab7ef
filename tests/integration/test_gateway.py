"""The gateway over real nginx: replicas killed, stopped, refusing; reloads; etcd away."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from paddle_ft.agent.tether import tethered
from paddle_ft.config import EtcdConfig
from paddle_ft.coordination.embedded import EmbeddedEtcd
from paddle_ft.coordination.etcd import EtcdCoordinator
from paddle_ft.gateway_config import GatewayConfig
from paddle_ft.serve.nginx import Nginx, workers_user
from paddle_ft.serve.nginx_text import Place, whole_nginx
from paddle_ft.serve.registry import Group, Keys
from paddle_ft.serve.routing import Learnt, Timeouts, routes
from paddle_ft.types import encode
from tests.integration.authority import Authority
from tests.integration.gateway_world import GROUP, HOST, World, call, nginx_binary

pytestmark = pytest.mark.etcd


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedEtcd]:
    with EmbeddedEtcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def world(tmp_path: Path, etcd: EmbeddedEtcd) -> Iterator[World]:
    coordinator = EtcdCoordinator(EtcdConfig(endpoints=(etcd.endpoint,)))
    with World(tmp_path, coordinator, etcd.endpoint) as found:
        yield found
    coordinator.close()


@pytest.fixture
def pair(world: World) -> World:
    """Two replicas behind a gateway that has learnt how quick they are."""
    world.add("a")
    world.add("b")
    world.start_gateway()
    return world


def learnt(world: World) -> bool:
    return "read 1 s" in world.said()


def test_a_replica_that_is_killed_costs_no_request(pair: World) -> None:
    for name in ("a", "b"):
        assert pair.control(name, delay_s=0.03)  # so that it holds requests when it is killed
    with pair.load(clients=8, pause_s=0.001) as told:
        pair.until(lambda: told.by_name["a"] > 10 and told.by_name["b"] > 10, "both answer")
        pair.send("a", signal.SIGKILL)
        pair.goes_to("b")
        before = told.by_name["b"]
        pair.until(lambda: told.by_name["b"] > before + 50, "b goes on")
        pair.run("a")
        before = told.by_name["a"]
        pair.until(lambda: told.by_name["a"] > before + 10, "a is back by itself")
    assert told.failed == []


def test_a_replica_that_is_stopped_costs_no_request(pair: World) -> None:
    with pair.load() as told:
        pair.until(lambda: learnt(pair), "time-outs are learnt")
        assert pair.ask("/v2/models/m", "GET")[0] == 200, "not told to ask with a slash"
        pair.send("a", signal.SIGSTOP)
        pair.goes_to("b")
        before = told.by_name["b"]
        pair.until(lambda: told.by_name["b"] > before + 50, "b goes on")
        pair.send("a", signal.SIGCONT)
        before = told.by_name["a"]
        pair.until(lambda: told.by_name["a"] > before + 10, "a is back by itself")
    assert told.failed == []
    assert told.slowest_s < 10, "nobody waited for the configured time-out"


@pytest.mark.slow
def test_what_waits_at_one_that_is_stopped_is_asked_of_another_one(world: World) -> None:
    """Long before its time-out; but a change of the state, which it may still make, is not."""
    for name in ("a", "b"):
        world.add(name)
        assert world.control(name, delay_s=0.3)
    world.primary("a")
    world.start_gateway(PADDLE_FT_GATEWAY__LEARN_TIMEOUTS="false")
    world.goes_to("a, b", "a")
    with ThreadPoolExecutor() as pool, world.load(clients=8) as told:
        world.until(lambda: told.by_name["a"] > 10, "a answers")
        change = pool.submit(world.ask, "/v2/state/s/k", "PUT")
        time.sleep(0.15)  # it is under way
        world.send("a", signal.SIGSTOP)
        world.goes_to("b", "a")
        done = [told.by_client[client] for client in range(8)]
        world.until(
            lambda: all(told.by_client[client] > done[client] + 1 for client in range(8)),
            "no client waits for the time-out of 30 s",
        )
        assert not change.done()
        world.send("a", signal.SIGCONT)
        assert change.result(20)[2]["name"] == "a"
    assert told.failed == []


def test_a_request_that_has_begun_before_passes_by_who_is_left_out(world: World) -> None:
    for name in ("a", "b"):
        world.add(name)
    world.control("a", delay_s=15.0)
    settings = GatewayConfig(listen=f"{HOST}:{world.http_port}", listen_grpc="", tries=1, workers=1)
    group = Group(replicas=world.records, primary="a", level="hot-standby")
    asked = routes(GROUP, group, settings, learnt=Learnt(*[Timeouts(1, 1, 1)] * 2))
    binary, folder = nginx_binary(), world.folder / "run"
    nginx = Nginx(binary, folder)
    try:
        place = Place(binary.version, workers_user(folder))
        nginx.start(whole_nginx(asked, place, "digest"), "digest")
        with ThreadPoolExecutor() as pool:
            request = pool.submit(world.ask)
            time.sleep(0.3)  # it waits at a
            nginx.leave_out({"a"})
            assert request.result(20)[2]["name"] == "b"
            assert world.ask()[2]["name"] == "b"
            nginx.let_in({"a", "b"})
            world.control("a", delay_s=0.0)
            assert world.ask()[2]["name"] == "a"
    finally:
        nginx.close()


def test_a_model_that_loads_takes_nobody_away_from_the_others(pair: World) -> None:
    """Its refusals are no failures of the replica: 3 of them took it out for 30 s once."""
    for name in ("a", "b"):
        assert pair.control(name, models={"loading": 503})
    with pair.load(clients=2) as served, pair.load(clients=2, model="loading") as refused:
        pair.until(lambda: served.answered > 100 and len(refused.failed) > 100, "both are asked")
    assert served.failed == []
    assert all(fault.startswith("503 {'name'") for fault in refused.failed), "by a replica itself"


@pytest.mark.slow
def test_a_model_is_found_where_it_is(pair: World) -> None:
    """Also where the record does not say so yet."""
    pair.control("a", models={"n": 404})
    assert {pair.ask("/v2/models/n/infer")[2]["name"] for _ in range(10)} == {"b"}
    pair.control("b", models={"n": 404})
    assert pair.ask("/v2/models/n/infer")[0] == 404


@pytest.mark.slow
def test_one_that_answers_requests_is_there_whatever_its_checks_say(pair: World) -> None:
    """As on a machine that has too much to do: the other one would have to do all of it."""
    for name in ("a", "b"):
        assert pair.control(name, delay_s=0.11)  # each answer is logged
    with pair.load(clients=8, pause_s=0.0) as told:
        pair.until(lambda: told.by_name["a"] > 10 and told.by_name["b"] > 10, "both answer")
        before = told.by_name["a"]
        assert pair.control("a", ready_delay_s=1.0)
        pair.until(lambda: told.by_name["a"] > before + 100, "a goes on")
        pair.send("a", signal.SIGSTOP)
        pair.goes_to("b")
        pair.send("a", signal.SIGCONT)
    assert told.failed == []


@pytest.mark.slow
def test_replicas_are_reached_by_tls_and_must_have_the_name(world: World) -> None:
    authority = Authority.make(world.folder / "authority")
    files = {}
    for who in ("replica", "stranger", "gateway"):
        authority.issue(who)
        files[who] = [authority.file(f"{who}.{kind}") for kind in ("crt", "key")]
    ca = authority.file("ca.crt")
    world.tls = ssl.create_default_context(cafile=ca)
    world.tls.load_cert_chain(*files["gateway"])
    for name, who in (("a", "replica"), ("b", "replica"), ("c", "stranger")):
        world.add(name, *files[who], ca)
    settings = {"CA_FILE": ca, "NAME": "replica"}
    settings |= dict(zip(("CERT_FILE", "KEY_FILE"), files["gateway"], strict=True))
    world.start_gateway(**{f"PADDLE_FT_GATEWAY__REPLICA_{key}": v for key, v in settings.items()})
    world.goes_to("a, b")
    assert set(world.names(10)) == {"a", "b"}
    assert json.loads(grpc_call(world))["name"] in ("a", "b")
    assert "c does not answer" in world.said()
    for name in ("a", "b"):
        world.send(name, signal.SIGKILL)
        world.remove(Keys(GROUP).replica(name))
    world.goes_to("c")
    assert world.ask()[0] == 503, "nginx does not believe it either"


def test_one_that_is_stopped_is_left_out_of_kept_connections_too(pair: World) -> None:
    """Old workers go on with connections that are kept, and learn of nothing by a reload."""
    connections = [http.client.HTTPConnection(HOST, pair.http_port, timeout=20) for _ in range(8)]

    def ask(connection: http.client.HTTPConnection) -> str:
        connection.request("POST", "/v2/models/m/infer", b"x")
        name: str = json.loads(connection.getresponse().read())["name"]
        return name

    with pair.load():
        pair.until(lambda: learnt(pair), "time-outs are learnt")
    assert {ask(connection) for connection in connections} == {"a", "b"}
    pair.send("a", signal.SIGSTOP)
    pair.goes_to("b")
    before = pair.asked("a")
    assert {ask(connection) for connection in connections} == {"b"}
    assert pair.asked("a") == before
    pair.send("a", signal.SIGCONT)
    pair.goes_to("a, b")
    for connection in connections:
        connection.close()


def test_reloads_under_load_cost_no_request(pair: World) -> None:
    with pair.load(clients=8, pause_s=0.002) as told:
        for weight in range(2, 12):
            pair.register("a", weight=weight)
            pair.until(lambda w=weight: f" weight={w} " in conf(pair), "nginx has it")
    assert told.failed == []
    assert told.answered > 100


def conf(world: World) -> str:
    return (world.folder / "run/nginx.conf").read_text()


@pytest.mark.slow
def test_a_replica_that_is_not_ready_is_left_out_and_comes_back(pair: World) -> None:
    pair.control("a", ready=503, answer=503)
    assert {pair.ask()[0] for _ in range(20)} == {200}, "a's refusals are asked of b at once"
    pair.goes_to("b")
    assert set(pair.names(20)) == {"b"}
    pair.control("b", ready=503, answer=503)
    pair.until(lambda: "b is not ready" in pair.said(), "b is left out")
    status, headers, _ = pair.ask()
    assert (status, headers["retry-after"]) == (503, "7"), "what a replica says while it loads"
    pair.control("a", ready=200, answer=200)
    pair.until(lambda: pair.ask()[0] == 200, "a is back by itself")


@pytest.mark.slow
def test_with_nobody_there_a_client_is_told_when_to_come_again(pair: World) -> None:
    for name in ("a", "b"):
        pair.send(name, signal.SIGKILL)
    status, headers, said = pair.ask()
    assert (status, headers["retry-after"], list(said)) == (503, "1", ["error"])
    pair.run("b")
    pair.until(lambda: pair.ask()[0] == 200, "b is back", timeout_s=10)


@pytest.mark.slow
def test_slow_answers_are_waited_for_although_quick_ones_were_learnt(pair: World) -> None:
    with pair.load():
        pair.until(lambda: learnt(pair), "time-outs are learnt")
    for name in ("a", "b"):
        pair.control(name, delay_s=1.5)
    assert pair.ask()[0] == 200
    before = pair.said().count("time-outs:")
    pair.until(
        lambda: pair.said().count("time-outs:") > before or "read 9." in pair.said(), "longer"
    )


def test_state_and_administration_go_to_the_primary(pair: World) -> None:
    ways = [("/v2/state/s/k", "GET"), ("/v2/repository/models/m/load", "POST")]
    for way in ways:
        status, headers, said = pair.ask(*way)
        assert (status, headers["retry-after"]) == (503, "1")
        assert "primary" in said["error"]
    assert pair.ask("/v2/state/s/k", "PUT")[0] == 200, "who knows of none waits for one"
    ways.append(("/v2/state/s/k", "PUT"))
    for name in ("b", "a"):
        pair.primary(name)
        pair.goes_to("a, b", name)
        for way in ways:
            assert {pair.ask(*way)[2]["name"] for _ in range(5)} == {name}
    pair.control("a", answer=503)
    for way in ways:
        assert pair.ask(*way)[0] == 503, "a refusal is not asked of another one"


def test_changes_of_the_state_find_another_way_to_the_primary(pair: World) -> None:
    pair.primary("a")
    pair.goes_to("a, b", "a")
    pair.control("a", delay_s=5.0)
    pair.control("a", ready_delay_s=5.0)
    pair.goes_to("b", "a")
    change = ("/v2/state/s/k", "PUT")
    pair.until(lambda: pair.ask(*change)[2]["name"] == "b", "another one passes it on")
    pair.control("a", delay_s=0.0)
    assert pair.ask("/v2/repository/models/m/load")[2]["name"] == "a", "whatever its checks say"
    pair.control("a", ready_delay_s=0.0)
    pair.goes_to("a, b", "a")
    pair.until(lambda: pair.ask(*change)[2]["name"] == "a", "it is asked again")
    pair.send("a", signal.SIGKILL)
    assert pair.ask(*change)[2]["name"] == "b", "at once"


@pytest.mark.slow
def test_sessions_stay_with_a_replica_while_it_is_there(pair: World) -> None:
    homes = {f"s{i}": pair.names(3, X_Session_Id=f"s{i}") for i in range(12)}
    assert all(len(names) == 1 for names in homes.values())
    by_session = {session: next(iter(names)) for session, names in homes.items()}
    assert set(by_session.values()) == {"a", "b"}
    pair.send("a", signal.SIGKILL)
    pair.goes_to("b")
    for session in by_session:
        assert set(pair.names(2, X_Session_Id=session)) == {"b"}


@pytest.mark.slow
def test_a_replica_let_in_slowly_takes_its_share(pair: World) -> None:
    pair.register("a", share=0.1)
    pair.until(lambda: pair.names(200)["a"] < 30, "10 of 200 go to a")
    pair.put(Keys(GROUP).level, b"hot-standby")
    pair.register("a", share=1.0)
    pair.primary("b")
    pair.goes_to("a, b", "b")
    pair.until(lambda: set(pair.names(20)) == {"b"}, "all go to b")
    pair.send("b", signal.SIGKILL)
    assert set(pair.names(20)) == {"a"}


def grpc_call(world: World, size: int = 1000) -> bytes:
    options = [("grpc.max_send_message_length", 2**26)]
    with grpc.insecure_channel(f"{HOST}:{world.grpc_port}", options) as channel:
        method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        answer: bytes = method(b"x" * size, timeout=20)
        return answer


@pytest.mark.slow
def test_grpc_is_asked_of_another_replica_too(pair: World) -> None:
    assert json.loads(grpc_call(pair, 3_000_000))["bytes"] == 3_000_000
    with grpc.insecure_channel(f"{HOST}:{pair.grpc_port}") as channel:
        method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

        def learnt_by_calls() -> bool:
            for _ in range(20):
                method(b"x", timeout=20)
            return "time-outs of gRPC: read 1 s" in pair.said()

        pair.until(learnt_by_calls, "time-outs are learnt")
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for name in ("a", "b"):
            assert pair.control(name, delay_s=0.4)
        with grpc.insecure_channel(f"{HOST}:{pair.grpc_port}") as channel:
            method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            pending = [method.future(b"x" * 1000, timeout=20) for _ in range(6)]
            time.sleep(0.2)  # they are under way at both
            pair.send("a", number)
            names = {json.loads(call.result())["name"] for call in pending}
        assert names == {"b"}
        pair.send("a", signal.SIGCONT)
        if number == signal.SIGSTOP:
            pair.goes_to("a, b")


@pytest.mark.slow
def test_it_goes_on_without_etcd_and_is_started_again_without_it(tmp_path: Path) -> None:
    with EmbeddedEtcd(tmp_path) as own:
        coordinator = EtcdCoordinator(EtcdConfig(endpoints=(own.endpoint,)))
        with World(tmp_path, coordinator, own.endpoint) as pair:
            pair.add("a")
            pair.add("b")
            pair.start_gateway()
            with pair.load() as told:
                own.stop()
                pair.send("a", signal.SIGKILL)
                pair.goes_to("b")
                before = told.by_name["b"]
                pair.until(lambda: told.by_name["b"] > before + 20, "b goes on")
            assert told.failed == []
            assert pair.stop_gateway() == 143
            pair.start_gateway(PADDLE_FT_ETCD__CALL_TIMEOUT_S="0.5")
            assert "the group of the last run" in pair.said()
            assert set(pair.names(5)) == {"b"}
            pair.run("a")
            pair.until(lambda: "a" in pair.names(5), "a is back by itself")
        coordinator.close()


@pytest.mark.slow
def test_a_registry_that_loses_replicas_takes_nobody_away_that_answers(pair: World) -> None:
    for name in ("a", "b"):
        pair.remove(Keys(GROUP).replica(name))
    pair.add("c")
    pair.goes_to("a, b, c")
    pair.send("a", signal.SIGKILL)
    pair.goes_to("b, c")
    pair.run("a")
    pair.until(lambda: pair.control("a"), "it is back, and nobody has told of it")
    pair.register("b", condition="draining")
    pair.remove(Keys(GROUP).replica("b"))
    pair.goes_to("c")
    pair.remove(Keys(GROUP).replica("c"))
    time.sleep(0.5)
    assert set(pair.names(5)) == {"c"}


@pytest.mark.slow
def test_a_bad_record_harms_nobody_else(pair: World) -> None:
    bad = replace(pair.records["a"], name="evil", host="127.0.0.1; return 200 stolen")
    pair.put(Keys(GROUP).replica("evil"), encode(bad))
    pair.until(lambda: "'evil' is left out" in pair.said(), "it is told")
    assert set(pair.names(10)) == {"a", "b"}
    pair.put(Keys(GROUP).replica("worse"), b"{")
    pair.until(lambda: "something else" in pair.said(), "it is told")
    assert set(pair.names(10)) == {"a", "b"}


@pytest.mark.slow
def test_names_of_hosts_are_resolved_beside_nginx(world: World) -> None:
    """nginx would take no configuration with one that has no address, at a start and later."""
    world.add("a")
    nowhere = replace(world.records["a"], name="nowhere", host="nowhere.invalid")
    world.put(Keys(GROUP).replica("nowhere"), encode(nowhere))
    world.start_gateway()
    world.until(lambda: "'nowhere.invalid' has no address" in world.said(), "it is told")
    world.add("b", host="localhost")
    world.primary("nowhere")
    world.goes_to("a, b")
    assert set(world.names(20)) == {"a", "b"}
    world.remove(Keys(GROUP).replica("a"))
    world.send("a", signal.SIGKILL)
    world.goes_to("b")


@pytest.mark.slow
def test_nginx_is_started_again_and_ends_with_its_gateway(pair: World) -> None:
    pid = int((pair.folder / "run/nginx.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    pair.until(lambda: "started again" in pair.said(), "it is noticed")
    pair.until(lambda: answers(pair), "it serves again")
    assert pair.gateway is not None
    pair.gateway.kill()
    pair.gateway.wait(5)
    pair.until(lambda: not answers(pair), "nginx is gone")


@pytest.mark.slow
def test_a_gateway_and_its_nginx_that_were_killed_are_in_nobodys_way(pair: World) -> None:
    """Workers outlive their master, and hold its ports, with nobody left to end them."""
    pid = int((pair.folder / "run/nginx.pid").read_text())
    assert pair.gateway is not None
    for number in (pid, pair.gateway.pid):
        os.kill(number, signal.SIGSTOP)
    for number in (pid, pair.gateway.pid):
        os.kill(number, signal.SIGKILL)
    pair.gateway.wait(5)
    assert answers(pair), "its workers serve on"
    (pair.folder / "gateway.txt").unlink()
    pair.start_gateway()
    assert set(pair.names(10)) == {"a", "b"}
    assert pair.stop_gateway(signal.SIGHUP) == 129
    pair.until(lambda: not answers(pair), "nginx is gone")


@pytest.mark.slow
@pytest.mark.root
def test_a_full_disk_under_a_gateway(pair: World, small_tmpfs: Path) -> None:
    assert pair.stop_gateway(signal.SIGINT) == 130
    folder, ballast = small_tmpfs / "run", small_tmpfs / "ballast"
    pair.start_gateway("--folder", str(folder))
    fill(ballast)
    pair.register("a", weight=7)
    pair.until(lambda: "goes on as before" in pair.said(), "it is told")
    assert set(pair.names(20)) == {"a", "b"}
    ballast.unlink()
    pair.until(lambda: " weight=7 " in (folder / "nginx.conf").read_text(), "it takes it up")
    assert set(pair.names(20)) == {"a", "b"}
    pair.stop_gateway()
    fill(ballast)
    done = subprocess.run(
        [*pair.command(), "--folder", str(folder)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, "No space left" in done.stderr.splitlines()[-1]) == (71, True), (
        done.stderr
    )
    assert "Traceback" not in done.stderr
    assert not list(folder.glob("*.tmp"))


def fill(ballast: Path) -> None:
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def answers(world: World) -> bool:
    try:
        return call(world.http_port, "POST", "/x", b"")[0] == 200
    except OSError:
        return False


@pytest.mark.slow
def test_what_cannot_be_is_told_in_a_sentence(pair: World) -> None:
    def run(*options: str) -> tuple[int, str]:
        done = subprocess.run(
            [*pair.command(), *options], capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stderr

    code, said = run()
    assert (code, said.count("\n")) == (2, 1), said
    assert "another gateway uses the folder" in said
    code, said = run("--folder", str(pair.folder / "other"))
    assert (code, "in use" in said.splitlines()[-1]) == (2, True), said
    code, said = run("--listen", "nowhere")
    assert (code, "host:port" in said) == (2, True), said
    code, said = run("--nginx", "/bin/true")
    assert (code, "is not an nginx" in said) == (2, True), said


@pytest.mark.slow
def test_a_configuration_for_somebody_elses_proxy(pair: World) -> None:
    for proxy, wanted in (
        ("nginx", "upstream pft_http_main {"),
        ("haproxy", "backend pft_grpc_main"),
    ):
        argv = [*pair.command(), "--print", proxy]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert wanted in done.stdout
        assert str(pair.records["a"].http_port) in done.stdout


@pytest.mark.slow
def test_haproxy_serves_the_group_by_its_configuration(world: World) -> None:
    """D5, C4: balances, asks another one for a POST too, and finds the primary."""
    binary = shutil.which("haproxy")
    if binary is None:
        pytest.skip("needs haproxy")
    for name in ("a", "b"):
        world.add(name)
    world.primary("b")
    argv = [*world.command(), "--print", "haproxy"]
    text = subprocess.run(argv, capture_output=True, timeout=60, check=True).stdout
    (world.folder / "haproxy.cfg").write_bytes(text)
    proxy = subprocess.Popen(
        tethered([binary, "-db", "-f", str(world.folder / "haproxy.cfg")]),
        stderr=subprocess.DEVNULL,
    )

    def names() -> set[str]:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            return set(world.names(10))
        return set()

    try:
        world.until(lambda: names() == {"a", "b"}, "both are asked")
        assert {json.loads(grpc_call(world))["name"] for _ in range(10)} == {"a", "b"}
        assert {world.ask("/v2/state/s/k", "PUT")[2]["name"] for _ in range(5)} == {"b"}
        with world.load() as told:
            world.until(lambda: told.by_name["a"] > 20, "a is asked")
            world.send("a", signal.SIGKILL)
            before = told.by_name["b"]
            world.until(lambda: told.by_name["b"] > before + 50, "b goes on")
        assert told.failed == []
    finally:
        proxy.terminate()
        proxy.wait(20)
