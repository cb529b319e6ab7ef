"""Copies are whole or thrown away, and images are read by name, also from pieces."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddle_ft.checkpoint import snapshot
from paddle_ft.checkpoint.snapshot import Image, Snapshot, Source
from paddle_ft.types import Changes, ImageInfo, TensorSpec


class Gated(Source):
    """Copies its first half, then waits for the gate."""

    gate: threading.Event
    begun: threading.Event

    def copy(self, target: int, stopped: Any) -> None:
        half = self.nbytes // 2
        rest = Source(
            self.keep, self.address + half, self.nbytes - half, self.offset + half, 0, None
        )
        first = Source(self.keep, self.address, half, self.offset, 0, None)
        first.copy(target, stopped)
        type(self).begun.set()
        assert type(self).gate.wait(20)
        rest.copy(target, stopped)


def gated(array: np.ndarray[Any, Any]) -> Gated:
    Gated.gate, Gated.begun = threading.Event(), threading.Event()
    return Gated(array, array.ctypes.data, array.nbytes, 0, 0, None)


def test_what_is_late_is_copied_by_a_thread_and_the_rest_at_once() -> None:
    late, early = np.arange(1000.0), np.arange(7, dtype=np.int32)
    memory = memoryview(bytearray(8100))
    done: list[str] = []
    source = gated(late)
    copy = Snapshot(
        memory,
        [(source, "in step"), (Source.of(early, 0, early.nbytes, 8064), "any time")],
        done.append,
    )
    assert bytes(memory[8064 : 8064 + 28]) == early.tobytes()
    assert Gated.begun.wait(20)
    assert done == []
    Gated.gate.set()
    copy.wait()
    assert done == ["intact"]
    assert bytes(memory[:8000]) == late.tobytes()


def test_the_step_waits_only_for_what_it_changes() -> None:
    trained, frozen = np.arange(100.0), np.arange(1000.0)
    memory = memoryview(bytearray(9000))
    done: list[str] = []
    source = gated(frozen)
    copy = Snapshot(
        memory, [(source, "seldom"), (Source.of(trained, 0, 800, 8064), "in step")], done.append
    )
    copy.wait_steady()
    assert bytes(memory[8064 : 8064 + 800]) == trained.tobytes()
    trained += 1.0
    assert Gated.begun.wait(20)
    assert done == []
    Gated.gate.set()
    copy.wait()
    assert done == ["intact"]
    assert bytes(memory[:8000]) == frozen.tobytes()


@pytest.mark.parametrize("changes", ["in step", "seldom"])
@pytest.mark.parametrize("kind", ["for good", "of what was copied"])
def test_a_change_while_it_is_copied_is_noticed(kind: str, changes: Changes) -> None:
    late = np.arange(1000.0)
    done: list[str] = []
    copy = Snapshot(memoryview(bytearray(8000)), [(gated(late), changes)], done.append)
    assert Gated.begun.wait(20)
    if kind == "for good":
        late += 1.0
    elif kind == "of what was copied":
        late[:10] = -1.0  # the copy is whole all the same
    Gated.gate.set()
    copy.wait()
    assert done == ["intact" if kind == "of what was copied" else changes]


def test_a_copy_that_is_no_longer_wanted_is_not_intact() -> None:
    done: list[str] = []
    copy = Snapshot(memoryview(bytearray(80)), [(gated(np.arange(10.0)), "in step")], done.append)
    assert Gated.begun.wait(20)
    stopper = threading.Thread(target=copy.abandon)
    stopper.start()
    copy._stop.wait(20)
    Gated.gate.set()
    stopper.join(20)
    assert done == ["stopped"]


def test_large_tensors_are_copied_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "CHUNK_BYTES", 100)
    array = np.arange(333, dtype=np.uint8)
    memory = memoryview(bytearray(400))
    Snapshot(memory, [(Source.of(array, 3, 330, 64), "any time")], lambda intact: None)
    assert bytes(memory[64 : 64 + 330]) == array[3:].tobytes()
    assert not any(memory[:64])


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 9, 15, 16, 17, 64, 1000])
def test_the_word_looked_at_lies_within_the_bytes(nbytes: int) -> None:
    array = np.full(nbytes + 16, 255, dtype=np.uint8)
    array[8 : 8 + nbytes] = 0
    source = Source(array, array.ctypes.data + 8, nbytes, 0, 0, None)
    assert not any(source.words(source.address))


@pytest.mark.parametrize("nbytes", [0, 1, 8, 8167, 8168, 8169, 50_000])
def test_a_fingerprint_sees_each_byte_and_its_place(
    nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "CHUNK_BYTES", 20_000)
    data = bytearray(np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8).tobytes())
    first = snapshot.fingerprint(memoryview(data))
    assert snapshot.fingerprint(memoryview(bytes(data))) == first
    for at in {0, nbytes // 3, nbytes // 2, nbytes - 1} if nbytes else ():
        data[at] ^= 64
        assert snapshot.fingerprint(memoryview(data)) != first
        data[at] ^= 64
    swapped = data[nbytes // 2 :] + data[: nbytes // 2]
    assert (snapshot.fingerprint(memoryview(swapped)) == first) == (swapped == data)


def spec(name: str, start: int, nbytes: int, offset: int) -> TensorSpec:
    return TensorSpec(name, "uint8", (6,), "replicated", offset, nbytes, start)


def test_an_image_joins_the_pieces_of_a_tensor(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"456___123abcdef")
    pieces = (spec("x", 3, 3, 0), spec("x", 0, 3, 6), spec("y", 0, 6, 9))
    image = Image.open(path, ImageInfo(1, 0, 1, pieces))
    assert image.names() == ["x", "y"]
    assert bytes(image.read("x")) == b"123456"
    assert bytes(image.read("y")) == b"abcdef"
    assert image.spec("z") is None


def test_an_image_without_bytes_needs_no_file() -> None:
    image = Image.open("/nonexistent", ImageInfo(1, 0, 1, (spec("x", 0, 0, 0),)))
    assert bytes(image.read("x")) == b""
