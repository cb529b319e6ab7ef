"""The gateway: keeps nginx routing to the replicas that are there and answer.

Invariant: nginx always has the newest routes that it has accepted, or will within ``PAUSE_S``.
Neither the loss of etcd nor an empty registry takes a replica away that answers its health check;
one that does not is left out without asking etcd, and without waiting for nginx to reload. One
loop decides; the watch and the checks only wake it.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from paddle_ft.config import EtcdConfig
from paddle_ft.errors import EtcdUnavailable, PaddleFTError
from paddle_ft.gateway_config import GatewayConfig
from paddle_ft.serve.checks import Checks, Target
from paddle_ft.serve.hosts import Hosts
from paddle_ft.serve.latency import Learners, tries_of
from paddle_ft.serve.lessons import Lessons
from paddle_ft.serve.nginx import Nginx, children, find_nginx, workers_user, write_whole
from paddle_ft.serve.nginx_pools import without_one
from paddle_ft.serve.nginx_text import FIRST_MIN_TIMEOUT, LOG, Place, whole_nginx
from paddle_ft.serve.registry import Group
from paddle_ft.serve.request_log import LOG_BYTES_MAX, Log
from paddle_ft.serve.routing import Health, Pool, Routes, configured, fault_of, models_of, routes
from paddle_ft.serve.steady import Damper, Roster, Standstill, believed, grace_s
from paddle_ft.serve.types import ServeError
from paddle_ft.serve.waiting import take_back
from paddle_ft.serve.watched_group import Registry, foreign
from paddle_ft.types import decode, encode

TICK_S = 0.1
APPLY_RETRY_S = 1.0
PAUSE_S = 0.5
"""Between two reloads, unless somebody could not be served meanwhile."""
SETTLE_S = 2.0
"""So long may one replica be left out without a reload: it may be back."""
DEATHS = 3
DEATHS_WITHIN_S = 10.0
GROUP_FILE = "group.json"
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Running:
    """What nginx was last given."""

    text: str
    routes: Routes
    at_s: float


class Gateway:
    """Args:
    tell: takes one line for people whenever something changes.
    """

    def __init__(
        self, name: str, settings: GatewayConfig, etcd: EtcdConfig, folder: Path, tell: Tell
    ) -> None:
        self._name, self._settings, self._folder, self._tell = name, settings, folder, tell
        self._wake = threading.Event()
        routes(name, Group(), settings)  # raises ConfigError before anything is started
        self._binary = find_nginx(settings.nginx)
        self._registry = Registry(etcd, name, self._wake.set)
        self._checks = Checks(settings, self._wake.set)
        self._hosts = Hosts(self._wake.set)
        self._lessons = Lessons(Learners(configured(settings), settings.timeout_floor_s))
        self._roster, self._damper = Roster(), Damper()
        self._group: Group | None = None
        self._running = _Running("", routes(name, Group(), settings), 0.0)
        self._told: dict[str, str] = {}
        self._deaths: deque[float] = deque(maxlen=DEATHS)
        self._answered_s: dict[str, float] = {}
        self._health: dict[str, Health] = {}
        self._left_s: float | None = None
        self._standstill = Standstill()
        self._asks: dict[int, set[str]] = {}
        """Whom each worker of nginx may ask, by its configuration."""
        self._retry_at_s = 0.0
        self._made: tuple[Routes, str, str] | None = None

    def run(self, stop: threading.Event) -> None:
        """Until ``stop`` is set. On the main thread, which nginx's life hangs on.

        Raises:
            EtcdUnavailable: etcd is away, and there is no group from an earlier run.
            ConfigError, MachineError, ServeError: nginx cannot run here, or ends again and again.
        """
        self._nginx = Nginx(self._binary, self._folder)
        log = Log(self._folder / LOG)
        try:
            self._checks.start()
            self._begin()
            while not stop.is_set():
                self._wake.wait(TICK_S)
                self._wake.clear()
                self._step(log)
        finally:
            self._registry.close()
            self._checks.close()
            self._hosts.close()
            log.close()
            self._nginx.close()

    def _begin(self) -> None:
        try:
            self._registry.start()
        except EtcdUnavailable as error:
            self._group = self._saved()
            if self._group is None:
                raise
            self._tell(f"{error}; going on with the group of the last run")
        now_s = time.monotonic()
        self._renew(now_s)
        wanted = self._routes(now_s)
        text, digest = self._text(wanted)
        place = self._place()
        self._nginx.start(text, digest)
        self._running = _Running(text, wanted, now_s)
        s = self._settings
        version = ".".join(map(str, place.version))
        grpc = f", gRPC on {s.listen_grpc}" if s.listen_grpc else ""
        self._tell(f"nginx {version} serves group {self._name}: HTTP on {s.listen}{grpc}")
        if self._binary.version < FIRST_MIN_TIMEOUT:
            self._tell(
                "so old an nginx loses requests on kept connections at a reload: HTTP clients get "
                "a connection for each request (not so from 1.27.4 on)"
            )
        if place.user == "root":
            self._tell(
                f"nginx's workers run as root: nobody else may pass the folders above "
                f"{self._folder} (chmod o+x, or give another --folder)"
            )
        self._tell_of(wanted)

    def _step(self, log: Log) -> None:
        now_s = time.monotonic()
        self._renew(now_s)
        self._learn(log, now_s)
        if not self._nginx.alive:
            self._restart(now_s)
            return
        wanted = self._routes(now_s)
        left = _asked(self._running.routes) - _asked(wanted)
        self._nginx.leave_out(left)
        self._left_s = (self._left_s or now_s) if left else None
        self._take_back(wanted, now_s)
        text, digest = self._text(wanted)
        if text == self._running.text:
            self._nginx.let_in(_asked(wanted))
            self._tell_of(wanted)
        elif now_s >= self._retry_at_s and self._due(wanted, left, now_s):
            self._apply(wanted, text, digest)
        elif left:
            self._tell_of(wanted)
        self._nginx.trim_log(LOG_BYTES_MAX)

    def _take_back(self, wanted: Routes, now_s: float) -> None:
        """What waits at a replica that has come to stand still is asked of another one."""
        silent = {name for name, health in self._health.items() if health == "silent"}
        asked = _asked(self._running.routes)
        pids = children(self._nginx.pid)
        self._asks = {pid: self._asks.get(pid, asked) for pid in pids}
        name = self._standstill.look(silent - _asked(wanted), patience_s(wanted), now_s)
        if name and self._group is not None and name in self._group.replicas:
            r = self._group.replicas[name]
            addresses = [(r.host, r.http_port), (r.host, r.grpc_port)]
            # Workers of a configuration with nobody else would have nobody else to ask.
            take_back([pid for pid in pids if self._asks[pid] - silent], addresses)

    def _due(self, wanted: Routes, left: set[str], now_s: float) -> bool:
        """Whether nginx is to reload now: at once if somebody cannot be served otherwise."""
        running = self._running.routes
        switched = len(left) == 1 and bool(without_one(running))
        # Who is the primary no longer passes changes on; who does not answer cannot.
        stuck = running.state is None or first_of(running.state) <= left
        if running.main is None or (left and not switched) or (stuck and wanted.state is not None):
            return True
        moved = running.primary != wanted.primary
        settled = moved or self._left_s is None or now_s >= self._left_s + SETTLE_S
        return settled and now_s >= self._running.at_s + PAUSE_S

    def _apply(self, wanted: Routes, text: str, digest: str) -> None:
        try:
            self._nginx.apply(text, digest)
        except PaddleFTError as error:
            self._once("apply", f"{error}; it goes on as before")
            self._retry_at_s = time.monotonic() + APPLY_RETRY_S
        else:
            self._once("apply", "")
            self._running = _Running(text, wanted, time.monotonic())
            self._nginx.let_in(_asked(wanted))
            self._tell_of(wanted)

    def _restart(self, now_s: float) -> None:
        self._deaths.append(now_s)
        if len(self._deaths) == DEATHS and now_s - self._deaths[0] < DEATHS_WITHIN_S:
            raise ServeError(
                f"nginx has ended {DEATHS} times within {DEATHS_WITHIN_S:g} s: its log in "
                f"{self._folder} says why"
            )
        self._tell("nginx has ended: it is started again")
        wanted = self._routes(now_s)
        text, digest = self._text(wanted)
        self._nginx.start(text, digest)
        self._running = _Running(text, wanted, now_s)
        self._tell_of(wanted)

    def _renew(self, now_s: float) -> None:
        """Takes over what etcd has, and what is to be checked."""
        fresh, odd = None, ""
        try:
            fresh = self._registry.group()
        except ValueError as error:
            odd = foreign(self._name, error)
        self._once("registry", odd)
        group = self._group
        if fresh is not None:
            fresh, nowhere = self._hosts.addressed(fresh)
            self._once("hosts", "; ".join(nowhere))
            group = self._roster.renew(group, fresh, self._health, now_s)
        if group is None:
            raise ServeError(f"{odd}.")
        if group is not self._group and group.replicas and _lasting(group) != _lasting(self._group):
            with suppress(OSError):
                write_whole(self._folder / GROUP_FILE, encode(group))
        self._group = group
        targets = {
            r.name: Target(r.host, r.http_port) for r in group.replicas.values() if not fault_of(r)
        }
        self._checks.watch(targets)
        self._lessons.learners.know(models_of(group))

    def _saved(self) -> Group | None:
        with suppress(OSError, ValueError):
            return decode(Group, (self._folder / GROUP_FILE).read_bytes())
        return None

    def _routes(self, now_s: float) -> Routes:
        assert self._group is not None
        found = self._health = believed(
            self._checks.health(), self._checks.unanswered_s(), self._answered_s
        )
        health = self._damper.settle(found, now_s)
        learnt = self._lessons.learners.learnt() if self._settings.learn_timeouts else None
        wanted = routes(self._name, self._group, self._settings, health, learnt)
        for name in self._group.replicas:
            sentence = _told_of(name, health.get(name))
            if found.get(name) == "ready" and health[name] != "ready":
                hold_s = self._damper.hold_s(name)
                sentence = f"replica {name} answers again: let in once it has for {hold_s:g} s"
            self._once(f"replica {name}", sentence)
        for sentence in wanted.refused:
            self._once(f"refused: {sentence}", sentence)
        for about in list(self._told):
            if about.startswith("replica ") and about[8:] not in self._group.replicas:
                del self._told[about]
        return wanted

    def _learn(self, log: Log, now_s: float) -> None:
        assert self._group is not None
        replicas = self._group.replicas.values()
        names = {
            f"{r.host}:{port}": r.name for r in replicas for port in (r.http_port, r.grpc_port)
        }
        ago_s = time.time() - now_s
        for line in log.lines():
            for tried in tries_of(line):
                name, ended_s = names.get(tried.address, ""), tried.at_s - ago_s
                self._lessons.saw(tried, name, ended_s)
                if tried.alive and name:
                    self._answered_s[name] = ended_s + grace_s(tried)
        self._lessons.step(now_s, names, self._health)
        for name in self._answered_s.keys() - self._group.replicas.keys():
            del self._answered_s[name]

    def _place(self) -> Place:
        return Place(self._binary.version, workers_user(self._folder))

    def _text(self, wanted: Routes) -> tuple[str, str]:
        """A configuration, and the digest that it answers with; made anew for new routes alone."""
        if self._made is not None and self._made[0] == wanted:
            return self._made[1:]
        place = self._place()
        plain = whole_nginx(wanted, place, "")
        digest = hashlib.sha256(plain.encode()).hexdigest()[:16]
        self._made = (wanted, whole_nginx(wanted, place, digest), digest)
        return self._made[1:]

    def _tell_of(self, taken: Routes) -> None:
        """What nginx does now, where that is new."""
        t, calls = taken.timeouts, taken.timeouts_grpc
        self._once("time-outs", f"time-outs: connect {t.connect_s:g} s, read {t.read_s:g} s")
        self._once("gRPC", f"time-outs of gRPC: read {calls.read_s:g} s")
        for model in taken.models:
            read_s, about = model.timeouts.read_s, f"time-outs of {model.name}"
            self._once(about, f"{about}: read {read_s:g} s")
        names = sorted(server.name for server in taken.main.servers) if taken.main else ["nobody"]
        primary = taken.primary.servers[0].name if taken.primary else "not known"
        self._once("asked", f"requests go to {', '.join(names)}; the primary is {primary}")

    def _once(self, about: str, sentence: str) -> None:
        """Tells what is new about something; "" forgets it."""
        if self._told.get(about, "") != sentence:
            self._told[about] = sentence
            if sentence:
                self._tell(sentence)


def _lasting(group: Group | None) -> object:
    """What a later run needs of a group; how far each log has come is not worth a write."""
    if group is None:
        return None
    replicas = [replace(r, term=0, sequence=0) for _, r in sorted(group.replicas.items())]
    return replicas, group.primary, group.level


def _asked(taken: Routes) -> set[str]:
    """Names of the replicas that answer for models."""
    return {server.name for server in taken.main.servers} if taken.main else set()


def patience_s(taken: Routes) -> float:
    """How long one must have been left out before requests are taken back from it: not at all
    where answers are quick, longer where time-outs have grown, as on a busy machine."""
    learnt = (taken.timeouts, taken.timeouts_grpc, *(model.timeouts for model in taken.models))
    beyond_s = min(each.read_s for each in learnt) - taken.settings.timeout_floor_s
    return min(0.75 * SETTLE_S, max(0.0, beyond_s) / 4)


def first_of(pool: Pool | None) -> set[str]:
    """Names of those that are asked first."""
    return {server.name for server in pool.servers if not server.backup} if pool else set()


def _told_of(name: str, health: Health | None) -> str:
    if health == "silent":
        return f"replica {name} does not answer: it is left out"
    if health == "refusing":
        return f"replica {name} is not ready: it is left out"
    return f"replica {name} is ready" if health == "ready" else ""
