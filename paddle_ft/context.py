"""Where a session runs: under the launcher, alone, or alone with a checkpoint directory.

Everything that differs between these is decided here, so that the session itself does not ask.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paddle_ft.agent import door
from paddle_ft.agent.beacon import Beacon
from paddle_ft.agent.worker_env import SESSION_VARIABLE, SessionEnv
from paddle_ft.checkpoint import plan
from paddle_ft.collective import Collective
from paddle_ft.errors import ConfigError
from paddle_ft.health import stacks
from paddle_ft.health.board import Board
from paddle_ft.keeper import AgentKeeper, Keeper, NullKeeper
from paddle_ft.policies import Rule, parse
from paddle_ft.progress import Position, Schedule
from paddle_ft.types import decode

_LOSS_INTERVAL_S = 0.5
"""How often the loss is read from an accelerator, which has to finish its work for that."""


@dataclass(slots=True)
class Context:
    """``url`` counts only where there is no launcher, ``save`` where that says nothing."""

    url: str | None = None
    save: Rule | None = None
    collective: Collective = field(default_factory=lambda: _collective())
    env: SessionEnv | None = field(default_factory=lambda: session_env())
    """What the launcher has told; None without a launcher."""
    held_s: float = 0.0
    """For how long checkpoints have held training up in this process."""
    board: Board = field(init=False)
    """What this rank is doing, for the launcher to see."""

    def __post_init__(self) -> None:
        self.board = self.collective.board
        with contextlib.suppress(OSError):  # the agent has gone: whoever connects to it is told
            if self.env is not None and self.env.beacon:
                self.board.move(self.env.beacon)
            if self.env is not None:
                stacks.install(Path(self.env.socket).parent)

    def take(self, env: Mapping[str, str]) -> None:
        """The launcher has told anew: another generation, and perhaps another rank in it.

        The variables change as well, for the script and for ``paddle.distributed``.
        """
        door.take(env)
        self.env = session_env()
        if self.env is not None:
            self.board.move(self.env.beacon)
        now = Collective.from_environment()
        self.collective.rank, self.collective.world_size = now.rank, now.world_size

    @property
    def generation(self) -> int:
        return self.env.generation if self.env else 1

    @property
    def restarts(self) -> int:
        return self.env.restarts if self.env else 0

    @property
    def mode(self) -> plan.Mode:
        return "sharded" if self.env and self.env.mode == "sharded" else "rank0"

    @property
    def block_bytes(self) -> int:
        return self.env.block_bytes if self.env else plan.ALIGN_BYTES

    @property
    def writers(self) -> int:
        """Ranks that save: without a launcher rank 0 does it for all, with its own statistics."""
        return self.collective.world_size if self.env else 1

    @property
    def store_url(self) -> str:
        """Where the checkpoints are kept; "" if nobody has said."""
        return (self.env.store if self.env else self.url) or ""

    def check_divided(self) -> None:
        """Raises ConfigError if tensors divided among the ranks could not be saved."""
        if self.env is None and self.url is not None and self.collective.world_size > 1:
            raise ConfigError(
                "Without the launcher rank 0 saves for all, and it does not have the shards of "
                "the others; start the script with paddle_ft.launch."
            )

    def connect(self) -> Keeper:
        """Where snapshots go. Raises PaddleFTError if the agent does not answer, StoreError."""
        if self.env is not None:
            groups = self.collective.groups
            if groups is None:
                return AgentKeeper(self.env.socket)
            return AgentKeeper(self.env.socket, lambda o: groups.abort_before(o.generation))
        if self.url is None:
            return NullKeeper()
        # Loads what talks to object stores.
        from paddle_ft.standalone import StandaloneKeeper

        return StandaloneKeeper(self.url, self.collective.rank)

    def schedule(self) -> Schedule:
        """When to save: what the launcher was told, else what the script says, else ``auto``."""
        if self.env is not None and self.env.when:
            rule = parse(self.env.when)
        else:
            rule = self.save or parse("auto")
        return Schedule(rule, self.env.mtbf_s if self.env else 0.0)

    def teller(self, position: Position) -> Teller:
        """Tells where the session is; begins with ``position``."""
        teller = Teller(Beacon(self.env.beacon) if self.env and self.env.beacon else None, self)
        teller.tell(position, None)
        return teller


class Teller:
    """Writes the session's progress to the page that the agent reads."""

    def __init__(self, beacon: Beacon | None, context: Context) -> None:
        self._beacon = beacon
        self._context = context
        self._held_before_s = context.held_s
        self._loss = float("nan")
        self._loss_at_s = float("-inf")

    def tell(self, position: Position, loss: Any) -> None:
        """``loss`` is a number, a tensor or None."""
        if self._beacon is None:
            return
        if loss is not None:
            self._read_loss(loss)
        p = position
        held_s = self._context.held_s - self._held_before_s
        self._beacon.write(p.step, self._loss, p.epoch, p.samples, p.steps_total(), held_s)

    def _read_loss(self, loss: Any) -> None:
        now_s = time.monotonic()
        on_device = hasattr(loss, "place") and not loss.place.is_cpu_place()
        if on_device and now_s - self._loss_at_s < _LOSS_INTERVAL_S:
            return
        self._loss_at_s = now_s
        self._loss = float(loss.mean() if getattr(loss, "size", 1) != 1 else loss)


def _collective() -> Collective:
    """Of a worker in reserve it is nobody's yet: its session waits only when it has begun."""
    return Collective(0, 1) if door.is_sealed() else Collective.from_environment()


def session_env() -> SessionEnv | None:
    """What the launcher has told this process. Raises ConfigError if it is another version's."""
    text = os.environ.get(SESSION_VARIABLE)
    if not text:
        return None
    try:
        return decode(SessionEnv, text.encode())
    except ValueError:
        raise ConfigError(
            f"The variable {SESSION_VARIABLE} is not what paddle_ft.launch of this version sets; "
            f"unset it to run the script alone."
        ) from None
