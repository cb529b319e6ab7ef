"""Which faults are tried on which systems, with which settings."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.drive import TORCH_PYTHON
from bench.recovery_jobs import (
    Job,
    PaddleFT,
    PaddleLaunch,
    TorchFT,
    Torchrun,
    has_torchft,
)
from bench.recovery_trials import (
    Fault,
    Outcome,
    kill_leader,
    kill_member,
    kill_node,
    kill_worker,
    stop_worker,
)

WORKER, NODE, RESTART, HANG = (
    "A worker gets SIGKILL",
    "A whole node gets SIGKILL (launcher and workers)",
    "The restart path: a worker of a paddle.DataParallel script gets SIGKILL",
    "A worker gets SIGSTOP",
)
EVERY = ("--checkpoint_every", "10")
"""As often as the scripts of those save that have to."""
TORCHFT_TUNED = (
    "--join_timeout_ms", "100", "--heartbeat_timeout_ms", "500", "--quorum_tick_ms", "20",
)  # fmt: skip
QUICK_TIMEOUT_S, SLOW_TIMEOUT_S = 20.0, 60.0


@dataclass
class Kind:
    """One row: how its jobs are made and hurt. ``slow``: of these there are few trials."""

    outcome: Outcome
    make: Callable[[], Job]
    fault: Fault
    slow: bool = False

    @property
    def timeout_s(self) -> float:
        return SLOW_TIMEOUT_S if self.slow else QUICK_TIMEOUT_S


def fresh(parent: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=parent))


def kinds(parent: Path) -> Iterator[Kind]:
    """All rows; what cannot be run here says so in ``outcome.not_run``."""
    for ranks in (2, 3):
        yield from _worker_ours(parent, ranks)
        yield from _worker_peers(parent, ranks)
    yield from _node(parent)
    yield from _hang(parent)
    for ranks in (2, 3):
        yield Kind(
            Outcome(RESTART, "paddle_ft", f"--spares {ranks}", ranks, goal_s=(0.3, 1.0), anew=True),
            lambda ranks=ranks: PaddleFT(
                fresh(parent), ranks, spares=ranks, flags=EVERY, arguments=("--parallel",)
            ),
            kill_worker,
        )


def _worker_ours(parent: Path, ranks: int) -> Iterator[Kind]:
    yield Kind(
        Outcome(WORKER, "paddle_ft", "--spares 1", ranks, goal_s=(0.15, 0.5)),
        lambda: PaddleFT(fresh(parent), ranks, spares=1, flags=EVERY),
        kill_worker,
    )
    yield Kind(
        Outcome(WORKER, "paddle_ft", "no spares", ranks),
        lambda: PaddleFT(fresh(parent), ranks, flags=EVERY),
        kill_worker,
    )


def _worker_peers(parent: Path, ranks: int) -> Iterator[Kind]:
    yield from torchft_kinds(parent, WORKER, ranks)
    for settings, flags in (
        ("defaults", ()),
        ("tuned: --monitor-interval 0.05", ("--monitor-interval", "0.05")),
    ):
        yield _torch(
            Outcome(WORKER, "torchrun", settings, ranks),
            lambda flags=flags: Torchrun(fresh(parent), ranks, flags=flags),
            kill_worker,
            slow=True,
        )
    yield Kind(
        Outcome(WORKER, "paddle.distributed.launch", "defaults", ranks),
        lambda: PaddleLaunch(fresh(parent), ranks),
        kill_worker,
        slow=True,
    )
    yield _paddle_elastic(parent, WORKER, ranks, kill_worker)


def _paddle_elastic(parent: Path, group: str, ranks: int, fault: Fault) -> Kind:
    nodes = f"{max(ranks - 1, 1)}:{ranks}"
    flags = ("--elastic_level", "1", "--elastic_timeout", "30", "--max_restart", "1000")
    return Kind(
        Outcome(
            group,
            "paddle.distributed.launch",
            f"etcd, --nnodes {nodes} --elastic_level 1 --elastic_timeout 30",
            ranks,
        ),
        lambda: PaddleLaunch(fresh(parent), ranks, nodes=nodes, flags=flags),
        fault,
        slow=True,
    )


def torchft_kinds(parent: Path, group: str, ranks: int) -> Iterator[Kind]:
    for settings, flags, timeout_s in (
        ("tuned: join 100 ms, heartbeat 500 ms", TORCHFT_TUNED, 1.0),
        ("defaults: join 60 s, heartbeat 5 s", (), 60.0),
    ):
        kind = _torch(
            Outcome(group, "torchft", settings, ranks),
            lambda flags=flags, timeout_s=timeout_s: TorchFT(
                fresh(parent), ranks, lighthouse_flags=flags, timeout_s=timeout_s
            ),
            kill_worker,
            slow=not flags,
        )
        if not has_torchft():
            kind.outcome.not_run = "not run: torchft is not installed in .venv-torch"
        yield kind


def _torch(outcome: Outcome, make: Callable[[], Job], fault: Fault, slow: bool) -> Kind:
    if not TORCH_PYTHON.exists():
        outcome.not_run = "not run: make setup-torch first"
    return Kind(outcome, make, fault, slow)


def _node(parent: Path) -> Iterator[Kind]:
    ranks = 3
    victims: tuple[tuple[str, Any], ...] = (
        ("not the leader's", kill_member),
        ("the leader's", kill_leader),
    )
    for who, fault in victims:
        yield Kind(
            Outcome(NODE, "paddle_ft", f"{who}, lease 5 s (default)", ranks, goal_s=(0.3, 1.0)),
            lambda: PaddleFT(fresh(parent), ranks, nodes=ranks, flags=EVERY),
            fault,
        )
    yield from torchft_kinds(parent, NODE, ranks)
    for settings, flags in (
        ("defaults", ()),
        (
            "tuned: last call 1 s, keep-alive 1 s × 2",
            ("--rdzv-conf", "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=2"),
        ),
    ):
        yield _torch(
            Outcome(NODE, "torchrun", f"c10d, --nnodes 2:3, {settings}", ranks),
            lambda flags=flags: Torchrun(fresh(parent), ranks, nodes="2:3", flags=flags),
            kill_node,
            slow=True,
        )
    yield _paddle_elastic(parent, NODE, ranks, kill_node)


def _hang(parent: Path) -> Iterator[Kind]:
    yield Kind(
        Outcome(HANG, "paddle_ft", "--spares 1", 2, hangs=True),
        lambda: PaddleFT(fresh(parent), 2, spares=1, flags=EVERY),
        stop_worker,
    )
