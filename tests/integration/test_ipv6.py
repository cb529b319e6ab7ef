"""An etcd that is reached over IPv6 (A2)."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from paddle_ft.config import EtcdConfig
from paddle_ft.coordination.embedded import EmbeddedEtcd
from paddle_ft.coordination.etcd import EtcdCoordinator
from paddle_ft.coordination.kv import Put, Transaction

pytestmark = pytest.mark.etcd


@contextlib.contextmanager
def over_ipv6(port: int) -> Iterator[int]:
    """A port on ::1 that leads to ``port`` on 127.0.0.1; skips the test where there is no IPv6."""
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    ends: list[socket.socket] = []

    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = server.accept()
                far = socket.create_connection(("127.0.0.1", port))
                ends.extend((near, far))
                for pair in ((near, far), (far, near)):
                    thread = threading.Thread(target=copy, args=pair)
                    thread.start()
                    threads.append(thread)

    threads = [threading.Thread(target=serve)]
    threads[0].start()
    try:
        yield server.getsockname()[1]
    finally:
        for end in (server, *ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for end in (server, *ends):
            end.close()


def test_etcd_over_ipv6() -> None:
    with EmbeddedEtcd() as etcd, over_ipv6(int(etcd.endpoint.rpartition(":")[2])) as port:
        coordinator = EtcdCoordinator(EtcdConfig(endpoints=(f"http://[::1]:{port}",)))
        try:
            coordinator.ping()
            coordinator.transact(Transaction((), (Put("/paddle_ft/six/a", b"1"),)))
            assert [kv.value for kv in coordinator.read("/paddle_ft/six/").kvs] == [b"1"]
        finally:
            coordinator.close()
