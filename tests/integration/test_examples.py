"""The examples train, alone and on two ranks, and end with the line that people compare."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
FINAL = re.compile(
    r"^(?:\[rank 0\] )?final step=(?P<step>\d+) loss=(?P<loss>\d+\.\d{4}) "
    r"accuracy=(?P<accuracy>[01]\.\d{4}) weights=(?P<weights>[0-9a-f]{64}) "
    r"world=(?P<world>\d+) restarts=(?P<restarts>\d+)$",
    re.MULTILINE,
)
LAUNCH = ("-m", "paddle_ft.launch", "--nproc_per_node", "2")
GPT_SMALL = ("--chars", "60000", "--width", "32", "--heads", "2", "--layers", "1")

pytestmark = pytest.mark.paddle


def run(directory: Path, *arguments: str, timeout_s: float = 100) -> re.Match[str]:
    """The last line of an example that was run in ``directory``."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout
    found = FINAL.findall(done.stdout)
    assert len(found) == 1, done.stdout
    match = FINAL.search(done.stdout)
    assert match is not None
    return match


def test_digits_are_learnt_on_two_ranks(tmp_path: Path) -> None:
    script = str(EXAMPLES / "digits/train.py")
    final = run(tmp_path, *LAUNCH, script, "--epochs", "10")
    assert (final["step"], final["world"], final["restarts"]) == ("230", "2", "0")
    assert float(final["accuracy"]) >= 0.97


@pytest.mark.slow
def test_digits_run_alone_and_always_end_the_same(tmp_path: Path) -> None:
    arguments = (str(EXAMPLES / "digits/train.py"), "--epochs", "1")
    ends = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        ends.append(run(tmp_path / name, *arguments))
    assert (ends[0]["step"], ends[0]["world"], ends[0]["restarts"]) == ("23", "1", "0")
    assert ends[0]["weights"] == ends[1]["weights"]
    (tmp_path / "other").mkdir()
    other = run(tmp_path / "other", *arguments, "--seed", "1")
    assert other["weights"] != ends[0]["weights"]


@pytest.mark.parametrize(
    "command", [pytest.param((), marks=pytest.mark.slow), LAUNCH], ids=["alone", "two ranks"]
)
def test_char_gpt_learns(tmp_path: Path, command: tuple[str, ...]) -> None:
    script = str(EXAMPLES / "char_gpt/train.py")
    final = run(tmp_path, *command, script, *GPT_SMALL)
    assert final["step"] == "56"
    assert final["world"] == ("2" if command else "1")
    assert float(final["accuracy"]) > 0.15  # the most frequent letter alone gives less


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_digits_reach_97_percent_as_they_are(tmp_path: Path) -> None:
    final = run(tmp_path, *LAUNCH, str(EXAMPLES / "digits/train.py"), timeout_s=250)
    assert float(final["accuracy"]) >= 0.97


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_demo_ends_with_equal_weights() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py"), "--epochs", "10"],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is killed" in done.stdout
    assert "equal, bit for bit" in done.stdout
