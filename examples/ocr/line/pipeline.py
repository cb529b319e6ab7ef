"""Reads pictures of one line of text each: the recognition of PP-OCRv4 alone.

Lines of several requests, whatever their widths, are read together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from strips import HEIGHT, ROWS_MAX, Recognition, decoded, drawn

from paddle_ft.serve.pipeline import Pipeline
from paddle_ft.serve.types import Feature, Tensors


class LineReader(Pipeline):
    inputs = (Feature("image", "BYTES", (-1,)),)
    outputs = (Feature("text", "BYTES", (-1,)), Feature("score", "FP32", (-1,)))
    batched = True

    def setup(self) -> None:
        self.recognition = Recognition(self.model("rec"), self.folder / "characters.txt")
        # The first batches of a size take longer: here nobody waits for them.
        line = drawn("warm up", HEIGHT, 320)
        for rows in (1, ROWS_MAX):
            self.run({"image": np.array([line] * rows, object)})

    def run(self, inputs: Tensors, state: Any = None) -> Tensors:
        """``text`` (UTF-8, maybe empty) and ``score`` (0 to 1) of each picture."""
        read = self.recognition.read_apart([decoded(file) for file in inputs["image"]])
        return {
            "text": np.array([text.encode() for text, _ in read], object),
            "score": np.array([score for _, score in read], np.float32),
        }
