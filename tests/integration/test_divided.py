"""Tensors of which each rank has a part, under other numbers of ranks than they were saved with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.integration.jobs import SCRIPTS, Launcher

pytestmark = [pytest.mark.paddle, pytest.mark.timeout(240)]

AXES = {"table": 0, "matrix": 1, "vector": 0}
NAMES = [*AXES, *(f"moment{n}_{name}" for n in (1, 2) for name in ("table", "matrix"))]


def run(directory: Path, ranks: int, epochs: int, *more: str) -> tuple[str, dict[str, np.ndarray]]:
    """What the launcher said, and the tensors put together; checkpoints go to ``directory``."""
    record = directory / f"record-{epochs}"
    flags = ("--nproc_per_node", str(ranks), "--checkpoint", str(directory / "store"))
    flags += ("--checkpoint_every", "2")
    script = (str(SCRIPTS / "divided.py"), "--record", str(record), "--epochs", str(epochs))
    launcher = Launcher(directory / f"run-{epochs}", (*flags, *script, *more))
    try:
        assert launcher.wait() == 0, launcher.output
    finally:
        launcher.close()
    assert f"world={ranks}" in launcher.output
    found = {}
    for name in NAMES:
        parts = [np.load(record / f"{name}-{r}.npy") for r in range(ranks) if "--late" not in more]
        if parts:
            found[name] = np.concatenate(parts, AXES[name.rpartition("_")[2]])
    return launcher.output, found


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys() == set(NAMES)
    for name, array in one.items():
        assert array.tobytes() == other[name].tobytes(), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """12 steps on one rank."""
    return run(tmp_path_factory.mktemp("undisturbed"), 1, 12)[1]


@pytest.mark.slow
def test_2_1_2_3_ranks_end_as_one_rank(tmp_path: Path, undisturbed: dict[str, np.ndarray]) -> None:
    for ranks, epochs in ((2, 3), (1, 6), (2, 9)):
        output, _ = run(tmp_path, ranks, epochs)
        assert epochs == 3 or f"from the checkpoint of step {epochs - 3}" in output
    same(run(tmp_path, 3, 12)[1], undisturbed)


@pytest.mark.slow
def test_what_2_ranks_had_is_read_by_3_and_a_lost_rank_means_a_restart(
    tmp_path: Path, undisturbed: dict[str, np.ndarray]
) -> None:
    """A rank's parts are nowhere but in a checkpoint, so the survivor does not go on in place."""
    output, _ = run(tmp_path, 2, 8, "--die-at", "5")
    assert "restarts=1" in output
    assert "has the state of step" not in output
    same(run(tmp_path, 3, 12)[1], undisturbed)
