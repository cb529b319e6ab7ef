"""Directories on shared memory: whose owner is gone goes, wherever the owner lived."""

from __future__ import annotations

import os
from pathlib import Path

from paddle_ft.agent import buffers

OLD_S = -1.0
"""What was just made counts as old enough."""


def test_what_is_locked_stays_and_goes_with_its_lock(tmp_path: Path) -> None:
    """The name's process id says nothing: the owner may live in another PID namespace."""
    path = buffers.own_directory("job", tmp_path)
    alive = path.rename(tmp_path / "paddle_ft-999999999-job-x")
    (alive / "snapshot-1-0-0").write_bytes(b"x")
    buffers.remove_leftovers(tmp_path, young_s=OLD_S)
    assert (alive / "snapshot-1-0-0").exists()
    os.close(buffers._locks.pop())
    buffers.remove_leftovers(tmp_path, young_s=OLD_S)
    assert not alive.exists()


def test_a_directory_that_was_just_made_is_not_a_leftover(tmp_path: Path) -> None:
    """Between mkdir and its lock."""
    (tmp_path / f"paddle_ft-{os.getpid()}-job-x").mkdir()
    buffers.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir())


def test_nothing_else_is_touched(tmp_path: Path) -> None:
    for name in ("paddle_ft-notes-x", "paddle_ft-1", "other-1-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "paddle_ft-1-file").write_text("")
    buffers.remove_leftovers(tmp_path, young_s=OLD_S)
    assert len(list(tmp_path.iterdir())) == 4
