"""The sample record sees a sample that is lost, or counted twice, and forgives one tried again."""

from __future__ import annotations

import json
from pathlib import Path

from tests.chaos import digests


def record(place: Path, name: str, *lines: tuple[int, int, list[int]]) -> Path:
    (place / "samples").mkdir(parents=True, exist_ok=True)
    told = [json.dumps({"generation": g, "step": s, "ids": ids}) for g, s, ids in lines]
    (place / "samples" / f"{name}.jsonl").write_text("\n".join([*told, '{"generation": 9, "st']))
    return place


def test_what_was_tried_again_counts_once(tmp_path: Path) -> None:
    record(tmp_path, "0-1", (1, 1, [4]), (1, 2, [7, 6]), (2, 2, [6]))
    record(tmp_path, "1-2", (1, 1, [3]), (2, 2, [7]), (2, 2, []))
    assert digests.used(tmp_path) == {1: [3, 4], 2: [6, 7]}


def test_a_lost_sample_and_a_double_one_are_seen(tmp_path: Path) -> None:
    lost = record(tmp_path / "lost", "0-1", (1, 1, [4]), (2, 1, [4]))
    double = record(tmp_path / "double", "0-1", (1, 1, [3, 4, 4]))
    assert digests.used(lost) == {1: [4]}
    assert digests.used(double) == {1: [3, 4, 4]}


def test_two_states_of_a_step_are_seen(tmp_path: Path) -> None:
    (tmp_path / "0-1").write_text("1 aa\n2 bb\n3 c")
    (tmp_path / "1-2").write_text("1 aa\n2 xx\n")
    assert digests.written(tmp_path) == {1: {"aa"}, 2: {"bb", "xx"}}
