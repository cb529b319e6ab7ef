"""Brings what waits in a spool into the store, in the background, and collects garbage there.

One thread; it begins anew where it stopped, after an error and after a restart of the launcher. An
object is sent as a whole; what a killed launcher left of one in parts is given up first.

    for each turn of ``backlog.turns``:
        data, part, manifest, signature    sent
        marker                             sent once all that its manifest refers to is there;
                                           then the checkpoint is settled, and garbage is collected
                                           upon its head
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from paddle_ft.checkpoint import backlog, commit, layout
from paddle_ft.checkpoint.collect import collect
from paddle_ft.checkpoint.crew import Crew
from paddle_ft.checkpoint.spool import Spool, WriteBack
from paddle_ft.checkpoint.store import Store
from paddle_ft.checkpoint.tiers import Cache, TieredStore
from paddle_ft.checkpoint.write import UPLOAD_THREADS
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import (
    CheckpointDamaged,
    PaddleFTError,
    StoreError,
    StoreMissing,
    StoreUnavailable,
)
from paddle_ft.failpoints import failpoint
from paddle_ft.types import CommitRef, Head

_log = logging.getLogger(__name__)
RETRY_INTERVAL_S = 2.0
COMING_S = 20.0
"""How long nothing may come into the store before what another node has is out of reach."""
_HANDOVER_S = 3.0


class Uploads:
    """The spool of one launcher, and the thread that empties it.

    ``front`` is the store its writer uses, which has what waits here, too.
    """

    def __init__(
        self, root: Path, remote: Store, config: CheckpointConfig, job: str, *, shared: bool
    ) -> None:
        cache = Cache(root, remote, config)
        wait_s = 0.0 if shared else _HANDOVER_S
        self.spool = Spool.claim(cache, config, remote.url, job, wait_s)
        back = WriteBack(self.spool, remote, shared=shared)
        cache.remote = back
        self.front: Store = TieredStore(root, back, config, cache)
        self._behind = TieredStore(root, remote, config, cache)
        self._remote = remote
        self._shared = shared
        self._kept = back.kept
        self._owner = self._identity = ""
        self._settled = 0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._told = ""
        self._arrived: tuple[str, frozenset[str], float] = ("", frozenset(), 0.0)

    # ------------------------------------------------------------ for the room

    @property
    def settled(self) -> int:
        """Sequence of the newest commit that is known to be complete in the store; 0: of none."""
        return self._settled

    def start(self, owner: str, identity: str) -> None:
        """Begins to upload to the store ``identity``; garbage of ``owner`` is collected there."""
        self._owner, self._identity = owner, identity
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
        self._thread.start()

    @contextmanager
    def attempt(self, member: str) -> Iterator[None]:
        """Around the writing of a part: what a failed attempt has put here goes, or the next one
        would find less and less room.

        Raises StoreError at once if the part could not be told to the others in the end.
        """
        if self._shared:
            self._remote.get(layout.STORE)
        before = {info.name for info in self.spool.waiting()}
        try:
            yield
        except StoreError:
            start = f"/{layout.safe_member(member)}."
            fresh = {info.name for info in self.spool.waiting()} - before
            self.spool.delete(n for n in fresh if n.startswith(layout.DATA) and start in n)
            raise

    def drain(self, limit_s: float, say: Callable[[str], None]) -> int:
        """Waits until everything is in the store, at most ``limit_s``; the bytes that are not."""
        until_s = time.monotonic() + limit_s
        told = False
        while (left := sum(i.nbytes for i in self.spool.waiting())) and (
            time.monotonic() < until_s and self._thread is not None
        ):
            if not told:
                say(f"{left / 1e6:.6g} MB of checkpoints are still being uploaded")
                told = True
            self._kept.set()
            time.sleep(0.1)
        return left

    def close(self) -> None:
        self._closed.set()
        self._kept.set()
        if self._thread is not None:
            self._thread.join(timeout=RETRY_INTERVAL_S)
        if self._thread is None or not self._thread.is_alive():
            self.spool.close()  # else the end of the process does

    def acknowledge(self, head: Head) -> None:
        """Writes the marker of ``head``; at once to the store if the disk does not take it and
        the store is not behind. Raises StoreError."""
        try:
            commit.mark_committed(self.front, head)
        except StoreError:
            if self._gap(head.newest):
                raise
            commit.mark_committed(self._behind, head)
            self._settled = max(self._settled, head.newest.sequence)

    def coming(self, ref: CommitRef) -> bool:
        """Whether objects of ``ref`` that are out of reach may be on their way from other nodes.

        They are, as long as anything of its job comes into the store every ``COMING_S``.
        """
        try:
            manifest = commit.read_manifest(self.front, ref)
            infos = {i.name: i.nbytes for i in self.front.find(layout.DATA)}
        except CheckpointDamaged:
            return False
        except StoreError:
            return True
        if not backlog.missing(manifest.objects, infos):
            return False
        name, seen, since_s = self._arrived
        now_s = time.monotonic()
        if name != ref.manifest or infos.keys() - seen:
            if name != ref.manifest:
                _log.warning("step %d is awaited: other nodes are uploading it", ref.step)
            self._arrived = ref.manifest, seen | infos.keys(), now_s
            return True
        return now_s - since_s < COMING_S

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        begun = False
        while not self._closed.is_set():
            self._kept.clear()
            try:
                if not begun:
                    self._begin()
                    begun = True
                self.spool.adopt()
                self.work()
                self._tell("")
            except PaddleFTError as error:
                self._tell(str(error))
            except Exception as error:  # noqa: BLE001  told, and tried again
                _log.exception("what waits cannot be uploaded: a defect of paddle_ft")
                self._tell(repr(error))
            (self._closed if self._told else self._kept).wait(RETRY_INTERVAL_S)

    def _begin(self) -> None:
        abandon = getattr(self._remote, "abandon", None)
        if abandon is not None:
            try:
                abandon({info.name for info in self.spool.waiting()})
            except StoreUnavailable:
                raise
            except StoreError as error:
                _log.info("half uploads stay until they are swept: %s", error)
        found = [layout.parse(name) for name in commit.marker_names(self._remote)]
        mine = [p.sequence for p in found if p is not None and p.owner == self._owner]
        self._settled = max([*mine, self._settled])

    def work(self) -> None:
        """Sends everything that can go now; raises StoreError."""
        for names in backlog.turns(i.name for i in self.spool.waiting()):
            if self._closed.is_set():
                return
            if names[0].startswith(layout.COMMITS):
                self._settle(names[0])
                continue
            with Crew(UPLOAD_THREADS, "send") as crew:
                stored = [n for n in crew.map(self._put, names) if n]
            self._still_there()
            for name in stored:
                self.spool.sent(name)

    def _put(self, name: str) -> str:
        if self._closed.is_set():
            return ""
        try:
            content = self.spool.get(name)
        except StoreMissing:
            return ""  # of an attempt that failed
        failpoint("upload.before")
        self._behind.put(name, content)
        failpoint("upload.stored")
        return name

    def _still_there(self) -> None:
        """Raises StoreUnavailable if that was not the store: a directory whose file system is not
        mounted takes files, too."""
        try:
            identity = commit.identity_in(self._remote)
        except StoreMissing:
            identity = ""
        if identity != self._identity:
            raise StoreUnavailable(
                f"{self._remote.url} is not the store that it was when the job began; mount or "
                f"restore that one."
            )

    def _settle(self, name: str) -> None:
        parsed = layout.parse(name)
        assert parsed is not None
        own = parsed.owner == self._owner
        if own and parsed.sequence < self._settled:  # a later one is there
            self.spool.delete([name])
            return
        head = commit.read_marker(self.spool, name)
        if gap := self._gap(head.newest):
            _log.debug("the marker of step %d waits for %s", head.newest.step, ", ".join(gap))
            return
        failpoint("upload.complete")
        self._behind.put(name, self.spool.get(name))
        self._still_there()
        if own:
            self._settled = max(self._settled, parsed.sequence)
        failpoint("upload.settled")
        if own:
            self._collect(head)
        self.spool.sent(name)

    def _gap(self, ref: CommitRef) -> tuple[str, ...]:
        """What the store lacks of ``ref``."""
        try:
            manifest = commit.read_manifest(self._remote, ref)
        except CheckpointDamaged:
            return (ref.manifest,)
        prefixes = {"/".join(n.split("/")[:2]) + "/" for n in manifest.objects}
        sizes = {i.name: i.nbytes for p in sorted(prefixes) for i in self._remote.find(p)}
        return backlog.missing(manifest.objects, sizes)

    def _collect(self, head: Head) -> None:
        try:
            collect(self._behind, head, self._owner)
        except PaddleFTError as error:
            _log.warning("old checkpoints stay for now: %s", error)

    def _tell(self, trouble: str) -> None:
        if trouble and not self._told:
            left = sum(info.nbytes for info in self.spool.waiting())
            _log.warning(
                "%.6g MB of checkpoints wait in the cache; they are uploaded as soon as that is "
                "possible: %s",
                left / 1e6,
                trouble,
            )
        elif self._told and not trouble:
            _log.warning("What waited in the cache is uploaded.")
        self._told = trouble
