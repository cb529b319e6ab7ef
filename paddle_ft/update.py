"""One optimizer step over all ranks: sum the gradients, apply them, step the schedule, clear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from paddle_ft.collective import Collective
from paddle_ft.errors import ConfigError
from paddle_ft.gradients import Gradients, Words
from paddle_ft.health.phases import OPTIMIZER, REDUCE
from paddle_ft.sampling import Item
from paddle_ft.state import TrainingState

LrStep = Literal["step", "epoch", "manual"]


def check_lr_step(lr_step: LrStep, lr_scheduler: Any) -> None:
    """Raises ConfigError if ``lr_scheduler`` cannot be stepped as ``lr_step`` says."""
    if lr_step not in ("step", "epoch", "manual"):
        raise ConfigError(f"lr_step is {lr_step!r}: use 'step', 'epoch' or 'manual'.")
    if lr_step != "manual" and type(lr_scheduler).__name__ == "ReduceOnPlateau":
        raise ConfigError(
            "ReduceOnPlateau needs a metric that only the script knows: give lr_step='manual' and "
            "call its step yourself."
        )


class Update:
    """``parallel``: the model sums its gradients itself (``paddle.DataParallel``)."""

    def __init__(
        self, state: TrainingState, lr_step: LrStep, collective: Collective, parallel: bool
    ) -> None:
        self._optimizer = state.optimizer
        self._lr_scheduler = state.lr_scheduler
        self._lr_step = lr_step
        self._collective = collective
        self._parallel = parallel
        self._weight = 0.0
        parameters = state.model.parameters()
        self._gradients = Gradients(parameters, collective, state.parameters_apart())

    @property
    def _sums(self) -> bool:
        return self._collective.world_size > 1 and not self._parallel

    def handed_out(self, item: Item) -> None:
        """The loop is about to work on ``item``."""

    def take(self) -> bool:
        """The gradients of what was handed out are there; whether a step is due with them."""
        return True

    def gather(self, weight: float) -> list[int]:
        """As ``Gradients.gather``; nothing where there is nobody to sum with."""
        self._weight = weight
        self._collective.board.enter(REDUCE)
        return self._gradients.gather(weight) if self._sums else []

    def sum(self, words: Words) -> Words:
        """As ``Gradients.sum``, of what was gathered."""
        return self._gradients.sum(words) if self._sums else self._collective.sum_words(words)

    def apply(self, present: Sequence[int], scaler: Any, ends_epoch: bool) -> None:
        """The optimizer's step, with what ``gather`` gave summed over the ranks."""
        self._collective.board.enter(OPTIMIZER)
        if self._sums:
            self._gradients.finish(present)
        if scaler is None:
            self._optimizer.step()
        else:
            scaler.step(self._optimizer)
            scaler.update()
        steps_lr = self._lr_step == "step" or (self._lr_step == "epoch" and ends_epoch)
        if steps_lr and self._lr_scheduler is not None:
            self._lr_scheduler.step()
        self.drop()
        self._collective.board.step(self._weight)

    def drop(self) -> None:
        """Clears the gradients."""
        self._gradients.clear()
