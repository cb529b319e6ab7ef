"""How long a replica may take before another one is asked, learnt from the requests themselves.

Learnt from nginx's own log of every try, not from the health checks: how long a check takes says
nothing of how long a model takes, and the log has the connection and the answer apart.

Invariant: a learnt time-out is at least ``FACTOR`` times the slowest answer of the last
``WINDOW_S``, or ``FACTOR_SLOW`` times and ``MORE_S`` where that is less, at least the floor, and at
most the configured one. A try that was given up at a replica that is there was too slow for the
time-out, not dead: it counts as half as long again, so that a time-out that has become too short
grows at once, and shrinks minutes later.
Each model is learnt for itself, so that a slow one does not make a quick one wait; gRPC, which
names the model where nginx does not look, is learnt as a whole. Pure.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from paddle_ft.serve.routing import Learnt, Timeouts

FACTOR = 5.0
FACTOR_SLOW = 2.0
MORE_S = 1.0
GROWTH = 1.5
GRPC = "grpc call"
"""What a call by gRPC is about; no model has such a name."""
LEAST = 20
"""Answers before anything is learnt."""
WINDOW_S = 120.0
_SLOTS = 10
_STEP = 1.25
"""Time-outs are rounded up to powers of it: each change costs nginx a reload."""
_FALL = 0.7
_MODEL = re.compile(r"/v2/models/([^/]+)/")
_BETWEEN = re.compile(r"\s*(?:,| : )\s*")


@dataclass(frozen=True, slots=True)
class Try:
    """One replica asked for one request; times in s, None where it did not come so far."""

    at_s: float
    """When the request ended, by the clock of the day."""
    about: str
    """A model, ``GRPC``, or "" for everything else."""
    address: str
    status: int
    """0 where there was no answer."""
    connect_s: float | None
    answer_s: float | None
    request_s: float = 0.0
    """Of all tries of its request together."""

    @property
    def alive(self) -> bool:
        """Whether the replica itself has answered; 502 and 504 are nginx's words."""
        return 200 <= self.status < 500 or self.status == 503


def tries_of(line: str) -> Iterator[Try]:
    """The tries of one request in nginx's log (``nginx_text``); none if the line is cut off."""
    fields = line.rstrip("\n").split("\t")
    if len(fields) != 7:
        return
    at_s, about = _number(fields[0]) or 0.0, _about(fields[2])
    columns = [_BETWEEN.split(text) for text in fields[3:]]
    if len({len(column) for column in columns}) != 1:
        return
    request_s = sum(_number(answer) or 0.0 for answer in columns[3])
    for address, status, connect, answer in zip(*columns, strict=True):
        code = int(status) if re.fullmatch(r"[0-9]{3}", status) else 0
        yield Try(at_s, about, address, code, _number(connect), _number(answer), request_s)


def _about(path: str) -> str:
    if path.startswith("/inference."):
        return GRPC
    found = _MODEL.match(path)
    return found[1] if found else ""


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", text) else None


@dataclass(slots=True)
class _Slot:
    begins_s: float
    connect_s: float = 0.0
    answer_s: float = 0.0


class Learners:
    """What is learnt of each model, of gRPC, and of the rest; bounded by the models there are."""

    def __init__(self, configured: Timeouts, floor_s: float) -> None:
        self._configured, self._floor_s = configured, floor_s
        self._learners = {about: Learner(configured, floor_s) for about in ("", GRPC)}

    def know(self, models: Collection[str]) -> None:
        """Others are learnt together with the rest."""
        kept = {"", GRPC, *models}
        self._learners = {
            about: self._learners.get(about) or Learner(self._configured, self._floor_s)
            for about in sorted(kept)
        }

    def observe(self, tried: Try, now_s: float, answering: Collection[str]) -> None:
        self._learners.get(tried.about, self._learners[""]).observe(tried, now_s, answering)

    def learnt(self) -> Learnt:
        found = {about: learner.timeouts() for about, learner in self._learners.items()}
        return Learnt(found.pop(""), found.pop(GRPC), found)


class Learner:
    """The slowest of the last minutes, and the time-outs that follow."""

    def __init__(self, configured: Timeouts, floor_s: float) -> None:
        self._configured = configured
        self._floor_s = floor_s
        self._seen = 0
        self._slots: deque[_Slot] = deque(maxlen=_SLOTS + 1)
        self._now: Timeouts = configured

    def observe(self, tried: Try, now_s: float, answering: Collection[str]) -> None:
        """``answering``: addresses of replicas whose health checks pass."""
        slot = self._slot(now_s)
        if tried.status == 504 and tried.answer_s is not None:
            if tried.address not in answering:
                return
            connected = tried.connect_s is not None
            if connected:
                slot.answer_s = max(slot.answer_s, GROWTH * tried.answer_s)
            else:
                slot.connect_s = max(slot.connect_s, GROWTH * tried.answer_s)
        elif 200 <= tried.status < 500 and tried.connect_s is not None:
            self._seen += 1
            slot.connect_s = max(slot.connect_s, tried.connect_s)
            slot.answer_s = max(slot.answer_s, tried.answer_s or 0.0)

    def timeouts(self) -> Timeouts:
        """Those to use from now on; while there are no requests they stay as they are."""
        if self._seen < LEAST:
            return self._configured
        most = self._configured
        read_s = self._settle(self._now.read_s, max(s.answer_s for s in self._slots), most.read_s)
        self._now = Timeouts(
            self._settle(
                self._now.connect_s, max(s.connect_s for s in self._slots), most.connect_s
            ),
            min(most.send_s, read_s),
            read_s,
        )
        return self._now

    def _settle(self, current_s: float, slowest_s: float, most_s: float) -> float:
        """Up at once, down only by much."""
        beyond_s = min(FACTOR * slowest_s, FACTOR_SLOW * slowest_s + MORE_S)
        wanted_s = max(self._floor_s, beyond_s) / self._floor_s
        steps = math.ceil(math.log(wanted_s, _STEP) - 1e-9)
        wanted_s = min(self._floor_s * _STEP**steps, most_s)
        return wanted_s if wanted_s > current_s or wanted_s < _FALL * current_s else current_s

    def _slot(self, now_s: float) -> _Slot:
        length_s = WINDOW_S / _SLOTS
        if not self._slots or now_s >= self._slots[-1].begins_s + length_s:
            self._slots.append(_Slot(now_s))
        while self._slots[0].begins_s < now_s - WINDOW_S - length_s:
            self._slots.popleft()
        return self._slots[-1]
