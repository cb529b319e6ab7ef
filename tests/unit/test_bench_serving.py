"""What the benchmark of serving reads out of the records of its load."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from bench import serving_report
from bench.report import Row
from bench.serving import chosen
from bench.serving_analysis import (
    LOST,
    RECORD,
    Ack,
    Request,
    Strike,
    answered_by_two_terms,
    failed,
    longest_gap_s,
    lost,
    p99_s,
    requests_of,
    routed_around_s,
    slowest_s,
    within,
)
from bench.serving_load import WRONG, Load, Spec, infer_request, parsed
from bench.serving_report import Part, document, from_json, to_json, unfinished

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
OTHER_LENGTH = b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: 1\r\n"


def request(at_s: float, took_s: float = 0.005, status: int = 200) -> Request:
    return Request(at_s, at_s, at_s + took_s, status, 1)


def ack(asked_s: float, term: int, number: int, key: str = "k", writer: int = 0) -> Ack:
    return Ack(asked_s, asked_s + 0.01, term, number, writer, key, number)


def test_records_are_read_in_their_order_and_a_torn_one_is_left_out() -> None:
    two = [request(2.0), request(1.0, 0.5, LOST)]
    data = b"".join(RECORD.pack(*r) for r in two)
    assert requests_of(data + b"\0" * 5) == [two[1], two[0]]
    assert failed(two) == 1
    assert slowest_s(two) == pytest.approx(0.5)
    assert within(two, 1.5, 2.5) == [two[0]]
    assert slowest_s([]) == p99_s([]) == 0.0


def test_routed_around_is_when_the_last_one_was_sent_that_was_caught() -> None:
    calm = [request(0.01 * i) for i in range(300)]
    caught = [request(1.0, 1.0), request(1.3, 0.8), request(1.31, 0.12)]
    strike = Strike(0.995, "stop", None, 3.0)
    assert routed_around_s(calm, strike, 0.005) == 0.0
    assert routed_around_s([*calm, *caught], strike, 0.005) == pytest.approx(0.315)
    assert routed_around_s([*calm, *caught], strike, 0.05) == pytest.approx(0.305), "3 times 0.05"
    refused = request(1.5, 0.001, 503)
    assert routed_around_s([*calm, refused], strike, 0.005) == pytest.approx(0.505)
    later = request(3.5, 2.0)
    assert routed_around_s([later], strike, 0.005) == 0.0, "all was as before by then"


def test_a_gap_is_that_around_the_fault_and_lasts_until_somebody_answers() -> None:
    times = [0.1 * i for i in range(11)] + [1.9, 2.0]
    assert longest_gap_s(times, 0.95, 1.5) == pytest.approx(0.5), "to the end: nobody yet"
    assert longest_gap_s(times, 0.95, 3.0) == pytest.approx(1.0)
    assert longest_gap_s(times, 0.15, 0.9) == pytest.approx(0.1)
    assert longest_gap_s([5.0], 1.0, 3.0) == pytest.approx(2.0)


def test_an_answer_of_a_lower_term_is_one_of_two_terms_if_it_was_asked_for_later() -> None:
    assert answered_by_two_terms([ack(1.0, 5, 1), ack(2.0, 6, 2), ack(3.0, 6, 3)]) == 0
    assert answered_by_two_terms([ack(1.0, 6, 1), ack(2.0, 5, 2), ack(3.0, 5, 3)]) == 2
    beside = [Ack(1.0, 2.0, 6, 1, 0, "a", 1), Ack(1.5, 2.5, 5, 1, 1, "a", 1)]
    assert answered_by_two_terms(beside) == 0, "asked for before the other had come"


def test_what_was_acknowledged_last_must_be_there_or_a_later_one() -> None:
    acks = [ack(1.0, 1, 1), ack(2.0, 1, 2), ack(3.0, 1, 3, "other"), ack(4.0, 1, 7, writer=1)]
    held = {(0, "k"): 2, (0, "other"): 4, (1, "k"): 7}
    assert lost(acks, held) == []
    assert lost(acks, held | {(0, "k"): 1}) == ["writer 0, k: 2 was acknowledged, 1 is there"]
    assert len(lost(acks, {})) == 3


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", (200, b"abc")),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nab", None),
        (b"HTTP/1.1 200 OK\r\ncontent-le", None),
        (OTHER_LENGTH + b"Content-Length: 3\r\n\r\na", None),
        (OTHER_LENGTH + b"Content-Length: 3\r\n\r\nabc", (200, b"abc")),
        (b"HTTP/1.1 204 No Content\r\n\r\n", (204, b"")),
        (
            CHUNKED + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
            (200, b"abcde"),
        ),
        (CHUNKED + b"3\r\nabc\r\n", None),
    ],
)
def test_an_answer_is_taken_when_it_is_whole(data: bytes, expected: Any) -> None:
    found = parsed(data)
    assert (found and (found[0], found[2])) == expected


@pytest.fixture
def load(tmp_path: Path) -> Load:
    samples = tmp_path / "samples.json"
    told = {"x": [[1.0, 2.0]], "scores": [[[0.5, 0.25]], [[4.0, 8.0]]]}
    samples.write_text(json.dumps(told))
    return Load(Spec(1, str(tmp_path / "out"), str(samples)))


@pytest.mark.parametrize(
    ("status", "version", "scores", "expected"),
    [
        (200, 1, (0.5, 0.25), 200),
        (200, 2, (4.0, 8.0), 200),
        (200, 2, (0.5, 0.25), WRONG),
        (200, 1, (0.5,), WRONG),
        (200, 3, (1.0, 1.0), 200),
        (503, 1, (0.5, 0.25), 503),
    ],
)
def test_an_answer_must_hold_what_its_version_gives(
    load: Load, status: int, version: int, scores: tuple[float, ...], expected: int
) -> None:
    json_part = json.dumps({"model_version": str(version)}).encode()
    head = f"HTTP/1.1 {status} x\r\nInference-Header-Content-Length: {len(json_part)}".encode()
    body = json_part + struct.pack(f"<{len(scores)}f", *scores)
    found, _, why = load._judge(0, status, head, body)
    assert found == expected
    assert bool(why) == (expected != 200)


def test_a_request_says_how_long_its_parts_are() -> None:
    head, _, body = infer_request("m", [1.0, 2.0]).partition(b"\r\n\r\n")
    lines = dict(line.split(": ") for line in head.decode().splitlines()[1:])
    assert int(lines["Content-Length"]) == len(body)
    told = json.loads(body[: int(lines["Inference-Header-Content-Length"])])
    assert told["inputs"][0]["parameters"]["binary_data_size"] == 8 == len(body[-8:])


PARTS = {
    "kills-2": Part(
        [
            Row("SIGKILL, 2", "failed", "requests", [3], goal=0.0, note="it said <b> | c"),
            Row("SIGKILL, 2", "p99", "s", [0.2], [0.1], "before", {"Patroni": (20.0,)}, goal=1.5),
        ],
        "2026-11-21 21:00", 12.5, (4.0, 5.0), "3 kills", "abc", 0.5,
    ),
    "ocr": Part(unfinished("ocr", "none"), "2026-11-21 22:00", 0.1, (0.1, 0.2), "60 s", "", 0.1),
}  # fmt: skip
FACTS = {"cores": 2, "cpu": "x", "memory_gib": 1, "kernel": "6", "python": "3", "packages": {}}


def test_the_report_holds_all_parts_and_comes_back_from_its_json(tmp_path: Path) -> None:
    assert from_json(to_json(PARTS, FACTS)) == from_json(
        to_json(from_json(to_json(PARTS, FACTS)), FACTS)
    )
    text = document(PARTS, FACTS, ["kills-2", "stops", "ocr"])
    assert "## stops\n\nNot run." in text
    assert "not run: none" in text
    assert "0 of 2 goals reached" in text
    assert "1 of 3 parts were not run" in text
    assert "it said &lt;b> / c" in text
    assert text.count("say little") == 1, "the machine was busy in one of them"
    assert document(from_json(to_json(PARTS, FACTS)), FACTS, ["kills-2", "ocr"]) == document(
        PARTS, FACTS, ["kills-2", "ocr"]
    )


def test_a_part_that_is_repeated_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    assert serving_report.read(tmp_path) == {}
    serving_report.write(tmp_path, PARTS, FACTS, list(PARTS))
    found = serving_report.read(tmp_path)
    assert list(found) == list(PARTS)
    found["ocr"] = Part([Row("OCR", "mean", "ms", [5.0])], "later", 1.0, (0.0, 0.0), "")
    serving_report.write(tmp_path, found, FACTS, list(PARTS))
    assert serving_report.read(tmp_path)["ocr"].rows[0].ours == [5.0]
    assert serving_report.read(tmp_path)["kills-2"].rows[0].reached is False
    (tmp_path / "bench-serving.json").write_text("{}")
    assert serving_report.read(tmp_path) == {}


def test_parts_are_chosen_by_how_their_names_begin() -> None:
    known = ["kills-2", "kills-3", "stops"]
    assert chosen("", known) == known
    assert chosen("stops,kills", known) == known
    assert chosen("kills-3", known) == ["kills-3"]
    with pytest.raises(ValueError, match="no part kill-9"):
        chosen("kill-9", known)
