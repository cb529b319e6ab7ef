"""Names of hosts become addresses before nginx sees them."""

from __future__ import annotations

import threading
from dataclasses import replace

from paddle_ft.serve.hosts import Hosts, addressed
from paddle_ft.serve.registry import Group, ReplicaRecord

A = ReplicaRecord("a", "127.0.0.1", 8000, 8001, 1, condition="ready")


def group(**hosts: str) -> Group:
    replicas = {name: replace(A, name=name, host=host) for name, host in hosts.items()}
    return Group(replicas=replicas, primary="a")


def test_only_names_are_replaced_and_who_has_no_address_is_left_out() -> None:
    found, left_out = addressed(
        group(a="10.0.0.1", b="pod-1.svc", c="gone", d="::1", e="x;"), {"pod-1.svc": "10.0.0.2"}
    )
    hosts = {name: replica.host for name, replica in found.replicas.items()}
    # What is neither an address nor a name is told of by the routes.
    assert hosts == {"a": "10.0.0.1", "b": "10.0.0.2", "d": "::1", "e": "x;"}
    assert left_out == ["replica 'c' is left out: its host 'gone' has no address"]
    assert found.primary == "a"


def test_a_name_is_resolved_beside_and_keeps_its_address() -> None:
    told = threading.Event()
    hosts = Hosts(told.set)
    given = group(a="127.0.0.1", b="localhost", c="nowhere.invalid")
    try:
        assert hosts.addressed(group(a="127.0.0.1")) == (group(a="127.0.0.1"), [])
        hosts.addressed(given)
        assert told.wait(30)
        found, left_out = hosts.addressed(given)
        assert found.replicas["b"].host in ("127.0.0.1", "::1")
        assert len(left_out) == 1
        assert hosts.addressed(given)[0].replicas["b"] == found.replicas["b"]
    finally:
        hosts.close()
