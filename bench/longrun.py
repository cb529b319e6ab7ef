"""What rows drawn at random cost over 200 checkpoints, compactions included, and what they leave.

The table is gone through twice; the first checkpoint, which writes all of it, is not counted.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import Row
from bench.storage import Writer, shared_memory
from paddle_ft.checkpoint import layout
from paddle_ft.checkpoint.store import Store, open_store
from paddle_ft.config import CheckpointConfig
from paddle_ft.types import ImageInfo, TensorSpec

GROUP = "Bytes written, mean of 200 checkpoints"
SHARE = 0.01
CHECKPOINTS = 200
ROWS_BYTES = (256, 1024, 4096)
RATIOS = (1.5, 1.75, 2.0, 3.0)


def measure(folder: Path, mbytes: float, say: Callable[[str], None]) -> list[Row]:
    rows = []
    default = CheckpointConfig().space_ratio
    for row_bytes in ROWS_BYTES:
        say(f"long run: rows of {row_bytes}")
        rows.append(_run(folder, mbytes / 4, row_bytes, default))
    for ratio in RATIOS:
        say(f"long run: space_ratio {ratio}")
        rows.append(_run(folder, mbytes / 10, 256, ratio))
    return rows


class _Counting:
    """A store that counts what is read by range."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.nbytes = self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read_into(self, name: str, offset: int, targets: Sequence[memoryview]) -> None:
        self.nbytes += sum(t.nbytes for t in targets)
        self.calls += 1
        self._store.read_into(name, offset, targets)


def _run(folder: Path, mbytes: float, row_bytes: int, ratio: float) -> Row:
    config = CheckpointConfig(space_ratio=ratio)
    count = int(mbytes * 1e6) // row_bytes
    nbytes, changed = count * row_bytes, int(count * SHARE)
    spec = TensorSpec(
        "model/table.weight", "float32", (count, row_bytes // 4), "replicated", 0, nbytes
    )
    generator = np.random.default_rng(1)
    store = _Counting(open_store(str(folder / "store"), config))
    target = Path(f"/dev/shm/paddle_ft-{os.getpid()}-bench-long")
    data, rest, taken_s = [], [], []
    with shared_memory(nbytes) as (_, view):
        writer = Writer(store, config)  # type: ignore[arg-type]
        table = np.frombuffer(view, dtype=np.uint32).reshape(spec.shape)
        table[:] = generator.integers(0, 2**32, spec.shape, dtype=np.uint32)
        ref = writer.write([(ImageInfo(1, 0, 1, (spec,), {}), view)])
        fresh_s = _restore_s(writer, ref, target, bytes(0))
        known = {info.name for info in writer.store.find("")}
        for step in range(2, 2 + CHECKPOINTS):
            table[generator.choice(count, changed, replace=False)] += np.uint32(1)
            start_s = time.perf_counter()
            ref = writer.write([(ImageInfo(step, 0, 1, (spec,), {}), view)])
            taken_s.append(time.perf_counter() - start_s)
            new = [info for info in writer.store.find("") if info.name not in known]
            known |= {info.name for info in new}
            data.append(sum(i.nbytes for i in new if i.name.startswith(layout.DATA)) / 1e6)
            rest.append(sum(i.nbytes for i in new) / 1e6 - data[-1])
        store.nbytes = store.calls = 0
        restore_s = _restore_s(writer, ref, target, bytes(view))
        del table
    shutil.rmtree(folder / "store")
    default = ratio == CheckpointConfig().space_ratio
    name = f"1 % of the rows of {row_bytes} bytes (random)"
    return Row(
        GROUP, name if default else f"{name}, space_ratio {ratio:g}", "MB",
        [sum(data) / len(data)], [changed * row_bytes / 1e6], "changed",
        goal=1.2 if default else None,
        note=f"a table of {mbytes:.0f} MB; mean of the last 50 {sum(data[-50:]) / 50:.3f} MB, "
        f"largest checkpoint {max(data):.2f} MB; manifest and listing {np.mean(rest):.3f} MB in "
        f"the mean, {max(rest):.3f} MB at most; {np.median(taken_s) * 1e3:.0f} ms a checkpoint; "
        f"restore of the last one reads {store.nbytes / 2 / nbytes:.2f} x the state in "
        f"{store.calls // 2} "
        f"ranges and takes {restore_s:.2f} s, of one written as a whole {fresh_s:.2f} s",
    )  # fmt: skip


def _restore_s(writer: Writer, ref: Any, target: Path, expected: bytes) -> float:
    """Seconds of the second restore of two, the page cache being warm then."""
    for _ in range(2):
        start_s = time.perf_counter()
        writer.restore(ref, target)
        taken_s = time.perf_counter() - start_s
        if expected:
            assert target.read_bytes()[: len(expected)] == expected
        target.unlink()
    return taken_s
