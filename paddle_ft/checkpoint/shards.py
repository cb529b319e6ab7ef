"""Tensors that are divided among ranks, loaded under another layout.

    box = Box(start=(0, 512), shape=(1024, 512))           # the right half of [1024, 1024]
    w = load_shards(url, {"w": box})["w"]

A rank saves its shard as a ``local`` tensor whose spec says of what it is a part (``ShardOf``); a
checkpoint is made only if the shards are all of the tensor. Whoever loads names the box it wants.
A tensor that was saved as a whole can be loaded in boxes as well.

Memory: the boxes, and of one stored shard at a time the rows that are needed, in whole blocks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paddle_ft import config as settings
from paddle_ft.checkpoint import commit
from paddle_ft.checkpoint.boxes import Box
from paddle_ft.checkpoint.manifest import ITEM_BYTES, Manifest
from paddle_ft.checkpoint.plan import aligned, image_bytes
from paddle_ft.checkpoint.reshard import plan_box
from paddle_ft.checkpoint.restore import fetch, new_mapped
from paddle_ft.checkpoint.sign import Trust
from paddle_ft.checkpoint.snapshot import array_of
from paddle_ft.checkpoint.store import Store, open_store
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import CheckpointMismatch
from paddle_ft.types import CommitRef, ImageInfo, TensorSpec


def load_shards(
    url: str,
    wanted: Mapping[str, Box],
    step: int | None = None,
    *,
    config: CheckpointConfig | None = None,
) -> dict[str, np.ndarray[Any, Any]]:
    """The ``wanted`` boxes, of the checkpoint of ``step`` or the newest; bfloat16 as uint16.

    Raises CheckpointMismatch if there is no such checkpoint, tensor or box, CheckpointDamaged,
    StoreError.
    """
    config = config or settings.load({}, os.environ).config.checkpoint
    store, trust = open_store(url, config), Trust.of(config)
    for ref in commit.list_commits(store):
        if step is None or ref.step == step:
            return read_boxes(store, ref, commit.read_manifest(store, ref, trust), wanted)
    what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    raise CheckpointMismatch(f"{store.url} holds {what}; correct the URL or the step.")


def read_boxes(
    store: Store, ref: CommitRef, manifest: Manifest, wanted: Mapping[str, Box]
) -> dict[str, np.ndarray[Any, Any]]:
    """The ``wanted`` boxes of one checkpoint; each block that is read is verified."""
    result = {}
    for name, box in wanted.items():
        reads = plan_box(manifest, name, box)
        dtype = next(p.dtype for p in manifest.tensors if p.name == name)
        item = np.dtype(f"V{ITEM_BYTES[dtype]}")
        target = np.empty(box.shape, item)
        for read in reads:
            scratch = bytearray(read.nbytes)
            fetch(store, ref.manifest, read.targets, memoryview(scratch))
            source = np.frombuffer(scratch, item, read.rows.size, read.offset)
            rows = source.reshape(read.rows.shape)
            target[read.common.slices(box)] = rows[read.common.slices(read.rows)]
        result[name] = array_of(dtype, box.shape, memoryview(target.tobytes()))
    return result


def restore_boxes(
    store: Store, ref: CommitRef, manifest: Manifest, wanted: Mapping[str, Box], path: Path
) -> ImageInfo:
    """Writes the ``wanted`` boxes to the new file ``path``; what is in it, as an image.

    Memory: the boxes twice. Raises CheckpointMismatch, CheckpointDamaged, StoreError (StoreFull if
    the file does not fit).
    """
    dtypes = {piece.name: piece.dtype for piece in manifest.tensors}
    found = read_boxes(store, ref, manifest, wanted)
    specs: list[TensorSpec] = []
    for name, array in found.items():
        offset = aligned(image_bytes(specs))
        form = (name, dtypes[name], wanted[name].shape)
        specs.append(TensorSpec(*form, "local", offset, array.nbytes))
    path.unlink(missing_ok=True)  # of an attempt that there was no room for
    image = memoryview(new_mapped(path, image_bytes(specs)))
    for spec in specs:
        image[spec.offset : spec.offset + spec.nbytes] = found[spec.name].tobytes()
    return ImageInfo(manifest.step, 0, manifest.world_size, tuple(specs))
