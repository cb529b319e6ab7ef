"""Health checks of replicas: each is asked for ``/v2/health/ready`` again and again.

Invariant: what is told of a replica is what its last check found, except that one which did not
answer must answer twice in a row to count as ready, and that a check says nothing when this
process itself did not get to run. A check is given ``FACTOR`` times as long as any of the last
minute has taken, but at least ``PATIENCE_S`` and at most the configured time: where all is quick,
a replica that stands still is seen early; where it is not, a slow one is not taken for dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from paddle_ft.errors import ConfigError
from paddle_ft.gateway_config import GatewayConfig
from paddle_ft.serve.routing import Health

CHECKS_PER_S = 100.0
"""Over all replicas; with more of them each is asked less often."""
STALL_S = 0.1
FACTOR = 8.0
PATIENCE_S = 0.1
WINDOW_S = 60.0
LEAST = 50
"""Checks before less than the configured time is given."""
RETURNS = 2
_ANSWER_BYTES_MAX = 4096


@dataclass(frozen=True, slots=True)
class Target:
    """Where a replica is asked; ``host`` without brackets."""

    host: str
    port: int


class Pace:
    """How long a check may take, from how long the last ones have taken. Pure."""

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._begins_s = -WINDOW_S
        self._slowest_s = [most_s, most_s]
        """Of the window before, and of this one."""
        self._seen = 0

    def saw(self, took_s: float, now_s: float) -> None:
        """An answer. One that comes late counts too: it was no sign of death."""
        if now_s - self._begins_s >= WINDOW_S / 2:
            self._slowest_s = [self._slowest_s[1] if self._seen else 0.0, 0.0]
            self._begins_s = now_s
        self._seen += 1
        self._slowest_s[1] = max(self._slowest_s[1], took_s)

    @property
    def timeout_s(self) -> float:
        if self._seen < LEAST:
            return self._most_s
        return min(self._most_s, max(PATIENCE_S, FACTOR * max(self._slowest_s)))


class Checks:
    """The health of a changing set of replicas, found out on a thread of its own.

    Args:
        notify: called on that thread whenever the health of one has changed; must not block.

    Raises:
        ConfigError: a file for TLS to the replicas cannot be read.
    """

    def __init__(self, settings: GatewayConfig, notify: Callable[[], None]) -> None:
        self._settings = settings
        self._notify = notify
        self._tls = _tls(settings)
        self._pace = Pace(settings.check_timeout_s)
        self._lock = threading.Lock()
        self._targets: dict[str, Target] = {}
        self._health: dict[str, Health] = {}
        self._unanswered_s: dict[str, float] = {}
        self._loop: asyncio.AbstractEventLoop
        self._tasks: dict[str, tuple[Target, asyncio.Task[None]]] = {}
        self._thread = threading.Thread(target=self._run, name="checks", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread.start()

    def watch(self, targets: Mapping[str, Target]) -> None:
        """Checks these from now on, and no others."""
        with self._lock:
            if targets == self._targets:
                return
            self._targets = dict(targets)
        self._loop.call_soon_threadsafe(self._arrange)

    def health(self) -> dict[str, Health]:
        """By name, of those that have been checked."""
        with self._lock:
            return dict(self._health)

    def unanswered_s(self) -> dict[str, float]:
        """Of those that are silent: when the last check began that nobody has answered in time.

        Not of those that have refused the connection: there is nobody.
        """
        with self._lock:
            return dict(self._unanswered_s)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    def _arrange(self) -> None:
        with self._lock:
            wanted = dict(self._targets)
        for name, (target, task) in list(self._tasks.items()):
            if wanted.get(name) != target:
                task.cancel()
                del self._tasks[name]
                with self._lock:
                    self._health.pop(name, None)
                    self._unanswered_s.pop(name, None)
        for name, target in wanted.items():
            if name not in self._tasks:
                self._tasks[name] = (target, self._loop.create_task(self._follow(name, target)))

    async def _follow(self, name: str, target: Target) -> None:
        answered, given_up, gave_up_s = RETURNS, 0, 0.0
        while True:
            began_s, timeout_s = time.monotonic(), self._pace.timeout_s
            found, refused = await self._check(target, timeout_s)
            took_s = time.monotonic() - began_s
            if found == "silent":
                given_up, gave_up_s = given_up + 1, took_s
            else:
                # Answering right after it was given up once, it was slow rather than dead.
                self._pace.saw(max(took_s, gave_up_s) if given_up == 1 else took_s, began_s)
                given_up = 0
            # Late by itself: the machine or this process stood still, not the replica.
            blind = found == "silent" and took_s > timeout_s + STALL_S
            if not blind:
                answered = 0 if found == "silent" else answered + 1
                if found == "silent" or answered >= RETURNS:
                    timed_out = found == "silent" and not refused
                    self._found(name, target, found, began_s if timed_out else None)
            pause_s = max(self._settings.check_interval_s, len(self._tasks) / CHECKS_PER_S)
            await asyncio.sleep(max(pause_s - took_s, pause_s / 4))

    def _found(self, name: str, target: Target, health: Health, unanswered_s: float | None) -> None:
        with self._lock:
            if self._targets.get(name) != target:
                return
            self._unanswered_s.pop(name, None)
            if unanswered_s is not None:
                self._unanswered_s[name] = unanswered_s
            if self._health.get(name) == health:
                return
            self._health[name] = health
        self._notify()

    async def _check(self, target: Target, timeout_s: float) -> tuple[Health, bool]:
        """What was found, and whether somebody or something said no."""
        try:
            status = await asyncio.wait_for(self._ask(target), timeout_s)
        except (asyncio.TimeoutError, TimeoutError):  # the same from Python 3.11 on
            return "silent", False
        except (OSError, ValueError, EOFError):
            return "silent", True
        return ("ready" if status == 200 else "refusing"), False

    async def _ask(self, target: Target) -> int:
        """The status of an answer; on a connection of its own, which shows that it accepts."""
        name = self._settings.replica_name or None
        reader, writer = await asyncio.open_connection(
            target.host,
            target.port,
            limit=_ANSWER_BYTES_MAX,
            ssl=self._tls,
            server_hostname=name if self._tls else None,
        )
        try:
            request = f"GET /v2/health/ready HTTP/1.1\r\nHost: {name or 'replica'}\r\n"
            writer.write(f"{request}Connection: close\r\n\r\n".encode())
            line = await reader.readline()
            if not line.startswith(b"HTTP/1."):
                raise ValueError("no HTTP")
            return int(line.split()[1])
        except IndexError as error:
            raise ValueError("no status") from error
        finally:
            writer.close()
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), 0.05)


def _tls(settings: GatewayConfig) -> ssl.SSLContext | None:
    if not settings.replica_ca_file:
        return None
    try:
        context = ssl.create_default_context(cafile=settings.replica_ca_file)
        if settings.replica_cert_file:
            context.load_cert_chain(settings.replica_cert_file, settings.replica_key_file)
    except OSError as error:
        raise ConfigError(
            f"the certificates for TLS to the replicas cannot be used ({error}): check the files "
            f"that gateway.replica_… name"
        ) from error
    return context
