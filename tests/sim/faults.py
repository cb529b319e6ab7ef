"""Makes the faults of a plan happen, and ends them when it is to be quiet."""

from __future__ import annotations

from paddle_ft.types import Head
from tests.sim.history import Struck, Write
from tests.sim.plan import QUIET_S, Fault
from tests.sim.world import World

STRIKING = (
    "crash", "kill worker", "freeze node", "freeze worker", "cut peers", "damage", "false alarm",
    "hang",
)  # fmt: skip
"""What workers can fail from. Everything else must leave them alone."""


def unleash(world: World) -> None:
    clock, plan = world.clock, world.plan
    world.network.flaky = plan.flaky
    world.network.watch_delay_s = plan.watch_delay_s
    for node, at_s in zip(world.names, plan.starts_s, strict=True):
        clock.after(at_s, world.start_node, node)
    for fault in plan.faults:
        clock.after(fault.at_s, _strike, world, fault)
    clock.after(QUIET_S, _quiet, world)


def _left(world: World, fault: Fault) -> float:
    return min(fault.duration_s, max(0.1, QUIET_S - 0.2 - world.clock.now))


def _strike(world: World, fault: Fault) -> None:
    clock, kind, node = world.clock, fault.kind, fault.node
    lasts_s = _left(world, fault)
    agent = world.agents.get(node)
    if kind == "trap":
        trap = (fault.how, fault.duration_s)
        (world.network.traps if fault.how in ("late", "deaf") else world.traps)[fault.detail] = trap
        return
    if kind in STRIKING:
        world.history.add(Struck(clock.now))
    world.note("fault", kind, node, fault.other, round(lasts_s, 2))
    if kind == "crash":
        world.crash_node(node)
        clock.after(lasts_s, world.start_node, node)
    elif kind == "kill worker" and agent is not None:
        world.kill_worker(agent)
    elif kind == "hang" and agent is not None:
        if agent.workers():
            world.kill_worker(agent)
            agent.blame()
    elif kind in ("freeze agent", "freeze node") and agent is not None:
        world.freeze(agent, lasts_s)
        if kind == "freeze node":
            for worker in agent.workers():
                worker.process.freeze()
                clock.after(lasts_s, worker.process.wake)
    elif kind == "freeze worker" and agent is not None:
        for worker in agent.workers()[:1]:
            worker.process.freeze()
            clock.after(lasts_s, worker.process.wake)
    elif kind == "cut etcd":
        world.network.cut.add(node)
        clock.after(lasts_s, world.network.reconnect, node)
    elif kind == "cut peers" and node != fault.other:
        pair = frozenset((node, fault.other))
        world.cut_peers.add(pair)
        clock.after(lasts_s, world.cut_peers.discard, pair)
    elif kind == "slow store":
        world.store.slow = 30.0
        clock.after(lasts_s, _store_recovers, world)
    elif kind == "failing store":
        world.store.failing = set(world.names) if fault.other == node else {node}
        clock.after(lasts_s, _store_recovers, world)
    elif kind == "terminate" and agent is not None:
        agent.terminate()
        clock.after(fault.duration_s + 1.0, world.start_node, node)
    elif kind == "terminate twice" and agent is not None:
        agent.terminate()
        clock.after(min(lasts_s, 1.0), agent.terminate)
        clock.after(lasts_s + 1.0, world.start_node, node)
    elif kind == "etcd elects":
        world.network.etcd.restart_leases()
    elif kind == "terminate all":
        for each in list(world.agents.values()):
            each.terminate()
        for name in world.names:
            clock.after(lasts_s + clock.between(0.0, 1.0), world.start_node, name)
    elif kind == "false alarm" and agent is not None:
        for worker in agent.workers()[:1]:
            worker.alarm()
    elif kind == "revoke" and agent is not None:
        agent.lose_lease()
    elif kind == "quarantine":
        world.quarantine(node)
        clock.after(lasts_s, world.release_from_quarantine, node)
    elif kind == "lift":
        world.release_from_quarantine(node)
    elif kind == "snare":
        world.snares[fault.detail] = world.snares.get(fault.detail, 0) + 1
    elif kind == "kill reserve" and agent is not None:
        for worker in agent.crew.reserve()[:1]:
            worker.kill(stopped=False)
    elif kind == "damage":
        head = newest_head(world)
        if head is not None:
            world.damage(head.newest)


def newest_head(world: World) -> Head | None:
    for fact in reversed(world.history.facts):
        if isinstance(fact, Write) and fact.key == "head":
            head: Head = fact.value
            return head
    return None


def _store_recovers(world: World) -> None:
    world.store.slow = 1.0
    world.store.failing = set()


def _quiet(world: World) -> None:
    """Everything works from here on, and every node that should be there comes."""
    world.note("fault", "no more faults")
    world.network.flaky = 0.0
    world.traps.clear()
    world.snares.clear()
    for node in world.names:
        world.release_from_quarantine(node)
    world.network.traps.clear()
    world.cut_peers.clear()
    _store_recovers(world)
    for node in sorted(world.network.cut):
        world.network.reconnect(node)
    for agent in world.agents.values():
        agent.process.wake()
        for worker in agent.workers():
            worker.process.wake()
    _bring_up(world)


def _bring_up(world: World) -> None:
    for node in world.names:
        world.start_node(node)
    if world.outcome_s is None:
        world.clock.after(2.0, _bring_up, world)
