"""The life cycle of one node's workers, rule by rule (A7)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paddle_ft.agent.supervise import (
    COLLATERAL_PATIENCE_S,
    Group,
    Leave,
    LocalView,
    Publish,
    StartWorkers,
    StopWorkers,
    TellPause,
    Worker,
    describe_end,
    status_of,
    supervise,
)
from paddle_ft.config import JobConfig
from paddle_ft.coordination.schema import JobState
from paddle_ft.errors import EXIT_COLLECTIVE, EXIT_PAUSED
from paddle_ft.types import (
    CommitRef,
    Generation,
    Head,
    Member,
    NodeRecord,
    NodeStatus,
    Outcome,
    Pause,
    Versioned,
)
from tests.unit.members import member

ME, OTHER = (member(node, slots=2) for node in "ab")
CONFIG = JobConfig()


def state(number: int = 1, members: tuple[Member, ...] = (ME,), **more: object) -> JobState:
    generation = Generation(number, members, "127.0.0.1:1")
    nodes = {m.id: Versioned(NodeRecord(m), i + 1, i + 1) for i, m in enumerate((ME, OTHER))}
    base = JobState(nodes=nodes, generation=Versioned(generation, 9, 9))
    return replace(base, **more)


def view(
    *workers: Worker, of: int = 1, told: bool = False, state: JobState, **more: object
) -> LocalView:
    group = Group(of, workers, told) if workers else None
    base = LocalView(me=ME.id, state=state, group=group, launched=of if workers else 0)
    return replace(base, **more)


def acts(local: LocalView, now_s: float = 100.0, config: JobConfig = CONFIG) -> tuple[object, ...]:
    published = Publish(status_of(local), local.leaving_since_s is not None)
    return supervise(local, published, now_s, config)


RUNNING = (Worker(0, session=True), Worker(1, session=True))
PAUSED = (Worker(0, EXIT_PAUSED, "paused", step=7), Worker(1, EXIT_PAUSED, "paused", step=7))


def head(step: int) -> Versioned[Head]:
    return Versioned(Head(CommitRef(1, step, 1, "m", "d")), 3, 3)


def test_workers_of_a_generation_are_started_once() -> None:
    now = state()
    assert acts(view(state=now)) == (StartWorkers(now.generation.value),)
    assert acts(view(*RUNNING, state=now)) == ()
    ended = (Worker(0, 0, "done"), Worker(1, 0, "done"))
    assert acts(view(*ended, state=now)) == ()


def test_who_is_not_a_member_starts_nothing() -> None:
    assert acts(view(state=state(members=(OTHER,)))) == ()


def test_workers_of_an_old_generation_end_before_new_ones_start() -> None:
    now = state(number=2)
    assert acts(view(*RUNNING, state=now)) == (StopWorkers("generation 1 is over"),)
    half = (Worker(0, -9, stopped=True), Worker(1))
    assert acts(view(*half, state=now)) == (StopWorkers("generation 1 is over"),)
    both = (Worker(0, -9, stopped=True), Worker(1, -9, stopped=True))
    assert acts(view(*both, state=now)) == (StartWorkers(now.generation.value),)


def test_a_change_is_published_before_anything_else() -> None:
    local = view(Worker(0, -9), Worker(1), state=state())
    told = supervise(local, Publish(NodeStatus("running", 1), False), 100.0, CONFIG)
    status = NodeStatus("failed", 1, "rank 0 was killed by SIGKILL", exit_code=-9, alive=1)
    assert told[0] == Publish(status, False)
    assert told[1] == StopWorkers("rank 0 was killed by SIGKILL")


def test_the_culprit_is_named_not_who_lost_it() -> None:
    local = view(
        Worker(0, EXIT_COLLECTIVE, "collective", "peer closed", ended_s=1.0),
        Worker(1, -11, ended_s=2.0),
        state=state(),
    )
    status = status_of(local)
    assert (status.reason, status.collateral) == ("rank 1 was killed by SIGSEGV", False)


def test_an_end_in_the_middle_of_a_session_is_a_failure_whatever_its_code() -> None:
    """``os._exit(0)``, or a library that does so; a script without a session may just end."""
    quiet = Worker(1, 0, session=True)
    status = status_of(view(Worker(0), quiet, state=state()))
    assert (status.state, status.reason) == ("failed", describe_end(quiet))
    assert "exit code 0" in status.reason
    both = (Worker(0, 0), Worker(1, 0))
    assert status_of(view(*both, state=state())).state == "finished"


def test_a_worker_that_only_lost_a_peer_gets_patience() -> None:
    """The real culprit may be here and not reaped yet; stopping it would hide it."""
    local = view(Worker(0, EXIT_COLLECTIVE, ended_s=99.9), Worker(1), state=state())
    assert status_of(local).collateral
    assert acts(local, now_s=100.0) == ()
    (stop,) = acts(local, now_s=99.9 + COLLATERAL_PATIENCE_S)
    assert isinstance(stop, StopWorkers)


def test_workers_the_agent_ended_did_not_fail() -> None:
    local = view(Worker(0, -9, stopped=True), Worker(1, -9, stopped=True), state=state())
    assert status_of(local).state == "idle"


def test_a_fatal_farewell_counts_whatever_else_happened() -> None:
    local = view(Worker(0, -9), Worker(1, 5, "fatal", "another model", fatal_code=5), state=state())
    assert (status_of(local).fatal, status_of(local).reason) == (5, "another model")


def test_pause_is_told_once_and_reported_with_its_step() -> None:
    now = state(pause=Versioned(Pause(1, "node b joins"), 4, 4))
    assert acts(view(*RUNNING, state=now)) == (TellPause("node b joins"),)
    assert acts(view(*RUNNING, told=True, state=now)) == ()
    status = status_of(view(*PAUSED, told=True, state=now))
    assert (status.state, status.saved_step) == ("paused", 7)


def test_a_pause_of_another_generation_is_not_ours() -> None:
    now = state(pause=Versioned(Pause(5, "later"), 4, 4))
    assert acts(view(*RUNNING, state=now)) == ()


def test_scripts_without_a_session_pause_by_ending() -> None:
    now = state(pause=Versioned(Pause(1, "node b joins"), 4, 4))
    (stop,) = acts(view(Worker(0), Worker(1), state=now))
    assert stop == StopWorkers("node b joins", gently=True)
    gone = (Worker(0, -15, stopped=True), Worker(1, -9, stopped=True))
    status = status_of(view(*gone, told=True, state=now))
    assert (status.state, status.saved_step) == ("paused", -1)


def test_the_end_of_the_job_is_followed_with_its_code() -> None:
    over = state(outcome=Versioned(Outcome(1, "too many failures"), 5, 5))
    assert acts(view(*RUNNING, state=over)) == (StopWorkers("too many failures"),)
    ended = (Worker(0, -9, stopped=True), Worker(1, -9, stopped=True))
    assert acts(view(*ended, state=over)) == (Leave(1, "too many failures"),)


class TestLeaving:
    """A node that was asked to stop (SIGTERM, Ctrl-C)."""

    def leaving(self, *workers: Worker, state: JobState, **more: object) -> LocalView:
        return view(*workers, state=state, leaving_since_s=90.0, leaving_code=143, **more)

    def alone(self, **more: object) -> JobState:
        now = state(**more)
        return replace(now, nodes={ME.id: Versioned(NodeRecord(ME, leaving=True), 1, 1)})

    def test_it_waits_until_its_last_state_is_committed(self) -> None:
        assert acts(self.leaving(*PAUSED, state=self.alone(head=head(6)))) == ()
        (leave,) = acts(self.leaving(*PAUSED, state=self.alone(head=head(7))))
        assert leave == Leave(143, "stopped after saving step 7")

    def test_it_stays_until_the_others_have_a_generation_without_it(self) -> None:
        now = state(members=(ME, OTHER), head=head(7))
        assert acts(self.leaving(*PAUSED, state=now)) == ()
        moved = state(number=2, members=(OTHER,), head=head(7))
        (leave,) = acts(self.leaving(*PAUSED, state=moved))
        assert isinstance(leave, Leave)

    def test_it_goes_when_its_grace_is_over_and_says_so(self) -> None:
        local = self.leaving(*RUNNING, state=self.alone())
        assert acts(local, now_s=90.0 + CONFIG.stop_grace_s - 1) == ()
        (stop,) = acts(local, now_s=90.0 + CONFIG.stop_grace_s)
        assert stop == StopWorkers("stopped without a last checkpoint")

    def test_asked_twice_it_goes_at_once(self) -> None:
        (stop,) = acts(self.leaving(*RUNNING, state=self.alone(), hurried=True))
        assert isinstance(stop, StopWorkers)

    def test_before_anything_ran_it_just_goes(self) -> None:
        (leave,) = acts(self.leaving(state=replace(self.alone(), generation=None)))
        assert isinstance(leave, Leave)


@pytest.mark.parametrize(
    ("worker", "text"),
    [
        (Worker(3, -9), "rank 3 was killed by SIGKILL"),
        (Worker(3, 1, reason="boom"), "rank 3 ended with exit code 1: boom"),
        (Worker(3, -250), "rank 3 was killed by signal 250"),
        (Worker(3, EXIT_COLLECTIVE), "rank 3 lost a peer"),
    ],
)
def test_ends_are_told_in_words(worker: Worker, text: str) -> None:
    assert describe_end(worker) == text
