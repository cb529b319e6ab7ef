"""``durable = "local"`` with real launchers and stores that go away and come back (A5, B4)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore.config import Config

from paddle_ft.checkpoint import claims, commit, uploads
from paddle_ft.checkpoint.restore import verify
from paddle_ft.checkpoint.store import Store, open_store
from paddle_ft.coordination.embedded import EmbeddedEtcd
from tests.contract.store_fixtures import Bucket, served_bucket
from tests.integration.jobs import FAST_ETCD, TINY, Launcher, final, steps_done, wait_until
from tests.integration.s3_server import S3Server
from tests.unit import local_job
from tests.unit.local_job import come_back, leave


def steps_in(directory: Path) -> list[int]:
    """Steps of the commits whose markers lie below ``directory``."""
    names = [p.name for p in directory.rglob("*.json") if p.parent.name == "commits"]
    return sorted(int(name.split("-")[1]) for name in names)


def intact(store: Store) -> list[int]:
    """Steps of what the store calls committed; each is verified block by block."""
    found = commit.list_commits(store)
    for ref in found:
        assert verify(store, ref, commit.read_manifest(store, ref)) == []
    return sorted(ref.step for ref in found)


@pytest.mark.paddle
@pytest.mark.etcd
@pytest.mark.timeout(240)
def test_what_was_acknowledged_without_a_store_outlives_a_kill(tmp_path: Path) -> None:
    """The store goes; the launcher commits on; it and its workers are killed; it is started again
    while the store is still away; the store comes back."""
    flags = ("--checkpoint", str(tmp_path / "store"), "--checkpoint_every", "3")
    flags += ("--durable", "local", "--cache", str(tmp_path / "cache"))
    script = (str(TINY), "--record", str(tmp_path / "record"), "--delay", "0.06")
    unsent = tmp_path / "cache" / "unsent"
    other = ("--checkpoint", str(tmp_path / "other"))
    undisturbed = Launcher(
        tmp_path / "plain", (*other, str(TINY), "--record", str(tmp_path / "ignored")), FAST_ETCD
    )
    first = Launcher(tmp_path / "first", (*flags, *script), FAST_ETCD)
    second = None
    try:
        wait_until(lambda: steps_in(tmp_path / "store"))
        leave(tmp_path)
        wait_until(lambda: len(steps_in(unsent)) >= 2)
        workers = first.workers()
        first.send(signal.SIGKILL)
        first.wait()
        wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers.values()))
        acknowledged = steps_in(unsent)[-1]
        assert steps_in(tmp_path / "gone")[-1] < acknowledged
        before = steps_done(tmp_path / "record")

        second = Launcher(tmp_path / "second", (*flags, *script), FAST_ETCD)
        wait_until(lambda: steps_done(tmp_path / "record") > before + 3)
        wait_until(lambda: steps_in(unsent)[-1:] > [acknowledged])
        come_back(tmp_path)
        assert second.wait() == 0, second.output
        assert undisturbed.wait() == 0, undisturbed.output
    finally:
        first.close()
        undisturbed.close()
        if second is not None:
            second.close()
    assert f"from the checkpoint of step {acknowledged}" in second.output
    assert steps_in(unsent) == []
    assert intact(open_store(str(tmp_path / "store")))[-1] == int(final(second.output)["step"])
    assert final(second.output)["weights"] == final(undisturbed.output)["weights"]


@pytest.mark.paddle
@pytest.mark.etcd
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_node_that_is_lost_with_its_disk_takes_no_more_than_waited_on_it(tmp_path: Path) -> None:
    """Of two nodes, one uploads nothing after its first objects; then it is gone, and a newcomer
    without its cache takes its place: they go on from what the store has."""
    script = (str(TINY), "--record", str(tmp_path / "record"), "--delay", "0.15")
    launchers: list[Launcher] = []

    def start(name: str, cache: str, **environ: str) -> Launcher:
        flags = ("--nnodes", "2", "--job_id", "pair", "--etcd", etcd.endpoint)
        flags += ("--checkpoint", str(tmp_path / "store"), "--checkpoint_every", "3")
        flags += ("--durable", "local", "--cache", str(tmp_path / cache))
        launcher = Launcher(tmp_path / name, (*flags, *script), {**FAST_ETCD, **environ})
        launchers.append(launcher)
        return launcher

    with EmbeddedEtcd() as etcd:
        try:
            first = start("first", "a")
            lost = start("lost", "b", PADDLE_FT_FAILPOINTS="upload.before=sleep:500@3")
            wait_until(lambda: steps_in(tmp_path / "store"))
            wait_until(lambda: len(steps_in(tmp_path / "a" / "unsent")) >= 2)
            lost.send(signal.SIGKILL)
            lost.wait()
            settled = steps_in(tmp_path / "store")[-1]
            newcomer = start("newcomer", "c")
            assert first.wait(150) == 0, first.output
            assert newcomer.wait() == 0, newcomer.output
        finally:
            for launcher in launchers:
                launcher.close()
    told = first.output + newcomer.output
    assert "is awaited: other nodes are uploading it" in told
    assert f"from the checkpoint of step {settled}" in told
    assert intact(open_store(str(tmp_path / "store")))[-1] == int(final(told)["step"])


@pytest.mark.etcd
def test_a_second_launcher_on_the_directory_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import time\ntime.sleep(60)\n")
    flags = ("--checkpoint", str(tmp_path / "store"), str(script))
    first = Launcher(tmp_path / "first", flags, FAST_ETCD)
    second = None
    try:
        wait_until(first.workers)
        second = Launcher(tmp_path / "second", ("--job_id", "another", *flags), FAST_ETCD)
        assert second.wait() == 2
        assert f"{tmp_path / 'store'} is in use by another launcher" in second.output
        assert f"pid {first.process.pid}" in second.output
        assert "Traceback" not in second.output
    finally:
        for launcher in filter(None, (first, second)):
            launcher.send(signal.SIGTERM) if launcher.process.poll() is None else None
            launcher.send(signal.SIGTERM) if launcher.process.poll() is None else None
            launcher.wait()
            launcher.close()


# ---------------------------------------------------------------- S3


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    yield from served_bucket()


def begun(bucket: Bucket) -> list[str]:
    """Keys of uploads in parts that nobody has completed."""
    client = boto3.session.Session().client(
        "s3", endpoint_url=bucket.server.endpoint, config=Config(s3={"addressing_style": "path"})
    )
    try:
        page = client.list_multipart_uploads(Bucket="checkpoints")
        return [upload["Key"] for upload in page.get("Uploads", ())]
    finally:
        client.close()


LARGE = 40 * 2**20
"""More than one part."""
CRASHER = """
import sys
from pathlib import Path
from paddle_ft.checkpoint import write
from tests.integration.test_local_durability import LARGE
from tests.unit.local_job import Launcher
write.PACK_BYTES_MIN = write.PACK_BYTES  # one object
job = Launcher(Path(sys.argv[1]), url=sys.argv[2], endpoint_url=sys.argv[3], block_bytes=2**20)
job.save(1, LARGE)
print("ack", flush=True)
job.drained()
"""


@pytest.mark.s3
def test_half_an_upload_is_given_up_and_begun_anew(bucket: Bucket, tmp_path: Path) -> None:
    url = f"{bucket.url}/half"
    done = subprocess.run(
        [sys.executable, "-c", CRASHER, str(tmp_path), url, bucket.server.endpoint],
        env=os.environ | {"PADDLE_FT_FAILPOINTS": "s3.part=crash@2"},
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
    assert done.returncode == 86
    assert len(begun(bucket)) == 1
    job = local_job.Launcher(
        tmp_path, url=url, endpoint_url=bucket.server.endpoint, block_bytes=2**20
    )
    try:
        assert job.drained()
    finally:
        job.close()
    assert begun(bucket) == []
    assert intact(bucket.open("half")) in ([1], [])


@pytest.mark.s3
def test_a_server_that_is_killed_and_comes_back(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "RETRY_INTERVAL_S", 0.2)
    with S3Server() as server:  # the credentials are those of ``bucket``
        settings = {"url": server.bucket("checkpoints"), "endpoint_url": server.endpoint}
        first = local_job.Launcher(tmp_path, **settings)
        first.save(1)
        assert first.drained()
        server.kill()
        kept = [first.save(step) for step in (2, 3)]
        first.close()
        again = local_job.Launcher(tmp_path, **settings)
        try:
            assert again.head is not None
            assert again.head.newest == kept[-1]
            assert again.holds(kept[-1])
            server.start()
            assert again.drained()
        finally:
            again.close()
        config = server.config()
        assert intact(open_store(settings["url"], config))[-1] == 3


@pytest.mark.s3
def test_a_note_of_another_launcher_is_told(
    bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    store = bucket.open("noted")
    with claims.alone(store, "job"):
        assert claims.NOTE in [info.name for info in store.find("")]
    assert store.find("") == []
    assert caplog.text == ""
    store.put(claims.NOTE, b'{"pid": 7, "host": "elsewhere", "job": "other"}')
    with claims.alone(store, "job"):
        pass
    assert "job other, pid 7, host elsewhere" in caplog.text
