"""What a failed request to etcd means. Pure: status code and text in, verdict out.

The texts are those of etcd's ``rpctypes`` and of grpc. The integration tests see them come from
real servers, so a change of wording there is noticed.
"""

from __future__ import annotations

from enum import Enum, auto

from paddle_ft.errors import ConfigError, CoordinationError, LeaseLost


class Verdict(Enum):
    """What is known about a request that failed."""

    NOT_EXECUTED = auto()
    """No connection was made, or etcd refused before it looked at the request."""
    UNKNOWN = auto()
    """It may have taken effect."""
    LOGIN_ENDED = auto()
    """Not executed: the token is missing or no longer valid."""
    FINAL = auto()
    """etcd answered, and the answer would be the same at every member."""


_RETRIABLE = frozenset(
    ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN", "INTERNAL", "ABORTED")
)
_NOT_EXECUTED = (
    "failed to connect to",
    "DNS resolution failed",
    "etcdserver: no leader",
    "etcdserver: too many requests",
)
_LOGIN_ENDED = (
    "etcdserver: invalid auth token",
    "etcdserver: revision of auth store is old",
    "etcdserver: user name is empty",
)
_REASONS = (
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not of the authority in etcd.ca_file"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS"),
    ("_ALERT_", "it refuses our client certificate, etcd.cert_file"),
    ("Unwrap failed", "it refuses our client certificate, etcd.cert_file"),  # TLS 1.3
    ("Socket closed", "it closed the connection; if it speaks TLS, write https://"),
    ("Connection reset", "it closed the connection"),
    ("Connection refused", "connection refused"),
    ("no leader", "it has no leader: a majority of its members must run"),
)


def verdict(code: str, details: str, *, has_user: bool) -> Verdict:
    """``code`` is the name of the grpc status code; ``has_user``: there is a user to log in as."""
    if any(text in details for text in _NOT_EXECUTED):
        return Verdict.NOT_EXECUTED
    if has_user and (code == "UNAUTHENTICATED" or any(text in details for text in _LOGIN_ENDED)):
        return Verdict.LOGIN_ENDED
    return Verdict.UNKNOWN if code in _RETRIABLE else Verdict.FINAL


def final_error(code: str, details: str, target: str, user: str) -> Exception:
    """The exception for a failure that no other member would spare us."""
    text = details.removeprefix("etcdserver: ")
    if "lease not found" in details:
        return LeaseLost(f"etcd at {target} refused a write: its lease has ended")
    if "authentication failed" in details:
        return ConfigError(
            f"etcd at {target} refused user {user!r}: the user or the password is wrong"
        )
    if code == "UNAUTHENTICATED" or "user name is empty" in details:
        return ConfigError(
            f"etcd at {target} wants a user and a password: set etcd.user and etcd.password"
        )
    if code == "PERMISSION_DENIED":
        return ConfigError(
            f"etcd at {target} denies user {user!r} access to /paddle_ft/: grant the user a role "
            "with readwrite permission for that prefix"
        )
    if "database space exceeded" in details:
        return CoordinationError(
            f"etcd at {target} is full: compact and defragment it, then disarm its alarm"
        )
    if "request is too large" in details or "larger than max" in details:
        return CoordinationError(
            f"etcd at {target} refused a request as too large: raise its --max-request-bytes"
        )
    if "duplicate key" in details or "key is not provided" in details:
        return ValueError(text)  # a defect of the caller, not of etcd
    if code == "UNIMPLEMENTED":
        return CoordinationError(
            f"{target} answers, but not as an etcd v3 server: check the address"
        )
    return CoordinationError(f"etcd at {target} refused a request ({code}): {text}")


def reason(code: str, details: str) -> str:
    """A few words for the end of a sentence, without grpc's wrapping."""
    if code == "DEADLINE_EXCEEDED":
        return "no answer"
    for sign, words in _REASONS:
        if sign in details:
            return words
    text = details.rpartition("last error: ")[2].removeprefix("UNKNOWN: ")
    text = text.rpartition("Failed to connect to remote host: ")[2].removeprefix("connect: ")
    return text.removeprefix("etcdserver: ").strip().replace("\n", " ") or code
