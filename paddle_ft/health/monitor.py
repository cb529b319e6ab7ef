"""Watches the ranks of one node: samples their boards, names who hangs, has it ended.

A thread looks every ``INTERVAL_S``; the agent's loop calls ``look`` once a turn, hands over what it
knows and takes what was found: culprits to be ended, news for etcd. Ends of workers are the loop's
business, judgement is that of ``judge`` and ``pace``.

Invariant: a culprit is ended only after the flight record was written, or could not be.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from paddle_ft.agent.group import WorkerGroup
from paddle_ft.agent.membership import Membership
from paddle_ft.config import Config
from paddle_ft.coordination import schema
from paddle_ft.health import flight
from paddle_ft.health.board import BoardReader
from paddle_ft.health.figures import Finding
from paddle_ft.health.judge import (
    HealthRecord,
    Kind,
    Row,
    Usual,
    Verdict,
    Waiting,
    find_hung,
    next_bound_s,
    patience_after,
)
from paddle_ft.health.links import LinkWatch
from paddle_ft.health.pace import Pace, PaceJudge, Sample
from paddle_ft.health.ranks import RankWatch
from paddle_ft.observe.events import EventLog

log = logging.getLogger("paddle_ft")

INTERVAL_S = 0.1
SOONEST_S = 0.002
"""Before a bound the next look comes when that is over, not after the whole interval."""
GAP_S = 0.3
"""More than this between two looks counts as this: the machine was asleep."""
SUSPICION_S = 0.5
"""Others are told of a rank that waits after half of its bound, and not before this."""
TELL_S = 5.0
"""At most so often is told what is not urgent; and the file in the log directory is written."""
URGENT_S = 1.0
UNALIGNED_MAX = 256


@dataclass(frozen=True, slots=True)
class _Known:
    """What the loop knows, for the thread."""

    generation: int
    pids: Mapping[int, int]
    paths: Mapping[int, Path]
    elsewhere: tuple[Waiting, ...] = ()
    others: tuple[Pace, ...] = ()


@dataclass(frozen=True, slots=True)
class _Blame:
    generation: int
    rank: int
    pid: int
    verdict: Verdict


class HealthMonitor:
    """Args: wake: makes the loop take a turn soon, from another thread."""

    def __init__(
        self,
        config: Config,
        node: str,
        run_dir: Path,
        group: WorkerGroup,
        events: EventLog,
        wake: Callable[[], None],
    ) -> None:
        self._config = config
        self._node = node
        self._run_dir = run_dir
        self._group = group
        self._events = events
        self._wake = wake
        self._usual = Usual(config.health.hang_floor_s, config.health.hang_cap_s)
        self._known: _Known | None = None
        self._blames: deque[_Blame] = deque(maxlen=256)
        self._blamed_s: tuple[float, ...] = ()
        self._accused: set[int] = set()
        """Process ids, of those that run: the kernel gives them again."""
        self._seen: dict[str, tuple[int, float]] = {}
        """By member that is there: revision of what it told last, and when that came here."""
        self._sent_s = float("-inf")
        self._record = HealthRecord(0)
        self._links = LinkWatch(wake)
        self._bad_links: tuple[Finding, ...] = ()
        """Of which this node is to tell."""
        self._watch: _GroupWatch | None = None
        self._looked_s = time.monotonic()
        self._wrote_s = float("-inf")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)
        if config.health.enabled:
            self._thread.start()

    # ------------------------------------------------------------ on the loop

    def look(self, state: schema.JobState, membership: Membership) -> None:
        """Hands over what is known, ends culprits, and tells the other nodes what is new."""
        if not self._config.health.enabled:
            return
        me, number = membership.me, self._group.generation
        if self._node in state.quarantine:
            self._blamed_s = ()  # it is punished for these; what comes after counts anew
        paths = {rank: beacon.path for rank, beacon in self._group.beacons().items()}
        told = self._others(state, me, number) if number else ()
        elsewhere = tuple(w for w, _ in told if w is not None)
        others = tuple(pace for _, paces in told for pace in paces)
        pids = dict(self._group.pids())
        self._known = _Known(number, pids, paths, elsewhere, others) if number else None
        slow = any(v.kind == "slow_link" for v in self._record.verdicts)
        self._links.look(state, me, number, slow and self._record.generation == number)
        self._name_links(number)
        while self._blames:
            self._end(self._blames.popleft())
        if not membership.lost:
            self._tell(state, membership)

    def _others(
        self, state: schema.JobState, me: str, generation: int
    ) -> tuple[tuple[Waiting | None, tuple[Pace, ...]], ...]:
        now_s, found = time.monotonic(), []
        self._seen = {m: told for m, told in self._seen.items() if m in state.health}
        for member, versioned in state.health.items():
            record = versioned.value
            revision, since_s = self._seen.get(member, (0, 0.0))
            if revision != versioned.mod_revision:
                since_s = now_s
                self._seen[member] = versioned.mod_revision, now_s
            if member == me or record.generation != generation or member not in state.live:
                continue
            waits = record.waiting
            if waits is not None:
                waits = replace(waits, still_s=waits.still_s + now_s - since_s)
            found.append((waits, record.paces))
        return tuple(found)

    def _name_links(self, generation: int) -> None:
        """The first node of a link tells of it."""
        found = tuple(f for f in self._links.findings if min(f.nodes) == self._node)
        names = [f.nodes for f in found]
        if names != [f.nodes for f in self._bad_links]:
            for finding in found:
                log.warning("%s", _link_told(finding))
                told: dict[str, Any] = {"nodes": list(finding.nodes), "reason": finding.reason}
                self._events.add("link", generation=generation, **told)
            if not found:
                self._events.add("link", generation=generation, nodes=[], reason="")
        self._bad_links = found

    def _end(self, blame: _Blame) -> None:
        if blame.generation != self._group.generation:
            return
        log.warning("rank %d hangs and is ended: %s", blame.rank, blame.verdict.reason)
        self._group.blame(blame.rank, blame.pid, blame.verdict.reason)

    def _tell(self, state: schema.JobState, membership: Membership) -> None:
        me, now_s = membership.me, time.monotonic()
        record, own = self._record, state.nodes.get(me)
        record = replace(record, blamed=self._blamed_s, links=self._links.times)
        keys = schema.Keys(self._config.job.id)
        if own is None:
            return
        told = state.health[me].value if me in state.health else HealthRecord(0)
        urgent = told.blamed != record.blamed or told.verdicts != record.verdicts
        urgent = urgent or (told.waiting is None) != (record.waiting is None)
        urgent = urgent or told.links != record.links
        if not told.says_as(record) and now_s - self._sent_s > (URGENT_S if urgent else TELL_S):
            self._sent_s = now_s
            txn = schema.tell_health(keys, own, record, membership.lease)
            membership.send("health", txn)

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(2.0)

    # ------------------------------------------------------------ on the thread

    def _run(self) -> None:
        pause_s = INTERVAL_S
        while not self._closed.wait(pause_s):
            known, pause_s = self._known, INTERVAL_S
            try:
                if known is not None:
                    rows = self._sample(known)
                    pause_s = min(INTERVAL_S, max(SOONEST_S, next_bound_s(rows, self._usual)))
            except Exception:  # a defect here must not cost the training
                log.exception("the health monitor has a defect")
                return

    def _sample(self, known: _Known) -> list[Row]:
        """Looks once at all ranks; gives what they do."""
        if self._watch is None or self._watch.paths != known.paths:
            self._watch = _GroupWatch(known, self._usual)
        watch, now_s = self._watch, time.monotonic()
        watch.look(known, min(now_s - self._looked_s, GAP_S))
        self._looked_s = now_s
        self._name_slow(watch)
        self._accused.intersection_update(known.pids.values())
        rows = [rank.row for rank in watch.ranks.values()]
        hung = find_hung(rows, known.elsewhere, self._usual)
        new = [v for v in hung if known.pids.get(v.rank) not in self._accused]
        if new:
            self._accuse(known, watch, new)
        waits = [r for r in rows if r.waits and r.alive]
        suspicious_s = max(
            SUSPICION_S, min(self._usual.tight_s, self._config.health.hang_cap_s) / 2
        )
        waits = [r for r in waits if r.still_s > suspicious_s]
        record = HealthRecord(
            generation=known.generation,
            rows=tuple(rows),
            verdicts=(*hung, *watch.slow_verdicts(), *map(_link_verdict, self._bad_links)),
            waiting=max(
                (Waiting(r.entered if r.inside else 0, round(r.still_s, 3)) for r in waits),
                key=lambda w: w.number,
                default=None,
            ),
            paces=watch.pace.paces(),
            blamed=self._blamed_s,
        )
        news = not record.says_as(self._record)
        self._record = record
        if news:
            self._wake()
        if news or now_s - self._wrote_s > TELL_S:
            self._wrote_s = now_s
            self._write_file(known, record)
        return rows

    def _accuse(self, known: _Known, watch: _GroupWatch, new: list[Verdict]) -> None:
        noticed_s = time.monotonic()
        subjects = [
            flight.Subject(rank.row, known.pids[number], rank.reader.calls())
            for number, rank in watch.ranks.items()
            if number in known.pids
        ]
        watch.accused = True
        log_dir = Path(self._config.job.log_dir)
        try:
            at = flight.save(log_dir, self._run_dir, self._node, known.generation, subjects, new)
            log.warning("what the ranks were doing is in %s", at)
        except OSError as error:
            log.warning("a flight record cannot be written: %s", error)
        for verdict in new:
            pid = known.pids.get(verdict.rank)
            if pid is None:
                continue
            self._accused.add(pid)
            self._blames.append(_Blame(known.generation, verdict.rank, pid, verdict))
            told: dict[str, Any] = {"rank": verdict.rank, "pid": pid, "reason": verdict.reason}
            told |= {"still_s": round(verdict.since_s, 3), "collective": verdict.collective}
            self._events.add("hung", at_s=noticed_s, generation=known.generation, **told)
        blamed = {verdict.rank for verdict in new}
        ended = [r.row for n, r in watch.ranks.items() if n in blamed]
        self._usual.patience = patience_after(self._usual, ended)
        self._blamed_s = (*self._blamed_s, *[round(time.time(), 3)] * len(new))[-32:]
        self._wake()

    def _name_slow(self, watch: _GroupWatch) -> None:
        for text, fields in watch.changes():
            log.warning("%s", text)
            self._events.add("pace", generation=watch.generation, **fields)

    def _write_file(self, known: _Known, record: HealthRecord) -> None:
        """``health-<node>.json`` in the log directory, for ``paddle-ft health``."""
        name = re.sub(r"[^A-Za-z0-9._-]", "_", self._node)
        path = Path(self._config.job.log_dir) / f"health-{name}.json"
        told = {"node": self._node, "job": self._config.job.id, "wall_s": time.time()}
        told |= {"bound_s": self._usual.tight_s, "pids": dict(known.pids)} | asdict(record)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(told))
            temporary.replace(path)


class _GroupWatch:
    """The ranks of this node in one group."""

    def __init__(self, known: _Known, usual: Usual) -> None:
        self.generation = known.generation
        self.paths = known.paths
        self.ranks = {r: RankWatch(r, BoardReader(path)) for r, path in known.paths.items()}
        self.pace = PaceJudge(tuple(known.paths))
        self.accused = False
        """A rank of it is being ended. Who was stopped goes on for its stacks, and may have come
        to the collective after all: what a step took then is nothing usual."""
        self._usual = usual
        self._unaligned: dict[int, dict[int, Sample]] = {}
        self._named: dict[int, float] = {}
        self._named_links = False

    def look(self, known: _Known, passed_s: float) -> None:
        for number, rank in self.ranks.items():
            for ordinal, step, waited_s in rank.look(known.pids.get(number), passed_s):
                if not self.accused:
                    self._usual.learn(step, ordinal)
                samples = self._unaligned.setdefault(step.number, {})
                samples[number] = Sample(
                    step.busy_s,
                    step.share,
                    step.reduce_s,
                    step.total_s,
                    step.saving_s,
                    waited_s,
                )
                if len(samples) == len(self.ranks):
                    self.pace.step(self._unaligned.pop(step.number), known.others)
        while len(self._unaligned) > UNALIGNED_MAX:
            self._unaligned.pop(min(self._unaligned))

    def slow_verdicts(self) -> tuple[Verdict, ...]:
        found: dict[Kind, dict[int, float]] = {"slow": self.pace.slow, "starved": self.pace.starved}
        verdicts = [
            Verdict(kind, rank, self.ranks[rank].row.entered, 0.0, self._why(rank, by))
            for kind, ranks in found.items()
            for rank, by in ranks.items()
        ]
        if self.pace.slow_links:
            verdicts.append(Verdict("slow_link", -1, 0, 0.0, _times(self.pace.slow_links)))
        return tuple(verdicts)

    def changes(self) -> list[tuple[str, dict[str, Any]]]:
        """What has been named or cleared since the last look, in words and in fields."""
        slow, found = dict(self.pace.slow), list[tuple[str, dict[str, Any]]]()
        # Who was named, and now waits for a processor besides, does not keep up for that.
        slow |= {r: by for r, by in self.pace.starved.items() if r in self._named}
        for rank in sorted({*slow, *self._named}):
            if (rank in slow) != (rank in self._named):
                by = slow.get(rank, 0.0)
                text = f"rank {rank} keeps up again"
                if by:
                    text = f"rank {rank} is slow: {self._why(rank, by)}"
                found.append((text, {"rank": rank, "slower": round(by, 3)}))
        links = self.pace.slow_links
        if bool(links) != self._named_links:
            text = (
                f"the links are slow: {_times(links)}" if links else "the links are as usual again"
            )
            found.append((text, {"rank": -1, "slower": round(links, 3)}))
        self._named, self._named_links = slow, bool(links)
        return found

    def _why(self, rank: int, by: float) -> str:
        text = f"its own part of a step takes {by:.0%} longer than that of the others"
        return text + (
            ", because other programs use its processor" if self.pace.is_starved(rank) else ""
        )


def _times(factor: float) -> str:
    return f"a reduction takes {factor:.1f} times as long as usual"


def _link_verdict(finding: Finding) -> Verdict:
    return Verdict("bad_link", -1, 0, 0.0, _link_told(finding))


def _link_told(finding: Finding) -> str:
    if len(finding.nodes) == 1:
        return f"the links of node {finding.nodes[0]} are slow: {finding.reason}"
    return f"the link between nodes {' and '.join(finding.nodes)} is slow: {finding.reason}"
