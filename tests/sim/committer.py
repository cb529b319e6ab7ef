"""The leader's slow work in the simulator: manifest, head, marker, garbage; the look at the store.

Follows ``paddle_ft.agent.committer``, with the product's own merging of parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paddle_ft.checkpoint import layout, plan
from paddle_ft.checkpoint.collect import collect
from paddle_ft.checkpoint.commit import adopt, mark_committed
from paddle_ft.checkpoint.manifest import Manifest, PartListing, encode_manifest
from paddle_ft.checkpoint.write import digest_of, read_part
from paddle_ft.coordination import schema
from paddle_ft.coordination.actions import Commit
from paddle_ft.coordination.kv import Transaction
from paddle_ft.coordination.view import who_marks
from paddle_ft.errors import CheckpointError, EtcdUnavailable, PaddleFTError, StoreError
from paddle_ft.types import CommitRef, Head
from tests.sim.network import Sent
from tests.sim.task import Steps, Task

if TYPE_CHECKING:
    from tests.sim.agent import SimAgent

PAUSE_S = 0.3
STORE_PAUSE_S = 1.0


class Committer:
    def __init__(self, agent: SimAgent) -> None:
        self._agent = agent
        self._world = agent.world
        self.acknowledged = ""
        self.moved_revision = 0
        self.failed: tuple[schema.Fences, str] | None = None

    def scan(self, task: Task) -> Steps:
        """Commits in the store, newest first."""
        front, node = self._world.store, self._agent.node
        while True:
            try:
                head = yield front.call(task, node, adopt, front.store, self._world.owner)
            except StoreError:
                yield task.sleep(STORE_PAUSE_S)
                continue
            return (head.newest, *head.lineage) if head is not None else ()

    def commit(self, task: Task, action: Commit) -> Steps:
        """Makes ``action``'s parts the newest checkpoint; None if that did not come about."""
        if self._world.trapped(self._agent, "merge"):
            yield task.sleep(0.0)
        try:
            ref = yield from self._store_manifest(task, action)
            if self._world.trapped(self._agent, "commit"):
                yield task.sleep(0.0)
            head = Head(ref, action.lineage, "model")
            txn = schema.commit(self._agent.keys, head, action.obsolete, action.fences)
            if not (yield from self._move_head(task, txn, ref, action.fences.leader)):
                return None
        except CheckpointError as error:
            self.failed = (action.fences, f"step {action.step} cannot be committed: {error}")
            return None
        except PaddleFTError:
            yield task.sleep(PAUSE_S)
            return None
        if self._world.trapped(self._agent, "marker"):
            yield task.sleep(0.0)
        yield from self._acknowledge(task, head)
        return head

    def _store_manifest(self, task: Task, action: Commit) -> Steps:
        front, node = self._world.store, self._agent.node
        listings: list[PartListing] = []
        for part in action.parts:
            listings.append((yield front.call(task, node, read_part, front.store, part)))
        head = action.head
        known = {c.manifest: c for c in (head.newest, *head.lineage)} if head else {}
        parents: dict[str, Manifest] = {}
        wanted = {p.parent for p in action.parts if p.parent}
        for name in sorted(wanted if wanted <= known.keys() else known):
            parents[name] = yield front.call(task, node, self._world.manifest, known[name])
        manifest = plan.merge(
            listings,
            head=action.head,
            parents=parents,
            created_s=self._world.clock.now,
        )
        name = layout.manifest_name(
            manifest.sequence, manifest.step, manifest.owner, self._world.nonce()
        )
        content = encode_manifest(manifest)
        yield front.call(task, node, self._world.put_manifest, name, content, manifest)
        return CommitRef(
            manifest.sequence, manifest.step, manifest.generation, name, digest_of(content)
        )

    def _move_head(self, task: Task, txn: Transaction, ref: CommitRef, term: int) -> Steps:
        """Runs ``txn``; when its outcome is not known, looks at head before it tries again."""
        network, agent, keys = self._world.network, self._agent, self._agent.keys
        while True:
            try:
                result = yield network.transact(
                    task, agent.node, txn, Sent(agent.me, "commit", term)
                )
                if result.succeeded:
                    self.moved_revision = result.revision
                    return True
            except EtcdUnavailable:
                yield task.sleep(PAUSE_S)
            try:
                found = yield network.call(task, agent.node, lambda e: e.read(keys.head))
            except EtcdUnavailable:
                continue
            state = schema.parse(keys, found.kvs)
            if state.head is not None and state.head.value.newest == ref:
                return True
            if not self._could_succeed(txn, state):
                return False

    def _could_succeed(self, txn: Transaction, head_now: schema.JobState) -> bool:
        known = self._agent.mirror.state().fences()
        now = schema.Fences(known.leader, known.generation, head_now.fences().head)
        return now.compares(self._agent.keys) == txn.compares

    def follow_head(self, state: schema.JobState) -> None:
        """Lets the workers know of a commit; the leader's own after the marker is written."""
        agent = self._agent
        head = state.head.value if state.head else None
        who = who_marks(state, agent.me)
        if head is None or head.newest.manifest == agent.told_manifest or not who:
            return
        if who == "another":
            agent.tell_committed(head)
        elif self.acknowledged != head.newest.manifest and not agent.commit_running:
            agent.commit_running = True  # the leader before may have died before its marker
            agent.note("writes the marker of", head.newest.sequence)
            Task(
                agent.process,
                lambda task: self._acknowledge(task, head),
                lambda _: agent.committed(head),
            )

    def _acknowledge(self, task: Task, head: Head) -> Steps:
        front, node = self._world.store, self._agent.node
        while True:
            try:
                yield front.call(task, node, mark_committed, front.store, head)
                break
            except StoreError:
                yield task.sleep(STORE_PAUSE_S)
        self.acknowledged = head.newest.manifest
        yield from self._collect(task, head)

    def _collect(self, task: Task, head: Head) -> Steps:
        """Looks for garbage, and removes it some time later."""
        front, node = self._world.store, self._agent.node
        try:
            doomed = yield front.call(task, node, self._look, head)
            if self._world.trapped(self._agent, "collect"):
                yield task.sleep(0.0)
            if doomed:
                yield front.call(task, node, self._world.remove, doomed)
        except PaddleFTError:  # a later collector knows more, or the store is away
            pass

    def _look(self, head: Head) -> list[str]:
        return collect(self._world.store.store, head, self._world.owner, dry_run=True)
