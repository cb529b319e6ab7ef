"""Calls to etcd over several members: one channel each, rotation, time-outs, tokens.

Invariant: **a write is sent again only if it certainly did not take effect.** A transaction whose
first try took effect, sent a second time, would find its comparisons broken by itself and report
a failure that never was. So after a failed try

- that was certainly not executed (no connection could be made, or etcd refused before it looked
  at the request: no leader known, token not valid), every call goes on at the next member;
- that may have taken effect (no answer in time, connection lost, leader changed), a call that may
  be repeated (a read, a grant, a renewal) goes on, and a write raises EtcdUnavailable: the caller
  looks at the state again.

To keep the second kind rare, a write goes only to a member that has answered since its last
failure; another is first asked for its status. And every request carries etcd's "requires a
leader" mark, so that a member cut off from the majority refuses at once instead of taking what
it cannot finish.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from paddle_ft.config import EtcdConfig
from paddle_ft.coordination import etcd_stubs
from paddle_ft.coordination.endpoints import parse_endpoints
from paddle_ft.coordination.etcd_failures import Verdict, final_error, reason, verdict
from paddle_ft.coordination.etcd_grpc import grpc
from paddle_ft.coordination.etcd_tls import channel_credentials
from paddle_ft.errors import EtcdUnavailable

PAUSE_BETWEEN_TRIES_S = 0.05
_LEADER_REQUIRED = ("hasleader", "true")
_OPTIONS = (
    # A peer that is frozen or gone without a word is noticed after some 7 s (6 measured with 5 s;
    # grpc's own keepalive_timeout_ms has no effect on a dead peer). etcd hangs up ("too many
    # pings") on who asks it more often than every 5 s, and a timer that is a little early does; and
    # on who asks it some times within two hours while no call, such as a watch, is under way.
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.keepalive_time_ms", 5500),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    # What may be repeated is known here, not in grpc.
    ("grpc.enable_retries", 0),
    # etcd is a neighbour: never through the proxy that the environment names for the Internet.
    ("grpc.enable_http_proxy", 0),
    # All records of a large job are one answer.
    ("grpc.max_receive_message_length", -1),
)


@dataclass(eq=False)
class Member:
    """One endpoint with its channel."""

    target: str
    channel: grpc.Channel
    stubs: dict[str, Any]
    answering: bool = False
    """It has answered since it last failed."""
    streams: set[Any] = field(default_factory=set)
    """Open watches; they end when calls turn away from this member."""


class _TryFailed(Exception):
    """One try at one member failed, and the next member may do better."""

    def __init__(self, verdict: Verdict, reason: str) -> None:
        super().__init__(reason)
        self.verdict = verdict
        self.reason = reason


class Connection:
    """Thread-safe calls to whichever member answers."""

    def __init__(self, config: EtcdConfig) -> None:
        """Reads no file and opens no connection; raises ConfigError for a bad endpoint."""
        self._config = config
        files = bool(config.ca_file or config.cert_file or config.key_file)
        self._endpoints = parse_endpoints(config.endpoints, tls_files=files)
        self._lock = threading.Lock()
        self._members: list[Member] = []
        self._current = 0
        self._token = ""
        self._authenticate = bool(config.user)
        self.closed = False

    @property
    def targets(self) -> tuple[str, ...]:
        """host:port of each member."""
        return self._endpoints.targets

    def call(
        self, service: str, method: str, request: Any, *, repeatable: bool = True
    ) -> tuple[Any, Member]:
        """The answer to ``request`` and the member that gave it.

        Takes ``call_timeout_s`` at most, ``rpc_timeout_s`` a try. Raises EtcdUnavailable;
        ConfigError if etcd refuses user, password or permission; LeaseLost if the request names
        a lease that has ended; CoordinationError if etcd cannot carry it out (no space, too
        large).
        """
        deadline = time.monotonic() + self._config.call_timeout_s
        while True:
            member = self._member()
            try:
                self._prepare(member, deadline, prove=not repeatable)
                return self._once(member, service, method, request, deadline), member
            except _TryFailed as failed:
                if failed.verdict is Verdict.LOGIN_ENDED:
                    self.forget_token()
                else:
                    self._leave(member)
                if failed.verdict is Verdict.UNKNOWN and not repeatable:
                    raise EtcdUnavailable(
                        f"etcd at {member.target} did not confirm a write ({failed.reason}), and "
                        "whether it took effect is not known: look at the state again"
                    ) from None
                if deadline - time.monotonic() <= 2 * PAUSE_BETWEEN_TRIES_S:
                    raise self._unavailable(failed.reason) from None
            _pause(member)

    def open_stream(self, member: Member, service: str, method: str, requests: Any) -> Any:
        """An endless bidirectional call to ``member``; give it back with ``close_stream``."""
        try:
            call = getattr(member.stubs[service], method)(requests, metadata=self._metadata())
        except ValueError:  # grpc's answer for a closed channel
            raise self._unavailable("closed") from None
        with self._lock:
            member.streams.add(call)
        return call

    def close_stream(self, member: Member, call: Any) -> None:
        with self._lock:
            member.streams.discard(call)
        call.cancel()

    def forget_token(self) -> None:
        """The next call authenticates again."""
        self._authenticate = bool(self._config.user)

    def close(self) -> None:
        """Ends all calls and streams. Safe to call twice."""
        with self._lock:
            self.closed = True
            members, self._members = self._members, []
        for member in members:
            member.channel.close()

    # ------------------------------------------------------------ one try

    def _prepare(self, member: Member, deadline: float, *, prove: bool) -> None:
        """Makes sure of a token and, with ``prove``, that ``member`` answers at all."""
        api = etcd_stubs.load()
        try:
            if self._authenticate:
                self._token = ""  # etcd 3.4 refuses to log in who still shows an ended token
                request = api.AuthenticateRequest(
                    name=self._config.user, password=self._config.password
                )
                self._token = self._authenticated(member, request, deadline)
                self._authenticate = False
            if prove and not member.answering:
                self._once(member, "Maintenance", "Status", api.StatusRequest(), deadline)
        except _TryFailed as failed:
            if failed.verdict is Verdict.UNKNOWN:  # but the write itself was not sent
                failed.verdict = Verdict.NOT_EXECUTED
            raise

    def _authenticated(self, member: Member, request: Any, deadline: float) -> str:
        try:
            answer = self._once(member, "Auth", "Authenticate", request, deadline)
        except _AuthenticationOff:
            return ""
        token: str = answer.token
        return token

    def _once(
        self, member: Member, service: str, method: str, request: Any, deadline: float
    ) -> Any:
        timeout_s = min(self._config.rpc_timeout_s, deadline - time.monotonic())
        if timeout_s <= 0:
            raise _TryFailed(Verdict.NOT_EXECUTED, "no time left for another try")
        stub = getattr(member.stubs[service], method)
        metadata = self._metadata()
        try:
            if isinstance(stub, grpc.StreamStreamMultiCallable):
                call = stub(iter((request,)), timeout=timeout_s, metadata=metadata)
                answer = next(call, None)
                call.cancel()
                if answer is None:
                    raise _TryFailed(Verdict.UNKNOWN, "the stream ended without an answer")
            else:
                answer = stub(request, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise self._failure(member, error) from None
        except ValueError:  # grpc's answer for a closed channel
            raise self._unavailable("closed") from None
        member.answering = True
        return answer

    def _failure(self, member: Member, error: Any) -> Exception:
        code, details = error.code().name, error.details() or ""
        if self.closed:
            return self._unavailable("closed")
        if "authentication is not enabled" in details:
            return _AuthenticationOff()
        found = verdict(code, details, has_user=bool(self._config.user))
        if found is Verdict.FINAL:
            member.answering = True
            return final_error(code, details, member.target, self._config.user)
        return _TryFailed(found, reason(code, details))

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        # The token goes as plain metadata: grpc refuses call credentials on a channel without TLS.
        return (_LEADER_REQUIRED, ("token", self._token)) if self._token else (_LEADER_REQUIRED,)

    def _unavailable(self, why: str) -> EtcdUnavailable:
        where = f"etcd at {', '.join(self.targets)}"
        if self.closed:
            return EtcdUnavailable(f"the connection to {where} was closed")
        return EtcdUnavailable(
            f"{where} gave no answer within {self._config.call_timeout_s:g} s ({why}): "
            "check that it runs and that the endpoints are right"
        )

    # ------------------------------------------------------------ members

    def _member(self) -> Member:
        with self._lock:
            if self.closed:
                raise self._unavailable("closed")
            if not self._members:
                tls = channel_credentials(self._config) if self._endpoints.tls else None
                self._members = [_connect(target, tls) for target in self.targets]
            return self._members[self._current % len(self._members)]

    def _leave(self, member: Member) -> None:
        """Turns to the next member, with the watches that are open on this one."""
        member.answering = False
        with self._lock:
            alone = len(self._members) < 2
            if not alone and self._members[self._current % len(self._members)] is member:
                self._current += 1
            streams = () if alone else tuple(member.streams)
        for call in streams:
            call.cancel()


class _AuthenticationOff(Exception):
    """etcd knows no users: go on without a token."""


def _pause(member: Member) -> None:
    """Waits a moment, and lets grpc connect to ``member`` meanwhile.

    grpc (1.60 to 1.74 were tried) works on a connection only while a request waits for it. One
    that fails at once, as all do after a failed attempt, does not wait: with nothing but such
    requests a server that has come back would never be reached.
    """
    until = time.monotonic() + PAUSE_BETWEEN_TRIES_S
    try:
        member.stubs["Maintenance"].Status(
            etcd_stubs.load().StatusRequest(), timeout=PAUSE_BETWEEN_TRIES_S, wait_for_ready=True
        )
    except (grpc.RpcError, ValueError):  # not yet; the channel was closed
        pass
    time.sleep(max(0.0, until - time.monotonic()))


def _connect(target: str, credentials: grpc.ChannelCredentials | None) -> Member:
    if credentials is None:
        channel = grpc.insecure_channel(target, options=_OPTIONS)
    else:
        channel = grpc.secure_channel(target, credentials, options=_OPTIONS)
    api = etcd_stubs.load()
    services = ("KV", "Lease", "Watch", "Maintenance", "Auth")
    return Member(target, channel, {s: getattr(api, f"{s}Stub")(channel) for s in services})
