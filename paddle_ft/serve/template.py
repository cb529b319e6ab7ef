"""The exported files of a layer, to be filled with the values that its tensors have later.

To export a layer takes as long as to trace its forward pass, hundreds of milliseconds and more. A
training loop pays that once: of each later version it copies the tensors, and the files are put
together beside it.

Invariant: a template is made only of files that it gives again, byte for byte, from the values they
were exported with; else there is none, and each version is exported.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paddle_ft.serve.cut import tensors
from paddle_ft.serve.export import PREFIX

_PARAMETER = "p"
"""What Paddle 3 calls the operation that stands for a parameter."""


@dataclass(frozen=True, slots=True)
class Template:
    """``heads`` stand before the values of the tensors called ``names``, in the order of a file."""

    program: bytes
    names: tuple[str, ...]
    heads: tuple[bytes, ...]

    @classmethod
    def of(cls, layer: Any, folder: Path) -> Template | None:
        """For ``layer``, which has just been exported to ``folder``; None if there is none."""
        program = folder / f"{PREFIX}.json"
        if not program.is_file():  # Paddle 2
            return None
        data = (folder / f"{PREFIX}.pdiparams").read_bytes()
        try:
            names = sorted(set(_parameters(json.loads(program.read_bytes()))))
            sizes = list(tensors(memoryview(data)))
            values = _copied(layer, names)
        except (struct.error, ValueError, KeyError, IndexError):
            return None
        heads = tuple(_heads(data, sizes, values)) if len(sizes) == len(names) else ()
        made = cls(program.read_bytes(), tuple(names), heads)
        return made if b"".join(made._parts(values)) == data else None

    def copy(self, layer: Any) -> list[Any]:
        """The values that ``layer`` has now. Raises KeyError if it has other tensors."""
        return _copied(layer, self.names)

    def write(self, folder: Path, values: Sequence[Any]) -> None:
        """The files, with values that were copied; for any thread."""
        (folder / f"{PREFIX}.json").write_bytes(self.program)
        with (folder / f"{PREFIX}.pdiparams").open("wb") as file:
            for part in self._parts(values):
                file.write(part)

    def _parts(self, values: Sequence[Any]) -> Iterator[bytes | memoryview]:
        for head, value in zip(self.heads, values, strict=False):
            yield head
            yield value.reshape(-1).view(np.uint8).data


def _heads(data: bytes, sizes: Sequence[int], values: Sequence[Any]) -> Iterator[bytes]:
    at = 0
    for size, value in zip(sizes, values, strict=True):
        yield data[at : at + size - value.nbytes]
        at += size


def _parameters(program: Any) -> Iterator[str]:
    """Names of the parameters of a program, wherever they stand in it."""
    if isinstance(program, dict):
        if program.get("#") == _PARAMETER:
            yield str(program["A"][-1])
            return
        program = program.values()
    elif not isinstance(program, list):
        return
    for part in program:
        yield from _parameters(part)


def _copied(layer: Any, names: Sequence[str]) -> list[Any]:
    layer = getattr(layer, "_layers", layer)  # paddle.DataParallel
    found = {tensor.name: tensor for tensor in (*layer.parameters(), *layer.buffers())}
    return [np.ascontiguousarray(found[name].numpy()) for name in names]
