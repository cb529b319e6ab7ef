"""``paddle-ft health``: what a person is shown of ranks, from files and without etcd."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paddle_ft.cli import app
from paddle_ft.errors import ConfigError
from paddle_ft.health.cli import from_files
from paddle_ft.health.judge import HealthRecord, Row, Verdict
from paddle_ft.health.phases import COMPUTE, REDUCE

RECORD = HealthRecord(
    generation=3,
    rows=(
        Row(0, REDUCE, 7, True, 2.0, "idle", True, 12),
        Row(1, COMPUTE, 6, False, 2.1, "stopped", True, 12),
    ),
    verdicts=(Verdict("hung", 1, 7, 2.1, "it has not come to collective 7"),),
)


def write(log_dir: Path, node: str, record: HealthRecord) -> None:
    told = {"node": node, "wall_s": time.time()} | asdict(record)
    (log_dir / f"health-{node}.json").write_text(json.dumps(told))


def shown(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["health", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_it_tells_who_has_not_come_and_where_the_records_are(tmp_path: Path) -> None:
    write(tmp_path, "a", RECORD)
    write(tmp_path, "old", HealthRecord(2, (Row(5),)))
    (tmp_path / "health-cut.json").write_text('{"node":')
    for number in range(5):
        (tmp_path / "flight" / f"20260101T00000{number}-gen1-a").mkdir(parents=True)
    text = shown("--log-dir", str(tmp_path))
    assert "not come to collective 7, in which others wait: rank 1" in text
    assert "hung: rank 1 on a: it has not come to collective 7" in text
    assert "stopped" in text and "computes" in text
    assert "old" not in text, "of a generation that is over"
    assert "000004-gen1" in text and "000001-gen1" not in text
    told = json.loads(shown("--log-dir", str(tmp_path), "--json"))
    assert told["nodes"][0]["rows"][1]["evidence"] == "stopped" and len(told["flights"]) == 3


def test_a_job_that_is_well_has_nobody_missing(tmp_path: Path) -> None:
    write(tmp_path, "a", HealthRecord(1, (Row(0, COMPUTE, 6), Row(1, COMPUTE, 6))))
    text = shown("--log-dir", str(tmp_path))
    assert "not come" not in text and "hung" not in text


def test_what_is_missing_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--log_dir"):
        from_files(tmp_path)
    for arguments in (["--lift", "a"], ["--etcd", "x:1"]):
        with pytest.raises(ConfigError, match="--job-id"):
            CliRunner().invoke(app, ["health", *arguments], catch_exceptions=False)
