"""The state that each rank has for itself (BatchNorm statistics, buffers), known to all ranks.

It changes in every forward pass and is nowhere else, so that it would be lost with its rank. So the
ranks tell each other: it travels with the vote before each step, as words of one sum in which every
rank has its own place. Who replaces a lost rank, and who has to do a batch again, begins with what
was agreed at the last step.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from paddle_ft.checkpoint.snapshot import in_place, nbytes_of, write_tensor
from paddle_ft.state import TrainingState

Words = npt.NDArray[np.int64]

BYTES_MAX = 1 * 2**20
"""Of one rank. More would make every step slower, so such a job is restarted instead."""


class LocalState:
    """This rank's own tensors, and what all ranks had at the last agreement."""

    def __init__(self, state: TrainingState) -> None:
        entries = state.model_entries()
        self._tensors = [e.tensor for e in entries if e.scope == "local" and e.shard is None]
        self.nbytes = sum(map(nbytes_of, self._tensors))
        self.width = -(-self.nbytes // 8)
        """Words of one rank."""
        self.nothing: Words = np.zeros(0, dtype=np.int64)
        self.agreed: Words = np.zeros((1, self.width), dtype=np.int64)
        """Row r: what rank r had."""

    @property
    def fits(self) -> bool:
        """Whether it can be told to all ranks at every step."""
        return self.nbytes <= BYTES_MAX and all(map(in_place, self._tensors))

    def is_as_agreed(self, row: int) -> bool:
        return not self.width or bool(np.array_equal(self.read(), self.agreed[row]))

    def read(self) -> Words:
        """This rank's own, as words."""
        words = np.zeros(self.width, dtype=np.int64)
        at = words.ctypes.data
        for tensor in self._tensors:
            ctypes.memmove(at, tensor.data_ptr(), nbytes_of(tensor))
            at += nbytes_of(tensor)
        return words

    def placed(self, rank: int, world_size: int) -> Words:
        """This rank's own words in its place, zeros in those of the others: to be summed."""
        if not self.width:
            return self.nothing
        table = np.zeros((world_size, self.width), dtype=np.int64)
        table[rank] = self.read()
        return table.reshape(-1)

    def agree(self, sums: Words, world_size: int) -> None:
        """Takes note of the sums of what ``placed`` gave."""
        self.agreed = sums.reshape(world_size, self.width)

    def put_back(self, rank: int) -> None:
        """Gives the tensors here what ``rank`` had at the last agreement."""
        data, at = memoryview(self.agreed[rank].tobytes()), 0
        for tensor in self._tensors:
            write_tensor(tensor, data[at : at + nbytes_of(tensor)])
            at += nbytes_of(tensor)
