"""A replica to which no etcd was named has one of its own, which others on its machine can use."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paddle_ft.cli import app
from paddle_ft.config import Config, load
from paddle_ft.coordination.etcd import EtcdCoordinator
from paddle_ft.errors import CoordinationError, PaddleFTError
from paddle_ft.serve import registry
from paddle_ft.serve.own_etcd import with_etcd
from tests.integration.replica_world import TIMES, publish_times, replica

pytestmark = pytest.mark.etcd


def serve(**settings: object) -> Config:
    return load({f"serve.{name}": value for name, value in settings.items()}, {}).config


def answers(config: Config) -> bool:
    coordinator = EtcdCoordinator(config.etcd)
    try:
        coordinator.read("/")
        return True
    except PaddleFTError:
        return False
    finally:
        coordinator.close()


def servers() -> list[int]:
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = [int(pid) for path in children for pid in path.read_text().split()]
    return [pid for pid in pids if b"--data-dir" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_its_etcd_comes_back_and_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_for: Callable[..., None]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with with_etcd(serve()) as config:
        assert answers(config)
        (before,) = servers()
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: servers() not in ([], [before]))
        wait_for(lambda: answers(config))
    assert not servers()
    assert not list(tmp_path.iterdir())


def test_who_is_to_be_alone_starts_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "paddle_ft")
    with with_etcd(serve(alone=True)) as config:
        assert not config.etcd.endpoints
    assert not caplog.text
    with with_etcd(serve(host="192.0.2.1")) as config:
        assert not config.etcd.endpoints
    assert "alone: to join one at 192.0.2.1, others need TLS" in caplog.text
    named = load({"etcd.endpoints": ("10.0.0.1:2379",)}, {}).config
    with with_etcd(named) as config:
        assert config is named
    assert not servers()


def test_a_group_is_told_of_what_the_command_line_publishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/pipeline.py").write_text(TIMES.format(gate="/", seconds=0, factor=2))
    store, keys = str(tmp_path / "store"), registry.Keys("readers")
    given = ["publish", str(tmp_path / "model"), "--name", "times", "--store", store]
    given += ["--group", "readers"]
    with with_etcd(serve()) as config:
        coordinator = EtcdCoordinator(config.etcd)
        for version in (1, 2):
            done = CliRunner().invoke(app, [*given, "--etcd", config.etcd.endpoints[0]])
            assert done.exit_code == 0, done.output
            group = registry.parse(keys, coordinator.read(keys.prefix).kvs)
            found = group.published["times"]
            assert (found.version, found.store) == (version, store)
        coordinator.close()
    monkeypatch.setenv("PADDLE_FT_ETCD__CALL_TIMEOUT_S", "1")
    lost = CliRunner().invoke(app, [*given, "--etcd", config.etcd.endpoints[0]])
    assert isinstance(lost.exception, CoordinationError)
    assert f"times 3 is in {store}, but the serving group readers was not told" in str(
        lost.exception
    )


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_another_one_joins_by_the_address_that_the_first_has_told(
    tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    publish_times(tmp_path, 2)
    with replica(tmp_path, "--group", "readers") as first:
        wait_for(first.is_ready, 60)
        found = re.search(r"--etcd (\S+)", first.text)
        assert found
        with replica(tmp_path, "--group", "readers", "--etcd", found[1]) as second:
            wait_for(second.is_ready, 60)
            status, answer = second.load("times")
            assert status == 421
            assert first.http in str(answer)
