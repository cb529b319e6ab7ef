"""What a node does for the whole job if it leads: what is decided, and who is set to it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from paddle_ft.agent.committer import Committer
from paddle_ft.agent.events import CommitDone, Scanned
from paddle_ft.agent.membership import Membership, TransactionDone
from paddle_ft.checkpoint.room import CheckpointRoom
from paddle_ft.config import Config
from paddle_ft.coordination import actions, schema, view
from paddle_ft.coordination.decide import decide
from paddle_ft.coordination.mirror import JobMirror
from paddle_ft.types import CommitRef, Head

log = logging.getLogger("paddle_ft")


class Leader:
    """For the loop alone. ``decide`` each turn: it finds out whether this node leads at all.

    Args:
        background: runs a function of this name on a thread; its result comes back as an event.
    """

    def __init__(
        self,
        config: Config,
        mirror: JobMirror,
        room: CheckpointRoom,
        membership: Membership,
        committer: Committer,
        background: Callable[[Callable[[], object], str], None],
    ) -> None:
        self._config = config
        self._keys = schema.Keys(config.job.id)
        self._mirror = mirror
        self._room = room
        self._membership = membership
        self._committer = committer
        self._background = background
        self._marks = view.Marks()
        self._found: tuple[CommitRef, ...] | None = None
        self._scanning = self._commit_running = False
        self._wrote_revision = 0
        self.reason = ""
        """Why what was decided last is done, or nothing is."""

    def took(self, event: TransactionDone | CommitDone | Scanned) -> None:
        """Something that was begun here has come back."""
        if isinstance(event, Scanned):
            self._found, self._scanning = event.found, False
        elif isinstance(event, CommitDone):
            self._commit_running = False
        elif event.succeeded:
            self._wrote_revision = event.revision

    def acknowledge(self, head: Head) -> None:
        """Sees to the marker of ``head``: the leader before may have died before it."""
        if self._committer.acknowledged != head.newest.manifest and not self._commit_running:
            self._commit_running = True
            self._background(lambda: CommitDone(self._committer.acknowledge(head)), "marker")

    def decide(self, state: schema.JobState, now_s: float) -> None:
        self._marks = view.observe(self._marks, state, now_s)
        if self._mirror.revision < max(self._wrote_revision, self._committer.moved_revision):
            return  # what was done last is not to be seen yet, and would be done again
        seen = view.View(
            me=self._membership.me,
            state=state,
            marks=self._marks,
            acting_until_s=self._membership.acting_until_s(),
            wall_s=time.time(),
            commit_running=self._commit_running,
            commit_failed=self._committer.failed,
            found=self._found,
            store=self._room.identity,
        )
        decision = decide(seen, now_s, self._config)
        if decision.reason != self.reason:
            self.reason = decision.reason
            log.info("%s", decision.reason)
        if decision.action is not None:
            self._act(decision.action)

    def _act(self, action: actions.Action) -> None:
        keys, send, lease = self._keys, self._membership.send, self._membership.lease
        if isinstance(action, actions.Campaign):
            send("campaign", schema.campaign(keys, self._membership.me, lease))
        elif isinstance(action, actions.ScanStore):
            if not self._scanning:
                self._scanning = True
                self._background(lambda: Scanned(self._committer.scan()), "scan")
        elif isinstance(action, actions.ImportHead):
            send("import", schema.commit(keys, action.head, (), action.fences))
        elif isinstance(action, actions.Propose):
            send("propose", schema.propose(keys, action.generation, action.fences))
        elif isinstance(action, actions.RequestPause):
            send("pause", schema.request_pause(keys, action.pause, action.fences))
        elif isinstance(action, actions.Finish):
            send("finish", schema.finish(keys, action.outcome, action.fences))
        elif isinstance(action, actions.Bar):
            send("bar", schema.quarantine(keys, action.node, action.reason, action.fences))
        elif not self._commit_running:
            self._commit_running = True
            self._background(lambda: CommitDone(self._committer.commit(action)), "commit")
