"""Strips: pictures of one line of text each, and what the recognition of PP-OCRv4 reads in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from paddle_ft.serve.pipeline import Loaded
from paddle_ft.serve.types import ModelError

PIXELS_MAX = 16_000_000
HEIGHT = 48
WIDTHS = (160, 320, 480, 640, 960, 1280, 1920)
"""Of strips for the recognition: a few shapes, for which oneDNN keeps what it has prepared."""
ROWS_MAX = 4


class Recognition:
    """The model, and the characters that it tells apart."""

    def __init__(self, model: Loaded, characters: Path) -> None:
        self._model = model
        lines = characters.read_text(encoding="utf-8").split("\n")
        # The first class is "nothing", the last a space.
        self._characters = ["", *(line for line in lines if line), " "]

    def read(self, strips: Sequence[NDArray[np.uint8]]) -> list[tuple[str, float]]:
        """Text and score of each; those of like width are read together."""
        read: list[tuple[str, float]] = [("", 0.0)] * len(strips)
        order = sorted(range(len(strips)), key=lambda i: strips[i].shape[1] / strips[i].shape[0])
        for rows in groups(order):
            width = width_for(strips[rows[-1]])
            batch = np.stack([padded(strips[i], width) for i in rows])
            for i, chances in zip(rows, only(self._model, batch), strict=True):
                read[i] = self._text_of(chances)
        return read

    def read_apart(self, strips: Sequence[NDArray[np.uint8]]) -> list[tuple[str, float]]:
        """The same; what is read in one, and its score, are whatever the others are."""
        of_width: dict[int, list[int]] = {}
        for i, strip in enumerate(strips):
            of_width.setdefault(width_for(strip), []).append(i)
        found = {}
        for rows in of_width.values():
            found.update(zip(rows, self.read([strips[i] for i in rows]), strict=True))
        return [found[i] for i in range(len(strips))]

    def _text_of(self, chances: NDArray[np.float32]) -> tuple[str, float]:
        """Of steps × characters; a character that goes on over several steps is one (CTC)."""
        best = chances.argmax(axis=1)
        new = (best != 0) & (best != np.concatenate([[-1], best[:-1]]))
        if not new.any():
            return "", 0.0
        text = "".join(self._characters[i] for i in best[new])
        return text, float(chances.max(axis=1)[new].mean())


def decoded(file: bytes) -> NDArray[np.uint8]:
    """Rows × columns × BGR of a picture file. Raises ModelError."""
    try:
        picture = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        picture = None
    if picture is None:
        raise ModelError("The image is no picture that can be read; send the bytes of a PNG, JPEG.")
    if picture.shape[0] * picture.shape[1] > PIXELS_MAX:
        raise ModelError(f"The image has more than {PIXELS_MAX} pixels; send a smaller one.")
    return np.asarray(picture, np.uint8)


def width_for(strip: NDArray[np.uint8]) -> int:
    """Of WIDTHS, the one that it goes into."""
    own = HEIGHT * strip.shape[1] / strip.shape[0]
    return next((width for width in WIDTHS if width >= own), WIDTHS[-1])


def padded(strip: NDArray[np.uint8], width: int) -> NDArray[np.float32]:
    """3 × HEIGHT × width: the strip at its own proportions, grey to the right of it."""
    own = min(width, max(1, round(HEIGHT * strip.shape[1] / strip.shape[0])))
    whole = np.zeros((3, HEIGHT, width), np.float32)
    whole[:, :, :own] = normalized(cv2.resize(strip, (own, HEIGHT)))
    return whole


def normalized(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """3 × rows × columns in -1 to 1."""
    return np.ascontiguousarray(picture.transpose(2, 0, 1), np.float32) / 127.5 - 1


def groups(indices: Sequence[int]) -> Iterator[Sequence[int]]:
    """Those of the strips that go through a model together."""
    for first in range(0, len(indices), ROWS_MAX):
        yield indices[first : first + ROWS_MAX]


def only(model: Loaded, batch: NDArray[np.float32]) -> NDArray[np.float32]:
    """The output of a model with one input and one output."""
    (given,) = model.run({model.info.inputs[0].name: batch}).values()
    return np.asarray(given, np.float32)


def drawn(text: str, height: int, width: int) -> bytes:
    """A picture file with a line of text."""
    picture = np.full((height, width, 3), 255, np.uint8)
    cv2.putText(picture, text, (8, height // 2 + 12), cv2.FONT_HERSHEY_SIMPLEX, 1.1, (0, 0, 0), 2)
    return bytes(cv2.imencode(".png", picture)[1])
