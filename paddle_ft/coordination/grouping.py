"""Who is in the next generation, at which place, and whether workers go on as they are. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from paddle_ft.coordination.schema import JobState
from paddle_ft.coordination.view import Trouble
from paddle_ft.errors import EXIT_COLLECTIVE
from paddle_ft.types import Generation, Member, Stumble

LOST_PEER_PATIENCE_S = 0.5
"""How long workers that only lost a peer wait for the one that failed to be found, before they form
a group again with everybody."""


def goes_on(state: JobState, chosen: Sequence[Member], trouble: Trouble | None) -> bool:
    """Whether workers of the present generation go on in the next one with what they have.

    Some of them must be alive, their script must have said that it can, and nobody's that it
    cannot.
    """
    if state.generation is None or (trouble is not None and trouble.uncommittable):
        return False
    old = state.generation.value
    if state.pause is not None and state.pause.value.generation == old.number:
        return False  # they were told to save and leave
    stay = {member.id for member in chosen}
    statuses = [
        state.live[m].value.status for m in old.member_ids() if m in stay and m in state.live
    ]
    told = [s for s in statuses if s.generation == old.number]
    says = {s.recovery for s in told}
    return "in_place" in says and "restart" not in says and any(s.alive for s in told)


def since_of(old: Generation | None, chosen: Sequence[Member], number: int) -> tuple[int, ...]:
    """``Generation.since`` for workers that go on: a member of ``old`` keeps its date."""
    were = set(old.member_ids()) if old else set()
    return tuple(old.workers_since(m.id) if old and m.id in were else number for m in chosen)


SAME_FAILURES_MAX = 3
"""So many attempts that end at the same step in the same way: more would end there, too."""
EARLY_FAILURES_MAX = 2
"""The same, of attempts that do not come to a step at all."""
LOST_PEERS_MAX = 10
"""So many groups in a row that break at the same step although nobody has died."""
OF_THE_SCRIPT = (-4, -6, -7, -8, -11)
"""Ends by SIGILL, SIGABRT, SIGBUS, SIGFPE and SIGSEGV; others come from outside."""


def stumble_of(old: Generation | None, trouble: Trouble | None) -> Stumble | None:
    """What the workers' own failure in ``trouble`` comes to, with those before it."""
    if trouble is None or trouble.lost:
        return None
    blamed = trouble.failed[:1] if trouble.collateral_only else trouble.blamed
    for record in blamed:
        status = record.status
        if status.collateral or status.exit_code > 0 or status.exit_code in OF_THE_SCRIPT:
            before = old.stumble if old else None
            exit_code = EXIT_COLLECTIVE if status.collateral else status.exit_code
            same = before is not None and (before.step, before.exit_code) == (
                status.failed_at,
                exit_code,
            )
            nodes = (*(before.nodes if before and same else ()), record.member.node)
            return Stumble(status.failed_at, exit_code, nodes)
    return None


def verdict_on(stumble: Stumble | None) -> str:
    """Why the job cannot go on at all; "" if it may."""
    if stumble is None:
        return ""
    times, how = len(stumble.nodes), f"exit code {stumble.exit_code}"
    if stumble.exit_code == EXIT_COLLECTIVE:
        if times < LOST_PEERS_MAX:
            return ""
        return (
            f"the workers have lost each other {times} times after step {stumble.step} while all "
            f"of them lived: look at the network between the nodes"
        )
    if times < (SAME_FAILURES_MAX if stumble.step else EARLY_FAILURES_MAX):
        return ""
    where = f"after step {stumble.step}" if stumble.step else "before its first step"
    nodes = ", ".join(dict.fromkeys(stumble.nodes))
    return (
        f"a worker ended with {how} {where} in each of the last {times} attempts (on {nodes}): it "
        f"is the script or its data and not a node, so starting it again does not help"
    )


def candidates_of(state: JobState) -> list[Member]:
    """Nodes that can have a place, in the order in which they came."""
    records = sorted(state.live.values(), key=lambda r: r.create_revision)
    return [r.value.member for r in records if not r.value.leaving]


def in_time(state: JobState, candidates: Sequence[Member], nodes_min: int) -> list[Member]:
    """``candidates`` without those that would keep workers waiting which could go on at once.

    A newcomer whose workers are not at the door yet joins later, unless there are too few without.
    """
    assert state.generation is not None
    members = set(state.generation.value.member_ids())
    prompt = [m for m in candidates if m.id in members or state.live[m.id].value.status.ready]
    return prompt if len(prompt) >= nodes_min else list(candidates)


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


def failures_within(
    old: Generation | None,
    trouble: Trouble | None,
    wall_s: float,
    window_s: float,
    in_place: bool,
) -> tuple[float, ...]:
    """Failures that count against --max_restart.

    Losing a node is nobody's failure, nor is a group that breaks while all live, in place.
    """
    recent = tuple(t for t in (old.failures if old else ()) if 0 <= wall_s - t < window_s)
    own = trouble is not None and (
        trouble.blamed or trouble.uncommittable or (trouble.collateral_only and not in_place)
    )
    return (*recent, wall_s) if own else recent
