"""A leader that saves checkpoints of a state known from its step, with a register for its head.

The register stands for etcd: a row of files, each made if and only if its number is free, so that
a commit upon a head that has moved is refused as the fenced transaction would refuse it.

As a program (``python -m tests.chaos.checkpoint_leader URL REGISTER CONFIG``) it takes over, then
saves until it is killed, and says ``ready``, ``begin N``, ``ack N`` and ``lost N`` on its output.
After it has lost the head it goes on as a leader would that does not know it yet.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from paddle_ft.checkpoint import collect, commit, plan, retention, write
from paddle_ft.checkpoint.store import Store, open_store
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import PaddleFTError, StoreError
from paddle_ft.types import CommitRef, Head, decode, encode
from tests.unit.checkpoint_job import BLOCK, Array, images, load, same

WORLD = 2
KEEP = 3
_STILL = np.random.default_rng(0).standard_normal(12_000)
_ZOMBIE_STEPS = 3


def state_of(step: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Replicated and local arrays of ``step``: some change as a whole, some in rows, some never."""
    random = np.random.default_rng(step)
    rows = np.zeros((400, 32), np.float32)
    for earlier in range(max(0, step - 5), step + 1):
        rows[earlier * 7 % 400] = earlier
    state = {"still": _STILL, "rows": rows, "dense": random.standard_normal(8_000)}
    return state, {"local": random.integers(0, 9, (WORLD, 50))}


def holds(store: Store, ref: CommitRef) -> bool:
    """Whether ``ref`` loads and is bit for bit what was saved; raises CheckpointDamaged."""
    state, local = state_of(ref.step)
    return all(
        same({**state, **{n: a[rank] for n, a in local.items()}}, load(store, ref, rank, WORLD))
        for rank in range(WORLD)
    )


class Register:
    """The head, moved by compare and swap."""

    def __init__(self, place: Path) -> None:
        self._place = place
        place.mkdir(exist_ok=True)

    def read(self) -> tuple[int, Head | None]:
        """Its revision and the head."""
        numbers = sorted(int(p.name) for p in self._place.iterdir() if p.name.isdigit())
        if not numbers:
            return 0, None
        content = (self._place / str(numbers[-1])).read_bytes()
        return numbers[-1], decode(Head, content) if content else None

    def swap(self, revision: int, head: Head | None) -> bool:
        """Makes ``head`` the one after ``revision``; False if somebody else was first."""
        fresh = self._place / f"new-{os.urandom(8).hex()}"
        fresh.write_bytes(encode(head) if head else b"")
        try:
            os.link(fresh, self._place / str(revision + 1))
            return True
        except FileExistsError:
            return False
        finally:
            fresh.unlink()


class Leader:
    """Takes over when it is made; ``save`` gives the reference, or None if it leads no more."""

    def __init__(self, store: Store, place: Path, **settings: object) -> None:
        self.store = store
        self.config = CheckpointConfig.model_validate({"block_bytes": BLOCK, **settings})
        self.register = Register(place)
        owner = place / "owner"
        if not owner.exists():
            owner.write_text(commit.binding(store))
            commit.adopt(store, commit.bound(store, owner.read_text()))
        self.owner = commit.bound(store, owner.read_text())
        while True:
            self.revision, self.head = self.register.read()
            if self.register.swap(self.revision, self.head):
                break
        self.revision += 1
        if self.head is not None:
            commit.mark_committed(store, self.head)  # its predecessor may not have come to it

    @property
    def step(self) -> int:
        return self.head.newest.step if self.head else 0

    def save(self, step: int) -> CommitRef | None:
        head, parent, parents = self.head, None, {}
        if head:
            parent = (head.newest, commit.read_manifest(self.store, head.newest))
            parents = {head.newest.manifest: parent[1]}
        made = images(*state_of(step), step, WORLD)
        sequence = (head.newest.sequence if head else 0) + 1
        listings = []
        for node in range(WORLD):
            part = write.write_part(
                self.store,
                made[node::WORLD],
                write.Share(self.owner, sequence, 1, f"n{node}.a", parent),
                self.config,
            )
            listings.append(write.read_part(self.store, part))
        manifest = plan.merge(listings, head=head, parents=parents, created_s=0.0)
        ref = write.store_manifest(self.store, manifest)
        moved = retention.next_head(head, ref, retention.KeepLast(KEEP), "")
        if not self.register.swap(self.revision, moved):
            return None
        self.revision, self.head = self.revision + 1, moved
        self.finish()
        return ref

    def finish(self) -> None:
        """Marker and garbage of the head, until the store takes them; harmless for a zombie."""
        assert self.head is not None
        deadline = time.monotonic() + 60
        while True:
            try:
                commit.mark_committed(self.store, self.head)
                break
            except StoreError:
                if time.monotonic() > deadline:
                    raise
        try:
            collect.collect(self.store, self.head, self.owner)
        except PaddleFTError:
            pass  # as in the product: later


def _say(*words: object) -> None:
    print(*words, flush=True)


def main(url: str, place: str, config: dict[str, Any]) -> None:
    settings = CheckpointConfig.model_validate({"block_bytes": BLOCK, **config})
    leader = Leader(open_store(url, settings), Path(place), **config)
    _say("ready")
    lost = 0
    step = leader.step
    while lost < _ZOMBIE_STEPS:
        step += 1
        _say("begin", step)
        try:
            ref = leader.save(step)
        except PaddleFTError as error:
            _say("failed", step, type(error).__name__)
            lost += 1
            continue
        if ref is None:
            lost += 1
            _say("lost", step)
            if leader.head is not None:
                leader.finish()  # the collector of somebody whose view is old
            continue
        _say("ack", step)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
