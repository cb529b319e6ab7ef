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

from collections.abc import Iterable, Sequence

from paddle_ft.checkpoint.retention import Keep, kept_lineage, next_head, rule_of
from paddle_ft.config import Config
from paddle_ft.coordination.actions import (
    Bar,
    Campaign,
    Commit,
    Decision,
    Finish,
    ImportHead,
    Propose,
    RequestPause,
    ScanStore,
)
from paddle_ft.coordination.grouping import (
    LOST_PEER_PATIENCE_S,
    arrange,
    candidates_of,
    failures_within,
    goes_on,
    in_time,
    since_of,
    stumble_of,
    verdict_on,
)
from paddle_ft.coordination.schema import JobState
from paddle_ft.coordination.view import Trouble, View, all_in, find_trouble, statuses_of
from paddle_ft.errors import (
    EXIT_CHECKPOINT,
    EXIT_COORDINATION,
    EXIT_DONE,
    EXIT_SAME_FAILURE,
    EXIT_STORE,
    EXIT_WORKER_FAILED,
)
from paddle_ft.health.quarantine import due
from paddle_ft.types import (
    CommitRef,
    Generation,
    Head,
    Member,
    NodeRecord,
    Outcome,
    Part,
    Pause,
)

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
        if others and (state.nodes[view.me].value.leaving or view.me not in state.live):
            return Decision(None, "leaving or in quarantine: others lead")
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
    members = statuses_of(state, generation)
    fatal = [r for r in members if r.status.fatal and r.status.generation == generation.number]
    if fatal:
        status = fatal[0].status
        return Decision(Finish(Outcome(status.fatal, status.reason), fences), status.reason)
    commit = next_commit(state, rule_of(config.checkpoint))
    if commit is not None and not view.commit_running:
        return Decision(commit, f"all parts of step {commit.step} are written")
    if all_in(members, generation, "finished"):
        return _finished(view, members, commit, now_s, config)
    bad = due(state, view.wall_s, config.health, config.job.nodes_min)
    if bad is not None:
        return Decision(Bar(*bad, fences), f"node {bad[0]} goes to quarantine: {bad[1]}")
    trouble = find_trouble(state)
    if trouble is not None and not (trouble.collateral_only and _pausing(state, generation)):
        return _recover(view, trouble, commit, now_s, config)
    return _rearrange(view, commit, now_s, config)


def _pausing(state: JobState, generation: Generation) -> bool:
    """Workers were asked to leave. Those who hear of it late only see that their peers go."""
    return state.pause is not None and state.pause.value.generation == generation.number


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
    stays = goes_on(view.state, candidates_of(view.state), trouble)
    patience_s = LOST_PEER_PATIENCE_S if stays else config.etcd.lease_ttl_s + 2
    if trouble.collateral_only and waited_s < patience_s:
        return Decision(None, f"waiting to learn who failed: {trouble}")
    if not stays and waited_s < config.checkpoint.persist_grace_s:
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
    if base is None or state.generation is None:
        return "training is complete"
    generation = state.generation.value
    anew = not generation.restarts and not generation.in_place
    if anew and generation.restore == base:
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
    members = statuses_of(state, generation)
    if _pausing(state, generation):
        return _paused(view, generation, members, commit, now_s, config)
    leaving = [r.member.node for r in members if r.leaving]
    stays = set(generation.member_ids())
    joiners = [m for m in candidates_of(state) if m.id not in stays]
    wanted = joiners and len(generation.members) < config.job.nodes_max
    if leaving:
        reason = f"node {', '.join(leaving)} leaves"
    elif wanted:
        reason = f"node {', '.join(m.node for m in joiners)} joins"
    else:
        spare = f", {len(joiners)} in reserve" if joiners else ""
        told = f"generation {generation.number} runs, nodes: {len(generation.members)}{spare}"
        return Decision(None, told)
    planned = _in_place(view, leaving, joiners, config, reason)
    if planned is not None:
        return planned
    if not leaving and now_s - view.marks.members_since_s < config.job.join_window_s:
        return Decision(None, f"node {joiners[0].node} has come: waiting for more")
    return Decision(RequestPause(Pause(generation.number, reason), state.fences()), reason)


def _in_place(
    view: View, leaving: Sequence[str], joiners: Sequence[Member], config: Config, reason: str
) -> Decision | None:
    """A change of members that running workers take in their stride; None if they cannot."""
    state = view.state
    assert state.generation is not None
    old = state.generation.value
    if not goes_on(state, old.members, None):
        return None
    if not all_in(statuses_of(state, old), old, "running"):
        return Decision(None, f"{reason}, once the workers of generation {old.number} run")
    prompt = in_time(state, candidates_of(state), config.job.nodes_min)
    chosen = arrange(old.members, prompt, config.job.nodes_max)
    carried = {m.id for m in old.members} & {m.id for m in chosen}
    if leaving:
        if len(chosen) < config.job.nodes_min or not carried:
            return None
    elif len(chosen) <= len(old.members):
        return Decision(None, f"node {joiners[0].node} has come and prepares its workers")
    restore, refused = restore_point(state)
    if refused and restore is None:  # whose state gets lost now would begin anew
        return Decision(None, f"{reason}, once there is a checkpoint that is not damaged")
    return _propose(view, chosen, reason, None, old)


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
    ended = all_in(members, generation, "paused", "finished", "failed")
    if not ended and not overdue:
        return Decision(None, "waiting for the workers to save their state")
    base = base_of(view.state)
    saved = max((r.status.saved_step for r in members), default=-1)
    if not overdue and (commit is not None or saved > (base.step if base else -1)):
        return Decision(None, f"waiting for the commit of step {saved}")
    return _regroup(view, None, now_s, config)


def _regroup(view: View, trouble: Trouble | None, now_s: float, config: Config) -> Decision:
    """A new generation from those who are there, or why it cannot be."""
    state, job = view.state, config.job
    old = state.generation.value if state.generation else None
    candidates = candidates_of(state)
    if old and goes_on(state, candidates, trouble):
        candidates = in_time(state, candidates, job.nodes_min)
    chosen = arrange(old.members if old else (), candidates, job.nodes_max)
    survivors = {m.id for m in old.members} & {m.id for m in chosen} if old else set()
    waited_s = now_s - view.marks.members_since_s
    if len(chosen) < job.nodes_min:
        told = f"{len(chosen)} of at least {job.nodes_min} nodes are here"
        if state.quarantine:
            told += f" ({', '.join(sorted(state.quarantine))} in quarantine)"
        if chosen and waited_s >= job.members_timeout_s:
            reason = f"{told} and nobody came for {job.members_timeout_s:g} s: start more nodes"
            return Decision(Finish(Outcome(EXIT_COORDINATION, reason), state.fences()), reason)
        return Decision(None, f"waiting for members: {told}")
    if not survivors and len(chosen) < job.nodes_max and waited_s < job.join_window_s:
        return Decision(None, f"{len(chosen)} nodes are here: waiting for more")
    if not survivors:
        trouble = None  # nobody of the generation before is there: another run begins
    history = old if survivors else None
    on = history is not None and goes_on(state, chosen, trouble)
    failures = failures_within(history, trouble, view.wall_s, job.restart_window_s, on)
    if trouble is not None and len(failures) > job.max_restart:
        reason = (
            f"workers failed {len(failures)} times within {job.restart_window_s:g} s "
            f"(--max_restart {job.max_restart}); the last time: {trouble}; what they printed is in "
            f"{job.log_dir}/workerlog.<rank> of their node"
        )
        return Decision(Finish(Outcome(EXIT_WORKER_FAILED, reason), state.fences()), reason)
    verdict = verdict_on(stumble_of(history, trouble))
    if verdict:
        reason = f"{verdict}; what it printed is in {job.log_dir}/workerlog.<rank> there"
        return Decision(Finish(Outcome(EXIT_SAME_FAILURE, reason), state.fences()), reason)
    restore, refused = restore_point(state)
    if refused and restore is None:
        reason = f"every checkpoint of the job is damaged ({', '.join(refused)})"
        return Decision(Finish(Outcome(EXIT_CHECKPOINT, reason), state.fences()), reason)
    reason = str(trouble) if trouble is not None else _why(state, history, chosen)
    return _propose(view, chosen, reason, trouble, history, failures)


def _propose(
    view: View,
    chosen: Sequence[Member],
    reason: str,
    trouble: Trouble | None,
    history: Generation | None,
    failures: tuple[float, ...] | None = None,
) -> Decision:
    """The next generation. ``history``: the one before, if some of its members go on."""
    state = view.state
    old = state.generation.value if state.generation else None
    before = (old.number if old else 0, state.head.value.newest.generation if state.head else 0)
    number = max(before) + 1
    on = history is not None and goes_on(state, chosen, trouble)
    generation = Generation(
        number=number,
        members=tuple(chosen),
        endpoint=f"{chosen[0].host}:{chosen[0].rendezvous_port(number)}",
        restore=restore_point(state)[0],
        reason=reason,
        failures=(history.failures if history else ()) if failures is None else failures,
        restarts=(history.restarts if history else 0) + (1 if trouble is not None else 0),
        stumble=stumble_of(history, trouble),
        since=since_of(history, chosen, number) if on else (),
        planned=on and trouble is None,
    )
    return Decision(Propose(generation, state.fences()), reason)


def _why(state: JobState, old: Generation | None, chosen: Sequence[Member]) -> str:
    if old is None:
        return "the job goes on" if state.head is not None else "the job begins"
    if state.pause is not None:
        return state.pause.value.reason
    return f"{len(chosen)} nodes are here"


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
