"""The promises of the coordination protocol, each as a check of a whole history with its own error.

A checker looks at what etcd, the store and the workers did (``history``), never at what an agent
believed. ``test_checkers`` shows each of them a history that it must reject.
"""

from __future__ import annotations

from dataclasses import dataclass

from paddle_ft.types import CommitRef, Generation, Head
from tests.sim.history import (
    Acknowledged,
    Applied,
    Barred,
    Damaged,
    EtcdLost,
    Exited,
    Formed,
    Gone,
    History,
    Nodes,
    Removed,
    Saved,
    Stored,
    Struck,
    Write,
)
from tests.sim.training import State

WATCH_DELAY_MAX_S = 1.5
BARRED_WORKS_S = 10.0
"""So long a node may work on in quarantine, while a leader is lost or nobody reaches etcd."""
LEADERS_KEYS = ("generation", "head", "pause", "outcome")


class Broken(AssertionError):
    """A promise was broken."""


class BrokeSingleWriter(Broken):
    """Somebody wrote what only the leader writes, without being it."""


class HeadWentBack(Broken):
    """A commit is not the next one, or has an earlier state than the one before."""


class GenerationWentBack(Broken):
    """The number of a generation was used before."""


class BrokeChain(Broken):
    """A commit does not continue what its generation started from, or committed last."""


class BrokeSampleAccounting(Broken):
    """A committed state was not trained on exactly the samples up to its position."""


class SteppedApart(Broken):
    """Ranks of one group went on from different states."""


class LostStep(Broken):
    """A step that a living process had applied is done again."""


class RedidCommitted(Broken):
    """Workers went on from a state that is older than, or beside, what is committed."""


class AskedTheBarred(Broken):
    """A node in quarantine was given a place."""


class BarredTooMany(Broken):
    """The leader put a node in quarantine that the job could not do without."""


class LostCheckpoint(Broken):
    """A checkpoint that the head keeps, or that was acknowledged, cannot be loaded."""


class NoProgress(Broken):
    """Nothing goes wrong any more, and yet the job does not come to its end."""


class CountedFailure(Broken):
    """A failure is held against the job that nobody's worker had."""


class WrongExitCode(Broken):
    """A launcher ended with another code than is documented."""


def check_all(history: History) -> None:
    """Raises the first broken promise."""
    for check in CHECKS:
        check(history)


# ---------------------------------------------------------------- single writer


def check_single_writer(history: History) -> None:
    """What leaders write is written by who holds the leader key, as decided in that term."""
    for fact in history.facts:
        if not isinstance(fact, Write) or fact.key not in LEADERS_KEYS:
            continue
        if not fact.sender or (fact.sender, fact.term) != (fact.leader, fact.leader_term):
            raise BrokeSingleWriter(
                f"{fact.at_s:.3f}: {fact.key} was written by {fact.sender or 'nobody'} for term "
                f"{fact.term}, while {fact.leader or 'nobody'} led in term {fact.leader_term}"
            )


# ---------------------------------------------------------------- heads and generations


def _damaged(history: History) -> frozenset[str]:
    """Manifests that a fault made unusable, at any time."""
    gone = {f.name for f in history.facts if isinstance(f, Damaged)}
    needing = {
        f.name for f in history.facts if isinstance(f, Stored) and not gone.isdisjoint(f.needs)
    }
    return frozenset(gone | needing)


def check_head(history: History) -> None:
    """Sequences grow by one; steps grow, unless what lies between was damaged."""
    damaged = _damaged(history)
    before: Head | None = None
    fresh_etcd = True
    acknowledged = 0
    for fact in history.facts:
        if isinstance(fact, EtcdLost):
            before, fresh_etcd = None, True
        elif isinstance(fact, Acknowledged):
            acknowledged = max(acknowledged, fact.commit.sequence)
        elif isinstance(fact, Write) and fact.key == "head":
            _check_next_head(fact, before, fresh_etcd, acknowledged, damaged)
            before, fresh_etcd = fact.value, False


def _check_next_head(
    fact: Write, before: Head | None, fresh_etcd: bool, acknowledged: int, damaged: frozenset[str]
) -> None:
    now: CommitRef = fact.value.newest
    if before is None:
        if now.sequence < acknowledged:
            raise HeadWentBack(
                f"{fact.at_s:.3f}: a new etcd begins with #{now.sequence}, but #{acknowledged} "
                f"was acknowledged"
            )
        if not fresh_etcd and now.sequence != 1:
            raise HeadWentBack(f"{fact.at_s:.3f}: the first commit is #{now.sequence}")
        return
    then = before.newest
    if now.sequence != then.sequence + 1:
        raise HeadWentBack(f"{fact.at_s:.3f}: #{now.sequence} follows #{then.sequence}")
    kept = {c.manifest for c in fact.value.lineage}
    passed_over = then.manifest not in kept
    if passed_over and then.manifest not in damaged:
        raise HeadWentBack(f"{fact.at_s:.3f}: #{now.sequence} drops #{then.sequence}, intact")
    if now.step <= then.step and not passed_over:
        raise HeadWentBack(
            f"{fact.at_s:.3f}: #{now.sequence} has step {now.step} after step {then.step}"
        )


def check_generations(history: History) -> None:
    """Numbers grow; where etcd was lost, they are higher than that of any acknowledged commit."""
    number = committed = acknowledged = 0
    for fact in history.facts:
        if isinstance(fact, EtcdLost):
            number, committed = 0, acknowledged
        elif isinstance(fact, Acknowledged):
            acknowledged = max(acknowledged, fact.commit.generation)
        elif isinstance(fact, Write) and fact.key == "head":
            committed = max(committed, fact.value.newest.generation)
        elif isinstance(fact, Write) and fact.key == "generation":
            if fact.value.number <= max(number, committed):
                raise GenerationWentBack(
                    f"{fact.at_s:.3f}: generation {fact.value.number} after {number}, with "
                    f"commits of generation {committed}"
                )
            number = fact.value.number


def check_chain(history: History) -> None:
    """Generations start where head stands, and their commits continue from there, each other."""
    damaged = _damaged(history)
    saved = {f.manifest: f for f in history.facts if isinstance(f, Saved)}
    head: Head | None = None
    generation: Generation | None = None
    last: Saved | None = None
    for fact in history.facts:
        if isinstance(fact, EtcdLost):
            head, generation, last = None, None, None
        elif isinstance(fact, Write) and fact.key == "generation":
            generation, restore = fact.value, fact.value.restore
            last = saved.get(restore.manifest) if restore is not None else None
            _check_start(fact.at_s, fact.value, head, damaged)
        elif isinstance(fact, Write) and fact.key == "head":
            head = fact.value
            if fact.value.newest.manifest in saved and generation is not None:
                last = _check_commit(fact, generation, saved[fact.value.newest.manifest], last)


def _check_start(
    at_s: float, generation: Generation, head: Head | None, damaged: frozenset[str]
) -> None:
    candidates = (head.newest, *head.lineage) if head else ()
    intact = [c for c in candidates if c.manifest not in damaged]
    if generation.restore == (candidates[0] if candidates else None):
        return
    passed_over = (
        list(candidates[: candidates.index(generation.restore)])
        if (generation.restore in candidates)
        else list(candidates)
    )
    if generation.restore is None or any(c in intact for c in passed_over):
        raise BrokeChain(
            f"{at_s:.3f}: generation {generation.number} starts from "
            f"{_name(generation.restore)}, but head is at {_name(candidates[0])}"
        )


def _check_commit(fact: Write, generation: Generation, saved: Saved, last: Saved | None) -> Saved:
    now: CommitRef = fact.value.newest
    where = f"{fact.at_s:.3f}: #{now.sequence} (step {now.step})"
    if now.generation != generation.number:
        raise BrokeChain(f"{where} of generation {now.generation} came in {generation.number}")
    origin = generation.restore.manifest if generation.restore else ""
    for state in saved.states:
        if state.origin != origin and not generation.in_place:
            raise BrokeChain(
                f"{where} continues {state.origin or 'the beginning'}, not "
                f"{_name(generation.restore)}, which its generation restored"
            )
    if len({s.path for s in saved.states}) != 1:
        raise BrokeChain(f"{where} is put together from different groups of ranks")
    if last is not None and not saved.states[0].continues(last.states[0]):
        raise BrokeChain(
            f"{where} does not continue step {last.step}, which its generation began with or "
            f"committed last"
        )
    return saved


def _name(ref: CommitRef | None) -> str:
    return f"#{ref.sequence}" if ref else "the beginning"


def check_samples(history: History) -> None:
    """Every committed state was trained on each sample before its position exactly once."""
    committed = {h.newest.manifest for h in history.heads()}
    for fact in history.facts:
        if not isinstance(fact, Saved) or fact.manifest not in committed:
            continue
        position = fact.step * history.batch
        wanted = ((0, position),) if position else ()
        if fact.position != position:
            raise BrokeSampleAccounting(
                f"step {fact.step} says that it is at sample {fact.position}, not {position}"
            )
        for state in fact.states:
            if state.used != wanted or state.step != fact.step:
                raise BrokeSampleAccounting(
                    f"step {fact.step} was trained on {state.used}, not on {wanted}"
                )


# ---------------------------------------------------------------- states in memory


def check_in_memory(history: History) -> None:
    """Ranks that step together are equal, go on from the furthest that is left, and redo nothing
    that is committed."""
    saved = {f.manifest: f for f in history.facts if isinstance(f, Saved)}
    generations: dict[int, Generation] = {}
    held: dict[int, _Held] = {}
    for fact in history.facts:
        if isinstance(fact, EtcdLost):
            held.clear()
        elif isinstance(fact, Write) and fact.key == "generation":
            generations[fact.value.number] = fact.value
        elif isinstance(fact, Gone):
            held.pop(fact.worker, None)
        elif isinstance(fact, Formed):
            _check_formed(fact, generations[fact.generation], saved, held)
            for worker, member in zip(fact.workers, fact.members, strict=True):
                held[worker] = _Held(member, fact.generation, fact.states[0])
        elif isinstance(fact, Applied):
            for worker, member in zip(fact.workers, fact.members, strict=True):
                held[worker] = _Held(member, fact.generation, fact.state)


@dataclass(frozen=True, slots=True)
class _Held:
    """What one process has in memory."""

    member: str
    generation: int
    state: State


def _check_formed(
    fact: Formed, generation: Generation, saved: dict[str, Saved], held: dict[int, _Held]
) -> None:
    where, state = f"{fact.at_s:.3f}: group {fact.run}", fact.states[0]
    if any(other != state for other in fact.states):
        told = ", ".join(f"{s.step} by {s.path}" for s in fact.states)
        raise SteppedApart(f"{where} goes on from different states: {told}")
    restore = saved.get(generation.restore.manifest) if generation.restore else None
    if restore is not None and not state.continues(restore.states[0]):
        raise RedidCommitted(
            f"{where} goes on from step {state.step} by {state.path}, which does not continue "
            f"the committed step {restore.step} by {restore.states[0].path}"
        )
    furthest = max((s.step for s in fact.brought), default=state.step)
    if state.step < furthest:
        raise LostStep(f"{where} goes on from step {state.step}, one of its ranks had {furthest}")
    for worker, had in held.items():
        goes_on = (
            had.member in generation.member_ids()
            and generation.workers_since(had.member) <= had.generation
        )
        if goes_on and had.state.step > state.step:
            raise LostStep(
                f"{where} of generation {generation.number} goes on from step {state.step}, but "
                f"process {worker}, which is left, had applied {had.state.step}"
            )


# ---------------------------------------------------------------- the store


def check_store(history: History) -> None:
    """What head keeps stays complete; what was acknowledged is found again without etcd."""
    damaged = _damaged(history)
    needs = {f.name: f.needs for f in history.facts if isinstance(f, Stored) and f.needs}
    there: set[str] = set()
    head: Head | None = None
    for fact in history.facts:
        if isinstance(fact, Stored):
            there.add(fact.name)
            continue
        if isinstance(fact, Removed):
            there.discard(fact.name)
        elif isinstance(fact, Write) and fact.key == "head":
            head = fact.value
        else:
            continue
        for ref in (head.newest, *head.lineage) if head else ():
            missing = {ref.manifest, *needs.get(ref.manifest, ())} - there
            if missing and ref.manifest not in damaged:
                raise LostCheckpoint(
                    f"{fact.at_s:.3f}: #{ref.sequence} (step {ref.step}) is kept by head, but "
                    f"{min(missing)} is not in the store"
                )


# ---------------------------------------------------------------- quarantine


def check_quarantine(history: History) -> None:
    """Who decides on a view in which a node is in quarantine gives it no place, nor does it work on
    for long; and the leader bars nobody that, in its view, the job cannot do without."""
    barred: dict[str, Barred] = {}
    looks: list[tuple[int, int]] = []
    """Revisions, and how many nodes out of quarantine were there to stay then."""
    staying: frozenset[str] = frozenset()
    for fact in history.facts:
        if isinstance(fact, EtcdLost):
            barred, looks, staying = {}, [], frozenset()
        elif isinstance(fact, Nodes):
            staying = fact.nodes
        elif isinstance(fact, Barred) and fact.lifted:
            barred.pop(fact.node, None)
        elif isinstance(fact, Barred):
            _check_bar(fact, looks, history.nodes_min)
            barred.setdefault(fact.node, fact)
        elif isinstance(fact, Write) and fact.key == "generation":
            for member in fact.value.members:
                bar = barred.get(member.node)
                if bar is not None and bar.revision <= fact.seen:
                    raise AskedTheBarred(
                        f"{fact.at_s:.3f}: generation {fact.value.number} has a place for node "
                        f"{member.node}, which is in quarantine since {bar.at_s:.3f}"
                    )
        elif isinstance(fact, Applied) and barred:
            _check_at_work(fact, barred)
        if isinstance(fact, Nodes | Barred):
            looks.append((fact.revision, len(staying - barred.keys())))


def _check_bar(fact: Barred, looks: list[tuple[int, int]], nodes_min: int) -> None:
    if not fact.sender:
        return
    there = next((count for revision, count in reversed(looks) if revision <= fact.seen), 0)
    if there <= nodes_min:
        raise BarredTooMany(
            f"{fact.at_s:.3f}: {fact.sender} puts node {fact.node} in quarantine, when {there} "
            f"nodes were there and {nodes_min} are needed"
        )


def _check_at_work(fact: Applied, barred: dict[str, Barred]) -> None:
    for member in fact.members:
        bar = barred.get(member.rpartition(".")[0])
        if bar is not None and fact.at_s - bar.at_s > BARRED_WORKS_S:
            raise AskedTheBarred(
                f"{fact.at_s:.3f}: {member} still applies steps, though its node is in quarantine "
                f"since {bar.at_s:.3f}"
            )


# ---------------------------------------------------------------- the end


def check_end(history: History) -> None:
    """The job ends because training is complete, or for a reason that is there."""
    outcomes = [f for f in history.facts if isinstance(f, Write) and f.key == "outcome"]
    if not outcomes:
        return
    heads, code = history.heads(), outcomes[0].value.exit_code
    at = heads[-1].newest.step if heads else 0
    if code == 0 and at != history.steps:
        raise NoProgress(f"the job says that it is complete at step {at} of {history.steps}")
    if code == 5:
        refs = (heads[-1].newest, *heads[-1].lineage) if heads else ()
        if any(c.manifest not in _damaged(history) for c in refs):
            raise NoProgress(f"the job gives up, but not everything is damaged: {outcomes[0]}")
    elif code == 3:
        gave_up_s = outcomes[0].at_s
        changed_s = [
            f.at_s
            for f in history.facts
            if isinstance(f, Nodes)
            and f.at_s > gave_up_s - history.members_timeout_s + WATCH_DELAY_MAX_S
            and f.at_s < gave_up_s - WATCH_DELAY_MAX_S
        ]
        if changed_s:
            raise NoProgress(
                f"{gave_up_s:.3f}: the job gives up waiting for nodes, and yet they changed "
                f"at {changed_s[-1]:.3f}"
            )
    elif code not in (0, 1):
        raise NoProgress(f"the job ends with {outcomes[0].value}")


def check_failures(history: History) -> None:
    """Failures are counted against --max_restart only if something can have failed.

    Parts that were begun too many commits ago make no checkpoint, and nobody has to fail for that.
    When all is committed, workers end one by one: who is asked to form another group may miss them.
    """
    struck = False
    for fact in history.facts:
        if isinstance(fact, Struck):
            struck = True
        elif isinstance(fact, Write) and fact.key == "head":
            struck = struck or fact.value.newest.step == history.steps
        elif not isinstance(fact, Write) or fact.key != "generation":
            continue
        elif "cannot be committed" in fact.value.reason:
            struck = True
        elif fact.value.failures and not struck:
            raise CountedFailure(
                f"{fact.at_s:.3f}: generation {fact.value.number} counts a failure "
                f"({fact.value.reason}), though no worker was touched"
            )


def check_exit_codes(history: History) -> None:
    """Launchers end with the outcome's code, or with that of the signal they got."""
    outcome: int | None = None
    for fact in history.facts:
        if isinstance(fact, Write) and fact.key == "outcome":
            outcome = fact.value.exit_code
        elif isinstance(fact, Exited):
            allowed = {outcome} | ({fact.asked} if fact.asked else set())
            if fact.exit_code not in allowed - {None}:
                raise WrongExitCode(
                    f"{fact.at_s:.3f}: {fact.node} ended with {fact.exit_code}, not one of "
                    f"{allowed}"
                )


CHECKS = (
    check_single_writer,
    check_generations,
    check_head,
    check_chain,
    check_samples,
    check_in_memory,
    check_store,
    check_end,
    check_failures,
    check_exit_codes,
    check_quarantine,
)
