"""A job of one or two launchers with local durability, its head kept here instead of in etcd.

As a program (``python -m tests.unit.local_job PLACE STEPS``) it goes on where the place stands and
says ``ack N`` after each checkpoint, then ``end``.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from paddle_ft.checkpoint import commit
from paddle_ft.checkpoint.retention import KeepLast, kept_lineage
from paddle_ft.checkpoint.room import CheckpointRoom
from paddle_ft.checkpoint.store import Store, open_store
from paddle_ft.config import CheckpointConfig, Config, EtcdConfig, JobConfig
from paddle_ft.coordination.actions import Commit
from paddle_ft.coordination.schema import Fences
from paddle_ft.types import CommitRef, Head
from tests.unit.checkpoint_job import BLOCK, Array, images, load, same

KEEP = 2


def state_of(step: int, nbytes: int = 40_000) -> dict[str, Array]:
    """Half of it changes with each step."""
    still = np.random.default_rng(0).integers(0, 255, nbytes // 2).astype(np.uint8)
    fresh = np.random.default_rng(step).integers(0, 255, nbytes // 2).astype(np.uint8)
    return {"still": still, "fresh": fresh}


class Launcher:
    """What one launcher does with checkpoints; ``etcd``: what its etcd holds under ``store``."""

    def __init__(
        self,
        place: Path,
        *,
        cache: str = "cache",
        nodes: int = 1,
        etcd: dict[str, str] | None = None,
        url: str = "",
        **settings: Any,
    ) -> None:
        given = {"block_bytes": BLOCK, "attempts": 1, "durable": "local", **settings}
        self.config = Config(
            job=JobConfig(nodes_max=nodes),
            etcd=EtcdConfig(endpoints=("h:1",) if nodes > 1 else ()),
            checkpoint=CheckpointConfig.model_validate(
                {"url": url or str(place / "store"), "cache": str(place / cache), **given}
            ),
        )
        self.room = CheckpointRoom.open(self.config)
        known = {} if etcd is None else etcd
        self.room.bind(lambda value: known.setdefault("store", value))
        found = self.room.commits()
        self.head = Head(found[0], found[1:]) if found else None

    @property
    def front(self) -> Store:
        return self.room._store

    def part(self, step: int, rank: int = 0, world: int = 1, nbytes: int = 40_000) -> Any:
        newest = self.head.newest if self.head else None
        return self.room.write_part(
            images(state_of(step, nbytes), {}, step, world)[rank : rank + 1],
            sequence=(newest.sequence if newest else 0) + 1,
            generation=1,
            member=f"n{rank}.a",
            parent=newest,
        )

    def commit(self, step: int, *parts: Any) -> CommitRef:
        base = self.head.newest if self.head else None
        action = Commit(
            generation=1,
            step=step,
            parts=parts,
            head=self.head,
            sequence=(base.sequence if base else 0) + 1,
            base=base,
            lineage=kept_lineage(self.head, base, step, KeepLast(KEEP)),
            obsolete=(),
            fences=Fences(0, 0, 0),
        )
        ref = self.room.store_manifest(action)
        self.head = Head(ref, self.room.lineage(action), self.room.identity)
        self.room.acknowledge(self.head)
        self.room.collect(self.head)
        return ref

    def save(self, step: int, nbytes: int = 40_000) -> CommitRef:
        return self.commit(step, self.part(step, nbytes=nbytes))

    def holds(self, ref: CommitRef, nbytes: int = 40_000) -> bool:
        return same(load(self.front, ref), state_of(ref.step, nbytes))

    @property
    def uploads(self) -> Any:
        return self.room._uploads

    def waiting(self) -> list[str]:
        return [info.name for info in self.uploads.spool.waiting()]

    def drained(self) -> bool:
        return bool(self.uploads.drain(30, lambda text: None) == 0)

    def close(self) -> None:
        self.room.close()


@contextmanager
def away(place: Path) -> Iterator[None]:
    """The directory store at ``place / "store"`` refuses everything."""
    leave(place)
    try:
        yield
    finally:
        come_back(place)


def leave(place: Path) -> None:
    (place / "store").rename(place / "gone")
    while True:
        try:
            (place / "store").write_text("not a directory")
            return
        except IsADirectoryError:  # an upload was under way
            shutil.rmtree(place / "store", ignore_errors=True)


def come_back(place: Path) -> None:
    if (place / "gone").exists():
        (place / "store").unlink()
        (place / "gone").rename(place / "store")


def in_store(place: Path) -> dict[int, bool]:
    """step -> whether it is whole, of all that the store calls committed."""
    store = open_store(str(place / "store"))
    return {ref.step: same(load(store, ref), state_of(ref.step)) for ref in refs(store)}


def refs(store: Store) -> list[CommitRef]:
    return commit.list_commits(store)


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come about"
        time.sleep(0.01)


def main(place: Path, steps: int) -> None:
    launcher = Launcher(place)
    print("begin", launcher.head.newest.step if launcher.head else 0, flush=True)
    for _ in range(steps):
        step = (launcher.head.newest.step if launcher.head else 0) + 1
        launcher.save(step)
        print("ack", step, flush=True)
    launcher.drained()
    launcher.close()
    print("end", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
