"""What a step computes and what a checkpoint holds, on both versions of Paddle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.session_world import ROOT, Workers, python_26

pytestmark = pytest.mark.paddle
SCRIPTS = Path(__file__).parent / "session_scripts"


@pytest.fixture(params=["this Paddle", pytest.param("Paddle 2.6.2", marks=pytest.mark.slow)])
def python(request: pytest.FixtureRequest) -> str:
    return sys.executable if request.param == "this Paddle" else python_26()


def test_every_optimizer_goes_on_bit_for_bit(python: str) -> None:
    """A8: with other automatic names, before the first step, with and without accumulators."""
    done = subprocess.run(
        [python, str(SCRIPTS / "optimizers.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(lines) == 16
    same = ("same_image", "same_result", "same_prepared")
    assert [line for line in lines if not all(line[what] for what in same)] == []


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_are_weighted_sums_to_the_last_bit(world_size: int) -> None:
    command = [sys.executable, str(SCRIPTS / "sums.py")]
    with Workers(world_size, command=command) as workers:
        for result in workers.results():
            assert result.code == 0, result.errors[-2000:]
            assert result.lines[-1]["ok"]


@pytest.mark.slow
def test_gradients_on_paddle_26() -> None:
    with Workers(2, command=[python_26(), str(SCRIPTS / "sums.py")]) as workers:
        for result in workers.results():
            assert result.code == 0, result.errors[-2000:]
            assert result.lines[-1]["ok"]


MISUSES = {
    "lr_step": "use 'step', 'epoch' or 'manual'",
    "plateau": "lr_step='manual'",
    "save": "does not say when to save",
    "no shards": "reproducible is -1",
    "shards without batches": "s.step belongs after each batch of s.batches, once",
    "two steps of a shard": "s.step belongs after each batch of s.batches, once",
    "no step of a shard": "to accumulate gradients give a larger batch_size",
    "shards of DataParallel": "give the model itself to ft.session",
    "foreign parameters": "trains 2 parameters that are not the model's",
    "endless dataset": "use a map-style paddle.io.Dataset",
    "no dataset": "use a map-style paddle.io.Dataset",
    "empty dataset": "the dataset is empty",
    "batch size": "batch_size is 0",
    "two loops": "Two loops over s.batches run at the same time",
    "late register": "registered after the first batch",
    "registered twice": "'a' is registered already",
    "slash": "use a name without '/'",
    "no state_dict": "object lacks state_dict or set_state_dict",
    "not JSON": "registered/a/x/1 is a set, which cannot be kept",
    "array of texts": "registered/a/x is a ndarray, which cannot be kept",
    "same path": "two tensors have the same path",
}


def test_misuse_is_told_in_one_sentence_that_names_the_way_out(python: str) -> None:
    with Workers(1, command=[python, str(SCRIPTS / "misuse.py")]) as workers:
        (result,) = workers.results()
    assert result.code == 0, result.errors[-2000:]
    said = {line["kind"]: line["said"] for line in result.lines}
    assert said.keys() == MISUSES.keys()
    wrong = {kind: said[kind] for kind, part in MISUSES.items() if part not in said[kind]}
    assert wrong == {}
    assert not [text for text in said.values() if "\n" in text]
