"""The simulated job as a whole: nodes, etcd, store, network, faults, and the record of it all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from paddle_ft import meeting
from paddle_ft.checkpoint.collect import release
from paddle_ft.checkpoint.commit import read_manifest
from paddle_ft.checkpoint.manifest import Manifest
from paddle_ft.config import CheckpointConfig, Config, EtcdConfig, HealthConfig, JobConfig
from paddle_ft.coordination import schema
from paddle_ft.coordination.kv import Put, Transaction
from paddle_ft.errors import CheckpointDamaged
from paddle_ft.meeting import Meeting
from paddle_ft.types import (
    CommitRef,
    Generation,
    Head,
    NodeRecord,
    Outcome,
    Pause,
    Recovery,
    decode,
)
from tests.sim.agent import SimAgent
from tests.sim.clock import Clock
from tests.sim.history import (
    Acknowledged,
    Applied,
    Barred,
    Damaged,
    EtcdLost,
    Exited,
    Formed,
    Gone,
    History,
    Nodes,
    Removed,
    Saved,
    Stored,
    Struck,
    Write,
)
from tests.sim.model_etcd import Batch
from tests.sim.model_store import ModelStore, StoreFront
from tests.sim.network import Network, Sent
from tests.sim.plan import Plan
from tests.sim.ranks import RankGroup
from tests.sim.training import SimWorker, State, Training

KINDS: dict[str, Any] = {
    "generation": Generation, "head": Head, "pause": Pause, "outcome": Outcome, "leader": str,
}  # fmt: skip


@cache
def make_config(
    nodes_min: int,
    nodes_max: int,
    slots: int,
    max_restart: int,
    keep_last: int,
    members_timeout_s: float = 300.0,
    persist_grace_s: float = 1.5,
    recovery: Recovery = "in_place",
    spares: int = 0,
    quarantine_after: int = 0,
) -> Config:
    return Config(
        job=JobConfig(
            id="sim", nodes_min=nodes_min, nodes_max=nodes_max, nproc_per_node=slots,
            max_restart=max_restart, join_window_s=0.6, stop_grace_s=6.0,
            members_timeout_s=members_timeout_s, recovery=recovery or "in_place", spares=spares,
        ),
        etcd=EtcdConfig(lease_ttl_s=2, renew_interval_s=0.5, rpc_timeout_s=0.4),
        checkpoint=CheckpointConfig(keep_last=keep_last, persist_grace_s=persist_grace_s),
        health=HealthConfig(quarantine_after=quarantine_after),
    )  # fmt: skip


class World:
    """One run. ``plan`` says what the job is and what happens to it; see ``plan.make_plan``."""

    def __init__(self, plan: Plan, clock: Clock, *, tracing: bool = False) -> None:
        self.plan = plan
        self.clock = clock
        self.config = make_config(
            plan.nodes_min,
            plan.nodes_max,
            plan.slots,
            plan.max_restart,
            plan.keep_last,
            plan.members_timeout_s,
            plan.persist_grace_s,
            plan.recovery,
            plan.spares,
            plan.quarantine_after,
        )
        self.keys = schema.Keys("sim")
        self.training = Training(plan.steps, 8, plan.save_every, plan.session, plan.patient)
        self.history = History(self.training.batch, plan.steps if plan.session else 0)
        self.history.members_timeout_s = plan.members_timeout_s
        self.history.nodes_min = plan.nodes_min
        self.trace: list[tuple[Any, ...]] = []
        self.tracing = tracing
        self.network = Network(clock, self, self.keys.prefix)
        self.store = StoreFront(clock, ModelStore(lambda: clock.now))
        self.names = [f"n{i}" for i in range(plan.nodes)]
        self.agents: dict[str, SimAgent] = {}
        self.cut_peers: set[frozenset[str]] = set()
        self.traps: dict[str, tuple[str, float]] = {}
        self.states: dict[str, State] = {}
        self.snares: dict[str, int] = {}
        """How many workers are to be killed in the middle of a meeting or a hand-over."""
        self.meet: Callable[[Sequence[int]], Meeting] = meeting.meet
        """What the product decides by; for tests."""
        self.minds_restore_point = True
        """A state that is older than the restore point counts for nothing."""
        self.tells_restore_point = True
        """In place, a worker learns that the restore point is committed."""
        self.forgets_early = False
        """A worker gives its own state up before it has another; for tests."""
        self.deaf_while_loading = False
        """A worker that waits for a checkpoint hears of no planned change; for tests."""
        self.minds_since = True
        """Workers that have missed a generation do not go on."""
        self.minds_quarantine = True
        """Leaders know who is in quarantine."""
        self._brought_by: dict[int, tuple[State, ...]] = {}
        self.one_identity = False
        """Every life of a node has the same incarnation; for tests."""
        self.outcome_s: float | None = None
        self._staying: frozenset[str] = frozenset()
        self._leader: tuple[str, int] = ("", 0)
        self._counters: dict[str, int] = {}
        self._groups: dict[tuple[int, str], RankGroup] = {}
        self._manifests: dict[str, tuple[bytes, Manifest]] = {}
        self._told: set[str] = set()
        self._held: list[SimAgent] = []
        self._tick_etcd()

    def _tick_etcd(self) -> None:
        self.network.etcd.tick()
        self.clock.after(0.25, self._tick_etcd)

    # ------------------------------------------------------------ record

    def note(self, who: str, *what: object) -> None:
        self.trace.append((self.clock.now, who, what))
        if self.tracing:
            print(f"{self.clock.now:8.3f}  {who:8}", *what)

    def digest(self) -> str:
        """Of everything that was noted: equal for equal seeds."""
        return hashlib.sha256(repr(self.trace).encode()).hexdigest()

    def etcd_changed(self, batch: Batch, sent: Sent | None) -> None:
        """Called by etcd with every change it makes, before anyone else hears of it."""
        holder, term = self._leader
        for event in batch.events:
            key = event.kv.key[len(self.keys.prefix) :]
            if key.startswith("nodes/"):
                self._node_changed(batch.revision, key, None if event.deleted else event.kv.value)
            if key.startswith("quarantine/"):
                self._quarantine_changed(batch.revision, key, event.deleted, sent)
            if key not in KINDS:
                if not event.deleted and key.startswith("parts/") and self.tracing:
                    self.note("etcd", batch.revision, key)
                continue
            if event.deleted:
                self.note("etcd", batch.revision, key, "is deleted")
                if key == "leader":
                    self._leader = ("", 0)
                    self._release_held()
                continue
            value = event.kv.value
            parsed = value.decode() if key == "leader" else decode(KINDS[key], value)
            if key == "leader":
                self._leader = (parsed, event.kv.create_revision)
                self._release_held()
            if key == "outcome" and self.outcome_s is None:
                self.outcome_s = self.clock.now
                self._turn_away_newcomers()
            self.note("etcd", batch.revision, key, describe(parsed), "by", sent and sent.sender)
            self.history.add(
                Write(
                    self.clock.now,
                    batch.revision,
                    key,
                    parsed,
                    sent.sender if sent else "",
                    sent.term if sent else 0,
                    holder,
                    term,
                    sent.seen if sent else 0,
                )
            )

    def _node_changed(self, revision: int, key: str, value: bytes | None) -> None:
        staying = self._staying - {key}
        if value is not None and not decode(NodeRecord, value).leaving:
            staying |= {key}
        if staying != self._staying:
            self._staying = staying
            self.history.add(Nodes(self.clock.now, staying, revision))

    def _quarantine_changed(self, revision: int, key: str, lifted: bool, sent: Sent | None) -> None:
        self.note("etcd", revision, key, "lifted" if lifted else "barred", sent)
        node, (sender, seen) = key.partition("/")[2], (sent.sender, sent.seen) if sent else ("", 0)
        self.history.add(Barred(self.clock.now, revision, node, sender, seen, lifted))

    def _turn_away_newcomers(self) -> None:
        """A launcher that has not joined when the job ends would begin another run."""
        for agent in list(self.agents.values()):
            if agent.registered_s < 0:
                del self.agents[agent.node]
                agent.kill()

    def acknowledged(self, commit: CommitRef) -> None:
        if commit.manifest not in self._told:
            self._told.add(commit.manifest)
            self.history.add(Acknowledged(self.clock.now, commit))

    def exited(self, agent: SimAgent, code: int, asked: int) -> None:
        self.history.add(Exited(self.clock.now, agent.node, code, asked, agent.registered_s))
        if self.agents.get(agent.node) is agent:
            del self.agents[agent.node]
        if self.plan.embedded:
            release(self.store.store, self.owner)
            self._lose_etcd()

    # ------------------------------------------------------------ names and numbers

    def _count(self, what: str) -> int:
        self._counters[what] = self._counters.get(what, 0) + 1
        return self._counters[what]

    def next_incarnation(self, node: str) -> int:
        return 0 if self.one_identity else self._count(f"life of {node}")

    def next_port(self) -> int:
        return self._count("port")

    # ------------------------------------------------------------ quarantine

    def quarantine(self, node: str) -> None:
        """A person keeps ``node`` from taking part."""
        key = f"{self.keys.quarantine}{node}"
        self.network.etcd.transact(Transaction((), (Put(key, b"{}"),)))

    def release_from_quarantine(self, node: str) -> None:
        key = f"{self.keys.quarantine}{node}"
        for kv in self.network.etcd.read(key).kvs:
            if kv.key == key:
                txn = schema.lift_quarantine(self.keys, node, kv.mod_revision)
                self.network.etcd.transact(txn)

    def next_worker(self) -> int:
        return self._count("worker")

    def nonce(self) -> str:
        return f"{self._count('nonce'):08x}"

    @property
    def owner(self) -> str:
        """One history of heads: one job in one etcd."""
        return f"job{self.network.lives}"

    # ------------------------------------------------------------ the store

    def put(self, name: str, content: bytes) -> None:
        self.store.store.put(name, content)
        self.history.add(Stored(self.clock.now, name))

    def put_manifest(self, name: str, content: bytes, manifest: Manifest) -> None:
        self.store.store.put(name, content)
        self.history.add(Stored(self.clock.now, name, tuple(manifest.objects)))
        states = [
            self.states[block.digest]
            for piece in manifest.tensors
            if piece.name != "frozen"
            for block in piece.blocks
        ]
        self.history.add(
            Saved(
                self.clock.now,
                name,
                manifest.step,
                manifest.meta["position"],
                tuple(dict.fromkeys(states)),
            )
        )

    def remove(self, names: list[str]) -> None:
        self.store.store.delete(names)
        for name in names:
            self.history.add(Removed(self.clock.now, name))

    def damage(self, ref: CommitRef) -> None:
        """A fault: one object of the checkpoint is gone, or its manifest is altered."""
        store = self.store.store
        try:
            manifest = self.manifest(ref)
        except CheckpointDamaged:
            return
        victim = ref.manifest
        if self.clock.chance(0.7):
            victim = self.clock.random.choice(sorted(manifest.objects))
            store.delete([victim])
        else:
            store.put(victim, store.get(victim)[:-1])
        self.note("fault", "destroys", victim)
        self.history.add(Damaged(self.clock.now, victim))

    def manifest(self, ref: CommitRef) -> Manifest:
        """Reads and checks a manifest; the same bytes are decoded once."""
        store, name = self.store.store, ref.manifest
        known = self._manifests.get(name)
        if known is not None and name in store and store.get(name) is known[0]:
            return known[1]
        manifest = read_manifest(store, ref)
        self._manifests[name] = (store.get(name), manifest)
        return manifest

    def check_objects(self, ref: CommitRef, manifest: Manifest) -> None:
        """What reading every block finds out."""
        for name in manifest.objects:
            if name not in self.store.store:
                raise CheckpointDamaged(f"{name} of {ref.manifest} is missing")

    def state_in(self, ref: CommitRef, manifest: Manifest) -> State:
        weights = next(p for p in manifest.tensors if p.name == "weights")
        state = self.states[weights.blocks[0].digest]
        return State(manifest.step, manifest.meta["position"], state.used, ref.manifest, state.path)

    # ------------------------------------------------------------ nodes and workers

    def start_node(self, node: str) -> None:
        if node in self.agents or self.outcome_s is not None:
            return
        self.note(node, "starts")
        self.agents[node] = SimAgent(self, node, self.plan.slots)
        self.agents[node].start()

    def crash_node(self, node: str) -> None:
        """The launcher and its workers are gone; a private etcd with them."""
        agent = self.agents.pop(node, None)
        if agent is None:
            return
        self.note("fault", "kills", node)
        agent.kill()
        if self.plan.embedded:
            self._lose_etcd()

    def _lose_etcd(self) -> None:
        self.network.restart_empty()
        self._leader = ("", 0)
        self.history.add(EtcdLost(self.clock.now))

    def connected(self, a: str, b: str) -> bool:
        return not self.cut_peers or frozenset((a, b)) not in self.cut_peers

    def rendezvous(self, worker: SimWorker) -> RankGroup | None:
        """The worker looks for its peers at the endpoint of its generation."""
        env = worker.env
        assert env is not None
        key = (env.generation, env.endpoint)
        group = self._groups.get(key)
        if group is None or not any(w.process.alive for w in group.ranks.values()):
            number = self._count("run")
            group = self._groups[key] = RankGroup(self, number, env.generation, env.world_size)
        host = env.endpoint.partition(":")[0]
        refused = (
            group.running
            or group.over
            or worker.rank in group.ranks
            or group.world_size != env.world_size
            or not self.connected(worker.owner.node, host)
        )
        if refused:
            return None
        group.join(worker)
        return group

    def met(self, group: RankGroup, workers: list[SimWorker]) -> None:
        """The ranks compare where they stand."""
        self._brought_by[group.number] = tuple(w.state for w in workers if w.has_state)
        self.snare("meeting", workers)

    def formed(self, group: RankGroup, workers: list[SimWorker]) -> None:
        """The ranks stand together, and begin to step."""
        brought = self._brought_by.pop(group.number, ())
        states = tuple(w.state for w in workers)
        numbers = tuple(w.number for w in workers)
        members = tuple(w.owner.me for w in workers)
        self.history.add(
            Formed(
                self.clock.now, group.generation, group.number, numbers, members, brought, states
            )
        )
        if self.tracing:
            self.note("group", group.number, "of generation", group.generation, "at", states[0])

    def applied(self, group: RankGroup, workers: list[SimWorker]) -> None:
        """A step is applied, by all of them or by some."""
        numbers = tuple(w.number for w in workers)
        if len(workers) < group.world_size:
            self.note("fault", "only", numbers, "come through step", workers[0].state.step)
        members = tuple(w.owner.me for w in workers)
        self.history.add(
            Applied(self.clock.now, group.generation, workers[0].state, numbers, members)
        )

    def worker_gone(self, worker: SimWorker, how: str) -> None:
        self.history.add(Gone(self.clock.now, worker.number, how))

    def snare(self, kind: str, workers: list[SimWorker]) -> None:
        """Springs a snare that was set for this moment: one of ``workers`` is killed."""
        if self.snares.get(kind, 0):
            self.snares[kind] -= 1
            victim = self.clock.random.choice(workers)
            self.history.add(Struck(self.clock.now))
            self.note("fault", "kills", victim.process.name, "in its", kind)
            victim.kill(stopped=False)

    def trapped(self, agent: SimAgent, kind: str) -> bool:
        """Springs a trap that was set for whoever does ``kind`` next: freezes or kills it."""
        trap = self.traps.pop(kind, None)
        if trap is None:
            return False
        how, duration_s = trap
        self.note("fault", how, agent.node, "before its", kind, round(duration_s, 2))
        if how == "kill":
            self.history.add(Struck(self.clock.now))
        if how == "freeze":
            self.freeze(agent, duration_s)
        elif how == "hold":
            agent.process.freeze()
            self._held.append(agent)
        else:
            self.crash_node(agent.node)
            self.clock.after(duration_s, self.start_node, agent.node)
        return True

    def sprung(self, sent: Sent) -> None:
        """The network does something to this request: what else goes wrong at such a moment?"""
        self.note("fault", "in the way of", sent.kind, "of", sent.sender)
        if self.agents and self.clock.chance(0.7):
            node = self.clock.random.choice(sorted(self.agents))
            self.clock.after(self.clock.between(0.0, 0.3), self._kill_worker_of, node)

    def _kill_worker_of(self, node: str) -> None:
        if node in self.agents:
            self.kill_worker(self.agents[node])

    def kill_worker(self, agent: SimAgent) -> None:
        self.history.add(Struck(self.clock.now))
        for worker in agent.workers()[:1]:
            self.note("fault", "kills", worker.process.name)
            worker.kill(stopped=False)

    def _release_held(self) -> None:
        """The leader has changed: the perfect moment for an earlier one to wake up."""
        held, self._held = self._held, []
        for agent in held:
            self.clock.after(self.clock.between(0.0, 0.4), agent.process.wake)

    def freeze(self, agent: SimAgent, duration_s: float) -> None:
        agent.process.freeze()
        self.clock.after(duration_s, agent.process.wake)

    # ------------------------------------------------------------ the end

    def finished(self) -> bool:
        """The job has ended and everyone who was there has gone."""
        if self.outcome_s is None:
            return False
        return not self.agents


def describe(value: object) -> str:
    if isinstance(value, Generation):
        at = f"from #{value.restore.sequence} step {value.restore.step}" if value.restore else ""
        return f"{value.number} {' '.join(value.member_ids())} {at} ({value.reason})"
    if isinstance(value, Head):
        kept = [c.sequence for c in value.lineage]
        newest = value.newest
        return f"#{newest.sequence} step {newest.step} generation {newest.generation} on {kept}"
    return str(value)
