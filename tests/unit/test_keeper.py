"""The worker's end of the conversation with its agent, over a real socket and real files."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paddle_ft import keeper as module
from paddle_ft.agent import ipc
from paddle_ft.errors import ConfigError, StoreFull
from paddle_ft.keeper import AgentKeeper, Superseded
from paddle_ft.types import ImageInfo, TensorSpec

Wait = Callable[..., None]
INFO = ImageInfo(7, 0, 1, (TensorSpec("x", "uint8", (3,), "replicated", 2, 3),), {"a": 1})


class Agent:
    """Answers as told; what it got is in ``got``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.got: queue.Queue[object] = queue.Queue()
        self.buffers = 2
        self.reply: ipc.RestoreReply | None = ipc.RestoreReply(None, None, -1, 3)
        self.channel: ipc.Channel | None = None
        self.listener = ipc.Listener(str(directory / "s"), self.on_message)

    def on_message(self, channel: ipc.Channel, message: object) -> None:
        self.channel = channel
        if isinstance(message, ipc.RestoreRequest):
            if self.reply is None:  # the checkpoint is still being loaded
                self.got.put(message)
            else:
                channel.send(self.reply)
        elif isinstance(message, ipc.Allocate):
            paths = []
            for index in range(self.buffers):
                path = self.directory / f"{message.nbytes}-{index}"
                path.write_bytes(bytes(message.nbytes))
                paths.append(str(path))
            channel.send(ipc.Allocated(tuple(paths)))
        else:
            self.got.put(message)

    def say(self, message: ipc.ToWorker) -> None:
        assert self.channel is not None
        assert self.channel.send(message)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    agent = Agent(tmp_path)
    yield agent
    agent.listener.close()
    if agent.channel is not None:
        agent.channel.close()


@pytest.fixture
def keeper(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> Iterator[AgentKeeper]:
    keeper = AgentKeeper(str(agent.directory / "s"))
    keeper.join(0, 1, 3, "restart")
    hello = agent.got.get(timeout=20)
    assert isinstance(hello, ipc.Hello)
    assert (hello.rank, hello.generation) == (0, 3)
    yield keeper
    keeper.close(None)


def test_there_may_be_nothing_to_restore(keeper: AgentKeeper) -> None:
    assert keeper.restore() is None
    assert keeper.committed_step == -1


def test_what_is_restored_is_read_from_the_agents_file(agent: Agent, keeper: AgentKeeper) -> None:
    (agent.directory / "image").write_bytes(b"__abc")
    agent.reply = ipc.RestoreReply(str(agent.directory / "image"), INFO, 4, 3)
    image = keeper.restore()
    assert image is not None
    assert bytes(image.read("x")) == b"abc"
    assert keeper.committed_step == 7


def test_a_buffer_is_used_again_only_when_it_was_released(
    agent: Agent, keeper: AgentKeeper, wait_for: Wait
) -> None:
    taken = [keeper.acquire(100, wait=False), keeper.acquire(100, wait=False)]
    assert None not in taken
    assert keeper.acquire(100, wait=False) is None
    assert not keeper.free()
    first = taken[0]
    assert first is not None
    first[1][:3] = b"abc"
    keeper.publish(first[0], INFO)
    ready = agent.got.get(timeout=20)
    assert ready == ipc.SnapshotReady(first[0], INFO)
    assert (agent.directory / f"100-{first[0]}").read_bytes()[:3] == b"abc"
    agent.say(ipc.Released(first[0]))
    wait_for(keeper.free)
    again = keeper.acquire(100, wait=False)
    assert again is not None
    assert again[0] == first[0]


def test_one_that_was_not_used_is_free_again(keeper: AgentKeeper) -> None:
    taken = keeper.acquire(10, wait=False)
    assert taken is not None
    keeper.acquire(10, wait=False)
    keeper.give_back(taken[0])
    assert keeper.free()


def test_larger_buffers_are_asked_for_when_all_smaller_ones_are_back(
    agent: Agent, keeper: AgentKeeper
) -> None:
    small = keeper.acquire(10, wait=False)
    assert small is not None
    assert keeper.acquire(20, wait=False) is None  # it is in flight, known by its number
    timer = threading.Timer(0.1, lambda: agent.say(ipc.Released(small[0])))
    timer.start()
    large = keeper.acquire(20, wait=True)
    assert large is not None
    assert len(large[1]) == 20
    timer.join()


def test_without_memory_a_checkpoint_is_put_off_and_a_last_one_is_an_error(
    agent: Agent, keeper: AgentKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.buffers = 0
    assert keeper.free()
    assert keeper.acquire(10, wait=False) is None
    assert not keeper.free()  # for some seconds, then it is tried again
    monkeypatch.setattr(module, "_NO_MEMORY_TIMEOUT_S", 0.0)
    with pytest.raises(StoreFull, match="no shared memory for a snapshot"):
        keeper.acquire(10, wait=True)


def test_it_says_what_it_waits_for(
    agent: Agent,
    keeper: AgentKeeper,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "_TELL_INTERVAL_S", 0.05)
    timer = threading.Timer(0.3, lambda: agent.say(ipc.Committed(7, 1)))
    timer.start()
    keeper.wait_committed(7)
    assert "waits for the checkpoint of step 7 to be stored" in capsys.readouterr().err
    keeper.wait_committed(6)  # older ones are safe too
    timer.join()


def test_a_pause_is_noted(agent: Agent, keeper: AgentKeeper, wait_for: Wait) -> None:
    assert keeper.pause_reason == ""
    agent.say(ipc.PauseRequest("scale up"))
    wait_for(lambda: keeper.pause_reason == "scale up")


def test_the_last_word_arrives_before_the_connection_ends(
    agent: Agent, keeper: AgentKeeper
) -> None:
    keeper.close("fatal", "because", 5)
    assert agent.got.get(timeout=20) == ipc.Farewell("fatal", "because", 5, -1)
    assert agent.got.get(timeout=20) is None


@pytest.mark.parametrize("how", ["gone", "of another version"])
def test_a_worker_whose_agent_is_gone_ends(
    how: str, agent: Agent, keeper: AgentKeeper, monkeypatch: pytest.MonkeyPatch, wait_for: Wait
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(module, "end", codes.append)
    assert agent.channel is not None
    if how == "gone":
        agent.channel.close()
    else:
        agent.channel._connection.sendall(b'{"type": "news"}\n')
    wait_for(lambda: codes == [1])


def test_an_agent_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not answer at .*/nobody"):
        AgentKeeper(str(tmp_path / "nobody"))


@pytest.mark.parametrize("at_once", [True, False])
def test_an_order_ends_the_wait_for_a_checkpoint(
    agent: Agent, keeper: AgentKeeper, at_once: bool
) -> None:
    """Its group may never form, and the others would wait for this worker in the next one."""
    agent.reply = None

    def order() -> None:
        assert isinstance(agent.got.get(timeout=20), ipc.RestoreRequest)
        agent.say(ipc.Order(4, {}, at_once))

    thread = threading.Thread(target=order)
    thread.start()
    with pytest.raises(Superseded):
        keeper.restore()
    thread.join(20)
    assert keeper.wait_order(3).generation == 4
