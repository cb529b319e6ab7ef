"""The files in launchers/ use flags and settings that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from paddle_ft.command_line import build_parser
from paddle_ft.config import Config

LAUNCHERS = Path(__file__).parents[2] / "launchers"
FILES = sorted(path for path in LAUNCHERS.rglob("*") if path.is_file())
OTHERS_FLAGS = {
    # of srun, docker and useradd
    *("--no-kill", "--kill-on-bad-exit", "--wait", "--nodes", "--ntasks-per-node", "--requeue"),
    *("--signal", "--rm", "--shm-size", "--uid", "--create-home", "--no-cache-dir"),
    "--epochs",
}


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", text))


def unknown_flags(text: str) -> set[str]:
    known = {option for action in build_parser()._actions for option in action.option_strings}
    return flags_in(text) - known - OTHERS_FLAGS


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_flags_exist(file: Path) -> None:
    assert not unknown_flags(file.read_text())


def test_an_unknown_flag_is_found() -> None:
    assert unknown_flags("python -m paddle_ft.launch --nnodes 2 --chekpoint x") == {"--chekpoint"}


@pytest.mark.parametrize(
    "file",
    [f for f in FILES if "terminationGrace" in f.read_text() or "TimeoutStop" in f.read_text()],
    ids=lambda path: path.name,
)
def test_there_is_time_for_the_last_checkpoint(file: Path) -> None:
    found = re.search(r"(?:terminationGracePeriodSeconds: |TimeoutStopSec=)(\d+)", file.read_text())
    assert found is not None
    assert int(found[1]) > Config().job.stop_grace_s


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.suffix in (".sh", ".sbatch")], ids=lambda path: path.name
)
def test_scripts_parse(file: Path) -> None:
    checked = subprocess.run(["bash", "-n", file], capture_output=True, timeout=20, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
