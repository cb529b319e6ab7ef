"""Bytes written: what changed, and every byte once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.drive import Job
from bench.report import Row
from bench.storage import Writer, shared_memory, tensors
from paddle_ft.checkpoint import layout, plan
from paddle_ft.checkpoint.store import open_store
from paddle_ft.config import CheckpointConfig
from paddle_ft.types import ImageInfo, TensorSpec

GROUP = "Bytes written"
SHARE = 0.01
"""Of the rows of the table that change."""
CHANGES = 3


def measure(folder: Path, mbytes: float, say: Callable[[str], None]) -> list[Row]:
    rows = []
    default = CheckpointConfig().block_bytes
    for row_bytes in (256, 4096):
        for block_bytes in (default, 64 * 2**10, 4096):
            for random in (False, True):
                say(f"bytes: rows of {row_bytes}, blocks of {block_bytes}, random: {random}")
                rows.append(_embedding(folder, mbytes / 4, row_bytes, block_bytes, random))
    say("bytes: nothing changes")
    rows.append(_nothing(folder, mbytes))
    say("bytes: four ranks")
    rows += [_four_parts(folder, mbytes), _four_ranks(folder, mbytes / 4)]
    return rows


def _size(block_bytes: int) -> str:
    if block_bytes >= 2**20:
        return f"{block_bytes // 2**20} MiB"
    return f"{block_bytes // 2**10} KiB"


def _embedding(folder: Path, mbytes: float, row_bytes: int, block_bytes: int, random: bool) -> Row:
    """A table of ``mbytes`` of which 1 % of the rows change; objects with data alone count."""
    config = CheckpointConfig(block_bytes=block_bytes)
    count = int(mbytes * 1e6) // row_bytes
    shape = (count, row_bytes // 4)
    spec = TensorSpec("model/table.weight", "float32", shape, "replicated", 0, count * row_bytes)
    changed = int(count * SHARE)
    generator = np.random.default_rng(1)
    data, rest, taken_s = [], [], []
    with shared_memory(count * row_bytes) as (_, view):
        writer = Writer(open_store(str(folder / "store")), config)
        writer.write([(ImageInfo(1, 0, 1, (spec,), {}), view)])
        for step in range(2, 3 + CHANGES):
            before = {info.name for info in writer.store.find("")}
            table = np.frombuffer(view, dtype=np.uint32).reshape(shape)
            if random:
                table[generator.choice(count, changed, replace=False)] += 1
            else:
                start = int(generator.integers(count - changed))
                table[start : start + changed] += 1
            del table
            start_s = time.perf_counter()
            writer.write([(ImageInfo(step, 0, 1, (spec,), {}), view)])
            taken_s.append(time.perf_counter() - start_s)
            new = [info for info in writer.store.find("") if info.name not in before]
            data.append(sum(i.nbytes for i in new if i.name.startswith(layout.DATA)) / 1e6)
            rest.append(sum(i.nbytes for i in new) / 1e6 - data[-1])
    shutil.rmtree(folder / "store")
    where = "random" if random else "contiguous"
    return Row(
        GROUP,
        f"1 % of the rows of {row_bytes} bytes ({where}), blocks of {_size(block_bytes)}",
        "MB", data[1:], [changed * row_bytes / 1e6], "changed", goal=1.2,
        note=f"manifest and listing {rest[-1]:.2f} MB, {taken_s[-1]:.2f} s for a table of "
        f"{mbytes:.0f} MB; the first change, which is not counted, {data[0]:.2f} MB"
        + (f"; {CHANGES} changes are too few to meet a compaction, see the mean of 200"
           if random else ""),
    )  # fmt: skip


def _nothing(folder: Path, mbytes: float) -> Row:
    specs = plan.share(tensors(int(mbytes * 1e6)), 0, 1, CheckpointConfig().block_bytes)
    with shared_memory(plan.image_bytes(specs)) as (_, view):
        writer = Writer(open_store(str(folder / "store")), CheckpointConfig())
        writer.write([(ImageInfo(1, 0, 1, specs, {}), view)])
        before = {info.name for info in writer.store.find("")}
        writer.write([(ImageInfo(2, 0, 1, specs, {}), view)])
        new = [info for info in writer.store.find("") if info.name not in before]
    shutil.rmtree(folder / "store")
    data = sum(info.nbytes for info in new if info.name.startswith(layout.DATA))
    rest = sum(info.nbytes for info in new) - data
    return Row(GROUP, f"nothing of {mbytes:.0f} MB changes", "MB", [data / 1e6], goal=0.0,
               note=f"manifest and listing {rest / 1e6:.3f} MB")  # fmt: skip


def _four_parts(folder: Path, mbytes: float) -> Row:
    config = CheckpointConfig()
    whole = tensors(int(mbytes * 1e6))
    nbytes = sum(spec.nbytes for spec in whole)
    shares = plan.shares(whole, 4, config.block_bytes)
    with shared_memory(max(plan.image_bytes(share) for share in shares)) as (_, view):
        # One buffer serves all: a node does not know what the others write.
        images = [(ImageInfo(1, rank, 4, share, {}), view) for rank, share in enumerate(shares)]
        writer = Writer(open_store(str(folder / "store")), config, nodes=4)
        writer.write(images)
        written = sum(info.nbytes for info in writer.store.find(""))
        del images
    shutil.rmtree(folder / "store")
    return Row(GROUP, "4 data-parallel ranks on 4 nodes, everything in the store", "MB",
               [written / 1e6], [nbytes / 1e6], "one copy", goal=1.02)  # fmt: skip


def _four_ranks(folder: Path, mbytes: float) -> Row:
    """A real job; its last checkpoint is its only one."""
    job = Job(
        folder / "job",
        ["--case", "heavy", "--mbytes", str(mbytes), "--steps", "10", "--every", "1000"],
        ranks=4,
        flags=("--checkpoint_every", "never"),
    )
    job.start()
    job.wait()
    store = folder / "job" / "store"
    written = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    data = sum(path.stat().st_size for path in (store / layout.DATA).rglob("*") if path.is_file())
    shutil.rmtree(folder / "job")
    width = int((mbytes * 1e6 / 4 / 50) ** 0.5)
    return Row(GROUP, "a real job of 4 ranks on one node, everything in the store", "MB",
               [written / 1e6], [width * width * 4 * 50 / 1e6], "one copy", goal=1.02,
               note=f"objects with data alone: {data / 1e6:.2f} MB")  # fmt: skip
