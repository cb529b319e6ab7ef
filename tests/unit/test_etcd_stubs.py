"""The stubs speak etcd's wire format, and leave the process as it was."""

from __future__ import annotations

import subprocess
import sys

from paddle_ft.coordination.etcd_stubs import load


def test_messages_have_etcd_wire_form() -> None:
    api = load()
    request = api.TxnRequest(
        compare=[
            api.Compare(
                target=api.Compare.CREATE, result=api.Compare.EQUAL, key=b"k", create_revision=7
            )
        ],
        success=[api.RequestOp(request_put=api.PutRequest(key=b"k", value=b"v", lease=9))],
    )
    # rpc.proto: Txn.compare = 1 {target = 2, key = 3, create_revision = 5}, Txn.success = 2
    # {request_put = 2 {key = 1, value = 2, lease = 3}}
    wire = b"\x0a\x07\x10\x01\x1a\x01k(\x07\x12\x0a\x12\x08\x0a\x01k\x12\x01v\x18\x09"
    assert request.SerializeToString() == wire
    assert api.TxnRequest.FromString(wire) == request


def test_every_service_has_its_methods() -> None:
    api = load()
    made: list[tuple[str, str]] = []

    class Channel:
        def __getattr__(self, kind: str):  # type: ignore[no-untyped-def]
            return lambda path, **_: made.append((path, kind))

    for service in ("KV", "Watch", "Lease", "Auth", "Maintenance"):
        getattr(api, f"{service}Stub")(Channel())
    assert ("/etcdserverpb.KV/Txn", "unary_unary") in made
    assert ("/etcdserverpb.Watch/Watch", "stream_stream") in made
    assert ("/etcdserverpb.Lease/LeaseKeepAlive", "stream_stream") in made
    assert ("/etcdserverpb.Maintenance/Snapshot", "unary_stream") in made


def test_loading_imports_nothing_of_etcd3_and_changes_no_environment() -> None:
    code = (
        "import os, sys; before = dict(os.environ)\n"
        "from paddle_ft.coordination.etcd_stubs import load; load()\n"
        "assert not [m for m in sys.modules if m.startswith('etcd3')]\n"
        "assert dict(os.environ) == before\n"
        "assert load() is load()\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
