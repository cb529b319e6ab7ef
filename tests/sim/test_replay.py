"""A seed determines everything that happens."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.sim.run import run

SEED = 17


def digest_elsewhere(hash_seed: str) -> str:
    code = f"from tests.sim.run import run; print(run({SEED}).world.digest())"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_equal_seeds_have_equal_histories() -> None:
    first, second = run(SEED), run(SEED)
    assert first.world.digest() == second.world.digest()
    assert first.world.history.facts == second.world.history.facts


def test_other_seeds_have_other_histories() -> None:
    assert run(SEED).world.digest() != run(SEED + 1).world.digest()


def test_hashes_of_strings_do_not_matter() -> None:
    assert digest_elsewhere("1") == digest_elsewhere("2") == run(SEED).world.digest()
