"""What is wrong is told in seconds, in one sentence, with its exit code (A1, B6)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.jobs import FAST_ETCD, TINY, Launcher, final
from tests.integration.s3_server import S3Server

pytestmark = [pytest.mark.timeout(180)]


def run(directory: Path, *flags: str, script: tuple[str, ...] = (), **environ: str) -> Launcher:
    """A launcher that has ended."""
    script = script or (str(TINY), "--record", str(directory / "record"))
    launcher = Launcher(directory, (*flags, *script), {**FAST_ETCD, **environ})
    try:
        launcher.wait(60)
    finally:
        launcher.close()
    return launcher


def the_error(launcher: Launcher) -> str:
    """The one sentence; there is no traceback."""
    assert "Traceback" not in launcher.output, launcher.output
    (line,) = [
        line
        for line in launcher.output.splitlines()
        if line.startswith("paddle_ft: error: ") or "ended with exit code" in line
    ]
    return line


@pytest.mark.etcd
def test_an_etcd_that_is_not_there(tmp_path: Path) -> None:
    launcher = run(tmp_path, "--etcd", "127.0.0.1:1", PADDLE_FT_ETCD__CALL_TIMEOUT_S="1")
    assert launcher.process.returncode == 3, launcher.output
    assert "127.0.0.1:1" in the_error(launcher)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:x", "ftp://127.0.0.1:1"])
def test_an_etcd_address_that_is_none(tmp_path: Path, endpoint: str) -> None:
    launcher = run(tmp_path, "--etcd", endpoint)
    assert launcher.process.returncode == 2, launcher.output
    assert endpoint.removeprefix("ftp://") in the_error(launcher)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    launcher = run(tmp_path, "--checkpoint", str(tmp_path / "file" / "below"))
    assert launcher.process.returncode == 4, launcher.output
    assert "file" in the_error(launcher)


@pytest.mark.parametrize("url", ["s3://", "nosuch://x/y", "s3://user:secret@bucket/x"])
def test_a_url_that_is_none(tmp_path: Path, url: str) -> None:
    launcher = run(tmp_path, "--checkpoint", url)
    assert launcher.process.returncode == 2, launcher.output
    assert "secret" not in the_error(launcher)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as server:
        server.bucket("there")
        yield server


@pytest.mark.s3
class TestS3:
    def launch(self, directory: Path, server: S3Server, url: str, **environ: str) -> Launcher:
        where = {"PADDLE_FT_CHECKPOINT__ENDPOINT_URL": server.endpoint}
        return run(directory, "--checkpoint", url, **{**server.environment, **where, **environ})

    def test_a_bucket_that_is_not_there(self, tmp_path: Path, server: S3Server) -> None:
        launcher = self.launch(tmp_path, server, "s3://nosuch/x")
        assert launcher.process.returncode == 4, launcher.output
        assert "nosuch" in the_error(launcher)

    def test_wrong_credentials(self, tmp_path: Path, server: S3Server) -> None:
        launcher = self.launch(
            tmp_path, server, "s3://there/x", AWS_SECRET_ACCESS_KEY="not the one"
        )
        assert launcher.process.returncode == 4, launcher.output
        assert "there" in the_error(launcher)
        assert "not the one" not in launcher.output

    def test_no_credentials(self, tmp_path: Path, server: S3Server) -> None:
        launcher = self.launch(
            tmp_path, server, "s3://there/x", AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY=""
        )
        assert launcher.process.returncode == 4, launcher.output
        assert "credentials" in the_error(launcher)

    def test_a_server_that_is_not_there(self, tmp_path: Path, server: S3Server) -> None:
        launcher = self.launch(
            tmp_path,
            server,
            "s3://there/x",
            PADDLE_FT_CHECKPOINT__ENDPOINT_URL="http://127.0.0.1:1",
            PADDLE_FT_CHECKPOINT__ATTEMPTS="2",
        )
        assert launcher.process.returncode == 4, launcher.output
        assert "there" in the_error(launcher)


def tiny(directory: Path, epochs: int = 3, width: int = 16) -> tuple[str, ...]:
    record = str(directory / "record")
    return (str(TINY), "--record", record, "--epochs", str(epochs), "--width", str(width))


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a job that has ended left."""
    place = tmp_path_factory.mktemp("before")
    flags = ("--checkpoint", str(place / "store"), "--checkpoint_every", "10")
    launcher = run(place, *flags, script=tiny(place, epochs=2))
    assert launcher.process.returncode == 0, launcher.output
    assert len(list((place / "store" / "manifests").glob("*.json"))) >= 2
    return place / "store"


@pytest.mark.paddle
@pytest.mark.etcd
class TestCheckpoints:
    """A job has left two checkpoints; then something happens to them."""

    @pytest.fixture
    def store(self, tmp_path: Path, two_checkpoints: Path) -> Path:
        return Path(shutil.copytree(two_checkpoints, tmp_path / "store"))

    def manifests(self, store: Path) -> list[Path]:
        return sorted((store / "manifests").glob("*.json"))

    def step_before(self, store: Path) -> int:
        """Of the newest checkpoint but one; a busy machine saves later than it was asked to."""
        return int(self.manifests(store)[-2].name.split("-")[1])

    def again(self, tmp_path: Path, store: Path, **more: int) -> Launcher:
        script = tiny(tmp_path, **more)
        return run(tmp_path / "again", "--checkpoint", str(store), script=script)

    @pytest.mark.parametrize(
        "how", [pytest.param("truncated", marks=pytest.mark.slow), "altered", "deleted"]
    )
    def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
        self, tmp_path: Path, store: Path, how: str
    ) -> None:
        newest, step = self.manifests(store)[-1], self.step_before(store)
        if how == "truncated":
            newest.write_bytes(newest.read_bytes()[:-10])
        elif how == "altered":
            newest.write_bytes(newest.read_bytes().replace(b"0", b"1", 1))
        else:
            newest.unlink()
        launcher = self.again(tmp_path, store)
        assert launcher.process.returncode == 0, launcher.output
        assert newest.name in launcher.output
        assert f"from the checkpoint of step {step};" in launcher.output, launcher.output
        assert final(launcher.output)["step"] == "39"

    def test_damaged_data_is_found_before_it_is_used(self, tmp_path: Path, store: Path) -> None:
        """One flipped byte in every object that only the newest checkpoint refers to."""
        step = self.step_before(store)
        objects = sorted((store / "data").rglob("*.*"), key=lambda p: p.stat().st_mtime)
        newest = objects[-1]
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1
        newest.chmod(0o600)
        newest.write_bytes(content)
        launcher = self.again(tmp_path, store)
        assert launcher.process.returncode == 0, launcher.output
        assert "is damaged" in launcher.output, launcher.output
        assert f"from the checkpoint of step {step};" in launcher.output, launcher.output

    def test_all_damaged_is_an_error_not_a_new_beginning(self, tmp_path: Path, store: Path) -> None:
        before = {path: path.read_bytes() for path in store.rglob("*.json")}
        for path in self.manifests(store):
            path.write_bytes(b"{}")
        launcher = self.again(tmp_path, store)
        assert launcher.process.returncode == 5, launcher.output
        assert "damaged" in the_error(launcher)
        assert set(before) <= set(store.rglob("*.json")), "nothing is removed"

    def test_a_checkpoint_of_another_model(self, tmp_path: Path, store: Path) -> None:
        kept = {path.name for path in self.manifests(store)}
        launcher = self.again(tmp_path, store, width=24)
        assert launcher.process.returncode == 5, launcher.output
        assert "model/0.weight" in the_error(launcher), launcher.output
        assert {path.name for path in self.manifests(store)} == kept


@pytest.mark.etcd
def test_two_nodes_with_different_directories(tmp_path: Path) -> None:
    """The commonest mistake on several machines: a directory that they do not share."""
    from paddle_ft.coordination.embedded import EmbeddedEtcd

    with EmbeddedEtcd() as etcd:
        flags = ("--etcd", etcd.endpoint, "--job_id", "apart", "--nnodes", "2")
        first = Launcher(
            tmp_path / "1", (*flags, "--checkpoint", str(tmp_path / "a"), str(TINY)), FAST_ETCD
        )
        try:
            while "apart" not in first.output:
                assert first.process.poll() is None, first.output
            # The first one to claim the store wins; the other hears of it.
            second = run(tmp_path / "2", *flags, "--checkpoint", str(tmp_path / "b"))
            loser = second if second.process.returncode == 5 else first
            assert loser.process.returncode == 5, second.output + first.output
            assert "another store" in the_error(loser)
        finally:
            first.close()
    assert os.path.isdir(tmp_path / "a")
