"""``ft.checkpoint.save``, ``load`` and ``steps`` (A4, B6), alone and with a second writer."""

from __future__ import annotations

import logging
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import paddle_ft as ft
from paddle_ft import checkpoint
from paddle_ft.checkpoint import commit, standalone
from paddle_ft.checkpoint.store import open_store
from paddle_ft.errors import (
    CheckpointDamaged,
    CheckpointMismatch,
    ConfigError,
    StoreDenied,
    StoreUnavailable,
)
from paddle_ft.failpoints import switched

ROOT = Path(__file__).parents[2]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def state_of(value: int) -> dict[str, Any]:
    return {
        "model": {"z.w": np.full((30, 20), value, np.float32), "a.b": np.arange(5.0)},
        "position": (value, [1, None, True]),
        "name": "run ☃",
        "by_number": {3: "three", (1, 2): 0.1},
    }


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def test_the_state_comes_back(url: str) -> None:
    ref = ft.checkpoint.save(url, state_of(1), step=7).wait(20)
    assert ref.step == 7
    assert_same(ft.checkpoint.load(url), state_of(1))
    assert ft.checkpoint.steps(url) == [7]


def test_special_numbers(url: str) -> None:
    state = {
        "n": float("nan"),
        "i": -math.inf,
        "big": 2**100,
        "bool": True,
        "scalar": np.float32(2),
    }
    checkpoint.save(url, state, step=1).wait(20)
    found = checkpoint.load(url)
    assert math.isnan(found["n"])
    assert found["i"] == -math.inf
    assert (found["big"], found["bool"], found["scalar"]) == (2**100, True, 2.0)


def test_the_state_may_change_once_save_has_returned(url: str) -> None:
    state = state_of(1)
    handle = checkpoint.save(url, state, step=1)
    state["model"]["z.w"][:] = 99
    handle.wait(20)
    assert_same(checkpoint.load(url), state_of(1))


def test_the_newest_or_the_step_asked_for(url: str) -> None:
    for step in (3, 5, 4):
        checkpoint.save(url, state_of(step), step=step)
    checkpoint.save(url, state_of(9), step=9).wait(20)
    assert checkpoint.steps(url) == [3, 4, 5, 9]
    assert_same(checkpoint.load(url), state_of(9))
    assert_same(checkpoint.load(url, step=5), state_of(5))
    with pytest.raises(CheckpointMismatch, match="step 6"):
        checkpoint.load(url, step=6)


def test_only_the_parts_asked_for(url: str) -> None:
    ref = checkpoint.save(url, state_of(1), step=1).wait(20)
    assert checkpoint.load(url, names="model/a.*").keys() == {"model/a.b"}
    assert checkpoint.load(url, names=["*z*", "*a.b"]).keys() == {"model/z.w", "model/a.b"}
    assert checkpoint.load(url, names="nothing") == {}
    store = open_store(url)
    manifest = commit.read_manifest(store, ref)
    big = next(t for t in manifest.tensors if t.name == "model/z.w").blocks[0].extents[0]
    path = Path(url) / big.object
    content = bytearray(path.read_bytes())
    content[big.offset] ^= 1
    path.write_bytes(content)
    assert checkpoint.load(url, names="model/a.*").keys() == {"model/a.b"}  # the rest is not read
    with pytest.raises(CheckpointDamaged):
        checkpoint.load(url)


def test_a_damaged_newest_is_passed_over_loudly(url: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint.save(url, state_of(1), step=1).wait(20)
    ref = checkpoint.save(url, state_of(2), step=2).wait(20)
    (Path(url) / ref.manifest).write_bytes(b"{}")
    assert_same(checkpoint.load(url), state_of(1))
    assert ref.manifest in caplog.text
    with pytest.raises(CheckpointDamaged, match=ref.manifest):
        checkpoint.load(url, step=2)


def test_retention(url: str) -> None:
    best = checkpoint.KeepAny((checkpoint.KeepLast(2), checkpoint.KeepBest("loss", 1)))
    for step in range(1, 9):
        metrics = {"loss": float(abs(step - 3))}
        handle = checkpoint.save(url, state_of(step), step=step, keep=best, metrics=metrics)
    handle.wait(20)
    assert checkpoint.steps(url) == [3, 7, 8]
    for step in (3, 7, 8):
        assert_same(checkpoint.load(url, step=step), state_of(step))


def test_nothing_there(url: str) -> None:
    assert checkpoint.steps(url) == []
    with pytest.raises(CheckpointMismatch, match="no checkpoint"):
        checkpoint.load(url)


def test_what_cannot_be_saved_is_named(url: str) -> None:
    for bad in ({"a": {"b": object()}}, {"a": {"b": np.array([None])}}, {"a": {"b": {1, 2}}}):
        with pytest.raises(ConfigError, match="a/b"):
            checkpoint.save(url, bad, step=1)
    for _ in range(standalone.SAVES_MAX + 1):  # no slot is lost
        with pytest.raises(ConfigError):
            checkpoint.save(url, {"a": {"b": object()}}, step=1)


def test_a_store_that_refuses_is_told_by_wait(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    handle = checkpoint.save(str(tmp_path / "file"), {"a": 1}, step=1)
    with pytest.raises(StoreDenied):
        handle.wait(20)
    assert handle.done()


def test_after_a_failed_save_the_next_one_works(url: str) -> None:
    checkpoint.save(url, state_of(1), step=1).wait(20)
    with switched("manifest.stored=raise:StoreFull"), pytest.raises(ft.StoreFull):
        checkpoint.save(url, state_of(2), step=2).wait(20)
    checkpoint.save(url, state_of(3), step=3).wait(20)
    assert checkpoint.steps(url) == [1, 3]
    assert_same(checkpoint.load(url), state_of(3))


OTHER = """
import logging, os, pathlib, sys, time
import numpy as np
logging.basicConfig()
from paddle_ft import checkpoint
url, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for step in range(first, first + count):
    state = {"w": np.full(3000, step)}
    handle = checkpoint.save(url, state, step=step, keep=checkpoint.KeepLast(2))
    if step == first and (meeting := os.environ.get("MEETING")):
        handle.wait(20)
        pathlib.Path(meeting, str(first)).touch()
        while len(os.listdir(meeting)) < 2:
            time.sleep(0.001)
"""


def other(url: str, first: int, count: int, **variables: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", OTHER, url, str(first), str(count)],
        cwd=ROOT, env=os.environ | variables, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors.decode()


def test_a_script_that_ends_has_its_last_save_written(url: str) -> None:
    assert finish(other(url, 1, 1)) == (0, "")
    assert checkpoint.load(url)["w"][0] == 1


def test_a_directory_that_was_removed_is_not_made_again_at_the_end(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standalone, "_writers", {})
    checkpoint.save(url, state_of(1), step=1).wait(20)
    standalone._say_that_it_is_over()
    assert len(list(Path(url).glob("owners/*.over.json"))) == 1
    shutil.rmtree(url)
    standalone._say_that_it_is_over()
    assert not Path(url).exists()


@pytest.mark.parametrize("url", ["http://host/x", "https://host"])
def test_a_web_server_takes_no_checkpoints(url: str) -> None:
    with pytest.raises(ConfigError, match=rf"{url} is that of a web server.* s3://bucket/prefix"):
        open_store(url)


def test_a_server_that_does_not_answer_is_named() -> None:
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        url = f"ftp://127.0.0.1:{bound.getsockname()[1]}/x"
        with pytest.raises(StoreUnavailable, match=f"^{url} cannot be reached"):
            open_store(url)


def test_a_process_goes_on_where_another_has_ended(url: str) -> None:
    assert finish(other(url, 1, 3)) == (0, "")
    assert finish(other(url, 4, 2)) == (0, "")
    assert checkpoint.load(url)["w"][0] == 5


def test_what_ended_processes_left_is_collected(url: str) -> None:
    for round_ in range(4):
        assert finish(other(url, 10 * round_ + 1, 10)) == (0, "")
    assert checkpoint.steps(url) == [39, 40]
    store = open_store(url)
    assert len({i.name.split("/")[1] for i in store.find("data/")}) <= 2
    assert len(store.find("owners/")) <= 4


def test_a_second_writer_is_told_and_loses_nothing(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    mine = checkpoint.KeepLast(2)
    checkpoint.save(url, {"w": np.full(3000, 100)}, step=100, keep=mine).wait(20)
    assert finish(other(url, 1, 12)) == (0, "")  # it began with ours
    with caplog.at_level(logging.WARNING):
        checkpoint.save(url, {"w": np.full(3000, 101)}, step=101, keep=mine).wait(20)
    assert "Somebody else is saving" in caplog.text
    for step in range(102, 115):
        checkpoint.save(url, {"w": np.full(3000, step)}, step=step, keep=mine).wait(20)
    assert {11, 12, 113, 114} <= set(checkpoint.steps(url))
    for step in checkpoint.steps(url):
        assert checkpoint.load(url, step=step)["w"][0] == step
    assert checkpoint.load(url)["w"][0] == 114


def test_two_writers_at_once(url: str, tmp_path: Path) -> None:
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    writers = [other(url, first, 10, MEETING=str(meeting)) for first in (1, 1001)]
    results = [finish(writer) for writer in writers]
    assert [code for code, _ in results] == [0, 0]
    assert {9, 10, 1009, 1010} <= set(checkpoint.steps(url))
    for step in checkpoint.steps(url):
        assert checkpoint.load(url, step=step)["w"][0] == step


def test_killed_at_any_moment(url: str) -> None:
    for round_ in range(5):
        first = 100 * round_ + 1
        process = other(
            url, first, 50, PADDLE_FT_FAILPOINTS=f"directory.written=crash@{15 + 13 * round_}"
        )
        code, _ = finish(process)
        assert code == 86
        for step in checkpoint.steps(url):
            assert checkpoint.load(url, step=step)["w"][0] == step
    assert checkpoint.load(url)["w"][0] > 400


@pytest.mark.paddle
def test_paddle_tensors_come_back_as_such(url: str) -> None:
    import paddle

    model = paddle.nn.Linear(4, 3)
    optimizer = paddle.optimizer.Adam(parameters=model.parameters())
    model(paddle.ones([2, 4])).sum().backward()
    optimizer.step()
    half = paddle.arange(6, dtype="float32").reshape([2, 3]).astype("bfloat16")
    state = {"model": model.state_dict(), "opt": optimizer.state_dict(), "half": half}
    checkpoint.save(url, state, step=1).wait(20)
    found = checkpoint.load(url)
    assert found["half"].dtype == paddle.bfloat16
    assert found["half"].astype("float32").numpy().tolist() == [[0, 1, 2], [3, 4, 5]]
    other_model = paddle.nn.Linear(4, 3)
    other_model.set_state_dict(found["model"])
    assert other_model.weight.numpy().tobytes() == model.weight.numpy().tobytes()
    for name, tensor in optimizer.state_dict().items():
        if hasattr(tensor, "numpy"):
            assert found["opt"][name].numpy().tobytes() == tensor.numpy().tobytes()
