"""Replicas as processes: what they answer while models come, change, die and go; how they end."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from paddle_ft.cli import app
from paddle_ft.config import load
from paddle_ft.serve.__main__ import main
from paddle_ft.serve.loader import version_of
from paddle_ft.serve.memory import _groups, used_share
from paddle_ft.serve.publish import publish
from paddle_ft.serve.replica import Replica, condition
from paddle_ft.serve.tensors import BadRequest
from tests.integration.etcd_cluster import EtcdCluster
from tests.integration.replica_world import ADMIN, Clients, publish_times, replica

INDEX = "/v2/repository/index"


def states(made: Any) -> set[tuple[str, str, str]]:
    return {(e["name"], e["version"], e["state"]) for e in made.ask("POST", INDEX)[2]}


def test_a_replica_says_how_far_it_is_and_then_swaps_versions_under_requests(
    tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    gate = tmp_path / "gate"
    publish_times(tmp_path, 2, gate=gate)
    with replica(tmp_path, "--spares", "0") as made:
        wait_for(lambda: ("times", "1", "LOADING") in states(made), 60)
        wait_for(lambda: made.infer()[1] == "times 1 is being loaded: 50% done", 60)
        status, headers, answer = made.ask("GET", "/v2/models/times")
        assert (status, headers["retry-after"], answer["progress"]) == (503, "1", 0.5)
        assert not made.is_ready()
        gate.touch()
        wait_for(made.is_ready, 60)
        assert made.infer(4)[1][0] == 8

        publish_times(tmp_path, 3)
        with Clients(made) as clients, ThreadPoolExecutor(1) as pool:
            wait_for(lambda: clients.answers[2] > 5)
            loading = pool.submit(made.load, "times")
            assert loading.result(60) == (200, None)
            after = clients.answers[3]
            wait_for(lambda: clients.answers[3] > after + 5)
        assert not clients.failures
        assert clients.answers.keys() == {2, 3}
        assert made.infer()[1][0] == 3
        wait_for(lambda: states(made) == {("times", "2", "READY")})

        assert made.load("times", version="1") == (200, None)  # back again
        assert made.infer()[1][0] == 2


@pytest.mark.slow
def test_what_cannot_be_loaded_leaves_the_replica_as_it_is(
    tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    publish_times(tmp_path, 2)
    gate = tmp_path / "gate"
    publish_times(tmp_path, 5, name="late", gate=gate)
    broken = tmp_path / "pipeline" / "pipeline.py"
    with replica(tmp_path, "--spares", "0") as made:
        wait_for(made.is_ready, 60)
        path = "/v2/repository/models/times/load"
        assert made.ask("POST", path, {})[0] == 401
        for name, parameters, code, text in (
            ("none", {}, 404, "holds no model none; its models are: late, times"),
            ("times", {"version": "9"}, 404, "no version 9 of times"),
            ("times", {"version": "one"}, 400, "whole number"),
            ("times", {"file:1/a": "x"}, 400, "no parameter 'file:1/a'"),
            ("times", {"config": '{"max_batch_size": 3}'}, 400, "a version alone"),
        ):
            status, answer = made.load(name, **parameters)
            assert (status, text in answer["error"]) == (code, True), answer
        broken.write_text(broken.read_text() + "\nraise ZeroDivisionError('no such luck')\n")
        publish(broken.parent, "times", str(tmp_path / "store"))
        status, answer = made.load("times")
        assert (status, "no such luck" in answer["error"]) == (400, True)
        assert made.is_ready()
        assert made.infer()[1][0] == 2

        with ThreadPoolExecutor(1) as pool:  # another model comes beside: still ready
            loading = pool.submit(made.load, "late")
            wait_for(lambda: ("late", "1", "LOADING") in states(made))
            assert made.is_ready()
            assert made.infer(model="late")[0] == 503
            gate.touch()
            assert loading.result(60) == (200, None)
        assert made.infer(model="late")[1][0] == 5
        unload = "/v2/repository/models/late/unload"
        assert [made.ask("POST", unload, {}, **ADMIN)[0] for _ in range(2)] == [200, 404]
        assert made.infer(model="late")[0] in (404, 503)
        wait_for(lambda: made.infer(model="late")[0] == 404)
        assert made.is_ready()


def test_no_request_fails_when_workers_are_killed(
    tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    publish_times(tmp_path, 2)
    with replica(tmp_path, "--workers", "2") as made:
        wait_for(made.is_ready, 60)
        for _ in range(2):
            # What the first kill has interrupted is answered before the second one: a batch that
            # has lost two workers is refused.
            with Clients(made) as clients:
                wait_for(lambda c=clients: len(c.pids) > 5)
                victim = clients.pids[-1]
                os.kill(victim, signal.SIGKILL)
                wait_for(lambda c=clients, v=victim: v not in c.pids[-4:])
            assert not clients.failures
        assert "is replaced: it ended by SIGKILL" in made.text


def test_a_replica_that_is_asked_to_stop_answers_what_it_has(
    tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    publish_times(tmp_path, 2, seconds=0.2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    with replica(tmp_path, "--spares", "0") as made, ThreadPoolExecutor(3) as pool:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert resource.prlimit(made.pid, resource.RLIMIT_NOFILE)[0] == min(hard, 65536)
        wait_for(made.is_ready, 60)
        asked = [pool.submit(made.infer, value) for value in (1, 2, 3)]
        stats = "/v2/models/times/stats"
        wait_for(lambda: made.ask("GET", stats)[2]["model_stats"][0]["inference_count"] >= 1)
        made.stop()
        assert sorted(f.result()[1][0] for f in asked) == [2, 4, 6]


def test_a_stop_ends_a_replica_that_still_loads(
    tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    publish_times(tmp_path, 2, gate=tmp_path / "never")
    with replica(tmp_path) as made:
        wait_for(lambda: made.infer()[1].endswith("50% done"))


def test_a_replica_waits_for_its_store(
    tmp_path: Path, wait_for: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("PADDLE_FT_CHECKPOINT__ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("PADDLE_FT_CHECKPOINT__ATTEMPTS", "1")
    with replica(tmp_path, "--store", "s3://bucket/models") as made:
        wait_for(lambda: "cannot be reached" in made.infer()[1])
        assert made.infer()[0] == 503
        assert not made.is_ready()
        assert made.text.count("is not there yet, and tried again") == 1


def test_a_stop_that_comes_with_a_change_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    values = {"serve.models": ("times",), "serve.cache": str(tmp_path / "cache")}
    made = Replica(load(values | {"checkpoint.url": str(tmp_path / "store")}, {}).config)

    async def story() -> None:
        for ticks in range(4):
            watch = asyncio.create_task(made._watch())
            await asyncio.sleep(0.02)
            made._front.catalog.forget("times")
            for _ in range(ticks):
                await asyncio.sleep(0)
            watch.cancel()
            assert await asyncio.wait([watch], timeout=10) == ({watch}, set())

    asyncio.run(story())


@pytest.mark.etcd
@pytest.mark.slow
def test_replicas_of_a_group_follow_their_primary(
    tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    gate = tmp_path / "gate"
    publish_times(tmp_path, 2, gate=gate)

    def told(*flags: str) -> str:
        place = ["--etcd", etcd.endpoints[0], "--group", "readers"]
        done = CliRunner().invoke(app, ["serving", *place, *flags])
        assert done.exit_code == 0, done.output
        return done.output

    def group() -> Any:
        found = json.loads(told("--json"))
        for name, record in list(found["replicas"].items()):
            found[name.partition(".")[0]] = record
        return found

    def conditions() -> list[str]:
        return [record["condition"] for record in group()["replicas"].values()]

    def flags(node: str) -> list[str]:
        return ["--etcd", etcd.endpoints[0], "--group", "readers", "--node", node, "--spares", "0"]

    with EtcdCluster(1) as etcd:
        assert "no replica" in told()
        with replica(tmp_path, *flags("left")) as left:
            wait_for(lambda: conditions() == ["loading"])
            assert group()["left"]["models"] == {}
            gate.touch()
            wait_for(lambda: conditions() == ["ready"])
            record = group()["left"]
            assert (record["models"], record["host"]) == ({"times": "1"}, "127.0.0.1")
            assert f"127.0.0.1:{record['http_port']}" == left.http
            wait_for(lambda: "1 replica, primary left." in told())

            with replica(tmp_path, *flags("right")) as right:
                wait_for(lambda: conditions() == ["ready", "ready"])
                publish_times(tmp_path, 3)
                status, answer = right.load("times")
                assert (status, left.http in answer["error"]) == (421, True)
                with Clients(right) as clients:  # it follows without dropping one
                    wait_for(lambda: clients.answers[2] > 2)
                    assert left.load("times") == (200, None)
                    wait_for(lambda: clients.answers[3] > 2)
                assert not clients.failures
                wait_for(lambda: group()["right"]["models"] == {"times": "2"})
                wait_for(lambda: "in sync" in told() and "share" not in told(), 30)
                lines = told().splitlines()
                assert [line.split()[3:] for line in lines[2:]] == [
                    ["ready", "times", "2", "primary"],
                    ["ready", "times", "2", "in", "sync"],
                ]
                left.stop()
                wait_for(lambda: group()["left"]["condition"] == "draining")
                assert left.infer()[0] == 200  # until all have heard of it
                assert not left.is_ready()
                wait_for(lambda: "1 replica, primary right." in told())
                assert left.wait() == 0
                publish_times(tmp_path, 4)
                assert right.load("times", version="1") == (200, None)

                with replica(tmp_path, *flags("late")) as late:  # not the newest: the group's
                    wait_for(lambda: group().get("late", {}).get("models") == {"times": "1"}, 60)
                    assert late.infer()[1][0] == 2

                etcd.lose(0)
                etcd.start(0)
                wait_for(lambda: "has lost what it knew" in right.text)
                assert right.infer()[1][0] == 2
                assert right.is_ready()
                assert right.ask("PUT", "/v2/state/a/b", 1)[0] == 503
                right.stop()
                assert right.wait() == 0
        etcd.wait_healthy()
        wait_for(lambda: "no replica" in told())


@pytest.fixture
def taken() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield str(server.getsockname()[1])


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (["--model", "other"], 4, "holds no model other; its models are: times."),
        (["--model", "times=7"], 4, "holds no version 7 of times; there are 1."),
        (["--model", "times=x"], 2, "a version is a whole number from 1"),
        (["--model", "times", "--model", "times=1"], 2, "is given twice"),
        ([], 2, "no model is named: give --model NAME"),
        (["--model", "times", "--http_port", "TAKEN"], 2, "is taken"),
        (["--model", "times", "--grpc-port", "TAKEN"], 2, "is it taken?"),
        (["--model", "times", "--store", "/none/such"], 4, "there is no directory /none/such"),
        (["--model", "times", "--etcd", "127.0.0.1:1"], 3, "127.0.0.1:1"),
        (["--model", "times", "--wokers", "2"], 2, "did you mean --workers?"),
        (["--model", "times", "--workers", "0"], 2, "--workers 0 is not allowed"),
    ],
)
def test_what_is_wrong_at_the_start_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    taken: str,
    flags: list[str],
    code: int,
    text: str,
) -> None:
    monkeypatch.setenv("PADDLE_FT_ETCD__CALL_TIMEOUT_S", "1.2")
    publish_times(tmp_path, 2)
    own = ["--store", str(tmp_path / "store"), "--cache", str(tmp_path / "cache"), "--quiet"]
    own += ["--http_port", "0", "--grpc_port", "0"]
    given = [taken if flag == "TAKEN" else flag for flag in flags]
    assert main([*own, *given]) == code
    said = capsys.readouterr().err.splitlines()
    assert (len(said), said[0].startswith("paddle_ft: error: ")) == (1, True), said
    assert text in said[0]


def test_a_damaged_model_is_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish_times(tmp_path, 2)
    (block,) = (tmp_path / "store" / "models" / "blob").glob("*/*")
    block.write_bytes(block.read_bytes()[:-1] + b"#")
    own = ["--store", str(tmp_path / "store"), "--cache", str(tmp_path / "cache")]
    assert main([*own, "--http_port", "0", "--grpc_port", "0", "--model", "times"]) == 5
    assert "A block of times 1 has been altered" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parameters", "version"),
    [
        ({}, None),
        ({"version": "3"}, 3),
        ({"version": 3}, 3),
        ({"config": '{"version_policy": {"specific": {"versions": [2]}}}'}, 2),
        ({"config": '{"version_policy": {"latest": {"num_versions": 1}}}'}, None),
    ],
)
def test_which_version_a_load_asks_for(parameters: dict[str, Any], version: int | None) -> None:
    assert version_of(parameters) == version


@pytest.mark.parametrize(
    "parameters",
    [
        {"version": 0},
        {"version": True},
        {"version": "1" * 30},
        {"version": "²"},
        {"other": 1},
        {"config": "["},
        {"config": 7},
        {"config": "[" * 100_000},
        {"config": '{"version_policy": {"specific": {"versions": [1, 2]}}}'},
        {"config": '{"version_policy": {"specific": {"versions": ["x"]}}}'},
    ],
)
def test_a_load_that_asks_for_what_is_none(parameters: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        version_of(parameters)


def test_help_tells_of_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    assert all(flag in told for flag in ("--model", "--store", "--workers", "--etcd", "exit codes"))


def test_the_memory_of_the_machine_and_of_control_groups(tmp_path: Path) -> None:
    assert 0 < used_share() <= 1
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for group, most, used in ((inner, "max", 10), (inner.parent, "1000", 960)):
        (group / "memory.max").write_text(f"{most}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text("anon 1\ninactive_file 60\n")
    assert list(_groups(tmp_path, "outer/inner")) == [0.9]


def test_the_condition_that_others_are_told() -> None:
    assert condition(True, False, False) == "ready"
    assert condition(True, False, True) == "degraded"
    assert condition(False, False, True) == "loading"
    assert condition(True, True, True) == "draining"
