"""Signals that ask a launcher to leave or to save, and what has become of them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

from typing_extensions import Self

from paddle_ft.errors import EXIT_SIGINT, EXIT_SIGTERM

ASK_TO_SAVE = (signal.SIGUSR1, signal.SIGUSR2)
"""Passed on to the workers, whose rules decide what they mean."""
REPEAT_S = 0.5
"""Within it a signal that comes again is the same: `timeout`, and other supervisors, send it to a
process and to its group."""


class Signals:
    """While it is entered, signals are noted; ``take`` acts upon them.

    Args:
        ask_to_save: is given the number of a signal that does.
        grace_s: how long leaving may take, for people.
    """

    def __init__(
        self, ask_to_save: Callable[[int], None], say: Callable[[str], None], grace_s: float
    ) -> None:
        self._ask_to_save = ask_to_save
        self._say = say
        self._grace_s = grace_s
        self._noted: list[int] = []
        self._before: dict[int, Any] = {}
        self.leaving_since_s: float | None = None
        """Monotonic; None while nobody has asked to leave."""
        self.leaving_code = 0
        self.hurried = False
        """Somebody has asked once more."""

    def __enter__(self) -> Self:
        numbers = [signal.SIGINT, signal.SIGTERM, *ASK_TO_SAVE]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def pending(self) -> bool:
        return bool(self._noted)

    def leave(self) -> None:
        """As if by SIGTERM, unless this launcher is leaving anyway."""
        if self.leaving_since_s is None:
            self._noted.append(signal.SIGTERM)
            self.take()

    def take(self) -> None:
        while self._noted:
            number = self._noted.pop(0)
            if number in ASK_TO_SAVE:
                self._ask_to_save(number)
                continue
            if self.leaving_since_s is not None:
                self.hurried |= time.monotonic() - self.leaving_since_s >= REPEAT_S
                continue
            self.leaving_since_s = time.monotonic()
            self.leaving_code = EXIT_SIGINT if number == signal.SIGINT else EXIT_SIGTERM
            self._say(
                f"{signal.Signals(number).name}: saving a last checkpoint, then leaving (at "
                f"most {self._grace_s:g} s; once more to leave at once)"
            )

    def _note(self, number: int, _frame: object) -> None:
        self._noted.append(number)  # a handler must not take locks
