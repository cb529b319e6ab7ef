"""Plans that lead straight to where in-place recovery is delicate."""

from __future__ import annotations

from dataclasses import replace

from paddle_ft.types import Recovery
from tests.sim.plan import Fault, Plan

CALM = Plan(
    nodes=2,
    nodes_min=2,
    nodes_max=2,
    slots=1,
    embedded=False,
    session=True,
    patient=True,
    steps=30,
    save_every=4,
    max_restart=1000,
    members_timeout_s=300.0,
    persist_grace_s=0.0,
    keep_last=2,
    flaky=0.0,
    watch_delay_s=(0.001, 0.2),
    starts_s=(0.1, 0.2),
    faults=(),
    recovery="in_place",
)
"""Two nodes with one worker each, and nothing goes wrong."""


def fault(kind: str, at_s: float, node: str = "n0", lasts_s: float = 1.0, what: str = "") -> Fault:
    return Fault(at_s, kind, node, node, lasts_s, what)


def hand_overs_that_break(steps: int = 30) -> Plan:
    """Ranks fall out with each other, and one is killed while one takes the other's state."""
    alarms = [fault("false alarm", 3.0 + 1.5 * i, f"n{i % 2}") for i in range(6)]
    snares = [fault("snare", 2.0 + 3.0 * i, what="hand-over") for i in range(3)]
    faults = tuple(sorted([*alarms, *snares], key=lambda f: f.at_s))
    return replace(CALM, steps=steps, save_every=100, faults=faults)


def ends_that_are_disturbed(at_s: float) -> Plan:
    """A worker is lost when the last step is committed and not everybody knows it yet."""
    return replace(
        CALM, nodes=3, nodes_min=3, nodes_max=3, starts_s=(0.1, 0.2, 0.3), steps=10,
        watch_delay_s=(0.01, 1.0), faults=(fault("kill worker", at_s, "n1"),),
    )  # fmt: skip


def leaving_while_loading(at_s: float) -> Plan:
    """A node is asked to leave while workers wait for a slow store."""
    faults = (
        fault("terminate all", 5.0, lasts_s=1.0),
        fault("slow store", 5.5, lasts_s=9.0),
        fault("terminate", at_s, "n1", lasts_s=10.0),
    )
    return replace(CALM, nodes_min=1, faults=faults)


def out_for_one_generation(at_s: float) -> Plan:
    """A node is out of one generation and in the next one before it has heard of either."""
    faults = (
        fault("freeze agent", at_s, "n0", 1.7),
        fault("quarantine", at_s + 0.01, "n0", 0.6),
        fault("quarantine", at_s + 0.9, "n1", 2.0),
    )
    return replace(
        CALM, nodes=4, nodes_min=3, nodes_max=3, starts_s=(0.3, 0.2, 0.05, 0.9), steps=40,
        save_every=100, watch_delay_s=(0.001, 0.02), faults=faults,
    )  # fmt: skip


def hangs_again_and_again(node: str, nodes_min: int = 2) -> Plan:
    """Workers of one node of three hang, until it gets no more work; a person lifts that."""
    hangs = tuple(fault("hang", 2.5 + 1.5 * i, node) for i in range(2))
    return replace(
        CALM, nodes=3, nodes_min=nodes_min, nodes_max=3, starts_s=(0.1, 0.2, 0.3), steps=60,
        save_every=100, watch_delay_s=(0.001, 0.02), quarantine_after=2,
        faults=(*hangs, fault("lift", 8.0, node)),
    )  # fmt: skip


def with_recovery(plan: Plan, recovery: Recovery) -> Plan:
    return replace(plan, recovery=recovery)
