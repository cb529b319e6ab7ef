"""How a session ends: done, paused, refused, failed, alone; and what it leaves with the agent."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.integration.session_world import (
    TRAIN,
    Agent,
    Result,
    Saved,
    Workers,
    end_group_of,
    group_of,
    run,
    succeeded,
)

pytestmark = pytest.mark.paddle
Wait = Callable[..., None]


@pytest.fixture(scope="module")
def saved() -> Saved:
    """A finished run of one epoch on one rank."""
    with Agent(1) as agent:
        succeeded(run(1, agent, epochs=1))
        return agent.newest


def one_line_said(result: Result) -> str:
    """The only line that paddle_ft wrote on stderr; there is no traceback."""
    assert "Traceback" not in result.errors
    lines = [line for line in result.errors.splitlines() if line.startswith("paddle_ft: ")]
    assert len(lines) == 1, result.errors
    return lines[0]


def test_a_finished_run_saves_its_last_step_waits_for_it_and_says_done() -> None:
    with Agent(1, when="7 steps") as agent:
        (result,) = succeeded(run(1, agent))
        assert [s.info.step for s in agent.committed] == [7, 14]  # 14 is not saved twice
        farewell = agent.farewells[0]
        assert (farewell.kind, farewell.step) == ("done", 14)
        reading = agent.beacon(0)
        assert (reading.step, reading.epoch, reading.samples) == (14, 1, 100)
        assert reading.steps_total == 14
        assert reading.loss == pytest.approx(result.events("step")[-1]["loss"])


def test_it_does_not_end_before_the_last_checkpoint_is_safe(wait_for: Wait) -> None:
    with Agent(1, hold=True) as agent, Workers(1, agent, epochs=1) as workers:
        wait_for(lambda: agent.published == [(7, 0)], 60)
        with pytest.raises(Exception, match="timed out"):
            workers.processes[0].wait(0.5)
        assert agent.farewells == {}
        agent.let_go()
        succeeded(workers.results())


def test_a_pause_is_agreed_upon_saved_and_left_and_resumed() -> None:
    """The loop of the script does not see it; the user's except clause does not swallow it."""
    undisturbed = succeeded(run(2))
    with Agent(2, when="2 steps", pause_after=4) as agent:
        results = run(2, agent)
        assert [result.code for result in results] == [76, 76]
        assert all("Traceback" not in result.errors for result in results)
        step = agent.newest.info.step
        assert {(f.kind, f.step) for f in agent.farewells.values()} == {("paused", step)}
        assert results[0].events("step")[-1]["step"] == step
        paused = agent.newest
    assert 4 < step < 14
    with Agent(2, start=paused) as agent:
        resumed = succeeded(run(2, agent))
    assert [r.end["all"] for r in resumed] == [r.end["all"] for r in undisturbed]


def test_without_a_free_buffer_training_goes_on_and_the_checkpoint_stays_due(
    wait_for: Wait,
) -> None:
    with Agent(2, when="1 steps", hold=True) as agent, Workers(2, agent, step_s=0.05) as workers:
        wait_for(lambda: agent.beacon(0).step >= 6, 60)
        assert sorted(agent.published) == [(1, 0), (1, 1), (2, 0), (2, 1)]
        agent.let_go()
        succeeded(workers.results())
        assert agent.newest.info.step == 14


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 32}, "model/first.weight is float32[8, 16] there and float32[8, 32] here"),
        ({"optimizer": "Momentum"}, "optimizer/first.weight/velocity is missing in it"),
        ({"optimizer": "SGD-constant"}, "optimizer/first.bias/beta1_pow_acc is not in this script"),
        ({"unused": True}, "model/spare.weight is missing in it"),
        ({"samples": 51}, "50 samples, and now it is 51"),
        ({"seed": 4}, "3 as seed, and now it is 4"),
        ({"register": True}, "has no registered object 'counter'"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_in_one_sentence(
    saved: Saved, options: dict[str, Any], said: str
) -> None:
    with Agent(1, start=saved) as agent:
        (result,) = run(1, agent, **{"epochs": 2, **options})
        assert result.code == 5, result.errors
        line = one_line_said(result)
        assert said in line
        assert "--checkpoint" in line
        farewell = agent.farewells[0]
        assert (farewell.kind, farewell.exit_code) == ("fatal", 5)
        assert said in farewell.reason
        assert agent.committed == []


def test_a_registered_object_that_the_script_forgot_is_missed() -> None:
    with Agent(1) as agent:
        succeeded(run(1, agent, epochs=1, register=True))
        saved = agent.newest
    with Agent(1, start=saved) as agent:
        (result,) = run(1, agent)
    assert result.code == 5
    assert "registered object 'counter', which this script has not" in one_line_said(result)


def test_a_checkpoint_that_no_session_wrote_is_refused(saved: Saved) -> None:
    info, data = saved.images[0]
    foreign = Saved({0: (replace(info, meta={}), data)})
    with Agent(1, start=foreign) as agent:
        (result,) = run(1, agent)
    assert result.code == 5
    one_line_said(result)


def test_a_mistake_of_the_script_keeps_its_traceback_and_saves_nothing() -> None:
    with Agent(1, when="2 steps") as agent:
        (result,) = run(1, agent, fail_at=5)
        assert result.code == 1
        assert agent.farewells == {}
        assert agent.newest.info.step == 4
    trace = result.errors[result.errors.index("Traceback") :].splitlines()
    assert trace[-1] == "ValueError: the script's own mistake"
    assert str(TRAIN) in trace[1]  # the first frame is the script's, not the bootstrap's


@pytest.mark.parametrize("how", ["done", "paused", "failed", "peer lost"])
def test_loader_processes_and_their_shared_memory_go_with_their_worker(
    how: str, wait_for: Wait
) -> None:
    """The worker that is killed from outside is the agent's to clean up after."""
    world_size = 2 if how == "peer lost" else 1
    more = {"failed": {"fail_at": 5}, "peer lost": {"die_at": 5, "die_rank": 1}}.get(how, {})
    agent = Agent(world_size, when="2 steps", pause_after=4 if how == "paused" else -1)
    with agent, Workers(world_size, agent, workers=2, step_s=0.05, **more) as workers:
        process = workers.processes[0]
        wait_for(lambda: agent.beacon(0).step >= 2, 60)
        members = group_of(process.pid)
        if how == "peer lost":  # its loader processes would hold its connections open
            workers.processes[1].wait(60)
            end_group_of(workers.processes[1].pid)
        assert process.wait(60) == {"done": 0, "paused": 76, "failed": 1, "peer lost": 75}[how]
        # Before the rest of its process group is ended by Workers, as by the agent.
        left = [p for pid in members for p in Path("/dev/shm").glob(f"paddle_{pid}_*")]
        assert left == []
        result = workers.results()[0]
    if how == "failed":
        assert result.errors.rstrip().endswith("ValueError: the script's own mistake")


def test_who_loses_a_peer_says_so_and_leaves_without_a_traceback() -> None:
    with Agent(2, when="2 steps") as agent:
        results = run(2, agent, die_at=5, die_rank=1)
        assert [result.code for result in results] == [75, -9]
        assert "Rank 0 lost a peer" in one_line_said(results[0])
        assert agent.farewells[0].kind == "collective"
        assert 1 not in agent.farewells
        assert agent.newest.info.step == 4


def test_weights_that_the_script_swaps_after_a_step_do_not_get_into_a_checkpoint() -> None:
    """Evaluation with averaged weights: a snapshot begins when the round of the loop is over."""
    with Agent(1, when="1 steps") as agent:
        undisturbed = succeeded(run(1, agent, epochs=1, swap_at=6))
        last = next(s for s in agent.committed if s.info.step == 6)
    with Agent(1, start=last) as agent:
        resumed = succeeded(run(1, agent, epochs=1))
    assert resumed[0].end["all"] == undisturbed[0].end["all"]


def test_a_worker_without_its_agent_ends(wait_for: Wait) -> None:
    with Agent(1) as agent, Workers(1, agent, step_s=0.2) as workers:
        wait_for(lambda: agent.beacon(0).step >= 2, 60)
        for channel in agent._channels.values():
            channel.close()
        (result,) = workers.results()
    assert result.code == 1
    assert "lost its agent" in one_line_said(result)


@pytest.mark.parametrize(
    ("env", "said", "code"),
    [
        ({"PADDLE_FT": "{}"}, "PADDLE_FT is not what paddle_ft.launch", 2),
        ({"PADDLE_TRAINER_ID": "2"}, "do not name a rank of a world", 2),
    ],
)
def test_a_wrong_environment_is_named(env: dict[str, str], said: str, code: int) -> None:
    with Workers(1, env=env) as workers:
        (result,) = workers.results()
    assert result.code == code
    assert said in one_line_said(result)


def test_an_agent_that_is_not_there_is_named() -> None:
    with Agent(1) as agent:
        env = agent.env(0)
    with Workers(1, env=env) as workers:
        (result,) = workers.results()
    assert result.code == 2
    assert "does not answer at" in one_line_said(result)


def test_under_plain_python_an_error_is_one_line_too(saved: Saved) -> None:
    """No bootstrap: ``python script.py`` with the environment of a launcher."""
    with Agent(1, start=saved) as agent:
        with Workers(1, agent, command=[sys.executable, str(TRAIN)], width=32) as workers:
            (result,) = workers.results()
        assert agent.farewells[0].kind == "fatal"
    assert result.code == 5
    assert "does not fit" in one_line_said(result)


def test_alone_nothing_is_needed_and_nothing_is_left(tmp_path: Path) -> None:
    with Workers(1, command=[sys.executable, str(TRAIN)], epochs=1) as workers:
        (result,) = succeeded(workers.results())
    assert result.end["step"] == 7
    assert list(tmp_path.iterdir()) == []


def test_importing_the_package_loads_neither_paddle_nor_grpc_nor_boto3() -> None:
    code = (
        "import sys, json, paddle_ft; "
        "print(json.dumps({'event': 'loaded', 'names': [m for m in ('paddle', 'grpc', 'boto3') "
        "if m in sys.modules], 'callable': callable(paddle_ft.session)}))"
    )
    with Workers(1, command=[sys.executable, "-c", code]) as workers:
        (result,) = workers.results()
    assert result.lines == [{"event": "loaded", "names": [], "callable": True}]
