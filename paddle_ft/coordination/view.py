"""What one node knows of the job when it decides: state, marks of time, trouble. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from paddle_ft.coordination.schema import Fences, JobState
from paddle_ft.types import CommitRef, Generation, NodeRecord, Versioned


@dataclass(frozen=True, slots=True)
class Marks:
    """Since when something has been so, by the clock of the observer. 0: no such generation."""

    staying: frozenset[str] = frozenset()
    """Members that are there and were not asked to leave."""
    members_since_s: float = 0.0
    trouble: int = 0
    trouble_since_s: float = 0.0
    pause: int = 0
    pause_since_s: float = 0.0
    finished: bool = False
    finished_since_s: float = 0.0


@dataclass(frozen=True, slots=True)
class View:
    """One consistent look at the job from one node."""

    me: str
    state: JobState
    marks: Marks
    acting_until_s: float
    """The lease of ``me`` certainly stands until then; same clock as ``now_s``."""
    wall_s: float
    """Seconds since 1970, for the failure window only."""
    commit_running: bool = False
    """A Commit decided here has not come back yet."""
    commit_failed: tuple[Fences, str] | None = None
    """What a Commit was decided upon whose parts do not make a checkpoint, and why."""
    found: tuple[CommitRef, ...] | None = None
    """Commits found in the store, newest first; None: not looked yet."""
    store: str = ""
    """Identity of the checkpoint store."""


def live_nodes(state: JobState) -> Mapping[str, Versioned[NodeRecord]]:
    """Records that count, by member id: the newest incarnation of each node out of quarantine."""
    return state.live


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a generation cannot go on."""

    lost: tuple[str, ...] = ()
    failed: tuple[NodeRecord, ...] = ()
    uncommittable: str = ""
    """Why parts that all members wrote do not make a checkpoint."""
    barred: frozenset[str] = frozenset()
    """Nodes in quarantine: a member of ``lost`` that is there, but is not asked any more."""

    @property
    def collateral_only(self) -> bool:
        return (
            not self.lost
            and not self.uncommittable
            and all(record.status.collateral for record in self.failed)
        )

    @property
    def blamed(self) -> tuple[NodeRecord, ...]:
        """Nodes whose own workers failed; checkpoints found damaged are nobody's failure."""
        return tuple(r for r in self.failed if not r.status.collateral and not r.status.damaged)

    def __str__(self) -> str:
        told = [self.uncommittable] if self.uncommittable else []
        nodes = [member.rpartition(".")[0] for member in self.lost]
        told += [f"node {n} is {'in quarantine' if n in self.barred else 'lost'}" for n in nodes]
        causes = [r for r in self.failed if not r.status.collateral]
        told += [
            f"node {r.member.node}: {r.status.reason}"
            for r in (causes or ([] if told else self.failed))  # not also who lost them
        ]
        return "; ".join(told)


def find_trouble(state: JobState) -> Trouble | None:
    """What is wrong with the current generation; None if nothing is, or there is none."""
    if state.generation is None:
        return None
    generation = state.generation.value
    lost: list[str] = []
    failed: list[NodeRecord] = []
    for member_id in generation.member_ids():
        record = state.live.get(member_id)
        if record is None:
            lost.append(member_id)
        elif (record.value.status.generation, record.value.status.state) == (
            generation.number,
            "failed",
        ):
            failed.append(record.value)
    if not lost and not failed:
        return None
    return Trouble(tuple(lost), tuple(failed), barred=state.quarantine)


def who_marks(state: JobState, me: str) -> Literal["me", "another", ""]:
    """Who sees to the marker of a commit, which makes it known without etcd: the leader.

    "" while nobody does: there is no leader, or it is this node before its lease ended, which has
    not been heard of yet.
    """
    if state.leader is None:
        return ""
    if state.leader.value == me:
        return "me"
    same_node = state.leader.value.rpartition(".")[0] == me.rpartition(".")[0]
    return "" if same_node else "another"


def observe(marks: Marks, state: JobState, now_s: float) -> Marks:
    """``marks`` brought up to date with ``state``."""
    staying = frozenset(m for m, r in state.live.items() if not r.value.leaving)
    if staying != marks.staying:
        marks = replace(marks, staying=staying, members_since_s=now_s)
    generation = state.generation.value if state.generation else None
    trouble = generation.number if generation and find_trouble(state) else 0
    if trouble != marks.trouble:
        marks = replace(marks, trouble=trouble, trouble_since_s=now_s)
    pause = state.pause.value.generation if state.pause else 0
    if pause != marks.pause:
        marks = replace(marks, pause=pause, pause_since_s=now_s)
    finished = generation is not None and all_in(
        statuses_of(state, generation), generation, "finished"
    )
    if finished != marks.finished:
        marks = replace(marks, finished=finished, finished_since_s=now_s)
    return marks


def statuses_of(state: JobState, generation: Generation) -> list[NodeRecord]:
    """Records of the members that are there, in rank order."""
    live = state.live
    return [live[m].value for m in generation.member_ids() if m in live]


def all_in(records: Sequence[NodeRecord], generation: Generation, *states: str) -> bool:
    return len(records) == len(generation.members) and all(
        r.status.generation == generation.number and r.status.state in states for r in records
    )
