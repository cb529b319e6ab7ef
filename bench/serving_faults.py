"""What faults, promotions and updates cost those who ask, and what they do to the state."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

from bench.report import Row
from bench.serving_analysis import Strike, longest_gap_s, p99_s, routed_around_s, within
from bench.serving_rows import (
    Progress,
    Run,
    Say,
    failures,
    slowest,
    state,
    under_load,
    without_primary,
    worst,
)
from bench.serving_world import GROUP, LEASE_S, TOKEN, Broken, Node, World, ask, environment, until

ROUTED_S = 4.0
"""For so long after a SIGSTOP the replica stays stopped, at least."""
PATRONI_S = (20.0, 27.0)
"""A node killed until there is a new primary: quoted, not measured in this run."""


# ---------------------------------------------------------------- SIGKILL


def kills(world: World, count: int, rate_hz: float, say: Say) -> list[Row]:
    """``count`` of the primary and as many of others, in turn; each is started again."""
    group = f"SIGKILL, {len(world.nodes)} replicas"
    progress = Progress(say, group, 2 * count)

    def act(run: Run) -> None:
        for number in range(2 * count):
            run.strikes.append(_kill(world, first=number % 2 == 0))
            progress.step()
            time.sleep(random.uniform(0.2, 0.8))

    run = under_load(world, rate_hz, 4, act, say)
    new = [s.primary_s for s in run.strikes if s.primary_s is not None]
    rows = [
        failures(run, group),
        slowest(run, group, 1.1),
        worst(group, "new primary in etcd", new, 1.0,
              "Patroni's figure is quoted, for a node", {"Patroni": PATRONI_S}),
        worst(group, "nothing acknowledged, kills of the primary", without_primary(run), None),
        *state(run, group),
    ]  # fmt: skip
    back = [s.over_s - s.at_s for s in run.strikes]
    rows.append(worst(group, "until all is as before, the process started again", back, None))
    return rows


def _kill(world: World, first: bool) -> Strike:
    """The primary, or another; returns once it is back."""
    primary = world.primary()
    others = [node for node in world.nodes.values() if node is not primary]
    victim = primary if first else random.choice(others)
    name = world.group().primary or ""
    at_s = time.monotonic()
    world.kill(victim)
    took_s = world.primary_other_than(name, at_s) if first else None
    victim.start()
    world.settle()
    return Strike(at_s, "primary" if first else "other", took_s, time.monotonic())


# ---------------------------------------------------------------- SIGSTOP


def stops(world: World, count: int, rate_hz: float, say: Say) -> list[Row]:
    """``count`` of the primary, each woken when another has long been the primary."""
    group = f"SIGSTOP of the primary, {len(world.nodes)} replicas"
    progress = Progress(say, group, count)
    changed: list[str] = []

    def act(run: Run) -> None:
        for _ in range(count):
            victim, name = world.primary(), world.group().primary or ""
            at_s = time.monotonic()
            victim.send(signal.SIGSTOP)
            try:
                took_s = world.primary_other_than(name, at_s, LEASE_S + 10.0)
                time.sleep(max(0.0, ROUTED_S - (time.monotonic() - at_s)))
                term = world.group().term
            finally:
                victim.send(signal.SIGCONT)
            world.settle()
            if world.group().term != term:
                changed.append(f"term {term} became {world.group().term}")
            run.strikes.append(Strike(at_s, "stop", took_s, time.monotonic()))
            progress.step()
            time.sleep(random.uniform(0.2, 0.8))

    run = under_load(world, rate_hz, 4, act, say)
    around = [routed_around_s(run.load.requests, s, run.calm_p99_s) for s in run.strikes]
    new = [s.primary_s for s in run.strikes if s.primary_s is not None]
    return [
        failures(run, group),
        worst(group, "routed around", around, 0.5, "until the last request was sent that met it"),
        slowest(run, group, None),
        Row(group, "changes by a woken primary", "terms", [len(changed)] if run.strikes else [],
            goal=0.0, note="; ".join(changed[:3])),
        worst(group, "new primary in etcd", new, LEASE_S + 1.0, f"the lease is of {LEASE_S} s"),
        worst(group, "nothing acknowledged", without_primary(run), None),
        *state(run, group),
    ]  # fmt: skip


# ---------------------------------------------------------------- promotion


def promotions(world: World, count: int, rate_hz: float, say: Say) -> list[Row]:
    """``paddle-ft promote``, ``count`` times."""
    group = f"Planned promotion, {len(world.nodes)} replicas"
    progress = Progress(say, group, count)
    refused: list[str] = []

    def act(run: Run) -> None:
        for _ in range(count):
            world.settle()
            name = world.group().primary or ""
            at_s = time.monotonic()
            if why := _promote(world):
                refused.append(why)
            else:
                world.primary_other_than(name, at_s)
                run.strikes.append(Strike(at_s, "promotion", 0.0, time.monotonic()))
            progress.step(refused[-1] if refused else "")
            time.sleep(random.uniform(0.3, 1.0))

    run = under_load(world, rate_hz, 4, act, say)
    gone = without_primary(run)
    note = "between two acknowledgements, around each; the writers pause as well"
    if not gone:
        note = f"not run: {run.load.state or run.broken}"
    return [
        failures(run, group),
        Row(
            group,
            "promotions that were refused",
            "promotions",
            [len(refused)],
            goal=0.0,
            note="; ".join(refused[:2]),
        ),
        worst(group, "without a primary", gone, 0.3, note),
        slowest(run, group, None),
        *state(run, group),
    ]


def _promote(world: World) -> str:
    """Why not; raises subprocess.TimeoutExpired."""
    run = subprocess.run(
        [sys.executable, "-m", "paddle_ft.cli", "promote", "--group", GROUP,
         "--etcd", world.etcd.endpoints[0]],
        stdin=subprocess.DEVNULL, capture_output=True, env=environment({}), text=True, timeout=60,
    )  # fmt: skip
    return f"{run.returncode}: {run.stderr.strip()}" if run.returncode else ""


# ---------------------------------------------------------------- etcd away


def etcd_away(world: World, how: str, for_s: float, rate_hz: float, say: Say) -> list[Row]:
    """etcd stopped by the signal ``how`` for ``for_s``."""
    group = f"etcd away for {for_s:g} s by {how}"
    say(group)
    before: list[tuple[str | None, int]] = []
    after: list[tuple[str | None, int]] = []
    puts: list[float] = []
    back: list[float] = []

    def act(run: Run) -> None:
        found = world.group()
        before.append((found.primary, found.term))
        at_s = time.monotonic()
        (world.etcd.freeze if how == "SIGSTOP" else world.etcd.kill)(0)
        try:
            for part in range(10):
                time.sleep(for_s / 10)
                say(f"{group}: {(9 - part) * for_s / 10:.0f} s left")
        finally:
            puts.extend((at_s + 1.0, time.monotonic()))
            (world.etcd.thaw if how == "SIGSTOP" else world.etcd.start)(0)
        run.strikes.append(Strike(at_s, how, None, time.monotonic()))
        world.etcd.wait_healthy()
        began_s = time.monotonic()
        found = world.group()
        after.append((found.primary, found.term))
        world.settle()
        back.append(time.monotonic() - began_s)
        time.sleep(2.0)
        found = world.group()
        after.append((found.primary, found.term))

    run = under_load(world, rate_hz, 2, act, say)
    changed = [f"{a} after {b}" for b, _ in before for a, _ in after if a not in (None, b)]
    terms = [term for _, term in (*before, *after) if term]
    times = [a.answered_s for a in run.load.acks]
    held_up = [longest_gap_s(times, *puts)] if times and puts else []
    return [
        failures(run, group),
        Row(group, "new primaries", "primaries", [len(changed)] if after else [], goal=0.0,
            note=f"{'; '.join(changed)} terms {terms}. {run.broken}".strip()),
        worst(group, "all registered again after its return", back, None),
        worst(group, "longest time in which nothing was acknowledged", held_up, None),
        *state(run, group),
    ]  # fmt: skip


# ---------------------------------------------------------------- a new version under load


def updates(world: World, count: int, rate_hz: float, say: Say) -> list[Row]:
    """A version more is published and loaded, ``count`` times."""
    group = f"Hot model update, {len(world.nodes)} replicas"
    progress = Progress(say, group, count)
    before: list[float] = []
    spans: list[tuple[float, float]] = []

    def act(run: Run) -> None:
        for _ in range(count):
            at_s = time.monotonic()
            version = world.model.publish()
            load_version(world, version)
            until(partial(_all_serve, world, version), f"all serve version {version}", 120.0)
            world.settle()
            end_s = time.monotonic()
            spans.append((at_s, end_s))
            run.strikes.append(Strike(at_s, "update", None, end_s))
            progress.step(f"(took {end_s - at_s:.1f} s)")
            time.sleep(max(5.0, end_s - at_s))  # as long in peace as in change

    run = under_load(world, rate_hz, 0, act, say)
    requests = run.load.requests
    during: list[float] = []
    for at_s, end_s in spans:
        long_s = max(3.0, end_s - at_s)
        before.append(p99_s(within(requests, at_s - min(long_s, 5.0), at_s)))
        during.append(p99_s(within(requests, at_s, end_s)))
    return [
        failures(run, group),
        Row(group, "p99 while it changes", "s", during, before, "p99 before", goal=1.5,
            note=f"from publishing until all serve it: {_spans(spans)}; versions answered "
                 f"{sorted({r.version for r in requests if r.status == 200})}"),
        slowest(run, group, None),
    ]  # fmt: skip


def _spans(spans: Sequence[tuple[float, float]]) -> str:
    return ", ".join(f"{b - a:.1f} s" for a, b in spans)


def load_version(world: World, version: int) -> None:
    """By way of the gateway, or of the primary where there is none. Raises Broken."""
    path = f"/v2/repository/models/{world.model.name}/load"
    body = f'{{"parameters": {{"version": "{version}"}}}}'.encode()
    status, _, said = ask(world.host, world.http_port, "POST", path, body, 120.0,
                          Authorization=f"Bearer {TOKEN}")  # fmt: skip
    if status != 200:
        raise Broken(f"POST {path} gets {status}: {said[:200]!r}")


def _all_serve(world: World, version: int) -> bool:
    records = world.group().replicas.values()
    return all(r.models.get(world.model.name) == str(version) for r in records)


# ---------------------------------------------------------------- a node that is cut off


def lost_node(world: World, cut: Callable[[Node], contextlib.AbstractContextManager[None]],
              count: int, rate_hz: float, say: Say) -> list[Row]:  # fmt: skip
    """The primary's node cut off from the network ``count`` times."""
    group = f"Node of the primary cut off, {len(world.nodes)} replicas"
    progress = Progress(say, group, count)

    def act(run: Run) -> None:
        for _ in range(count):
            victim, name = world.primary(), world.group().primary or ""
            at_s = time.monotonic()
            with cut(victim):
                took_s = world.primary_other_than(name, at_s, LEASE_S + 20.0)
                time.sleep(2.0)
            world.settle()
            run.strikes.append(Strike(at_s, "cut", took_s, time.monotonic()))
            progress.step(f"(new primary after {took_s:.2f} s)")

    run = under_load(world, rate_hz, 4, act, say)
    new = [s.primary_s for s in run.strikes if s.primary_s is not None]
    return [
        failures(run, group),
        worst(group, "new primary in etcd", new, LEASE_S + 1.0,
              f"the lease is of {LEASE_S} s; Patroni's figure is quoted", {"Patroni": PATRONI_S}),
        slowest(run, group, None),
        *state(run, group),
    ]  # fmt: skip
