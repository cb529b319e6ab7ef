"""A worker in reserve waits where its script first asks for its rank; it never sees a wrong one."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paddle_ft.agent import ipc
from paddle_ft.agent.worker_env import SEALED, SESSION_VARIABLE, SessionEnv, sealed_env, worker_env
from paddle_ft.types import Generation, Member, encode

A, B = (Member(n, "1", "127.0.0.1", 1, (7000 + i, 8000 + i)) for i, n in enumerate("ab"))
BEFORE = Generation(4, (A,), "127.0.0.1:7000")
GENERATION = Generation(5, (A, B), "127.0.0.1:7000")
ORDER = ipc.Order(5, {**worker_env(GENERATION, B.id, 0), "PADDLE_FT": "{}"}, at_once=True)
PATIENCE_S = 60.0


def slow(asks: str) -> object:
    return pytest.param(asks, marks=pytest.mark.slow)


class Reserve:
    """A process in reserve that runs ``script``, and this end of its conversation."""

    def __init__(self, directory: Path, script: str) -> None:
        self.heard: queue.Queue[tuple[ipc.Channel, object]] = queue.Queue()
        self.listener = ipc.Listener(str(directory / "s"), lambda *said: self.heard.put(said))
        (directory / "script.py").write_text(script)
        session = SessionEnv("job", 0, 0, str(directory / "s"), "", "rank0", 4096, waits=True)
        told = {**sealed_env(BEFORE), SESSION_VARIABLE: encode(session).decode()}
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "paddle_ft.agent.bootstrap", str(directory / "script.py")],
            env={**os.environ, **told}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def hello(self) -> ipc.Channel:
        channel, message = self.heard.get(timeout=PATIENCE_S)
        assert isinstance(message, ipc.Hello)
        assert (message.rank, message.generation) == (-1, 0)
        assert message.pid == self.process.pid
        return channel

    def end(self) -> tuple[int, list[str], str]:
        """Exit code, what it printed, what it complained of."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out.split(), err

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.listener.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Reserve]]:
    started: list[Reserve] = []

    def start(script: str) -> Reserve:
        started.append(Reserve(tmp_path, script))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.mark.parametrize(
    "asks",
    [
        "int(os.environ['PADDLE_TRAINER_ID'])",
        slow("os.getenv('PADDLE_TRAINER_ID')"),
        slow("'PADDLE_MASTER' in os.environ and os.environ['PADDLE_TRAINER_ID']"),
        "dict(os.environ)['PADDLE_TRAINER_ID']",
        slow("environ.pop('PADDLE_TRAINER_ID')"),
        "thread(lambda: os.environ['PADDLE_TRAINER_ID'])",
        slow("child('import os; print(os.environ[\"PADDLE_TRAINER_ID\"])', env={**os.environ})"),
    ],
)
def test_whoever_asks_for_the_rank_waits_and_gets_the_right_one(
    start: Callable[[str], Reserve], asks: str
) -> None:
    reserve = start(
        "import os, subprocess, sys, concurrent.futures as f\nfrom os import environ\n"
        "def thread(what): return f.ThreadPoolExecutor(1).submit(what).result()\n"
        "def child(text, env): return subprocess.check_output([sys.executable, '-c', text], "
        "env=env, text=True).strip()\n"
        f"print(os.environ['PADDLE_DISTRI_BACKEND'])\nprint({asks})\n"
        "print(os.environ['PADDLE_TRAINERS_NUM'], type(os.environ).__name__)\n"
    )
    channel = reserve.hello()
    assert reserve.process.poll() is None
    channel.send(ORDER)
    assert reserve.end() == (0, ["gloo", "1", "2", "_Environ"], "")


def test_what_the_script_sets_itself_is_set_after_the_order(
    start: Callable[[str], Reserve],
) -> None:
    reserve = start(
        "import os\nos.environ['PADDLE_MASTER'] = 'mine'\n"
        "print(os.environ['PADDLE_MASTER'], os.environ['PADDLE_TRAINER_ID'])\n"
    )
    reserve.hello().send(ORDER)
    assert reserve.end() == (0, ["mine", "1"], "")


def test_a_process_that_was_forked_too_early_takes_it_with_it(
    start: Callable[[str], Reserve],
) -> None:
    reserve = start(
        "import os, time\nif not os.fork():\n    print(os.environ['PADDLE_TRAINER_ID'])\n"
        "time.sleep(100)\n"
    )
    code, out, err = reserve.end()
    assert (code, out) == (-9, [])
    assert "asks for PADDLE_TRAINER_ID, too early" in err


def test_a_program_that_was_started_too_early_finds_no_number(
    start: Callable[[str], Reserve],
) -> None:
    reserve = start(
        "import subprocess, sys\nsys.exit(subprocess.call([sys.executable, '-c', "
        "'import os; print(os.environ[\"PADDLE_TRAINER_ID\"])']))\n"
    )
    assert reserve.end() == (0, [SEALED], "")


def test_a_worker_in_reserve_ends_with_its_agent(start: Callable[[str], Reserve]) -> None:
    reserve = start("import os\nprint(os.environ['PADDLE_TRAINER_ID'])\n")
    reserve.hello().close()
    assert reserve.end() == (1, [], "")


PADDLE = """
import paddle, os, sys
import paddle.distributed as dist
paddle.seed(0)
model = paddle.nn.Linear(4, 4)
assert not dist.is_initialized()
print("built", flush=True)
random = paddle.get_rng_state()
drawn = paddle.rand([2]).tolist()
paddle.set_rng_state(random)
print({asks}, flush=True)
assert paddle.rand([2]).tolist() == drawn
assert paddle.nn.Linear(2, 2).weight.name == "linear_1.w_0"
assert dist.parallel._global_parallel_env is None or dist.get_world_size() == 2
print(type(os.environ).__name__, dist.get_rank(), dist.get_world_size())
"""


@pytest.mark.paddle
@pytest.mark.parametrize(
    "asks",
    [
        "dist.get_rank()",
        slow("dist.get_world_size() - 1"),
        slow("dist.ParallelEnv().local_rank + 1"),
    ],
)
def test_importing_paddle_and_building_a_model_needs_no_rank(
    start: Callable[[str], Reserve], asks: str
) -> None:
    reserve = start(PADDLE.format(asks=asks))
    channel = reserve.hello()
    assert reserve.process.stdout is not None
    assert reserve.process.stdout.readline() == "built\n"
    channel.send(ORDER)
    code, out, _ = reserve.end()
    assert (code, out[-4:]) == (0, ["1", "_Environ", "1", "2"])
