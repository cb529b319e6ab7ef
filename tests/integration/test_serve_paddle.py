"""From a session to a served model, with real Paddle of both kinds of file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.session_world import ROOT, python_26

pytestmark = pytest.mark.paddle
SCRIPT = Path(__file__).parent / "serve_scripts" / "digits.py"


@pytest.mark.parametrize(
    "version", ["this Paddle", pytest.param("Paddle 2.6.2", marks=pytest.mark.slow)]
)
def test_what_a_session_publishes_is_served_to_the_bit(version: str, tmp_path: Path) -> None:
    python = sys.executable if version == "this Paddle" else python_26()
    done = subprocess.run(
        [python, str(SCRIPT), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    told = {line["event"]: line for line in lines}

    # Publishing changed nothing in training: neither weights nor mode.
    assert told["trained"] == {"event": "trained", "same": True, "training": True}
    assert told["loaded"]["source"] == {"1": {"step": 2}, "2": {"step": 6}}
    assert told["published"]["version"] == 2
    assert told["before"]["differs"]

    assert told["info"]["batched"]
    assert "'image', datatype='FP32', shape=(-1, 64)" in told["info"]["info"]
    assert "'digit', datatype='INT64', shape=(-1,)" in told["info"]["info"]
    exact, tuned = (line for line in lines if line["event"] == "served")
    assert exact["off"] == 0.0
    assert tuned["off"] < 1e-4
    assert "give input_spec" in told["refused"]["text"]
