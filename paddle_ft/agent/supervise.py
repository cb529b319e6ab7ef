"""What one node does next with its own workers: start, stop, pause, report, leave. Pure.

Invariants:
- workers run for one generation at a time, and only while this node is a member of it; they are
  ordered into the next one if it takes workers of theirs, and ended otherwise;
- where they are ended, those of a later generation are started after the last of them is gone;
- what is published about the workers names the generation it is about;
- a node asked to leave goes once its state is committed, or when it is not needed, or when its
  grace is over; in the last case it says that nothing was saved.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from paddle_ft.config import JobConfig
from paddle_ft.coordination.schema import JobState
from paddle_ft.coordination.view import live_nodes
from paddle_ft.errors import EXIT_COLLECTIVE, EXIT_PAUSED
from paddle_ft.types import Generation, NodeStatus, Recovery

CULPRIT_WITHIN_S = 0.1
"""How much later than by its peers a worker's end may be noticed."""
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
    recovery: Recovery = ""
    """What it can do when the group changes, by its own word."""
    lost_peer: str = ""
    """Why its group is broken, by its own word; it waits to be ordered into another."""
    lost_s: float = 0.0
    """Since when."""
    stopped: bool = False
    """The agent ended it."""
    at_step: int = 0
    """When it ended or lost a peer: the last step it had applied; 0 before its first."""
    ended_s: float = 0.0

    @property
    def stays(self) -> bool:
        """It runs, and has not said that it is about to leave."""
        return self.exit_code is None and not self.kind


@dataclass(frozen=True, slots=True)
class Group:
    """The workers of one generation on this node."""

    generation: int
    workers: tuple[Worker, ...]
    pause_told: bool = False
    dismissed_s: float | None = None
    """Since when its workers know that there is no place for them in the next one."""
    told: Recovery = ""
    """What a worker has said last that it can do, in this generation or an earlier one."""
    stepping: bool = True
    """One of them has applied a step in this generation."""

    @property
    def running(self) -> bool:
        return self.alive > 0

    @property
    def alive(self) -> int:
        return sum(w.exit_code is None for w in self.workers)

    @property
    def recovery(self) -> Recovery:
        told = {w.recovery for w in self.workers}
        return "restart" if "restart" in told else "in_place" if "in_place" in told else ""


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
    at_the_door: int = 0
    """Workers in reserve that have everything prepared."""


@dataclass(frozen=True, slots=True)
class StartWorkers:
    generation: Generation


@dataclass(frozen=True, slots=True)
class OrderWorkers:
    """They go on in ``generation``; those that have ended are replaced."""

    generation: Generation


@dataclass(frozen=True, slots=True)
class Dismiss:
    """Their group goes on without them: they leave it together with the others."""

    generation: int


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


LocalAction = StartWorkers | OrderWorkers | Dismiss | StopWorkers | TellPause | Publish | Leave


def status_of(view: LocalView, slots: int = 1) -> NodeStatus:
    """What the workers' ends say about their generation; ``slots``: workers of a node."""
    group, generation = view.group, view.state.generation
    member = generation is not None and view.me in generation.value.member_ids()
    ready = not member and view.at_the_door >= slots
    if group is None:
        return NodeStatus(damaged=view.damaged, ready=ready)
    recovery: Recovery = "restart" if view.restore_failed else group.recovery
    status = _status(view, group)
    alive = sum(worker.stays for worker in group.workers)
    return replace(status, recovery=recovery, alive=alive, ready=ready)


def _status(view: LocalView, group: Group) -> NodeStatus:
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
            exit_code=culprit.exit_code or 0,
            failed_at=culprit.at_step,
            pending_step=pending,
            damaged=view.damaged,
        )
    if group.running:
        lost = next((w for w in group.workers if w.lost_peer), None)
        if lost is not None:
            reason = f"rank {lost.rank} lost a peer"
            return NodeStatus(
                "failed",
                group.generation,
                reason,
                collateral=True,
                failed_at=lost.at_step,
                damaged=view.damaged,
            )
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
        why = f" ({worker.reason})" if worker.reason else ""
        return f"rank {worker.rank} was killed by {name}{why}"
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
    status = status_of(view, config.nproc_per_node)
    leaving = view.leaving_since_s is not None
    changed = published is not None and (published.status != status or published.leaving != leaving)
    if changed and not _may_change_soon(view.group, status, now_s):
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
        actions += _while_running(view, view.group, status, now_s, config)
    elif generation is not None and mine and generation.number > view.launched:
        actions.append(StartWorkers(generation))
    return tuple(actions)


def _may_change_soon(group: Group | None, status: NodeStatus, now_s: float) -> bool:
    """Somebody has lost a peer, a moment ago: who failed is about to be known.

    It would wait for this write otherwise.
    """
    if group is None or not status.collateral or not group.running:
        return False
    return all(now_s - w.lost_s < CULPRIT_WITHIN_S for w in group.workers if w.lost_peer)


def _while_running(
    view: LocalView, group: Group, status: NodeStatus, now_s: float, config: JobConfig
) -> Sequence[LocalAction]:
    generation = view.state.generation.value if view.state.generation else None
    if generation is None or generation.number != group.generation:
        due = _into(generation, view.me, group, now_s, config) if generation else _over(group)
        return [due] if due is not None else []
    if view.me not in generation.member_ids():
        return [_over(group)]
    if status.state == "failed" and status.recovery == "in_place":
        return []  # the leader forms another group, and these go on in it
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


def _over(group: Group) -> StopWorkers:
    return StopWorkers(f"generation {group.generation} is over")


def _into(
    generation: Generation, me: str, group: Group, now_s: float, config: JobConfig
) -> LocalAction | None:
    """What becomes of running workers when their generation is not the present one any more."""
    if group.recovery != "in_place" or generation.number < group.generation:
        return _over(group)
    if me in generation.member_ids():
        goes_on = generation.workers_since(me) <= group.generation
        return OrderWorkers(generation) if goes_on else _over(group)
    if not generation.planned:
        return _over(group)
    if group.dismissed_s is None:
        return Dismiss(generation.number)
    return None if now_s - group.dismissed_s < config.stop_grace_s else _over(group)


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
    if not mine and view.group is not None and view.group.running and not _is_over(view):
        return None
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


def _is_over(view: LocalView) -> bool:
    """Whether workers of a generation that this node has left need not be waited for."""
    generation = view.state.generation
    assert view.group is not None
    if generation is None or not generation.value.planned:
        return True
    return view.group.recovery != "in_place"


def _others_can_go_on(state: JobState, config: JobConfig) -> bool:
    stay = [r for r in live_nodes(state).values() if not r.value.leaving]
    return len(stay) >= config.nodes_min
