"""The record of events: what is read back, what a full disk costs, how long it gets."""

from __future__ import annotations

import time
from pathlib import Path

from paddle_ft.observe import events
from paddle_ft.observe.events import EventLog, read


def test_what_was_added_is_read_back(tmp_path: Path) -> None:
    log = EventLog(tmp_path, "n0-1")
    happened_s = time.monotonic() - 5
    log.add("worker_ended", at_s=happened_s, rank=1, pid=7, exit_code=-9, signal=9, stopped=False)
    log.add("leaving")
    log.close()
    first, second = read([tmp_path])
    assert (first.run, first.kind, second.kind) == ("n0-1", "worker_ended", "leaving")
    assert first.fields == {"rank": 1, "pid": 7, "exit_code": -9, "signal": 9, "stopped": False}
    assert abs(first.at_s - happened_s) < 1e-5
    assert 4.9 < second.wall_s - first.wall_s < 60
    assert log.dropped == 0


def test_lines_that_are_cut_are_left_out(tmp_path: Path) -> None:
    log = EventLog(tmp_path, "a")
    log.add("leaving")
    log.close()
    path = tmp_path / events.FILE
    whole = path.read_bytes()
    path.write_bytes(b"[]\n3\n{}\nnonsense\n" + whole.replace(b'"a"', b'"b"') + whole[:20])
    assert [event.run for event in read([tmp_path])] == ["b"]


def test_a_disk_that_takes_nothing_costs_events_only(tmp_path: Path) -> None:
    place = tmp_path / "gone"
    log = EventLog(place, "a")
    log.add("leaving")
    assert log.flush()
    assert log.dropped == 1
    place.mkdir()
    log.add("leaving")
    log.close()
    assert len(read([place])) == 1


def test_a_write_that_was_cut_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    with open("/dev/full", "wb"):
        pass
    log = EventLog(tmp_path, "a")
    (tmp_path / events.FILE).symlink_to("/dev/full")
    log.add("leaving")
    assert log.flush()
    (tmp_path / events.FILE).unlink()
    log.add("leaving")
    log.close()
    assert log.dropped == 1
    assert len(read([tmp_path])) == 1


def test_the_file_stays_bounded_and_the_newest_is_kept(tmp_path: Path) -> None:
    """Two launchers share the directory: neither loses what the other writes."""
    logs = [EventLog(tmp_path, run, bytes_max=5_000) for run in "ab"]
    for number in range(200):
        for log in logs:
            log.add("progress", step=number)
            assert log.flush()
    for log in logs:
        log.close()
    files = list(tmp_path.iterdir())
    assert {f.name for f in files} == {events.FILE, events.OLDER}
    assert all(f.stat().st_size < 5_200 for f in files)
    found = read([tmp_path])
    assert len(found) > 50
    for run in "ab":
        steps = [e.fields["step"] for e in found if e.run == run]
        assert steps == list(range(steps[0], 200))


def test_a_file_may_be_given_and_counts_once(tmp_path: Path) -> None:
    log = EventLog(tmp_path, "a")
    log.add("leaving")
    log.close()
    assert len(read([tmp_path, tmp_path / events.FILE, str(tmp_path)])) == 1
