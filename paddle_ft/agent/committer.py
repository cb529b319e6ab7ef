"""The leader's slow work: manifest, head, marker, garbage; and the look into the store.

Order, and what a crash between two steps leaves behind:

    parts in the store and in etcd      nothing refers to them: garbage
    manifest in the store               garbage until head names it
    head moved by the fenced txn        committed; from here on it is never lost while etcd lives
    marker in the store                 acknowledged; known without etcd, too
    garbage collected

A commit is told to the workers of this node after the marker, since the embedded etcd dies with
its launcher. The next leader writes a marker that its predecessor did not come to.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from paddle_ft.checkpoint.room import CheckpointRoom
from paddle_ft.coordination import schema
from paddle_ft.coordination.actions import Commit
from paddle_ft.coordination.kv import Coordinator, Transaction
from paddle_ft.coordination.mirror import JobMirror
from paddle_ft.errors import CheckpointError, CoordinationError, PaddleFTError, StoreError
from paddle_ft.failpoints import failpoint
from paddle_ft.types import CommitRef, Head, Part

log = logging.getLogger("paddle_ft")

PAUSE_S = 0.5
STORE_PAUSE_S = 2.0


class Committer:
    """Everything here blocks and belongs on a thread of its own; one call at a time.

    Args:
        closed: True once the agent is ending: nothing is tried again then.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        keys: schema.Keys,
        mirror: JobMirror,
        room: CheckpointRoom,
        closed: Callable[[], bool],
    ) -> None:
        self._coordinator = coordinator
        self._keys = keys
        self._mirror = mirror
        self._room = room
        self._closed = closed
        self.acknowledged = ""
        """Manifest of the newest commit whose marker is known to be written."""
        self.moved_revision = 0
        """Revision at which head was moved from here last; 0 if never."""
        self.failed: tuple[schema.Fences, str] | None = None
        """What a commit was decided upon whose parts do not make a checkpoint, and why."""

    def scan(self) -> tuple[CommitRef, ...]:
        """Commits in the store, newest first; tries until the store answers."""
        while not self._closed():
            try:
                return tuple(self._room.commits())
            except StoreError as error:
                log.warning("the store cannot be read yet: %s", error)
                time.sleep(STORE_PAUSE_S)
        return ()

    def announce(self, part: Part, revision: int, generation: Callable[[], int]) -> None:
        """Tells etcd of a written part until it has answered or the generation is over.

        ``revision`` is that of the generation the part belongs to, ``generation`` the current one.
        """
        txn = schema.add_part(self._keys, part, revision)
        while part.generation == generation() and not self._closed():
            try:
                self._coordinator.transact(txn)
                return
            except CoordinationError:
                time.sleep(PAUSE_S)

    def commit(self, action: Commit) -> Head | None:
        """Makes ``action``'s parts the newest checkpoint; None if that did not come about."""
        try:
            ref = self._room.store_manifest(action)
            failpoint("after_manifest_before_head")
            head = Head(ref, self._room.lineage(action), self._room.identity)
            txn = schema.commit(self._keys, head, action.obsolete, action.fences)
            if not self._move_head(txn, ref):
                log.info("step %d was not committed: the job has moved on", action.step)
                return None
            failpoint("after_head_before_marker")
        except CheckpointError as error:
            log.warning("step %d cannot be committed: %s", action.step, error)
            self.failed = (action.fences, f"step {action.step} cannot be committed: {error}")
            return None
        except PaddleFTError as error:
            log.warning("step %d is not committed yet: %s", action.step, error)
            time.sleep(PAUSE_S)
            return None
        self.acknowledge(head)
        return head

    def acknowledge(self, head: Head) -> Head:
        """Writes the marker that makes the commit known without etcd; then removes garbage.

        Gives ``head``.
        """
        while True:
            try:
                self._room.acknowledge(head)
                break
            except StoreError as error:
                if self._closed():
                    return head
                log.warning("the marker of step %d waits: %s", head.newest.step, error)
                time.sleep(STORE_PAUSE_S)
        self.acknowledged = head.newest.manifest
        failpoint("after_marker_before_collect")
        try:
            self._room.collect(head)
        except PaddleFTError as error:
            log.warning("old checkpoints stay for now: %s", error)
        return head

    def _move_head(self, txn: Transaction, ref: CommitRef) -> bool:
        """Runs ``txn``; when its outcome is not known, looks at head before it tries again."""
        while not self._closed():
            try:
                result = self._coordinator.transact(txn)
                if result.succeeded:
                    self.moved_revision = result.revision
                    return True
            except CoordinationError:
                time.sleep(PAUSE_S)
            try:
                state = schema.parse(self._keys, self._coordinator.read(self._keys.head).kvs)
            except CoordinationError:
                continue
            if state.head is not None and state.head.value.newest == ref:
                return True
            if not self._could_succeed(txn, state):
                return False
        return False

    def _could_succeed(self, txn: Transaction, head_now: schema.JobState) -> bool:
        """Whether the revisions that ``txn`` compares are still the current ones."""
        known = self._mirror.state()
        now = schema.Fences(
            leader=known.fences().leader,
            generation=known.fences().generation,
            head=head_now.fences().head,
        )
        return now.compares(self._keys) == txn.compares
