"""Does the faults of a plan at their times, and watches what comes of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from paddle_ft.chaos.plan import Plan
from paddle_ft.chaos.report import Outcome, Struck, judge, lines
from paddle_ft.chaos.strike import Hands, NoVictim
from paddle_ft.chaos.watch import Launcher, Watch
from paddle_ft.observe import events

TURN_S = 0.005
VICTIM_WAIT_S = 20.0
"""How long a fault waits for somebody whom it can hit, as while a job recovers."""


class Driver:
    """Times count from when all ranks step. ``turn`` is called every ``TURN_S`` seconds."""

    def __init__(self, plan: Plan, hands: Hands, watch: Watch) -> None:
        self._hands = hands
        self._watch = watch
        self._left = list(plan.faults)
        self._struck: list[Struck] = []
        self.began_s = 0.0
        """CLOCK_MONOTONIC; 0.0: not all ranks step yet."""

    def turn(self) -> None:
        self._hands.tend()
        if not self.began_s:
            if self._watch.running():
                self.began_s = time.monotonic()
            return
        late_s = time.monotonic() - self.began_s
        if self._left and late_s >= self._left[0].at_s:
            fault = self._left[0]
            try:
                self._struck.append(self._hands.strike(fault))
            except NoVictim as nobody:
                if late_s - fault.at_s < VICTIM_WAIT_S:
                    return
                self._struck.append(Struck(str(fault), "", time.monotonic(), str(nobody)))
            del self._left[0]

    def outcomes(self) -> list[Outcome]:
        """Of all faults; those that were not done before the job's end hit nothing."""
        now_s = time.monotonic()
        rest = [Struck(str(f), "", now_s, "the job had ended") for f in self._left]
        samples, notices_s = self._watch.samples(), self._notices_s()
        return judge([*self._struck, *rest], samples, notices_s)

    def _notices_s(self) -> list[float]:
        """When launchers wrote down that something was lost."""
        try:
            found = events.read(self._watch.log_dirs)
        except OSError:
            return []
        return [
            event.at_s
            for event in found
            if event.kind in ("lost_peer", "generation")
            or (event.kind == "worker_ended" and not event.fields.get("stopped"))
        ]

    def steps(self) -> int:
        return max((s.step for s in self._watch.samples()), default=0)


class OwnChaos:
    """What a launcher does to its own workers, as a context; the report is said at its end."""

    def __init__(self, plan: Plan, me: Launcher, say: Callable[[str], None]) -> None:
        self._say = say
        self._watch = Watch(lambda: [me])
        self._hands = Hands(plan, lambda: [me])
        self._driver = Driver(plan, self._hands, self._watch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos", daemon=True)

    def __enter__(self) -> None:
        self._watch.start()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)
        self._hands.close()
        self._watch.close()
        for line in lines(self._driver.outcomes(), self._driver.began_s, None):
            self._say(line)

    def _run(self) -> None:
        while not self._stop.wait(TURN_S):
            self._driver.turn()


def own_chaos(
    plan: Plan, node: str, pid: int, log_dir: str, say: Callable[[str], None]
) -> OwnChaos:
    return OwnChaos(plan, Launcher(node, pid, Path(log_dir)), say)
