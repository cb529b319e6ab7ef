"""The agent's end of the conversation with its workers."""

from __future__ import annotations

import os
import queue
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paddle_ft.agent import ipc


@pytest.fixture
def arrived() -> queue.Queue[int]:
    """Ranks of the workers that said hello."""
    return queue.Queue()


@pytest.fixture
def path(tmp_path: Path, arrived: queue.Queue[int]) -> Iterator[str]:
    def on_message(channel: ipc.Channel, message: object) -> None:
        if isinstance(message, ipc.Hello):
            arrived.put(message.rank)

    listener = ipc.Listener(os.path.relpath(tmp_path / "s"), on_message)
    yield listener.path
    listener.close()


@pytest.fixture
def connections() -> Iterator[list[socket.socket]]:
    made = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(3)]
    yield made
    for connection in made:
        connection.close()


def test_out_of_descriptors_a_worker_waits_and_is_heard(
    path: str,
    arrived: queue.Queue[int],
    connections: list[socket.socket],
    wait_for: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(used, 3), hard))
    try:
        for connection in connections:
            connection.connect(path)
        # The kernel had set a descriptor aside for the first one.
        wait_for(lambda: "Too many open files" in caplog.text)
        assert arrived.qsize() <= 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for rank, connection in enumerate(connections):
        connection.sendall(ipc._adapter.dump_json(ipc.Hello(rank, 1, 1)) + b"\n")
    assert {arrived.get(timeout=20) for _ in connections} == {0, 1, 2}
    assert caplog.text.count("Too many") == 1
