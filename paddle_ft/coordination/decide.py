"""What the cluster does next: membership, election, generations, commits. Pure.

Invariants (checked by the simulator, tests/sim):
- only the leader writes generation, head, pause and outcome, each with its fences (``schema``);
- a generation starts where ``head`` stands, or, when that checkpoint is damaged, at the newest
  older one that is not, and its number is higher than any before (after etcd was lost: than that
  of any acknowledged commit);
- head moves only to a step of the current generation that all of its members have written, and
  only along one chain: each commit continues what its generation restored or committed last;
- nothing is decided on a lease that may have ended.

Every node runs ``decide`` on every change; all but the leader get "following". Being wrong about
who leads costs a refused transaction, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from paddle_ft.checkpoint.retention import Keep, kept_lineage, next_head, rule_of
from paddle_ft.config import Config
from paddle_ft.coordination.actions import (
    Campaign,
    Commit,
    Decision,
    Finish,
    ImportHead,
    Propose,
    RequestPause,
    ScanStore,
)
from paddle_ft.coordination.schema import Fences, JobState
from paddle_ft.errors import (
    EXIT_CHECKPOINT,
    EXIT_COORDINATION,
    EXIT_DONE,
    EXIT_STORE,
    EXIT_WORKER_FAILED,
)
from paddle_ft.types import (
    CommitRef,
    Generation,
    Head,
    Member,
    NodeRecord,
    Outcome,
    Part,
    Pause,
    Versioned,
)

# ---------------------------------------------------------------- the view


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
        told += [f"node {member.partition('.')[0]} is lost" for member in self.lost]
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
    return Trouble(tuple(lost), tuple(failed)) if lost or failed else None


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
    finished = generation is not None and _all_in(
        _statuses(state, generation), generation, "finished"
    )
    if finished != marks.finished:
        marks = replace(marks, finished=finished, finished_since_s=now_s)
    return marks


# ---------------------------------------------------------------- decisions


def decide(view: View, now_s: float, config: Config) -> Decision:
    """The one cluster-wide action that is due at this node, or None, and why."""
    state = view.state
    if view.me not in state.nodes:
        return Decision(None, "not registered")
    if state.outcome is not None:
        return Decision(None, f"the job has ended: {state.outcome.value.reason}")
    if state.leader is None:
        others = [r.value for r in state.live.values() if not r.value.leaving]
        if state.nodes[view.me].value.leaving and others:
            return Decision(None, "leaving: others lead")
        return Decision(Campaign(), "there is no leader")
    if state.leader.value != view.me:
        leader = state.leader.value.partition(".")[0]
        return Decision(None, f"node {leader} leads")
    if now_s >= view.acting_until_s:
        return Decision(None, "the lease may have ended: not acting")
    return _lead(view, now_s, config)


def _lead(view: View, now_s: float, config: Config) -> Decision:
    state, fences = view.state, view.state.fences()
    if state.head is None:
        if view.found is None:
            return Decision(ScanStore(), "looking for checkpoints in the store")
        if view.found:
            newest, *older = view.found
            before = Head(older[0], tuple(older[1:])) if older else None
            head = next_head(before, newest, rule_of(config.checkpoint), view.store)
            return Decision(ImportHead(head, fences), f"the store holds step {view.found[0].step}")
    if state.generation is None:
        return _regroup(view, None, now_s, config)
    generation = state.generation.value
    if view.commit_failed is not None and view.commit_failed[0] == fences:
        return _regroup(view, Trouble(uncommittable=view.commit_failed[1]), now_s, config)
    members = _statuses(state, generation)
    fatal = [r for r in members if r.status.fatal and r.status.generation == generation.number]
    if fatal:
        status = fatal[0].status
        return Decision(Finish(Outcome(status.fatal, status.reason), fences), status.reason)
    commit = next_commit(state, rule_of(config.checkpoint))
    if commit is not None and not view.commit_running:
        return Decision(commit, f"all parts of step {commit.step} are written")
    if _all_in(members, generation, "finished"):
        return _finished(view, members, commit, now_s, config)
    trouble = find_trouble(state)
    if trouble is not None and not (trouble.collateral_only and _pausing(state, generation)):
        return _recover(view, trouble, commit, now_s, config)
    return _rearrange(view, commit, now_s, config)


def _pausing(state: JobState, generation: Generation) -> bool:
    """Workers were asked to leave. Those who hear of it late only see that their peers go."""
    return state.pause is not None and state.pause.value.generation == generation.number


def _statuses(state: JobState, generation: Generation) -> list[NodeRecord]:
    """Records of the members that are there, in rank order."""
    live = state.live
    return [live[m].value for m in generation.member_ids() if m in live]


def _all_in(records: Sequence[NodeRecord], generation: Generation, *states: str) -> bool:
    return len(records) == len(generation.members) and all(
        r.status.generation == generation.number and r.status.state in states for r in records
    )


def base_of(state: JobState) -> CommitRef | None:
    """What the next commit of the current generation continues."""
    assert state.generation is not None
    generation = state.generation.value
    if state.head is not None and state.head.value.newest.generation == generation.number:
        return state.head.value.newest
    return generation.restore


def next_commit(state: JobState, keep: Keep) -> Commit | None:
    """The newest step that every member has written and that continues the chain."""
    if state.generation is None:
        return None
    generation = state.generation.value
    base = base_of(state)
    head = state.head.value if state.head else None
    by_step: dict[int, dict[str, Part]] = {}
    for part in state.parts:
        if part.generation == generation.number:
            by_step.setdefault(part.step, {})[part.member] = part
    wanted = generation.member_ids()
    for step in sorted(by_step, reverse=True):
        parts = by_step[step]
        if (base is None or step > base.step) and all(m in parts for m in wanted):
            return Commit(
                generation=generation.number,
                step=step,
                parts=tuple(parts[m] for m in wanted),
                head=head,
                sequence=(head.newest.sequence if head else 0) + 1,
                base=base,
                lineage=kept_lineage(head, base, step, keep),
                obsolete=tuple(p for p in state.parts if p.step <= step),
                fences=state.fences(),
            )
    return None


def _recover(
    view: View, trouble: Trouble, commit: Commit | None, now_s: float, config: Config
) -> Decision:
    """A member is lost or its workers failed: soon a new generation, but not a moment early."""
    waited_s = now_s - view.marks.trouble_since_s
    if trouble.collateral_only and waited_s < config.etcd.lease_ttl_s + 2:
        return Decision(None, f"waiting to learn who failed: {trouble}")
    if waited_s < config.checkpoint.persist_grace_s:
        if commit is not None:
            return Decision(None, f"{trouble}; step {commit.step} is being committed first")
        base = base_of(view.state)
        pending = max((r.status.pending_step for r in trouble.failed), default=-1)
        if not trouble.lost and pending > (base.step if base else -1):
            return Decision(None, f"{trouble}; step {pending} is being written first")
    return _regroup(view, trouble, now_s, config)


def _finished(
    view: View, members: Sequence[NodeRecord], commit: Commit | None, now_s: float, config: Config
) -> Decision:
    """All workers are done: the job ends once the checkpoint they left behind is committed."""
    base = base_of(view.state)
    saved = max(r.status.saved_step for r in members)
    if commit is None and saved <= (base.step if base else -1):
        outcome = Outcome(EXIT_DONE, _completed(view.state, base))
    elif (
        commit is not None
        or any(r.status.pending_step >= 0 for r in members)
        or now_s - view.marks.finished_since_s < config.job.stop_grace_s
    ):
        return Decision(None, f"training is complete: step {saved} is being committed")
    else:
        outcome = Outcome(
            EXIT_STORE,
            f"training is complete, but its last checkpoint (step {saved}) was not saved: see "
            f"the logs of the nodes for the reason, and start again to compute what is missing",
        )
    return Decision(Finish(outcome, view.state.fences()), outcome.reason)


def _completed(state: JobState, base: CommitRef | None) -> str:
    """What is told of a job that is done; also when there was nothing left to do."""
    restored = state.generation.value.restore if state.generation else None
    if base is None:
        return "training is complete"
    if restored == base:
        return (
            f"nothing was left to train: the checkpoint of step {base.step} is the end of it (to "
            f"begin anew give another --checkpoint)"
        )
    return f"training is complete, step {base.step} is saved"


def _rearrange(view: View, commit: Commit | None, now_s: float, config: Config) -> Decision:
    """Nothing is wrong: see whether nodes want to leave or to join."""
    state = view.state
    assert state.generation is not None
    generation = state.generation.value
    members = _statuses(state, generation)
    if _pausing(state, generation):
        return _paused(view, generation, members, commit, now_s, config)
    leaving = [r.member.node for r in members if r.leaving]
    if leaving:
        reason = f"node {', '.join(leaving)} leaves"
        return Decision(RequestPause(Pause(generation.number, reason), state.fences()), reason)
    stays = set(generation.member_ids())
    joiners = [m for m in _candidates(state) if m.id not in stays]
    if joiners and len(generation.members) < config.job.nodes_max:
        if now_s - view.marks.members_since_s < config.job.join_window_s:
            return Decision(None, f"node {joiners[0].node} has come: waiting for more")
        reason = f"node {', '.join(m.node for m in joiners)} joins"
        return Decision(RequestPause(Pause(generation.number, reason), state.fences()), reason)
    spare = f", {len(joiners)} in reserve" if joiners else ""
    return Decision(
        None, f"generation {generation.number} runs, nodes: {len(generation.members)}{spare}"
    )


def _paused(
    view: View,
    generation: Generation,
    members: Sequence[NodeRecord],
    commit: Commit | None,
    now_s: float,
    config: Config,
) -> Decision:
    """Workers were asked to save and leave: go on once their checkpoint is committed."""
    overdue = now_s - view.marks.pause_since_s >= config.job.stop_grace_s
    ended = _all_in(members, generation, "paused", "finished", "failed")
    if not ended and not overdue:
        return Decision(None, "waiting for the workers to save their state")
    base = base_of(view.state)
    saved = max((r.status.saved_step for r in members), default=-1)
    if not overdue and (commit is not None or saved > (base.step if base else -1)):
        return Decision(None, f"waiting for the commit of step {saved}")
    return _regroup(view, None, now_s, config)


def _candidates(state: JobState) -> list[Member]:
    """Nodes that can have a place, in the order in which they came."""
    records = sorted(state.live.values(), key=lambda r: r.create_revision)
    return [r.value.member for r in records if not r.value.leaving]


def arrange(
    previous: Sequence[Member], candidates: Sequence[Member], nodes_max: int
) -> tuple[Member, ...]:
    """Members of the next generation in rank order.

    Who was a member keeps its place; a place that fell vacant goes to the same node in a new
    incarnation, else to whoever came first, so that slices of the batch and the order of the
    reduction stand. Places nobody takes are closed.
    """
    came = {m.id: m for m in candidates}
    places: list[Member | None] = [came.pop(m.id, None) for m in previous]
    for place, member in enumerate(previous):
        if places[place] is None:
            again = next((c for c in came.values() if c.node == member.node), None)
            if again is not None:
                places[place] = came.pop(again.id)
    for place, taken in enumerate(places):
        if taken is None and came:
            places[place] = came.pop(next(iter(came)))
    chosen = [m for m in places if m is not None]
    chosen += list(came.values())
    return tuple(chosen[:nodes_max])


def _regroup(view: View, trouble: Trouble | None, now_s: float, config: Config) -> Decision:
    """A new generation from those who are there, or why it cannot be."""
    state, job = view.state, config.job
    old = state.generation.value if state.generation else None
    candidates = _candidates(state)
    chosen = arrange(old.members if old else (), candidates, job.nodes_max)
    survivors = {m.id for m in old.members} & {m.id for m in chosen} if old else set()
    waited_s = now_s - view.marks.members_since_s
    if len(chosen) < job.nodes_min:
        told = f"{len(chosen)} of at least {job.nodes_min} nodes are here"
        if chosen and waited_s >= job.members_timeout_s:
            reason = f"{told} and nobody came for {job.members_timeout_s:g} s: start more nodes"
            return Decision(Finish(Outcome(EXIT_COORDINATION, reason), state.fences()), reason)
        return Decision(None, f"waiting for members: {told}")
    if not survivors and len(chosen) < job.nodes_max and waited_s < job.join_window_s:
        return Decision(None, f"{len(chosen)} nodes are here: waiting for more")
    if not survivors:
        trouble = None  # nobody of the generation before is there: another run begins
    history = old if survivors else None
    failures = _failures(history, trouble, view.wall_s, job.restart_window_s)
    if trouble is not None and len(failures) > job.max_restart:
        reason = (
            f"workers failed {len(failures)} times within {job.restart_window_s:g} s "
            f"(--max_restart {job.max_restart}); the last time: {trouble}; what they printed is in "
            f"{job.log_dir}/workerlog.<rank> of their node"
        )
        return Decision(Finish(Outcome(EXIT_WORKER_FAILED, reason), state.fences()), reason)
    restore, refused = restore_point(state)
    if refused and restore is None:
        reason = f"every checkpoint of the job is damaged ({', '.join(refused)})"
        return Decision(Finish(Outcome(EXIT_CHECKPOINT, reason), state.fences()), reason)
    reason = str(trouble) if trouble is not None else _why(state, history, chosen)
    before = (old.number if old else 0, state.head.value.newest.generation if state.head else 0)
    generation = Generation(
        number=max(before) + 1,
        members=chosen,
        endpoint=f"{chosen[0].host}:{chosen[0].ports[0]}",
        restore=restore,
        reason=reason,
        failures=failures,
        restarts=(history.restarts if history else 0) + (1 if trouble is not None else 0),
    )
    return Decision(Propose(generation, state.fences()), reason)


def _why(state: JobState, old: Generation | None, chosen: Sequence[Member]) -> str:
    if old is None:
        return "the job goes on" if state.head is not None else "the job begins"
    if state.pause is not None:
        return state.pause.value.reason
    return f"{len(chosen)} nodes are here"


def _failures(
    old: Generation | None, trouble: Trouble | None, wall_s: float, window_s: float
) -> tuple[float, ...]:
    """Failures that count against --max_restart; losing a node is nobody's failure."""
    recent = tuple(t for t in (old.failures if old else ()) if 0 <= wall_s - t < window_s)
    own = trouble is not None and (
        trouble.blamed or trouble.collateral_only or trouble.uncommittable
    )
    return (*recent, wall_s) if own else recent


def restore_point(state: JobState) -> tuple[CommitRef | None, tuple[str, ...]]:
    """The newest commit that no live node found damaged, and the manifests passed over."""
    if state.head is None:
        return None, ()
    damaged = damaged_manifests(r.value for r in state.live.values())
    refused: list[str] = []
    for commit in (state.head.value.newest, *state.head.value.lineage):
        if commit.manifest not in damaged:
            return commit, tuple(refused)
        refused.append(commit.manifest)
    return None, tuple(refused)


def damaged_manifests(records: Iterable[NodeRecord]) -> frozenset[str]:
    return frozenset(name for record in records for name in record.status.damaged)
