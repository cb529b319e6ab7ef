"""The checkpoints of one job, as its agents use them.

A thin front over writing, committing, restoring and collecting, bound to one store and, once the
job's etcd is known, to one history of heads (``bind``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from paddle_ft.checkpoint import backlog, claims
from paddle_ft.checkpoint import commit as commits
from paddle_ft.checkpoint.boxes import Box
from paddle_ft.checkpoint.collect import collect, release
from paddle_ft.checkpoint.deltas import Prints
from paddle_ft.checkpoint.manifest import Manifest
from paddle_ft.checkpoint.plan import merge
from paddle_ft.checkpoint.restore import Near, restore
from paddle_ft.checkpoint.retention import metrics_of, rule_of
from paddle_ft.checkpoint.shards import restore_boxes
from paddle_ft.checkpoint.sign import Trust
from paddle_ft.checkpoint.spool import OWNER
from paddle_ft.checkpoint.store import Store, open_store
from paddle_ft.checkpoint.uploads import Uploads
from paddle_ft.checkpoint.write import Share, read_part, store_manifest, write_part
from paddle_ft.config import Config
from paddle_ft.coordination.actions import Commit
from paddle_ft.errors import CheckpointDamaged, StoreError
from paddle_ft.types import CommitRef, Head, ImageInfo, Part

_log = logging.getLogger(__name__)


def url_of(config: Config) -> str:
    """Where the job keeps its checkpoints."""
    return config.checkpoint.url or f"checkpoints/{config.job.id}"


@contextmanager
def alone(config: Config) -> Iterator[None]:
    """Keeps other launchers from the store of a job whose etcd is private; raises ConfigError."""
    if config.etcd.endpoints:
        yield
        return
    plain = config.checkpoint.model_copy(update={"cache": "", "attempts": 1})
    with claims.alone(open_store(url_of(config), plain), config.job.id):
        yield


class CheckpointRoom:
    """Every method blocks for as long as the store takes and raises StoreError, CheckpointError.

    ``uploads``: a commit is durable on the local disk first (``durable = "local"``).
    """

    def __init__(self, store: Store, config: Config, uploads: Uploads | None = None) -> None:
        self._store = store
        self._uploads = uploads
        self._private = not config.etcd.endpoints
        self._shared = config.job.nodes_max > 1
        self._config = config.checkpoint
        self._trust = Trust.of(config.checkpoint)
        rule_of(config.checkpoint)  # raises what decide would otherwise find out later
        self._owner = ""
        self._manifests: dict[str, Manifest] = {}
        self._prints = Prints()
        self.identity = ""
        """Of the store; known after ``bind``."""

    @classmethod
    def open(cls, config: Config) -> CheckpointRoom:
        """The room for ``config``, found usable: one object was written, read and removed.

        Raises ConfigError for a setting that cannot be followed, StoreError.
        """
        url = url_of(config)
        if config.checkpoint.durable == "remote":
            room = cls(open_store(url, config.checkpoint), config)
        else:
            remote = open_store(url, config.checkpoint.model_copy(update={"cache": ""}))
            place, shared = Path(config.checkpoint.cache), config.job.nodes_max > 1
            uploads = Uploads(place, remote, config.checkpoint, config.job.id, shared=shared)
            room = cls(uploads.front, config, uploads)
        try:
            room._store.check()
        except BaseException:
            room.close()
            raise
        return room

    @property
    def url(self) -> str:
        return self._store.url

    def bind(self, claim: Callable[[str], str]) -> None:
        """Binds the job to this store.

        ``claim`` puts the given value into etcd unless one is there and gives the one that is.
        Raises CheckpointMismatch if the job is bound to another store.
        """
        value = claim(self._binding_before() or commits.binding(self._store))
        self._owner = commits.bound(self._store, value)
        self.identity = commits.identify(self._store)
        if self._uploads is not None:
            if self._private:
                self._uploads.spool.put(OWNER, value.encode())
            else:
                self._uploads.spool.delete([OWNER])
            self._uploads.start(self._owner, self.identity)

    def _binding_before(self) -> str:
        """Of a launcher whose private etcd ended with it and of which nothing lives: its history
        goes on, unless the store is another one by now."""
        before = self._uploads.spool.recall(OWNER) if self._uploads and self._private else ""
        same = before.startswith(f"{commits.identify(self._store)}.")
        return before if same else ""

    def commits(self) -> tuple[CommitRef, ...]:
        """What the store holds for a job whose etcd knows of nothing, newest first."""
        try:
            head = commits.adopt(self._store, self._owner)
        except StoreError as error:
            # What waits here is newer than all of this history that the store has.
            head = commits.newest_head(self._uploads.spool) if self._uploads else None
            if head is None:
                raise
            _log.warning("The newest checkpoint is looked for in the cache alone: %s", error)
        return (head.newest, *head.lineage) if head else ()

    def write_part(
        self,
        images: Sequence[tuple[ImageInfo, memoryview]],
        *,
        sequence: int,
        generation: int,
        member: str,
        parent: CommitRef | None,
        places: dict[str, tuple[int, int]] | None = None,
    ) -> Part:
        """Stores one node's share of a step; ``sequence`` is the head's plus one.

        ``places`` is told where each block lies: digest -> (rank, offset in its image).
        """
        try:
            known = (parent, self._manifest(parent)) if parent else None
        except CheckpointDamaged:
            known = None  # nothing of it can be referred to: everything is written
        with self._uploads.attempt(member) if self._uploads else nullcontext():
            return write_part(
                self._store,
                images,
                Share(self._owner, sequence, generation, member, known),
                self._config,
                prints=self._prints,
                places=places,
            )

    def store_manifest(self, action: Commit) -> CommitRef:
        """Merges the parts of ``action`` and stores the manifest that ``head`` will name."""
        listings = [read_part(self._store, part) for part in action.parts]
        refs = (
            {c.manifest: c for c in (action.head.newest, *action.head.lineage)}
            if (action.head)
            else {}
        )
        wanted = {part.parent for part in action.parts if part.parent}
        if not wanted <= refs.keys():
            wanted = set(refs)
        parents = {name: self._manifest(refs[name]) for name in sorted(wanted)}
        manifest = merge(listings, head=action.head, parents=parents, created_s=time.time())
        ref = store_manifest(self._store, manifest)
        self._trust.sign(self._store, ref, manifest)
        ref = replace(ref, metrics=metrics_of(manifest.meta))
        self._manifests[ref.manifest] = manifest
        return ref

    def lineage(self, action: Commit) -> tuple[CommitRef, ...]:
        """The ancestors that the head after ``action`` keeps: with local durability those, too,
        that a job goes on from which loses its disks."""
        if self._uploads is None:
            return action.lineage
        settled = self._uploads.settled
        return backlog.protected(action.head, action.base, action.lineage, settled)

    def acknowledge(self, head: Head) -> None:
        """Writes the marker of a commit that etcd has."""
        if self._uploads is not None:
            self._uploads.acknowledge(head)
        else:
            commits.mark_committed(self._store, head)

    def restore(
        self,
        ref: CommitRef,
        *,
        ranks: Sequence[int],
        world_size: int,
        path: Path,
        near: Near | None = None,
    ) -> Mapping[int, ImageInfo]:
        """Loads what ``ranks`` need into the new file ``path``; what is in it, by rank.

        ``near`` finds blocks in memory.
        """
        return restore(
            self._store,
            ref,
            self._manifest(ref),
            ranks=ranks,
            world_size=world_size,
            path=path,
            near=near,
        )

    def restore_boxes(self, ref: CommitRef, wanted: Mapping[str, Box], path: Path) -> ImageInfo:
        """Loads the ``wanted`` parts of tensors into the new file ``path``; what is in it."""
        return restore_boxes(self._store, ref, self._manifest(ref), wanted, path)

    def coming(self, ref: CommitRef) -> bool:
        """Whether what ``ref`` lacks may still come: from nodes that have it on their disks."""
        return self._uploads is not None and self._shared and self._uploads.coming(ref)

    def collect(self, head: Head) -> None:
        """Removes what no checkpoint that is kept refers to; with local durability that is done
        once the store has ``head``."""
        if self._uploads is None:
            collect(self._store, head, self._owner)

    def _manifest(self, ref: CommitRef) -> Manifest:
        """The manifest of ``ref``; the few newest are remembered."""
        manifest = self._manifests.get(ref.manifest)
        if manifest is None:
            manifest = commits.read_manifest(self._store, ref, self._trust)
            self._manifests[ref.manifest] = manifest
        for name in list(self._manifests)[:-4]:
            del self._manifests[name]
        return manifest

    def drain(self, limit_s: float, say: Callable[[str], None]) -> None:
        """Waits at most ``limit_s`` for what is not in the store yet; tells ``say`` of it."""
        left = self._uploads.drain(limit_s, say) if self._uploads else 0
        if left and self._uploads:
            say(
                f"{left / 1e6:.6g} MB of checkpoints are not in {self.url} yet, only in "
                f"{self._uploads.spool.url}: start the job again with the same --cache"
            )

    def release(self) -> None:
        """The job's etcd is gone for good: nobody will write under this history again."""
        if self._uploads and self._uploads.spool.waiting():
            return  # the next launcher goes on with it
        if self._owner:
            release(self._store, self._owner)
            if self._uploads:
                self._uploads.spool.delete([OWNER])

    def close(self) -> None:
        """Gives what it holds on the local disk to the next one."""
        if self._uploads:
            self._uploads.close()
