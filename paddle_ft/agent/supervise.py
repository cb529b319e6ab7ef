"""What one node does next with its own workers: start, stop, pause, report, leave. Pure.

Invariants:
- workers run for one generation only, and only while this node is a member of it;
- workers of a later generation are started after every worker of the one before has ended;
- what is published about the workers names the generation it is about;
- a node asked to leave goes once its state is committed, or when it is not needed, or when its
  grace is over; in the last case it says that nothing was saved.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from paddle_ft.config import JobConfig
from paddle_ft.coordination.decide import live_nodes
from paddle_ft.coordination.schema import JobState
from paddle_ft.errors import EXIT_COLLECTIVE, EXIT_PAUSED
from paddle_ft.types import Generation, NodeStatus

COLLATERAL_PATIENCE_S = 0.5
"""How long a worker that only lost a peer is given company before the others are stopped: the
one that really failed may not have been reaped yet."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker process as the agent sees it."""

    rank: int
    exit_code: int | None = None
    """None while it runs; -n if signal n ended it."""
    kind: Literal["", "done", "paused", "fatal", "collective"] = ""
    """What it said when it left; "" if it said nothing."""
    reason: str = ""
    fatal_code: int = 0
    step: int = -1
    """Of the checkpoint it handed over before it left; -1 if none."""
    session: bool = False
    """The script uses a session: it can be asked to save and leave."""
    stopped: bool = False
    """The agent ended it."""
    ended_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Group:
    """The workers of one generation on this node."""

    generation: int
    workers: tuple[Worker, ...]
    pause_told: bool = False

    @property
    def running(self) -> bool:
        return any(w.exit_code is None for w in self.workers)


@dataclass(frozen=True, slots=True)
class LocalView:
    me: str
    state: JobState
    group: Group | None
    launched: int
    """Highest generation whose workers were started here; 0 if none."""
    pending_step: int = -1
    """Newest step whose snapshot this node holds but has not finished writing."""
    damaged: tuple[str, ...] = ()
    restore_failed: str = ""
    """Why the restore point could not be loaded for ``launched``; "" if it could."""
    restore_fatal: int = 0
    """Exit code if loading it again cannot help; 0 if it can."""
    leaving_since_s: float | None = None
    leaving_code: int = 0
    hurried: bool = False
    """Asked to leave a second time: do not wait for anything."""


@dataclass(frozen=True, slots=True)
class StartWorkers:
    generation: Generation


@dataclass(frozen=True, slots=True)
class StopWorkers:
    reason: str
    gently: bool = False
    """SIGTERM first: scripts without a session, which cannot save, are paused like this."""


@dataclass(frozen=True, slots=True)
class TellPause:
    reason: str


@dataclass(frozen=True, slots=True)
class Publish:
    status: NodeStatus
    leaving: bool


@dataclass(frozen=True, slots=True)
class Leave:
    exit_code: int
    reason: str


LocalAction = StartWorkers | StopWorkers | TellPause | Publish | Leave


def status_of(view: LocalView) -> NodeStatus:
    """What the workers' ends say about their generation."""
    group = view.group
    if group is None:
        return NodeStatus(damaged=view.damaged)
    pending = view.pending_step
    if view.restore_failed:
        return NodeStatus(
            "failed",
            group.generation,
            view.restore_failed,
            fatal=view.restore_fatal,
            damaged=view.damaged,
        )
    for worker in group.workers:
        if worker.kind == "fatal":
            return NodeStatus(
                "failed", group.generation, worker.reason, fatal=worker.fatal_code or 1
            )
    bad = [w for w in group.workers if _failed(w)]
    if bad:
        culprit = min(bad, key=lambda w: (_collateral(w), w.ended_s, w.rank))
        return NodeStatus(
            "failed",
            group.generation,
            describe_end(culprit),
            collateral=_collateral(culprit),
            pending_step=pending,
            damaged=view.damaged,
        )
    if group.running:
        return NodeStatus("running", group.generation, damaged=view.damaged)
    paused = [w for w in group.workers if _paused(w)]
    if paused or (group.pause_told and any(w.stopped for w in group.workers)):
        step = max((w.step for w in paused), default=-1)
        return NodeStatus(
            "paused",
            group.generation,
            pending_step=pending,
            saved_step=step,
            damaged=view.damaged,
        )
    if any(w.stopped for w in group.workers):
        return NodeStatus("idle", group.generation, damaged=view.damaged)
    return NodeStatus(
        "finished",
        group.generation,
        pending_step=pending,
        saved_step=max((w.step for w in group.workers), default=-1),
        damaged=view.damaged,
    )


def _paused(worker: Worker) -> bool:
    return worker.kind == "paused" or worker.exit_code == EXIT_PAUSED


def _failed(worker: Worker) -> bool:
    ended_badly = worker.exit_code not in (None, 0, EXIT_PAUSED) or _wordless(worker)
    return ended_badly and not worker.stopped


def _wordless(worker: Worker) -> bool:
    """It left in the middle of its session with exit code 0: ``os._exit``, or a library's exit."""
    return worker.exit_code == 0 and worker.session and not worker.kind


def _collateral(worker: Worker) -> bool:
    return worker.kind == "collective" or worker.exit_code == EXIT_COLLECTIVE


def describe_end(worker: Worker) -> str:
    """How a worker ended, in words: ``rank 1 was killed by SIGKILL``."""
    code = worker.exit_code
    if _collateral(worker):
        return f"rank {worker.rank} lost a peer"
    if code is not None and code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"rank {worker.rank} was killed by {name}"
    told = f": {worker.reason}" if worker.reason else ""
    if _wordless(worker):
        told = " in the middle of its session"
    return f"rank {worker.rank} ended with exit code {code}{told}"


def supervise(
    view: LocalView, published: Publish | None, now_s: float, config: JobConfig
) -> tuple[LocalAction, ...]:
    """The actions that are due at this node, in order; empty if there are none.

    Args:
        view: this node's workers and the job.
        published: what this node last published of itself; None before it registered.
        now_s: monotonic time.
        config: the job's settings.
    """
    actions: list[LocalAction] = []
    status = status_of(view)
    leaving = view.leaving_since_s is not None
    if published is not None and (published.status != status or published.leaving != leaving):
        actions.append(Publish(status, leaving))
    generation = view.state.generation.value if view.state.generation else None
    mine = generation is not None and view.me in generation.member_ids()
    running = view.group is not None and view.group.running
    end = _ending(view, status, mine, now_s, config)
    if end is not None:
        if running:
            return (*actions, StopWorkers(end.reason))
        return (*actions, end)
    if running:
        assert view.group is not None
        actions += _while_running(view, view.group, status, mine, now_s)
    elif generation is not None and mine and generation.number > view.launched:
        actions.append(StartWorkers(generation))
    return tuple(actions)


def _while_running(
    view: LocalView, group: Group, status: NodeStatus, mine: bool, now_s: float
) -> Sequence[LocalAction]:
    generation = view.state.generation.value if view.state.generation else None
    if generation is None or not mine or generation.number != group.generation:
        return [StopWorkers(f"generation {group.generation} is over")]
    if status.state == "failed":
        first_s = min((w.ended_s for w in group.workers if _failed(w)), default=now_s)
        if status.collateral and now_s - first_s < COLLATERAL_PATIENCE_S:
            return []
        return [StopWorkers(status.reason)]
    pause = view.state.pause
    if pause is not None and pause.value.generation == group.generation and not group.pause_told:
        if any(w.session for w in group.workers):
            return [TellPause(pause.value.reason)]
        return [StopWorkers(pause.value.reason, gently=True)]
    return []


def _ending(
    view: LocalView, status: NodeStatus, mine: bool, now_s: float, config: JobConfig
) -> Leave | None:
    """Why and how this launcher ends now; None if it goes on."""
    state = view.state
    if state.outcome is not None:
        return Leave(state.outcome.value.exit_code, state.outcome.value.reason)
    if view.leaving_since_s is None:
        return None
    if view.hurried or now_s - view.leaving_since_s >= config.stop_grace_s:
        return Leave(view.leaving_code, "stopped without a last checkpoint")
    if not mine:
        return Leave(view.leaving_code, "left the job; the others go on")
    assert state.generation is not None
    generation = state.generation.value
    over = status.generation == generation.number and status.state in ("paused", "idle", "failed")
    never_ran = view.launched < generation.number
    if not over and not never_ran:
        return None
    if _others_can_go_on(state, config):
        return None  # they, or this node as their leader, form a generation without it
    committed = state.head.value.newest.step if state.head else -1
    if max(status.saved_step, status.pending_step) > committed:
        return None
    saved = f" after saving step {committed}" if committed >= 0 else " before anything was saved"
    return Leave(view.leaving_code, f"stopped{saved}")


def _others_can_go_on(state: JobState, config: JobConfig) -> bool:
    stay = [r for r in live_nodes(state).values() if not r.value.leaving]
    return len(stay) >= config.nodes_min
