"""A watch that outlives members, connections and compactions.

Invariant: every event after the starting revision is delivered once and in order. The position
is the revision of the last event that was delivered, never the revision in a response's header:
while a watch catches up, the header is ahead of the events. A stream that breaks is opened again,
at another member if need be, at that position + 1. If etcd has compacted those events away, or
turns out to be another etcd than before, the prefix is read anew and handed over as a whole.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from paddle_ft.coordination import etcd_stubs
from paddle_ft.coordination.etcd_connection import Connection, Member
from paddle_ft.coordination.etcd_grpc import grpc
from paddle_ft.coordination.kv import Event, KeyValue, OnEvents, OnReset, Snapshot
from paddle_ft.errors import PaddleFTError

logger = logging.getLogger(__name__)

PAUSE_BETWEEN_STREAMS_S = 0.05
CANCEL_WAIT_S = 2.0


def key_value(kv: Any) -> KeyValue:
    """etcd's message as plain data."""
    key: bytes = kv.key
    return KeyValue(key.decode(), kv.value, kv.create_revision, kv.mod_revision, kv.lease)


def range_of(prefix: str) -> dict[str, bytes]:
    """``key`` and ``range_end`` of etcd's requests for everything that begins with ``prefix``."""
    key = prefix.encode()
    end = key.rstrip(b"\xff")
    if not end:
        return {"key": key or b"\0", "range_end": b"\0"}  # from key to the end
    return {"key": key, "range_end": end[:-1] + bytes((end[-1] + 1,))}


class Watch:
    """Delivers the changes below one prefix on a daemon thread of its own."""

    def __init__(
        self,
        connection: Connection,
        read: Callable[[str], Snapshot],
        prefix: str,
        revision: int,
        on_events: OnEvents,
        on_reset: OnReset,
    ) -> None:
        self._connection = connection
        self._read = read
        self._prefix = prefix
        self._revision = revision
        self._on_events = on_events
        self._on_reset = on_reset
        self._cluster_id = 0
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._stream: tuple[Member, Any] | None = None
        self._complaint = ""
        self._thread = threading.Thread(target=self._run, name=f"watch {prefix}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def cancel(self) -> None:
        """No callback begins after this, except if one has been running for 2 s already."""
        self._stopped.set()
        with self._lock:
            stream = self._stream
        if stream is not None:
            self._connection.close_stream(*stream)
        if threading.current_thread() is not self._thread:
            self._thread.join(CANCEL_WAIT_S)

    def _run(self) -> None:
        status = etcd_stubs.load().StatusRequest()
        while not self._stopped.is_set():
            try:
                # A member that answers; a stream alone would wait for a frozen one.
                _, member = self._connection.call("Maintenance", "Status", status)
                self._follow(member)
            except PaddleFTError as error:
                self._complain(str(error))
            self._stopped.wait(PAUSE_BETWEEN_STREAMS_S)

    def _follow(self, member: Member) -> None:
        """One stream, until it breaks or ``cancel`` is called."""
        requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        requests.put(self._request())
        call = self._connection.open_stream(member, "Watch", "Watch", iter(requests.get, None))
        with self._lock:
            self._stream = (member, call)
        try:
            # Set before this check, so that cancel() either sees the stream or is seen here.
            while not self._stopped.is_set() and self._take(next(call)):
                pass
        except StopIteration:
            pass
        except grpc.RpcError as error:
            logger.debug("watch on %s at %s broke: %s", self._prefix, member.target, error)
        finally:
            with self._lock:
                self._stream = None
            requests.put(None)  # ends the thread that grpc reads the requests with
            self._connection.close_stream(member, call)

    def _request(self) -> Any:
        api = etcd_stubs.load()
        create = api.WatchCreateRequest(**range_of(self._prefix), start_revision=self._revision + 1)
        return api.WatchRequest(create_request=create)

    def _take(self, response: Any) -> bool:
        """Delivers one response; False if the stream is of no more use."""
        if response.created and not self._same_history(response.header):
            self._reset("etcd has lost its history")
            return False
        if response.compact_revision:
            self._reset(f"etcd has compacted its history up to {response.compact_revision}")
            return False
        if response.canceled:
            self._connection.forget_token()  # the usual cause
            self._complain(f"etcd ended it: {response.cancel_reason}")
            return False
        events = tuple(
            Event(e.type == e.DELETE, key_value(e.kv))
            for e in response.events
            if e.kv.mod_revision > self._revision
        )
        if events and not self._stopped.is_set():
            self._complaint = ""
            revision = events[-1].kv.mod_revision
            self._on_events(revision, events)
            self._revision = revision
        return True

    def _same_history(self, header: Any) -> bool:
        """Whether this is the etcd we have followed: another one may stand at the same address."""
        known, self._cluster_id = self._cluster_id, header.cluster_id
        if known not in (0, header.cluster_id):
            return False
        if header.revision >= self._revision:
            return True
        # A member may lag behind, but a linearizable read does not.
        return self._read(self._prefix).revision >= self._revision

    def _reset(self, why: str) -> None:
        logger.info("watch on %s starts anew: %s", self._prefix, why)
        snapshot = self._read(self._prefix)
        if not self._stopped.is_set():
            self._on_reset(snapshot)
            self._revision = snapshot.revision

    def _complain(self, text: str) -> None:
        if text != self._complaint and not self._connection.closed:
            logger.warning("watch on %s: %s", self._prefix, text)
        self._complaint = text
