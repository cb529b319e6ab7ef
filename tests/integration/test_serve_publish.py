"""Models published to a store and loaded from it: what is shared, found, refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from paddle_ft.checkpoint.sign import Trust, make_keys
from paddle_ft.checkpoint.store import Buffers, Store, open_store
from paddle_ft.checkpoint.store_directory import DirectoryStore
from paddle_ft.cli import app
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import (
    CheckpointDamaged,
    CheckpointMismatch,
    ConfigError,
    MachineError,
    StoreMissing,
)
from paddle_ft.serve.folder import LoadedVersion, load
from paddle_ft.serve.models import manifest_name
from paddle_ft.serve.publish import Published, publish

BIG = np.random.default_rng(0).bytes(10_000_000)
PIPELINE = """
from paddle_ft.serve.pipeline import Pipeline

class Reader(Pipeline):
    pass
"""


class Shop:
    """A store, a cache, and a pipeline folder to publish."""

    def __init__(self, place: Path) -> None:
        self.url, self.cache, self.folder = str(place / "store"), place / "cache", place / "model"
        (self.folder / "weights").mkdir(parents=True)
        self.write("pipeline.py", PIPELINE.encode())
        self.write("weights/big", BIG)
        self.write("empty", b"")

    @property
    def store(self) -> Store:
        return open_store(self.url)

    def write(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)

    def publish(self, name: str = "reader", **config: object) -> Published:
        settings = CheckpointConfig.model_validate(config)
        return publish(self.folder, name, self.url, config=settings, source={"step": 7})

    def load(self, version: int | None = None, **more: object) -> LoadedVersion:
        return load(self.store, "reader", version, self.cache, **more)  # type: ignore[arg-type]

    def content(self, folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_versions_share_what_is_equal_both_ways(shop: Shop) -> None:
    first = shop.publish()
    assert (first.ref.version, first.nbytes_new) == (1, len(BIG) + len(PIPELINE))
    shop.write("pipeline.py", PIPELINE.encode() + b"# changed\n")
    second = shop.publish()
    assert (second.ref.version, second.nbytes_new) == (2, len(PIPELINE) + 10)

    one = shop.load(1)
    assert one.nbytes_fetched == one.manifest.nbytes == first.nbytes
    two = shop.load()
    assert two.ref == second.ref
    assert two.nbytes_fetched == second.nbytes_new
    assert shop.content(two.folder) == shop.content(shop.folder)
    assert two.manifest.source == {"step": 7}
    assert shop.load(2).nbytes_fetched == 0


def test_a_folder_that_was_touched_is_made_anew(shop: Shop) -> None:
    shop.publish()
    folder = shop.load().folder
    for damage in (
        lambda: (folder / "weights" / "big").write_bytes(b"\1" + BIG[1:]),
        lambda: (folder / "more.py").write_text("1"),
        lambda: (folder / "empty").unlink(),
    ):
        damage()
        assert shop.content(shop.load().folder) == shop.content(shop.folder)
    assert {path.name for path in folder.parent.iterdir() if path.is_dir()} >= {folder.name}


def test_what_is_lost_or_altered_in_the_store_is_named(shop: Shop) -> None:
    shop.publish()
    blobs = sorted(Path(shop.url).glob("models/blob/*/*"))
    data = blobs[0].read_bytes()
    blobs[0].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointDamaged, match="has been altered"):
        shop.load()
    blobs[0].unlink()
    with pytest.raises(CheckpointDamaged, match="lacks a block"):
        shop.load()
    assert not [p for p in shop.cache.rglob("*") if p.name.startswith(".tmp")]
    blobs[0].write_bytes(data)
    shop.load()

    with pytest.raises(StoreMissing, match="no version 3 of reader; there are 1"):
        shop.load(3)
    with pytest.raises(StoreMissing, match="no model writer; its models are: reader"):
        load(shop.store, "writer", None, shop.cache)
    with pytest.raises(ConfigError, match="cannot be the name"):
        load(shop.store, "../reader", None, shop.cache)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"format": 2}, CheckpointMismatch, "format 2"),
        ({"name": "other"}, CheckpointMismatch, "wrong name"),
        ({"files": [{"path": "../x", "blocks": []}]}, CheckpointDamaged, "leads out"),
        ({"files": [{"path": "/x", "blocks": []}]}, CheckpointDamaged, "leads out"),
        ({"files": 3}, CheckpointDamaged, "is damaged"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(
    shop: Shop, change: dict[str, object], error: type[Exception], text: str
) -> None:
    shop.publish()
    path = Path(shop.url) / manifest_name("reader", 1)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(error, match=text):
        shop.load()
    path.write_bytes(b"\xff[[[")
    with pytest.raises(CheckpointDamaged, match="is damaged"):
        shop.load()


def test_who_signed_counts(shop: Shop, tmp_path: Path) -> None:
    private, public, _ = make_keys(tmp_path / "keys")
    trusting = CheckpointConfig(trusted_keys=(str(public),), verify="required")
    trust = Trust.of(trusting)
    shop.publish()
    with pytest.raises(CheckpointDamaged, match="is not signed"):
        shop.load(trust=trust)
    done = shop.publish(sign_key=str(private))
    assert done.signed
    assert shop.load(trust=trust, digest=done.ref.digest).ref == done.ref
    with pytest.raises(CheckpointDamaged, match="need one --store"):
        shop.load(trust=trust, digest="0" * 64)
    path = Path(shop.url) / manifest_name("reader", 2)
    path.write_bytes(path.read_bytes().replace(b'"step":7', b'"step":8'))
    with pytest.raises(CheckpointDamaged, match="is not signed"):
        shop.load(trust=trust)


def test_two_who_publish_at_once_get_numbers_of_their_own(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    other: list[int] = []

    def meanwhile(name: str) -> None:
        if name == "publish.blobs" and not other:
            other.append(0)
            other[0] = shop.publish().ref.version

    monkeypatch.setattr("paddle_ft.serve.publish.failpoint", meanwhile)
    assert shop.publish().ref.version == 2
    assert other == [1]


def test_a_cache_that_cannot_be_written_is_told(shop: Shop) -> None:
    shop.publish()
    shop.cache.write_text("a file")
    with pytest.raises(MachineError, match="that can be written with --cache"):
        shop.load()


def test_old_folders_go(shop: Shop) -> None:
    for number in range(5):
        shop.write("empty", b"%d" % number)
        shop.publish()
        newest = shop.load().folder
    assert newest.is_dir()
    folders = [path for path in newest.parent.iterdir() if path.is_dir()]
    assert len(folders) == 3


def test_a_folder_in_use_stays(shop: Shop) -> None:
    shop.publish()
    used = shop.load()
    for number in range(4):
        shop.write("empty", b"%d" % number)
        shop.publish()
        shop.load()
    assert shop.content(used.folder)["empty"] == b""
    used.held.close()
    shop.write("empty", b"last")
    shop.publish()
    shop.load()
    assert not used.folder.exists()
    assert len([path for path in shop.cache.glob("reader/*") if path.is_dir()]) == 3


def test_two_who_load_at_once_both_have_it(shop: Shop) -> None:
    shop.publish()
    others: list[LoadedVersion] = []

    def meanwhile(share: float) -> None:
        if share == 1 and not others:
            others.append(shop.load())

    mine = shop.load(on_progress=meanwhile)
    assert mine.folder == others[0].folder
    assert mine.held.is_there()
    assert others[0].held.is_there()
    assert shop.content(mine.folder) == shop.content(shop.folder)
    assert not list(shop.cache.glob("reader/.tmp*"))


def test_publishing_again_mends_what_the_store_has_lost(shop: Shop) -> None:
    shop.publish()
    blobs = sorted(Path(shop.url).glob("models/blob/*/*"), key=lambda path: path.stat().st_size)
    blobs[-1].unlink()
    blobs[-2].write_bytes(b"short")
    again = shop.publish()
    assert again.nbytes_new > 2**20
    assert shop.content(shop.load().folder) == shop.content(shop.folder)
    assert shop.publish().nbytes_new == 0


def test_a_put_whose_answer_was_lost_keeps_its_signature(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public, _ = make_keys(tmp_path / "keys")
    put = DirectoryStore.put

    def forgets(
        store: DirectoryStore, name: str, data: Buffers, *, if_absent: bool = False
    ) -> bool:
        return put(store, name, data, if_absent=if_absent) and "manifest" not in name

    monkeypatch.setattr(DirectoryStore, "put", forgets)
    assert shop.publish(sign_key=str(private)).ref.version == 1
    shop.load(trust=Trust.of(CheckpointConfig(trusted_keys=(str(public),), verify="required")))


def test_what_is_no_model_is_not_published(tmp_path: Path) -> None:
    for name, text, said in (
        ("a/pipeline.py", "class (", "is not Python"),
        ("b/pipeline.py", "x = 1", "defines no class"),
        ("c/readme", "", "holds no Paddle inference model"),
    ):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            publish(path.parent, "m", str(tmp_path / "store"))
    files = tmp_path / "d"
    files.mkdir()
    (files / "m.json").write_text("{}")
    (files / "m.pdiparams").write_bytes(b"")
    with pytest.raises(ConfigError, match="is not a program of Paddle"):
        publish(files, "m", str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("flag", ["--warm-up=x=1,2", "--outputs=a,b", "--batched", "--no-batched"])
def test_what_a_pipeline_says_itself_is_not_taken_beside_it(shop: Shop, flag: str) -> None:
    given = ["publish", str(shop.folder), "--name", "reader", "--store", shop.url, flag]
    told = CliRunner().invoke(app, given)
    assert isinstance(told.exception, ConfigError)
    assert f"{shop.folder} is a pipeline" in str(told.exception)
    assert not Path(shop.url).exists()


def test_from_the_command_line(shop: Shop) -> None:
    command = CliRunner()
    told = command.invoke(
        app, ["publish", str(shop.folder), "--name", "reader", "--store", shop.url]
    )
    assert told.exit_code == 0, told.output
    assert "reader 1 is in" in told.output
    listed = command.invoke(app, ["models", "--store", shop.url])
    assert listed.exit_code == 0, listed.output
    assert "reader" in listed.output
    assert "pipeline" in listed.output
    as_json = command.invoke(app, ["models", "--store", shop.url, "--json"])
    assert json.loads(as_json.output) == {"reader": [1]}
