"""What a seed means: the shape of the job, and the faults that happen to it, and when."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from paddle_ft.types import Recovery

QUIET_S = 16.0
"""No fault begins or goes on after this."""
PROGRESS_S = 60.0
"""Once it is quiet, the job ends within so much time."""

FAULTS = (
    "crash", "crash", "crash",
    "kill worker", "kill worker",
    "freeze agent", "freeze agent", "freeze node", "freeze worker",
    "cut etcd", "cut etcd", "cut peers",
    "slow store", "failing store",
    "trap", "trap", "trap", "trap",
    "terminate", "terminate all", "terminate twice",
    "etcd elects",
    "damage",
    "false alarm", "false alarm", "revoke", "quarantine", "quarantine", "snare", "snare",
    "kill reserve",
)  # fmt: skip
TRAPS = (
    "propose", "propose", "propose", "commit", "commit", "commit",
    "merge", "marker", "collect", "pause", "publish", "finish", "campaign",
)  # fmt: skip
SNARES = ("meeting", "hand-over", "hand-over")
DETAILS = {"trap": TRAPS, "snare": SNARES}


@dataclass(frozen=True, slots=True)
class Fault:
    at_s: float
    kind: str
    node: str
    other: str
    duration_s: float
    detail: str = ""
    """With ``trap``: before doing what it springs; with ``snare``: in the middle of what."""
    how: str = ""
    """With ``trap``: ``freeze``, ``hold`` (freeze until the leader changes) or ``kill`` who does
    it; or its request to etcd arrives ``late``, or the answer does not (``deaf``)."""


@dataclass(frozen=True, slots=True)
class Plan:
    nodes: int
    nodes_min: int
    nodes_max: int
    slots: int
    embedded: bool
    """etcd belongs to the only launcher and dies with it, data and all."""
    session: bool
    """The script uses a session: it saves, and goes on where it stood."""
    patient: bool
    """Workers wait for their last checkpoint to be committed before they leave."""
    steps: int
    save_every: int
    max_restart: int
    members_timeout_s: float
    persist_grace_s: float
    keep_last: int
    flaky: float
    """Share of the requests to etcd that are lost, late or doubled."""
    watch_delay_s: tuple[float, float]
    starts_s: tuple[float, ...]
    """When each node comes for the first time."""
    faults: tuple[Fault, ...]
    recovery: Recovery = "restart"
    spares: int = 0
    groups_max: int = 50
    """Through so many groups a worker goes before it is replaced."""
    quarantine_after: int = 0
    """So many hung workers put a node in quarantine; 0: never."""


def make_plan(choose: random.Random) -> Plan:
    nodes = choose.choice((1, 1, 2, 2, 2, 3, 3, 3, 4, 5))
    nodes_max = max(1, nodes - choose.choice((0, 0, 0, 1, 2)))
    nodes_min = choose.choice((1, nodes_max, choose.randint(1, nodes_max)))
    names = [f"n{i}" for i in range(nodes)]
    steps = choose.randint(15, 45)
    until_s = min(QUIET_S - 2.0, 3.0 + 0.35 * steps)  # while there is something to disturb
    count = choose.choice((0, 1, 2, 3, 4, 5, 6, 8))
    faults = [_fault(choose, names, until_s) for _ in range(count)]
    plan = Plan(
        nodes=nodes,
        nodes_min=nodes_min,
        nodes_max=nodes_max,
        slots=choose.choice((1, 1, 2)),
        embedded=nodes == 1 and choose.random() < 0.7,
        session=choose.random() < 0.95,
        patient=choose.random() < 0.5,
        steps=steps,
        save_every=choose.randint(2, 6),
        max_restart=choose.choice((1000, 1000, 1000, 1000, 3)),
        members_timeout_s=choose.choice((300.0, 300.0, 8.0)),
        persist_grace_s=choose.choice((0.0, 1.5)),
        keep_last=choose.choice((1, 2, 3)),
        flaky=choose.choice((0.0, 0.05, 0.2)),
        watch_delay_s=choose.choice(((0.001, 0.02), (0.001, 0.2), (0.01, 1.0))),
        starts_s=tuple(
            choose.uniform(0, 0.5) if choose.random() < 0.7 else choose.uniform(0, 10)
            for _ in names
        ),
        faults=tuple(sorted(faults, key=lambda f: f.at_s)),
        recovery=choose.choice(("in_place", "in_place", "in_place", "restart")),
        spares=choose.choice((0, 0, 1)),
        groups_max=choose.choice((50, 50, 50, 4)),
    )
    hangs = nodes > nodes_min and choose.random() < 0.4  # else nobody may be barred
    return _with_hangs(choose, plan, names, until_s) if hangs else plan


def _with_hangs(choose: random.Random, plan: Plan, names: list[str], until_s: float) -> Plan:
    """Workers of a node or two hang again and again; beside what happens anyway."""
    bad = choose.sample(names, min(len(names), choose.choice((1, 1, 2))))
    count = choose.randint(1, 5)
    hangs = [Fault(choose.uniform(1.0, until_s), "hang", node, node, 0.0)
             for node in bad for _ in range(count)]  # fmt: skip
    faults = tuple(sorted((*plan.faults, *hangs), key=lambda f: f.at_s))
    return replace(plan, faults=faults, quarantine_after=choose.choice((1, 2, 3)))


def _fault(choose: random.Random, names: list[str], until_s: float) -> Fault:
    kind = choose.choice(FAULTS)
    return Fault(
        at_s=choose.uniform(0.5, until_s),
        kind=kind,
        node=choose.choice(names),
        other=choose.choice(names),
        duration_s=choose.choice((choose.uniform(0.2, 1.5), choose.uniform(1.5, 6.0))),
        detail=choose.choice(DETAILS.get(kind, ("",))),
        how=choose.choice(("freeze", "hold", "hold", "kill", "late", "late", "deaf"))
        if kind == "trap"
        else "",
    )
