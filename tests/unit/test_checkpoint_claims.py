"""Two launchers that cannot know of each other do not use one checkpoint directory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paddle_ft.checkpoint import claims
from paddle_ft.checkpoint.room import alone
from paddle_ft.checkpoint.store import open_store
from paddle_ft.config import CheckpointConfig, Config, EtcdConfig
from paddle_ft.errors import ConfigError, StoreDenied

HOLDER = """
import sys, time
from paddle_ft.checkpoint import claims
from paddle_ft.checkpoint.store import open_store
with claims.alone(open_store(sys.argv[1]), "other-job"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held(place: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(place)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def config(place: Path, *endpoints: str) -> Config:
    return Config(checkpoint=CheckpointConfig(url=str(place)), etcd=EtcdConfig(endpoints=endpoints))


def test_the_second_is_told_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_HANDOVER_S", 0.1)
    place = tmp_path / "store"
    with held(place) as process:
        with pytest.raises(ConfigError) as caught, alone(config(place)):
            pass
        told = str(caught.value)
        for word in (str(place), f"pid {process.pid}", socket.gethostname(), "other-job"):
            assert word in told
        with alone(config(place, "127.0.0.1:2379")):
            pass  # launchers with an etcd in common know of each other


def test_who_was_killed_leaves_no_claim(tmp_path: Path) -> None:
    with held(tmp_path) as process:
        process.kill()
        with alone(config(tmp_path)):
            pass
    with alone(config(tmp_path)):
        pass


def test_a_claim_is_no_object(tmp_path: Path) -> None:
    with alone(config(tmp_path)):
        assert (tmp_path / ".lock").exists()
        assert open_store(str(tmp_path)).find("") == []


def test_a_directory_that_cannot_be_locked_is_used_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".lock").mkdir()
    with alone(config(tmp_path)):
        pass
    assert "cannot be locked" in caplog.text


def test_of_a_directory_that_cannot_be_made_the_store_tells(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with alone(config(Path("/proc/nosuch"))):
        pass
    assert caplog.text == ""
    with pytest.raises(StoreDenied, match=r"^/proc/nosuch cannot be .*; name another directory\.$"):
        open_store("/proc/nosuch").check()


@pytest.mark.parametrize(
    ("note", "alive"),
    [
        (b'{"pid": 1, "host": "another"}', True),
        (b"", True),
        (b'{"pid": %d, "host": "%s"}' % (os.getppid(), socket.gethostname().encode()), True),
        (b'{"pid": 4194305, "host": "%s"}' % socket.gethostname().encode(), False),
    ],
)
def test_a_note_of_a_process_that_is_gone_does_not_count(note: bytes, alive: bool) -> None:
    assert claims._may_live(note) is alive
