"""A store in a broken world: the typed error, one clear sentence, in seconds (B5)."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paddle_ft.checkpoint.store import Store, get_range, open_store
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import (
    ConfigError,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreUnavailable,
)
from paddle_ft.failpoints import switched
from tests.contract.store_fixtures import Bucket, served_bucket
from tests.integration.fault_proxy import FaultProxy
from tests.integration.s3_server import S3Server

SECONDS = 8.0
"""'In seconds', on a busy machine."""


def failure(store: Store) -> StoreError:
    """What ``check`` raises; it must be quick and one sentence."""
    began = time.monotonic()
    with pytest.raises(StoreError) as caught:
        store.check()
    assert time.monotonic() - began < SECONDS
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    return caught.value


# ---------------------------------------------------------------- directories


@pytest.mark.root
def test_a_full_disk(small_tmpfs: Path) -> None:
    store = open_store(str(small_tmpfs / "store"))
    store.put("small", b"x" * 1000)
    with pytest.raises(StoreFull, match=r"large.* No space left on device; free or add space"):
        store.put("large", os.urandom(2 * 2**20))
    assert [i.name for i in store.find("")] == ["small"]
    assert store.get("small") == b"x" * 1000
    store.put("fits", os.urandom(500_000))  # nothing half-written takes the space


@pytest.mark.root
def test_a_read_only_file_system(small_tmpfs: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_tmpfs], check=True)
    error = failure(open_store(str(small_tmpfs / "store")))
    assert isinstance(error, StoreDenied)
    assert "Read-only file system" in str(error)


def test_an_unwritable_directory(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o555)
    assert isinstance(failure(open_store(str(tmp_path / "store"))), StoreDenied)
    tmp_path.chmod(0o755)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for url in (tmp_path / "file", tmp_path / "file" / "store"):
        error = failure(open_store(str(url)))
        assert isinstance(error, StoreDenied)
        assert str(url) in str(error)


def test_a_crash_before_the_rename_leaves_no_object(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with switched("directory.written=raise:StoreFull"), pytest.raises(StoreFull):
        store.put("a/b", b"x")
    assert store.find("") == []


# ---------------------------------------------------------------- S3


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    yield from served_bucket()


@pytest.fixture
def proxy(bucket: Bucket) -> Iterator[FaultProxy]:
    with FaultProxy(bucket.server.endpoint) as running:
        yield running


def through(proxy: FaultProxy, bucket: Bucket, **settings: object) -> Store:
    config = bucket.server.config(endpoint_url=proxy.endpoint, **settings)
    return open_store(f"{bucket.url}/{os.urandom(4).hex()}", config)


@pytest.mark.s3
def test_a_bucket_that_is_not_there(bucket: Bucket) -> None:
    error = failure(open_store("s3://no-such-bucket/x", bucket.server.config()))
    assert isinstance(error, StoreMissing)
    assert "no-such-bucket" in str(error)


@pytest.mark.s3
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong"),
        ("AWS_ACCESS_KEY_ID", "nobody"),
        ("AWS_ACCESS_KEY_ID", ""),
    ],
)
def test_wrong_or_no_credentials(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    if value:
        monkeypatch.setenv(variable, value)
    else:
        monkeypatch.delenv(variable)
    error = failure(bucket.fresh())
    assert isinstance(error, StoreDenied)
    assert "wrong" not in str(error)


@pytest.mark.s3
def test_nobody_listens(bucket: Bucket) -> None:
    config = bucket.server.config(endpoint_url="http://127.0.0.1:1")
    error = failure(open_store("s3://checkpoints", config))
    assert isinstance(error, StoreUnavailable)
    assert "127.0.0.1:1" in str(error)


@pytest.mark.s3
def test_a_frozen_server(bucket: Bucket) -> None:
    store = bucket.fresh(read_timeout_s=1.0, connect_timeout_s=1.0)
    store.check()
    bucket.server.freeze()
    try:
        assert isinstance(failure(store), StoreUnavailable)
    finally:
        bucket.server.thaw()
    store.check()


def test_an_endpoint_that_is_no_url() -> None:
    store = open_store("s3://bucket", CheckpointConfig(endpoint_url="nonsense"))
    with pytest.raises(ConfigError, match="endpoint_url"):
        store.check()


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["500", "503", "reset", "lost", "half", "stall"])
def test_a_passing_fault_is_not_seen(proxy: FaultProxy, bucket: Bucket, fault: str) -> None:
    store = through(proxy, bucket, read_timeout_s=0.5)
    content = os.urandom(100_000)
    for call in (
        lambda: store.put("a", content),
        lambda: store.put("b", content, if_absent=True),
        lambda: store.get("a") == content,
        lambda: get_range(store, "a", 10, 50_000) == content[10:50_010],
        lambda: [i.name for i in store.find("")] == ["a", "b"],
        lambda: store.delete(["b"]) is None,
    ):
        proxy.faults[:] = [fault]
        assert call()
        assert proxy.faults == []
    assert [i.name for i in store.find("")] == ["a"]


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["500", "reset", "lost"])
def test_a_passing_fault_in_any_request_of_a_large_object(
    proxy: FaultProxy, bucket: Bucket, fault: str
) -> None:
    store = through(proxy, bucket)
    content = os.urandom(33 * 2**20)
    for position in (0, 2, 4):  # of: create, three parts, complete
        proxy.faults[:] = [""] * position + [fault]
        store.put("large", content)
        assert proxy.faults == []
    assert store.get("large") == content


@pytest.mark.s3
def test_a_lasting_fault_ends_after_the_attempts(proxy: FaultProxy, bucket: Bucket) -> None:
    store = through(proxy, bucket, attempts=3)
    proxy.faults[:] = ["503"] * 100
    with pytest.raises(StoreUnavailable, match="SlowDown"):
        store.get("a")
    assert len(proxy.requests) == 3


@pytest.mark.s3
def test_a_refusal_is_not_repeated(proxy: FaultProxy, bucket: Bucket) -> None:
    store = through(proxy, bucket)
    with pytest.raises(StoreMissing):
        store.get("a")
    assert len(proxy.requests) == 1


@pytest.mark.s3
def test_a_conditional_put_that_somebody_else_has_won(proxy: FaultProxy, bucket: Bucket) -> None:
    store = through(proxy, bucket)
    store.put("a", b"theirs")
    proxy.faults[:] = ["500"]
    assert store.put("a", b"ours", if_absent=True) is False
    assert store.get("a") == b"theirs"


@pytest.mark.s3
def test_an_abandoned_large_object_is_not_there(proxy: FaultProxy, bucket: Bucket) -> None:
    store = through(proxy, bucket, attempts=1)
    proxy.faults[:] = ["", "", "500"]
    with pytest.raises(StoreUnavailable):
        store.put("large", bytes(33 * 2**20))
    assert store.find("") == []
    assert proxy.requests[-2].startswith("DELETE")


@pytest.mark.s3
def test_killed_and_started_again(bucket: Bucket) -> None:
    with S3Server() as server:  # the credentials are the same
        store = open_store(server.bucket("checkpoints"), server.config(attempts=8))
        store.put("a", b"x")
        server.kill()
        server.start(wait=False)
        assert store.get("a") == b"x"
