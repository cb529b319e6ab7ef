"""What the rooms of serving pass to one another: a model's description, and who runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from paddle_ft.errors import EXIT_SERVING, PaddleFTError

Tensors = Mapping[str, NDArray[Any]]
"""By name; rows along the first dimension. Elements of BYTES are ``bytes`` in an object array."""


@dataclass(frozen=True, slots=True)
class Feature:
    """An input or output of a model, as the Open Inference Protocol describes it."""

    name: str
    datatype: str
    """Of the protocol: "FP32", "INT64", "BYTES" …"""
    shape: tuple[int, ...]
    """-1 stands for any size; the first dimension counts rows where ``ModelInfo.batched``."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    name: str
    version: str
    platform: str
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    batched: bool = True
    """Rows of several requests may be joined along the first dimension."""
    stateful: bool = False
    """It keeps something for each session: requests that name one are not joined."""


class Runner(Protocol):
    """One loaded, warm version of a model, run by worker processes or by what stands for them."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def idle(self) -> int:
        """How many batches could begin at once."""
        ...

    async def run(
        self, inputs: Tensors, timeout_s: float, session: str = "", again: bool = False
    ) -> Tensors:
        """The outputs for one batch.

        Args:
            session: whose state a pipeline reads and changes; "" for none. Batches of one session
                run one after the other; what they change is kept once they have run well.
            again: these inputs were in a batch that was refused as ``BatchRefused``: they are
                given to one worker only.

        Raises:
            ModelError: the model refuses these inputs; the same would happen again.
            Unavailable: no worker could do it in time; another replica may.
            NotPrimary, TooLarge: the state of the session was not changed.
        """
        ...

    async def close(self) -> None: ...


class Sessions(Protocol):
    """What a group keeps for each session of its clients: values by key, on every replica."""

    async def get(self, session: str, key: str) -> bytes | None:
        """None if there is none. Raises Unavailable."""
        ...

    async def put(self, session: str, changes: Mapping[str, bytes], timeout_s: float) -> None:
        """Returns when all are acknowledged: whatever happens, it is all of them or none, and
        none once ``timeout_s`` is over.

        Raises NotPrimary, Unavailable, TooLarge."""
        ...


class ServeError(PaddleFTError):
    """A request that is not answered; ``status`` is that of HTTP."""

    exit_code = EXIT_SERVING
    status = 500


class ModelError(ServeError):
    """The model refuses these inputs: the same request would be refused again."""

    status = 400


class BatchRefused(ModelError):
    """Workers were lost with this batch: it is taken to be the cause."""


class Unavailable(ServeError):
    """Nobody here can do it now: another replica may, or this one after ``retry_after_s``."""

    status = 503

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoPrimary(Unavailable):
    """Nobody takes changes just now, and nothing has been done."""


class NotPrimary(ServeError):
    """Another replica takes changes: ``address`` (host:port) is that of its HTTP front."""

    status = 421

    def __init__(self, name: str, address: str) -> None:
        super().__init__(f"changes go to the primary, {name} at {address}")
        self.name = name
        self.address = address


class TooLarge(ServeError):
    """A key, a value or the state would exceed its bound."""

    status = 413


class Full(TooLarge):
    """The state of the group has no room for anything more."""

    status = 507


class Lost(ServeError):
    """A change that was acknowledged once is gone, after a forced promotion or a total loss."""

    status = 409


class NotPromoted(ServeError):
    """A promotion that cannot be."""

    status = 409
