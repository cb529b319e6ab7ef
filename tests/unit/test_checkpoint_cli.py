"""``paddle-ft ckpt``: what it tells, and that it tells the truth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from paddle_ft.checkpoint import commit
from paddle_ft.checkpoint.cli import ckpt_app
from paddle_ft.checkpoint.store import open_store
from paddle_ft.checkpoint.words import age, size
from paddle_ft.errors import (
    CheckpointDamaged,
    CheckpointMismatch,
    ConfigError,
    StoreError,
    StoreMissing,
)
from tests.unit import checkpoint_job
from tests.unit.checkpoint_job import BLOCK, SavingJob, load


@pytest.fixture
def job(tmp_path: Path) -> SavingJob:
    """Steps 10 and 20, which differ in one block of ``w``."""
    job = SavingJob(open_store(str(tmp_path / "store")), keep=2)
    weights = np.zeros(3 * BLOCK, np.uint8)
    job.save(10, {"w": weights, "old": np.zeros(3)}, {"mean": np.zeros((2, 4))}, 2)
    weights = weights.copy()
    weights[0] = 1
    job.save(20, {"w": weights, "new": np.zeros((1, 2))}, {"mean": np.zeros((2, 4))}, 2)
    return job


def run(*arguments: object) -> str:
    """The output; raises what the command raised."""
    result = CliRunner().invoke(ckpt_app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def run_json(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json"))


def test_ls(job: SavingJob) -> None:
    rows = run_json("ls", job.store.url)
    assert [r["step"] for r in rows] == [20, 10]
    assert rows[0]["bytes"] == 3 * BLOCK + 16 + 2 * 32
    assert 16 < rows[0]["bytes_new"] <= BLOCK + 16
    assert rows[0]["world_size"] == 2
    assert run("ls", job.store.url).count("\n") == 3


def test_ls_names_what_is_damaged(job: SavingJob, tmp_path: Path) -> None:
    assert job.head
    (tmp_path / "store" / job.head.newest.manifest).write_text("x")
    assert "damaged" in run_json("ls", job.store.url)[0]
    assert "damaged" in run("ls", job.store.url)


def test_show(job: SavingJob) -> None:
    shown = run_json("show", job.store.url, "--step", 10)
    assert shown["step"] == 10
    assert {t["name"] for t in shown["tensors"]} == {"w", "old", "mean"}
    assert shown["meta"] == {"step": 10}
    assert "mean" in run("show", job.store.url)


def test_show_tells_where_training_stood(job: SavingJob, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = {"position": {"epoch": 3, "samples": 640, "plan": None}, "metrics": {"loss": 0.25}}
    plain = checkpoint_job.images
    monkeypatch.setattr(
        checkpoint_job,
        "images",
        lambda *a, **k: [(replace(info, meta=meta), data) for info, data in plain(*a, **k)],
    )
    job.save(30, {"w": np.zeros(3)})
    shown = run_json("show", job.store.url)
    assert (shown["epoch"], shown["samples"], shown["loss"]) == (3, 640, 0.25)
    lines = [line.split() for line in run("show", job.store.url).splitlines()]
    assert ["epoch", "3"] in lines
    assert ["loss", "0.25"] in lines


def test_verify(job: SavingJob, tmp_path: Path) -> None:
    assert "step 20: intact" in run("verify", job.store.url)
    assert run("verify", job.store.url, "--all").count("intact") == 2
    for path in (tmp_path / "store" / "data").rglob("*.0"):
        path.write_bytes(bytes(path.stat().st_size + 1)[1:] + b"x")
    with pytest.raises(CheckpointDamaged):
        run("verify", job.store.url)


def test_diff(job: SavingJob) -> None:
    rows = {(r["name"], r["change"], r["bytes"]) for r in run_json("diff", job.store.url, 10, 20)}
    assert rows == {("w", "changed", BLOCK), ("old", "removed", 24), ("new", "added", 16)}
    assert "no tensor differs" in run("diff", job.store.url, 10, 10)


def test_pin_and_unpin(job: SavingJob) -> None:
    ref = commit.list_commits(job.store)[1]
    run("pin", job.store.url, "--step", 10, "--who", "me")
    assert run_json("ls", job.store.url)[1]["pinned"] == ["me"]
    for step in range(30, 60, 10):
        job.save(step, {"w": np.full(3, step)})
    assert load(job.store, ref)["old"].nbytes == 24
    assert "no longer pinned" in run("unpin", job.store.url, "--step", 10, "--who", "me")
    with pytest.raises(ConfigError, match="who"):
        run("pin", job.store.url, "--who", "a/b")


def test_a_step_that_is_not_given_as_one_is_explained(job: SavingJob) -> None:
    url = job.store.url
    for command, *words in (["pin", url, 10], ["unpin", 10, url], ["export", url, 10, "--to", "x"]):
        with pytest.raises(ConfigError, match=rf"{command} takes a URL alone; .* --step 10\."):
            run(command, *words)
    with pytest.raises(ConfigError, match="--step N"):
        run("show", url, "newest")
    assert run_json("ls", url)[1]["pinned"] == []


def test_gc_tells_first_and_deletes_when_told(job: SavingJob) -> None:
    url = job.store.url
    assert "0 objects" in run("gc", url)
    assert job.head
    late = commit.layout.manifest_name(2, 20, job.owner, "0f")  # of a leader that lost the race
    job.store.put(late, b"x")
    assert late in run("gc", url)
    assert job.store.get(late) == b"x"
    assert "1 objects deleted" in run("gc", url, "--delete")
    assert job.store.find(late) == []
    load(job.store, job.head.newest)


def test_nothing_there(tmp_path: Path) -> None:
    """An empty directory, which a job may be about to use."""
    assert "no checkpoint" in run("ls", tmp_path)
    for command in ("show", "verify", "pin", "gc"):
        with pytest.raises(CheckpointMismatch, match="no checkpoint"):
            run(command, tmp_path)


@pytest.mark.parametrize("command", ["ls", "show", "verify", "pin", "gc"])
def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path, command: str) -> None:
    with pytest.raises(StoreMissing, match="there is no directory .*nosuch"):
        run(command, tmp_path / "nosuch")
    assert not (tmp_path / "nosuch").exists()


def test_a_store_that_cannot_be_written_is_named_not_what_it_was_tried_with(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError) as caught:
        open_store(str(tmp_path / "file")).check()
    assert str(tmp_path / "file") in str(caught.value)
    assert "probe" not in str(caught.value)


def test_a_job_that_begins_from_a_checkpoint_does_not_show_as_a_pin(job: SavingJob) -> None:
    run("pin", job.store.url)
    assert commit.adopt(job.store, commit.new_owner())
    assert run_json("ls", job.store.url)[0]["pinned"] == ["user"]
    assert len(commit.pins(job.store)[job.head.newest.manifest]) == 2
    assert run("unpin", job.store.url) == "step 20 is no longer pinned by user\n"


def test_a_step_that_is_not_there_names_those_that_are(job: SavingJob) -> None:
    with pytest.raises(CheckpointMismatch, match="20, 10"):
        run("show", job.store.url, "--step", 15)


def test_figures_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1536, 5 * 2**30, 2**42)] == [
        "0 B", "1023 B", "1.5 KiB", "5.0 GiB", "4.0 TiB",
    ]  # fmt: skip
    assert [age(s) for s in (0, 59, 61, 3600, 90_061)] == [
        "0 s", "59 s", "1 min 1 s", "1 h", "1 d 1 h",
    ]  # fmt: skip
