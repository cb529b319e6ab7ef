"""What a launcher writes down of its job: looks at the state and the workers once a turn, and at
each event on its way to the loop, and puts what is new into the record of events."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paddle_ft.agent import ipc
from paddle_ft.agent.beacon import Beacon, Reading
from paddle_ft.agent.console import Console
from paddle_ft.agent.group import Said, WorkerGroup
from paddle_ft.agent.snapshots import PartWritten, StateFailed
from paddle_ft.agent.workers import WorkerEnded
from paddle_ft.config import Config
from paddle_ft.coordination.schema import JobState
from paddle_ft.coordination.view import find_trouble
from paddle_ft.observe.events import EventLog, read
from paddle_ft.observe.goodput import account, summary
from paddle_ft.observe.story import last_job
from paddle_ft.types import Generation

SAMPLE_S = 1.0
SAMPLE_S_MAX = 10.0
OFTEN_S = 600.0
"""A job of this age is sampled every ``SAMPLE_S``; an older one more rarely, in proportion."""


@dataclass(slots=True)
class _Pages:
    """The workers' pages of one generation, and what has been told of them."""

    generation: int = 0
    beacons: Mapping[int, Beacon] | None = None
    formed: bool = False
    stepped: bool = False
    told_step: int = -1


class Chronicle:
    """For the loop alone. ``look`` each turn, ``took`` for each event before it is acted upon."""

    def __init__(self, config: Config, node: str, group: WorkerGroup) -> None:
        self._group = group
        self._needed = config.job.nodes_min
        self._since_s = time.monotonic()
        self._sampled_s = 0.0
        self._known: dict[str, Any] = {}
        """By kind: what was told last."""
        self._pids: Mapping[int, int] = {}
        self._pages = _Pages()
        self._before = _Pages()
        """Of the generation before: its workers may step on until they get to their order."""
        self._log_dir = config.job.log_dir
        self.log = EventLog(config.job.log_dir, f"{node}-{uuid.uuid4().hex[:12]}")
        job, slots = config.job.id, config.job.nproc_per_node
        self.log.add("started", node=node, job=job, pid=os.getpid(), slots=slots)

    # ------------------------------------------------------------ events

    def took(self, event: object) -> None:
        """Something is about to be taken into account."""
        if isinstance(event, WorkerEnded):
            self._sample(self._pages)
            code = event.exit_code
            self.log.add(
                "worker_ended",
                at_s=event.at_s,
                rank=event.rank,
                pid=event.pid,
                exit_code=code,
                signal=max(0, -code),
                stopped=event.stopped,
                generation=self._group.generation,
            )
        elif isinstance(event, Said):
            self._said(event)
        elif isinstance(event, PartWritten):
            part = event.part
            self.log.add("stored", generation=part.generation, step=part.step, ok=True)
        elif isinstance(event, StateFailed) and not event.manifest:
            self.log.add("stored", generation=event.generation, step=-1, ok=False)

    def _said(self, event: Said) -> None:
        who, message = event.channel, event.message
        told: dict[str, Any] = {"rank": who.rank, "pid": who.pid}
        if isinstance(message, ipc.Hello):
            told |= {"generation": message.generation, "recovery": message.recovery}
            self.log.add("hello", **told)
        elif isinstance(message, ipc.LostPeer):
            self._sample(self._pages)
            told |= {"generation": who.generation, "reason": message.reason}
            self.log.add("lost_peer", **told)
        elif isinstance(message, ipc.Farewell):
            told |= {"why": message.kind, "reason": message.reason, "step": message.step}
            self.log.add("farewell", **told)

    # ------------------------------------------------------------ once a turn

    def look(self, state: JobState, me: str) -> None:
        """Tells what has changed since the last look."""
        if me:
            self._tell("registered", member=me)
        live = sum(not record.value.leaving for record in state.live.values())
        self._tell("members", live=live, needed=self._needed)
        self._tell("leader", member=state.leader.value if state.leader else "")
        if state.quarantine or "quarantine" in self._known:
            self._tell("quarantine", nodes=sorted(state.quarantine))
        if state.generation is not None:
            self._tell("generation", **_facts(state.generation.value, me))
        trouble = find_trouble(state)
        if trouble is not None and state.generation is not None:
            number = state.generation.value.number
            told = {"generation": number, "lost": list(trouble.lost), "reason": str(trouble)}
            self._tell("trouble", collateral=trouble.collateral_only, **told)
        if state.pause is not None:
            pause = state.pause.value
            self._tell("pause", generation=pause.generation, reason=pause.reason)
        if state.head is not None:
            new = state.head.value.newest
            told = {"generation": new.generation, "step": new.step, "sequence": new.sequence}
            if self._group.generation:
                self._tell("commit", **told)
            else:  # of an earlier run
                self._known["commit"] = told
        own = state.live.get(me)
        if own is not None and own.value.leaving:
            self._tell("leaving")
        if state.outcome is not None:
            outcome = state.outcome.value
            self._tell("outcome", exit_code=outcome.exit_code, reason=outcome.reason)
        self._look_at_workers()
        self._look_at_pages()

    def _tell(self, kind: str, **fields: Any) -> None:
        """Adds an event unless it says what the last one of its kind said."""
        if self._known.get(kind) != fields:
            self._known[kind] = fields
            if kind in ("generation", "trouble", "leaving", "outcome"):
                self._sample(self._pages)
            self.log.add(kind, **fields)

    def _look_at_workers(self) -> None:
        pids = self._group.pids()
        generation = self._group.generation
        for rank, pid in pids.items():
            if pid not in self._pids.values():
                self.log.add("worker_started", rank=rank, pid=pid, generation=generation)
            elif generation != self._pages.generation:
                self.log.add("order", rank=rank, pid=pid, generation=generation)
        self._pids = pids

    def _look_at_pages(self) -> None:
        if self._group.generation != self._pages.generation:
            self._sample(self._pages)
            if self._pages.stepped:  # else those of the one before may still be of use
                self._before = self._pages
            self._pages = _Pages(self._group.generation, self._group.beacons())
        pages = self._pages
        readings = _readings(pages)
        began = [r for r in readings if r.began_s]
        if began and not pages.formed and len(began) == len(readings):
            pages.formed = True
            at_s, step = max((r.began_s, r.began_step) for r in began)
            self.log.add("formed", at_s=at_s, generation=pages.generation, step=step)
        first = min(((r.first_s, r.began_step + 1) for r in readings if r.first_s), default=None)
        if first is not None and not pages.stepped:
            self._sample(self._before)
            pages.stepped = True
            at_s, step = first
            self.log.add("first_step", at_s=at_s, generation=pages.generation, step=step)
        now_s = time.monotonic()
        rare = min(SAMPLE_S_MAX, max(SAMPLE_S, SAMPLE_S * (now_s - self._since_s) / OFTEN_S))
        if now_s - self._sampled_s >= rare:
            self._sampled_s = now_s
            self._sample(pages, even_if_known=True)

    def _sample(self, pages: _Pages, even_if_known: bool = False) -> None:
        """Tells where the worker is that is furthest, once it has applied a step."""
        readings = [r for r in _readings(pages) if r.first_s]
        if not readings:
            return
        furthest = max(readings, key=lambda r: (r.step, -r.at_s))
        if furthest.step == pages.told_step and not even_if_known:
            return
        pages.told_step = furthest.step
        self.log.add(
            "progress",
            generation=pages.generation,
            step=furthest.step,
            step_s=round(furthest.at_s, 6),
            samples=furthest.samples,
            held_s=round(max(r.held_s for r in readings), 6),
        )

    # ------------------------------------------------------------ the end

    def end(self, exit_code: int, reason: str, console: Console) -> None:
        """The launcher is about to end: also tells people."""
        console.end(exit_code, reason)
        self._sample(self._pages)
        self.log.add("ended", exit_code=exit_code, reason=reason)
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # somebody's edit
            self.log.flush()
            told = account(last_job(read([self._log_dir])))
            if told.steps:
                console.say(summary(told))

    def close(self) -> None:
        self.log.close()


def _readings(pages: _Pages) -> list[Reading]:
    return [beacon.read() for beacon in (pages.beacons or {}).values()]


def _facts(generation: Generation, me: str) -> dict[str, Any]:
    return {
        "number": generation.number,
        "members": list(generation.member_ids()),
        "world_size": generation.world_size,
        "in_place": generation.in_place,
        "planned": generation.planned,
        "restarts": generation.restarts,
        "restore_step": generation.restore.step if generation.restore else -1,
        "reason": generation.reason,
        "here": me in generation.member_ids(),
    }
