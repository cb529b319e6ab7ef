"""A serving group under faults, its clients, and what must hold whatever happens to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paddle_ft.serve import registry
from paddle_ft.serve.broadcast import HOLD_S, Answer, Append, Install
from paddle_ft.serve.log import Entry, Position, joined
from paddle_ft.serve.registry import InSync, Lost, Promote
from paddle_ft.types import decode
from tests.sim.clock import Clock, Process
from tests.sim.model_etcd import Batch
from tests.sim.network import Network, Sent
from tests.sim.serve.history import WISH_S, Broken, History
from tests.sim.serve.server import KEYS, NOTHING, Change, Server, twin
from tests.sim.task import Steps, Task

FAULTS_UNTIL_S = 40.0
QUIET_S = 50.0
"""From here on no client asks anything."""
SCENE_S = 18.0
LEVEL_S = 3.0
"""So much later all replicas have the same."""
ANSWER_S = 1.0


class Ask:
    """One request of a client; an answer that comes too late finds nobody waiting."""

    def __init__(self, client: Client) -> None:
        self.entry: Entry | None = None
        self.value: int | None = None
        self.gone = False
        self.answered = False
        self._client = client

    def done(self, outcome: Any) -> None:
        """An entry, or what has become of it instead."""
        self._tell("entry", outcome if isinstance(outcome, Entry) else None)

    def lost(self) -> None:
        """It is told that what it knew of is gone."""
        self._tell("gone", True)

    def read(self, value: bytes, twin: bytes) -> None:
        self._client.group.history.together(self._client.key, int(value), int(twin))
        self._tell("value", int(value))

    def _tell(self, name: str, value: object) -> None:
        self._client.process.after(self._client.group.delay_s(), self._set, name, value)

    def _set(self, name: str, value: object) -> None:
        setattr(self, name, value)
        self.answered = True


class Client:
    """Writes rising numbers under a key of its own, and reads them back, anywhere."""

    def __init__(self, group: Group, key: str) -> None:
        self.group, self.key = group, key
        self.process = Process(group.clock, key)
        self.number = 0
        self.at = Position()
        """Of its newest acknowledged write."""
        self.known = 0
        """What it wrote with that: it may not read less."""
        self._age = 0
        Task(self.process, self._work)

    def _work(self, task: Task) -> Steps:
        clock = self.group.clock
        while clock.now < self.group.quiet_s:
            history = self.group.history
            server, ask, known = self.group.somebody(), Ask(self), self.known
            if clock.chance(0.4):
                self._send(server, server.get, ask, self.key, self.at)
            elif clock.chance(0.2):
                self._send(server, server.read, ask, self.key)
            else:
                self.number += 1
                value = str(self.number).encode()
                both = joined({self.key: value, twin(self.key): value})
                self._send(server, server.put, ask, "states", self.key, both)
            until_s = clock.now + ANSWER_S
            while clock.now < until_s and not ask.answered:
                yield task.sleep(0.01)
            if history.age != self._age:  # it may be told that it is lost, and forgets what it knew
                self.at, self.known, self._age = Position(), 0, history.age
            elif ask.gone:
                raise Broken(f"{self.key} {self.at} is said to be lost, and it is not")
            elif ask.entry is not None:
                self.at, self.known = ask.entry.at, self.number
            elif ask.value is not None:
                history.read(self.key, ask.value, known)
            yield task.sleep(clock.between(0.01, 0.1))

    def _send(self, server: Server, method: Callable[..., None], *args: Any) -> None:
        if not self.group.clock.chance(self.group.lossy):
            server.process.after(self.group.delay_s(), method, *args)


class Group:
    """Args:
    without: a rule that is left out, to see that it is needed.
    faults: at random; else nothing happens but what is made to, and it is over soon.
    disasters: also those after which changes are given up.
    """

    def __init__(
        self, seed: int, *, without: str = "", faults: bool = True, disasters: bool = False
    ) -> None:
        self.clock = Clock(seed)
        self.without = without
        self.in_sync_min = 2 if seed % 3 or not faults else 1
        self.observe_s = 2.0 if seed % 5 == 4 and faults else HOLD_S
        self.quiet_s = QUIET_S if faults else SCENE_S
        self.on_sprung: Callable[[], None] | None = None
        """Called once, when a trap has sprung."""
        self.history = History()
        self.network = Network(self.clock, self, KEYS.prefix)
        self.lossy = 0.0
        self.cut: set[frozenset[str]] = set()
        """Pairs of nodes that cannot reach each other."""
        self.done: dict[str, int] = {}
        """Faults that were made."""
        self.disasters = disasters
        self.history.ordered = not (disasters and seed % 8 == 7)
        self.asked_s = float("-inf")
        """When a promotion was asked for last."""
        self.killed: set[str] = set()
        self._coming: set[str] = set()
        self._incarnations: dict[str, int] = {}
        self.servers: dict[str, Server] = {}
        """By node."""
        for number in range(2 if seed % 7 == 6 and faults else 3):
            self._start(f"n{number}")
        self.clients = [Client(self, f"k{number}") for number in range(3)]
        if faults:
            self.clock.after(self.clock.between(1.0, 3.0), self._fault)

    def etcd_changed(self, batch: Batch, sent: Sent | None) -> None:
        if sent is None or sent.kind not in ("force", "begin"):
            return
        term, history = batch.revision, self.history
        if sent.kind == "force":
            history.forced(term, self.asked_s, self.clock.now)
        for event in batch.events:
            if event.kv.key == KEYS.lost:
                lost = decode(Lost, event.kv.value)
                self.count("forced with loss" if lost.forced else "began anew")
                for name in () if lost.forced else lost.names:
                    history.ended(name, name not in self.killed)
                node = sent.sender.rpartition(".")[0]
                history.gave_up(term, self.servers[node].seat.replica)

    def sprung(self, sent: Sent) -> None:
        call, self.on_sprung = self.on_sprung, None
        if call is not None:
            call()

    def run(self) -> None:
        """Raises Broken."""
        self.clock.run(self.quiet_s + LEVEL_S, lambda: False)
        leader = next((s for s in self.servers.values() if s.leads), None)
        if leader is None:
            raise Broken("nobody is the primary at the end")
        for key, number in self.history.numbers.items():
            held = leader.seat.replica.state.items.get(("state", key))
            if held is None or int(held.value) < number:
                raise Broken(f"{key} is {held} at the end, and {number} was acknowledged")
        states = {tuple(sorted(s.seat.replica.state.items.items())) for s in self.servers.values()}
        if len(states) != 1:
            raise Broken("the replicas differ at the end")

    # ------------------------------------------------------------ replicas

    def _start(self, node: str) -> None:
        self._coming.discard(node)
        self._incarnations[node] = self._incarnations.get(node, 0) + 1
        self.servers[node] = Server(self, node, self._incarnations[node])

    def restart(self, server: Server) -> None:
        """As a new incarnation, with an empty log; mostly its death is seen by the others."""
        self.kill(server)
        if self.clock.chance(0.7):
            self.clock.after(self.delay_s(), self.known_dead, server)
        if self.servers[server.node] is server and server.node not in self._coming:
            self._coming.add(server.node)
            self.clock.after(self.clock.between(0.1, 1.0), self._start, server.node)

    def kill(self, server: Server) -> None:
        server.process.kill()
        self.killed.add(server.name)

    def known_dead(self, server: Server) -> None:
        """Also if it is not: a firewall may say so."""
        for other in self.servers.values():
            if other is not server and other.process.running:
                other.seat.died(server.name)
        self.network.etcd.revoke(server.lease)

    def ask_for(self, target: str, force: bool = False) -> None:
        """As an operator who waits for it."""
        etcd = self.network.etcd
        lease = 0 if self.without == "wish/lease" else etcd.grant(WISH_S)
        self.asked_s = self.clock.now
        etcd.transact(registry.wish(KEYS, Promote(target, force), lease))

    def delay_s(self) -> float:
        """Of a message that is not held up."""
        return self.clock.between(0.0005, 0.01)

    def jitter_s(self) -> float:
        return self.clock.between(0.0, 0.002)

    def pass_on(
        self,
        sender: Server,
        name: str,
        change: Change,
        until_s: float,
        term: int,
        end: Callable[[Any], None],
    ) -> None:
        """Over a connection: nothing is lost, but it may come late, also after it was cut."""
        server = self.servers[name.rpartition(".")[0]]
        delay_s = self.delay_s()
        if frozenset({sender.node, server.node}) in self.cut or self.clock.chance(
            max(0.02, self.lossy)
        ):
            delay_s = self.clock.between(0.1, 3.0)
        if server.name != name or not server.process.alive:  # nobody listens, or another one
            sender.process.after(delay_s, end, NOTHING)
            return

        def answered(outcome: Any) -> None:
            if not self.clock.chance(self.lossy):
                sender.process.after(self.delay_s(), end, outcome)

        server.process.after(delay_s, server.take, change, until_s, term, answered)

    def somebody(self) -> Server:
        """The primary, mostly, as a client would know it; now and then anyone."""
        servers = list(self.servers.values())
        kv = self.network.etcd.get(KEYS.primary)
        if kv is not None and not self.clock.chance(0.3):
            named = [s for s in servers if s.name == kv.value.decode()]
            if named:
                return named[0]
        return self.clock.random.choice(servers)

    def send(self, sender: Server, name: str, message: Append | Install | Answer) -> None:
        node = name.rpartition(".")[0]
        server = self.servers[node]
        away = frozenset({sender.node, node}) in self.cut
        if server.name != name or away or self.clock.chance(self.lossy):
            return
        if self.clock.chance(0.02):  # late, after what was sent later, or twice
            server.process.after(self.clock.between(0.1, 3.0), server.hear, sender.name, message)
            if self.clock.chance(0.5):
                return
        server.process.after(self.delay_s(), server.hear, sender.name, message)

    # ------------------------------------------------------------ faults

    def _fault(self) -> None:
        clock = self.clock
        if clock.now > FAULTS_UNTIL_S:
            self._heal()
            return
        faults = (self._kill, self._freeze, self._cut_etcd, self._cut_pair, self._lose, self._etcd)
        faults = (*faults, self._promote, self._trap, self._leave)
        if self.disasters:
            faults = (*faults, self._force, self._lose_all)
        if not self.history.ordered:
            faults = (*faults, self._mistake)
        fault = clock.random.choice(faults)
        if fault():
            name = fault.__name__.strip("_")
            self.count(name)
        clock.after(clock.between(0.2, 4.0), self._fault)

    def count(self, name: str) -> None:
        self.done[name] = self.done.get(name, 0) + 1

    def _heal(self) -> None:
        self.network.cut.clear()
        self.cut.clear()
        self.lossy = self.network.flaky = 0.0
        for server in self.servers.values():
            server.process.wake()

    def _victim(self) -> Server:
        """The primary every other time."""
        anyone = self.clock.random.choice(list(self.servers.values()))
        return self.somebody() if self.clock.chance(0.5) else anyone

    def _kill(self) -> bool:
        """Unless what was acknowledged would be nowhere then: no protocol could keep it."""
        victim = self._victim()
        kv = self.network.etcd.get(KEYS.in_sync)
        members = set(decode(InSync, kv.value).names) if kv else set()
        alive = {s.name for s in self.servers.values() if s.process.alive}
        needed = len(members & alive) >= self.in_sync_min and not victim.process.frozen
        if not needed or not (members & alive) - {victim.name}:
            return False
        self.restart(victim)
        return True

    def _freeze(self) -> bool:
        victim = self._victim().process
        victim.freeze()
        self.clock.after(self.clock.between(0.1, 6.0), victim.wake)
        return True

    def _promote(self) -> bool:
        """Planned; whoever it is, also one that cannot be."""
        target = self.clock.random.choice(list(self.servers.values())).name
        self.ask_for(target)
        return True

    def _mistake(self) -> bool:
        """A firewall answers for one that lives: the others take it for dead, and end its lease."""
        self.known_dead(self._victim())
        return True

    def _force(self) -> bool:
        self.ask_for(self.clock.random.choice(list(self.servers.values())).name, True)
        return True

    def _lose_all(self) -> bool:
        """The power is cut: everybody comes back, sooner or later."""
        for server in list(self.servers.values()):
            self.restart(server)
        return True

    def _leave(self) -> bool:
        """Asked to stop; it comes back later."""
        victim = self._victim()
        if victim.leaving or len(self.network.etcd.read(KEYS.replicas).kvs) < len(self.servers):
            return False
        victim.leave()
        return True

    def _trap(self) -> bool:
        """The next transaction of a kind takes effect late, or nobody hears that it has."""
        kind = self.clock.random.choice(("campaign", "record", "hand_over", "refuse", "register"))
        how = self.clock.random.choice(("late", "late", "deaf"))
        self.network.traps[kind] = (how, self.clock.between(0.3, 6.0))
        return True

    def _cut_etcd(self) -> bool:
        node = self._victim().node
        self.network.cut.add(node)
        self.clock.after(self.clock.between(0.2, 5.0), self.network.cut.discard, node)
        return True

    def _cut_pair(self) -> bool:
        nodes = self.clock.random.sample(sorted(self.servers), 2)
        pair = frozenset(nodes)
        self.cut.add(pair)
        self.clock.after(self.clock.between(0.2, 5.0), self.cut.discard, pair)
        return True

    def _lose(self) -> bool:
        self.lossy = 0.3
        self.clock.after(self.clock.between(0.5, 5.0), self._lose_no_more)
        return True

    def _lose_no_more(self) -> None:
        self.lossy = 0.0

    def _etcd(self) -> bool:
        self.network.flaky = 0.4
        self.clock.after(self.clock.between(0.5, 5.0), self._etcd_works)
        return True

    def _etcd_works(self) -> None:
        self.network.flaky = 0.0
