"""Reads the text in a picture: detection, direction and recognition of PP-OCRv4, one after another.

Three Paddle inference models and the Python between them, served as one model. A request carries
the bytes of a picture file; the reply has one row for each line of text, from top to bottom.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from strips import Recognition, decoded, drawn, groups, normalized, only, padded

from paddle_ft.serve.pipeline import Pipeline
from paddle_ft.serve.types import Feature, ModelError, Tensors

SIDE_MIN, SIDE_MAX = 320, 960
"""Pixels of the shorter and of the longer side at which lines are looked for."""
INK_MIN, LINE_MIN = 0.3, 0.5
"""From which probability on a pixel is text, and a region of such pixels a line."""
GROWTH = 1.6
"""Detection marks the core of a line; the line is so much larger (the paper of DB, 2019)."""
LINES_MAX = 1000
TURNED_MIN = 0.9
SCORE_MIN = 0.5


class Box(NamedTuple):
    """A rectangle, maybe turned."""

    center: tuple[float, float]
    size: tuple[float, float]
    angle: float

    def corners(self) -> NDArray[np.float32]:
        """4 × (x, y): upper left, upper right, lower right, lower left of the text."""
        points = cv2.boxPoints(self)
        by_x = points[np.argsort(points[:, 0], kind="stable")]
        left = by_x[:2][np.argsort(by_x[:2, 1])]
        right = by_x[2:][np.argsort(by_x[2:, 1])]
        return np.float32([left[0], right[0], right[1], left[1]])


class Reader(Pipeline):
    inputs = (Feature("image", "BYTES", (1,)),)
    outputs = (
        Feature("text", "BYTES", (-1,)),
        Feature("score", "FP32", (-1,)),
        Feature("box", "FP32", (-1, 4, 2)),
    )

    def setup(self) -> None:
        self.detect = self.model("det")
        self.turn = self.model("cls")
        self.recognition = Recognition(self.model("rec"), self.folder / "characters.txt")
        # The first pictures of a model take longer: here nobody waits for them.
        self.run({"image": np.array([drawn("warm up", SIDE_MIN, 2 * SIDE_MIN)], object)})

    def run(self, inputs: Tensors, state: Any = None) -> Tensors:
        """``text`` (UTF-8), ``score`` (0 to 1) and ``box`` (pixels; corners as in ``Box``)."""
        files = inputs["image"]
        if files.size != 1:
            raise ModelError(f"A request carries one picture; this one has {files.size}.")
        picture = decoded(files.flat[0])
        boxes = self.find(picture)
        strips = self.upright([cut_out(picture, box) for box in boxes])
        read = self.recognition.read(strips)
        kept = [i for i, (text, score) in enumerate(read) if text and score >= SCORE_MIN]
        return {
            "text": np.array([read[i][0].encode() for i in kept], object),
            "score": np.array([read[i][1] for i in kept], np.float32),
            "box": np.array([boxes[i] for i in kept], np.float32).reshape(-1, 4, 2),
        }

    def find(self, picture: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """The corners of each line of text, from top to bottom and from left to right."""
        height, width = picture.shape[:2]
        ratio = max(1.0, SIDE_MIN / min(height, width))
        ratio = min(ratio, SIDE_MAX / max(height, width))
        # The network halves five times.
        size = [max(32, round(side * ratio / 32) * 32) for side in (width, height)]
        ink = only(self.detect, normalized(cv2.resize(picture, size))[None])[0, 0]
        scale = np.float32([width / size[0], height / size[1]])
        edge = np.float32([width - 1, height - 1])
        found = [np.clip(box.corners() * scale, 0, edge) for box in lines_in(ink)]
        found = [box for box in found if np.ptp(box, axis=0).min() >= 3]
        return sorted(found, key=lambda box: (round(box[0, 1] / 10), box[0, 0]))

    def upright(self, strips: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """The same, those turned that stand on their head."""
        for rows in groups(range(len(strips))):
            batch = np.stack([padded(strips[i], 192) for i in rows])
            for i, (_, turned) in zip(rows, only(self.turn, batch), strict=True):
                if turned > TURNED_MIN:
                    strips[i] = cv2.rotate(strips[i], cv2.ROTATE_180)
        return strips


def lines_in(ink: NDArray[np.float32]) -> Iterator[Box]:
    """Rectangles around the text, of a map of probabilities."""
    mask = cv2.dilate((ink > INK_MIN).astype(np.uint8), np.ones((2, 2), np.uint8))
    contours, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    for contour in contours[:LINES_MAX]:
        center, (w, h), angle = cv2.minAreaRect(contour)
        if min(w, h) < 3:
            continue
        x, y, dx, dy = cv2.boundingRect(contour)
        inside = np.zeros((dy, dx), np.uint8)
        cv2.drawContours(inside, [contour], 0, 1, cv2.FILLED, offset=(-x, -y))
        if cv2.mean(ink[y : y + dy, x : x + dx], inside)[0] < LINE_MIN:
            continue
        grown = GROWTH * w * h / (w + h)
        yield Box(center, (w + grown, h + grown), angle)


def cut_out(picture: NDArray[np.uint8], corners: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The line as an upright strip."""
    width = max(1, round(float(np.linalg.norm(corners[1] - corners[0]))))
    height = max(1, round(float(np.linalg.norm(corners[3] - corners[0]))))
    target = np.float32([[0, 0], [width, 0], [width, height], [0, height]])
    move = cv2.getPerspectiveTransform(corners, target)
    strip = cv2.warpPerspective(
        picture, move, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
    )
    # A line that is much higher than wide is one that runs downwards.
    return np.rot90(strip) if height >= 1.5 * width else strip
