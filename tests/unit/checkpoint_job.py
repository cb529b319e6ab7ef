"""A job that saves and loads arrays through the engine, its head kept here instead of in etcd."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from paddle_ft.checkpoint import collect, commit, plan, retention, write
from paddle_ft.checkpoint.deltas import Prints
from paddle_ft.checkpoint.restore import restore
from paddle_ft.checkpoint.store import Store
from paddle_ft.config import CheckpointConfig
from paddle_ft.types import CommitRef, Head, ImageInfo, TensorSpec

Array = np.ndarray[Any, Any]
State = Mapping[str, Array]
BLOCK = 4096


def images(
    state: State,
    local: State,
    step: int,
    world: int,
    mode: Any = "sharded",
    block_bytes: int = BLOCK,
) -> list[tuple[ImageInfo, memoryview]]:
    """The images all ranks would make; ``local`` arrays have a first axis over the ranks."""
    specs = [
        TensorSpec(n, str(a.dtype), a.shape, "replicated", 0, a.nbytes) for n, a in state.items()
    ]
    specs += [
        TensorSpec(n, str(a.dtype), a.shape[1:], "local", 0, a[0].nbytes) for n, a in local.items()
    ]
    result = []
    for rank in range(world):
        share = plan.share(specs, rank, world, block_bytes, mode)
        image = bytearray(plan.image_bytes(share))
        for piece in share:
            array = state[piece.name] if piece.name in state else local[piece.name][rank]
            content = array.tobytes()[piece.start : piece.start + piece.nbytes]
            image[piece.offset : piece.offset + piece.nbytes] = content
        meta = {"step": step} if rank == 0 else {}
        result.append((ImageInfo(step, rank, world, share, meta), memoryview(image)))
    return result


class SavingJob:
    """``nodes`` members that save in turn; ``head`` moves with every ``save``."""

    def __init__(self, store: Store, *, keep: int = 3, **settings: object) -> None:
        self.store = store
        self.keep = keep
        self.config = CheckpointConfig.model_validate({"block_bytes": BLOCK, **settings})
        self.owner = commit.bound(store, commit.binding(store))
        self.head: Head | None = commit.adopt(store, self.owner)
        self.prints: dict[int, Prints] = {}

    def save(
        self, step: int, state: State, local: State | None = None, world: int = 1, nodes: int = 1
    ) -> CommitRef:
        """One checkpoint, committed and marked; what is not kept any more is collected."""
        made = images(state, local or {}, step, world, block_bytes=self.config.block_bytes)
        head, parent, parents = self.head, None, {}
        if head:
            parent = (head.newest, commit.read_manifest(self.store, head.newest))
            parents = {head.newest.manifest: parent[1]}
        sequence = (head.newest.sequence if head else 0) + 1
        parts = [
            write.write_part(
                self.store,
                made[node::nodes],
                write.Share(self.owner, sequence, 1, f"n{node}.a", parent),
                self.config,
                prints=self.prints.setdefault(node, Prints()),
            )
            for node in range(min(nodes, world))
        ]
        listings = [write.read_part(self.store, part) for part in parts]
        manifest = plan.merge(listings, head=head, parents=parents, created_s=0.0)
        ref = write.store_manifest(self.store, manifest)
        self.head = retention.next_head(head, ref, retention.KeepLast(self.keep), "")
        commit.mark_committed(self.store, self.head)
        collect.collect(self.store, self.head, self.owner)
        return ref


def load(store: Store, ref: CommitRef, rank: int = 0, world: int = 1) -> dict[str, Array]:
    """What ``rank`` of ``world`` gets."""
    manifest = commit.read_manifest(store, ref)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "image"
        infos = restore(store, ref, manifest, ranks=[rank], world_size=world, path=path)
        raw = path.read_bytes()
    return {t.name: array_of(t, raw) for t in infos[rank].tensors}


def array_of(spec: TensorSpec, raw: bytes) -> Array:
    dtype = "uint16" if spec.dtype == "bfloat16" else spec.dtype
    content = raw[spec.offset : spec.offset + spec.nbytes]
    return np.frombuffer(content, dtype=dtype).reshape(spec.shape)


def same(first: Mapping[str, Array], second: Mapping[str, Array]) -> bool:
    """Equal bit for bit, names, dtypes and shapes included."""
    return first.keys() == second.keys() and all(
        (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        for a, b in ((first[n], second[n]) for n in first)
    )


def as_bfloat16(info: ImageInfo, names: set[str]) -> ImageInfo:
    """``info`` with the uint16 tensors ``names`` declared as bfloat16."""
    tensors = tuple(replace(t, dtype="bfloat16") if t.name in names else t for t in info.tensors)
    return replace(info, tensors=tensors)
