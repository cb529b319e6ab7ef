"""Each kind of failure leads to the reaction that is safe for it, and to words one understands."""

from __future__ import annotations

import pytest

from paddle_ft.coordination.etcd_failures import Verdict, final_error, reason, verdict
from paddle_ft.errors import ConfigError, CoordinationError, LeaseLost

REFUSED = (
    "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: "
    "Failed to connect to remote host: connect: Connection refused (111)"
)


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        ("UNAVAILABLE", REFUSED, Verdict.NOT_EXECUTED),
        ("UNAVAILABLE", "DNS resolution failed for x:1: not found", Verdict.NOT_EXECUTED),
        ("UNAVAILABLE", "etcdserver: no leader", Verdict.NOT_EXECUTED),
        ("RESOURCE_EXHAUSTED", "etcdserver: too many requests", Verdict.NOT_EXECUTED),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", Verdict.UNKNOWN),
        ("UNAVAILABLE", "Socket closed", Verdict.UNKNOWN),
        ("UNAVAILABLE", "etcdserver: leader changed", Verdict.UNKNOWN),
        ("UNAVAILABLE", "etcdserver: request timed out", Verdict.UNKNOWN),
        ("UNAVAILABLE", "etcdserver: server stopped", Verdict.UNKNOWN),
        ("CANCELLED", "", Verdict.UNKNOWN),
        ("INTERNAL", "Received RST_STREAM with error code 2", Verdict.UNKNOWN),
        ("UNKNOWN", "anything", Verdict.UNKNOWN),
        ("UNAUTHENTICATED", "etcdserver: invalid auth token", Verdict.LOGIN_ENDED),
        ("INVALID_ARGUMENT", "etcdserver: revision of auth store is old", Verdict.LOGIN_ENDED),
        ("INVALID_ARGUMENT", "etcdserver: user name is empty", Verdict.LOGIN_ENDED),
        ("NOT_FOUND", "etcdserver: requested lease not found", Verdict.FINAL),
        ("PERMISSION_DENIED", "etcdserver: permission denied", Verdict.FINAL),
        ("RESOURCE_EXHAUSTED", "etcdserver: mvcc: database space exceeded", Verdict.FINAL),
        ("UNIMPLEMENTED", "", Verdict.FINAL),
    ],
)
def test_verdicts(code: str, details: str, expected: Verdict) -> None:
    assert verdict(code, details, has_user=True) is expected


def test_without_a_user_there_is_nothing_to_log_in_with_again() -> None:
    details = "etcdserver: user name is empty"
    assert verdict("INVALID_ARGUMENT", details, has_user=False) is Verdict.FINAL


@pytest.mark.parametrize(
    ("code", "details", "kind", "words"),
    [
        ("NOT_FOUND", "etcdserver: requested lease not found", LeaseLost, "its lease has ended"),
        (
            "INVALID_ARGUMENT",
            "etcdserver: authentication failed, invalid user ID or password",
            ConfigError,
            "the user or the password is wrong",
        ),
        ("INVALID_ARGUMENT", "etcdserver: user name is empty", ConfigError, "wants a user"),
        ("PERMISSION_DENIED", "etcdserver: permission denied", ConfigError, "grant the user"),
        (
            "RESOURCE_EXHAUSTED",
            "etcdserver: mvcc: database space exceeded",
            CoordinationError,
            "is full",
        ),
        (
            "INVALID_ARGUMENT",
            "etcdserver: request is too large",
            CoordinationError,
            "--max-request-bytes",
        ),
        ("UNIMPLEMENTED", "", CoordinationError, "not as an etcd v3 server"),
        ("DATA_LOSS", "etcdserver: corrupt cluster", CoordinationError, "corrupt cluster"),
        (
            "INVALID_ARGUMENT",
            "etcdserver: duplicate key given in txn request",
            ValueError,
            "duplicate key",
        ),
    ],
)
def test_final_errors(code: str, details: str, kind: type[Exception], words: str) -> None:
    error = final_error(code, details, "etcd-0:2379", "job")
    assert type(error) is kind
    assert words in str(error)
    assert kind is ValueError or "etcd-0:2379" in str(error)


@pytest.mark.parametrize(
    ("code", "details", "words"),
    [
        ("UNAVAILABLE", REFUSED, "connection refused"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", "no answer"),
        ("UNAVAILABLE", "etcdserver: request timed out", "request timed out"),
        ("UNAVAILABLE", "two\nlines", "two lines"),
        ("CANCELLED", "", "CANCELLED"),
    ],
)
def test_reasons_are_a_few_words(code: str, details: str, words: str) -> None:
    assert reason(code, details) == words
