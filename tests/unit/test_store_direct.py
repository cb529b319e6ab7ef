"""Files written past the page cache hold what was given, where that works and where it does not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from paddle_ft.checkpoint import store_directory
from paddle_ft.checkpoint.store_directory import DirectoryStore
from paddle_ft.config import CheckpointConfig

STAGE = 4 * 2**20
SIZES = [
    [2**20],
    [2**20 + 1],
    [STAGE],
    [STAGE - 1, 2, 5],
    [4097] * 300,
    [2 * STAGE, 4095],
    [7, STAGE],
]


def pieces(sizes: list[int]) -> list[memoryview]:
    content = np.random.default_rng(sum(sizes)).bytes(sum(sizes) + 1)
    result, at = [], 1  # no piece begins at an even address
    for size in sizes:
        result.append(memoryview(content)[at : at + size])
        at += size
    return result


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_byte_is_there_and_none_more(tmp_path: Path, sizes: list[int]) -> None:
    store = DirectoryStore(tmp_path, CheckpointConfig())
    data = pieces(sizes)
    store.put("data/object", data)
    assert (tmp_path / "data" / "object").read_bytes() == b"".join(data)
    assert not list((tmp_path / ".tmp").iterdir())


@pytest.mark.parametrize("where", ["open", "write"])
def test_a_file_system_that_cannot_do_it_gets_an_ordinary_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    real_open, refused = os.open, []

    def refusing_open(path: str | Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, "refused")
        return real_open(path, flags, *rest)

    def refusing_write(descriptor: int, pages: memoryview) -> None:
        refused.append(descriptor)
        os.write(descriptor, pages[:4096])
        raise OSError(errno.EINVAL, "refused")

    if where == "open":
        monkeypatch.setattr(store_directory.os, "open", refusing_open)
    else:
        monkeypatch.setattr(store_directory, "_write_pages", refusing_write)
    store = DirectoryStore(tmp_path, CheckpointConfig())
    data = pieces([STAGE, 100])
    store.put("data/object", data)
    assert refused
    assert (tmp_path / "data" / "object").read_bytes() == b"".join(data)
