"""A8: a killed run ends as the undisturbed one, bit for bit; other worlds, same samples."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest

from tests.integration.session_world import (
    Agent,
    Result,
    Saved,
    python_26,
    run,
    succeeded,
    used_ids,
)

pytestmark = pytest.mark.paddle


def killed_and_resumed(
    world_size: int, die_at: int, python: str = sys.executable, **options: Any
) -> tuple[list[Result], Saved]:
    """Results of the second life; the checkpoint it began with."""
    with Agent(world_size, when="3") as agent:
        first = run(world_size, agent, python=python, die_at=die_at, **options)
        assert -9 in [result.code for result in first]
        saved = agent.newest
    assert 0 < saved.info.step <= die_at
    with Agent(world_size, start=saved, generation=2, restarts=1) as agent:
        # Other layers made before shift all automatic names.
        second = succeeded(run(world_size, agent, python=python, layers_before=2, **options))
        assert agent.newest.info.step == second[0].end["step"]
    for result in second:
        (begin,) = result.events("begin")
        assert (begin["step"], begin["generation"]) == (saved.info.step, 2)
        assert begin["restarts"] == 1
    return second, saved


def same_end(first: list[Result], second: list[Result]) -> None:
    for undisturbed, resumed in zip(first, second, strict=True):
        assert resumed.end["step"] == undisturbed.end["step"]
        assert resumed.end["all"] == undisturbed.end["all"]


@pytest.mark.parametrize(
    ("world_size", "die_at"), [pytest.param(1, 4, marks=pytest.mark.slow), (2, 8)]
)
def test_a_killed_run_ends_bit_for_bit_as_the_undisturbed_one(world_size: int, die_at: int) -> None:
    """Adam, cosine rate, dropout, BatchNorm, shuffle, noise, clipping, a registered object.

    B1: each byte of a replicated tensor was copied by one rank, and they shared the work.
    """
    options = {"register": True, "width": 1200}
    undisturbed = succeeded(run(world_size, **options))
    resumed, saved = killed_and_resumed(world_size, die_at, **options)
    same_end(undisturbed, resumed)
    copied = replicated_bytes(saved)
    assert min(copied) > 0 and max(copied) - min(copied) <= 2 * 4096
    assert resumed[0].end["seen"] == undisturbed[0].end["seen"] == "14[7.0, 7.0, 7.0](1.5, inf)"


@pytest.mark.slow
def test_also_on_paddle_26() -> None:
    python = python_26()
    undisturbed = succeeded(run(2, python=python))
    resumed, _ = killed_and_resumed(2, 8, python=python)
    same_end(undisturbed, resumed)


@pytest.mark.slow
def test_also_with_loader_processes_epoch_schedule_and_a_layer_that_thaws() -> None:
    """And all of it together gives what loading in line gives."""
    options = {"lr_step": "epoch", "freeze_until": 5, "unused": True}
    undisturbed = succeeded(run(2, **options))
    loaded = succeeded(run(2, workers=2, **options))
    same_end(undisturbed, loaded)
    resumed, _ = killed_and_resumed(2, 11, workers=1, **options)
    same_end(undisturbed, resumed)


@pytest.mark.slow
def test_the_stream_in_which_a_run_died_is_resumed_and_those_before_are_over() -> None:
    options = {"streams": 3, "epochs": 1, "samples": 20}
    undisturbed = succeeded(run(1, **options))
    resumed, saved = killed_and_resumed(1, 5, **options)
    same_end(undisturbed, resumed)
    assert saved.info.meta["position"]["stream"] == 0
    assert {line["stream"] for line in resumed[0].events("step")} == {1, 2}


def life(
    world_size: int, start: Saved | None, die_at: int, **options: Any
) -> tuple[list[Result], Saved]:
    with Agent(world_size, start=start, when="1") as agent:
        results = run(world_size, agent, die_at=die_at, **options)
        return results, agent.newest


@pytest.mark.slow
def test_other_world_and_batch_sizes_use_every_sample_of_every_epoch_once() -> None:
    """The record counts what was committed: steps beyond the checkpoint are taken back."""
    options = {"samples": 23, "epochs": 3}
    first, one = life(2, None, 3, batch_size=4, **options)
    second, two = life(1, one, 7, batch_size=4, **options)
    third, three = life(3, two, -1, batch_size=5, **options)
    succeeded(third)
    lives = [(first, one.info.step), (second, two.info.step), (third, three.info.step)]
    assert Counter(used_ids(*lives)) == Counter(list(range(23)) * 3)
    assert one.info.step < two.info.step < three.info.step


@pytest.mark.slow
def test_statistics_are_the_ranks_own_and_go_to_rank_r_mod_the_old_world_size() -> None:
    """The third rank of the new world begins, and with nothing left to do ends, with rank 0's."""
    with Agent(2) as agent:
        first = succeeded(run(2, agent, epochs=1))
        saved = agent.newest
    name = "model/norm._mean"
    assert saved.tensor(name, rank=0) != saved.tensor(name, rank=1)
    with Agent(3, start=saved) as agent:
        second = succeeded(run(3, agent, epochs=1))
        assert agent.committed == []  # the last step is safe already
    ends = [result.end["weights"] for result in (*first, first[0])]
    assert [result.end["weights"] for result in second] == ends


def test_more_ranks_than_samples_in_the_last_batch() -> None:
    """Its second rank gets a sample that does not count; both end with the same parameters."""
    with Agent(2) as agent:
        results = succeeded(run(2, agent, samples=9, batch_size=4, epochs=1))
        saved = agent.newest
    assert sorted(used_ids((results, 99))) == list(range(9))
    assert results[1].events("step")[-1]["ids"] == []
    assert results[0].end["step"] == 3
    assert saved.tensor("model/last.weight", 0) == saved.tensor("model/last.weight", 1)


def replicated_bytes(saved: Saved) -> list[int]:
    """What each rank has copied of what all have."""
    return [
        sum(s.nbytes for s in saved.images[rank][0].tensors if s.scope == "replicated")
        for rank in sorted(saved.images)
    ]


@pytest.mark.slow
def test_one_rank_may_copy_all_that_is_replicated() -> None:
    """That the pieces fit together is shown by resuming from them."""
    with Agent(2, mode="rank0") as agent:
        succeeded(run(2, agent, epochs=1, width=1200))
        saved = agent.newest
    assert replicated_bytes(saved)[1] == 0
    with Agent(2, start=saved) as agent:
        resumed = succeeded(run(2, agent, epochs=2, width=1200))
    same_end(succeeded(run(2, epochs=2, width=1200)), resumed)


def test_a_data_parallel_model_is_resumed_too() -> None:
    options = {"data_parallel": True, "samples": 48}
    undisturbed = succeeded(run(2, **options))
    resumed, _ = killed_and_resumed(2, 8, **options)
    same_end(undisturbed, resumed)
