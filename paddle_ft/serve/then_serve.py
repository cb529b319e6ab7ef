"""``--then-serve``: a node that has trained becomes a replica of what was published.

The launcher stays the parent: a private etcd of the job lives on with it, it passes signals on, and
its exit code is that of the replica. Each node does this for itself. The others go on without one
that cannot, and whoever comes later joins them by the job's etcd and name.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from paddle_ft.agent.tether import tethered
from paddle_ft.checkpoint.room import url_of
from paddle_ft.config import Config
from paddle_ft.coordination.endpoints import parse_endpoints
from paddle_ft.errors import ConfigError
from paddle_ft.serve.command import parse
from paddle_ft.serve.own_etcd import ANY
from paddle_ft.serve.stream import is_loopback

POLL_S = 0.1
_AT_ONCE = 3
"""So many signals end a replica that does not answer to them."""


def check(given: Sequence[str], config: Config) -> None:
    """Raises ConfigError for flags that ``paddle_ft.serve`` would refuse after the training."""
    try:
        asked = parse(flags(given, config, config.etcd.endpoints), dict(os.environ))
    except ConfigError as error:
        raise ConfigError(f"--then-serve: {error}") from None
    serve = asked.loaded.config.serve
    if asked.print_config or not serve.models:
        raise ConfigError("--then-serve does not name a model: give it '--model NAME'")
    _check_reach(asked.loaded.config, config.job.nodes_max)
    from paddle_ft.serve.replica import models_of
    from paddle_ft.serve.tls import server_tls

    try:
        models_of(asked.loaded.config)
        server_tls(serve)
    except ConfigError as error:
        raise ConfigError(f"--then-serve: {error}") from None


def _check_reach(config: Config, nodes: int) -> None:
    """Raises ConfigError where the replicas of a job could not make a group."""
    serve, endpoints = config.serve, config.etcd.endpoints
    targets = parse_endpoints(endpoints).targets if endpoints else ()
    here = all(is_loopback(target.rpartition(":")[0].strip("[]")) for target in targets)
    host = config.job.host or serve.host
    local = here if host in ANY else is_loopback(host)
    if not local and not (serve.peer_ca_file or serve.peer_plain):
        raise ConfigError(
            f"--then-serve: replicas on {host} would talk to each other without TLS: set "
            f"serve.peer_ca_file and its certificates, or serve.peer_plain"
        )
    if local and nodes > 1 and not here:
        raise ConfigError(
            f"--then-serve: at {host} the replicas of other nodes cannot reach this one: give it "
            f"'--host 0.0.0.0'"
        )


def flags(given: Sequence[str], config: Config, endpoints: Sequence[str]) -> list[str]:
    """The flags of a replica of this job; those that are ``given`` win."""
    job = config.job
    own = ["--group", job.id, "--node", job.node, "--store", url_of(config)]
    if endpoints:
        own += ["--etcd", ",".join(endpoints)]
    return [*own, *given]


def serve(given: Sequence[str], config: Config, tend: Callable[[], object]) -> int:
    """Runs a replica until it ends; gives its exit code. ``tend`` is called now and then.

    To be called on the main thread, with the etcd of the job in ``config``.
    """
    command = flags(given, config, config.etcd.endpoints)
    sys.stderr.write(f"[paddle_ft] training has ended, now serving: {' '.join(given)}\n")
    with _noted() as noted:
        replica = subprocess.Popen(
            tethered([sys.executable, "-m", "paddle_ft.serve", *command], signal.SIGTERM),
            stdin=subprocess.DEVNULL,
            # Ctrl-C at the terminal comes to the launcher alone, which passes it on.
            start_new_session=True,
        )
        try:
            return _watch(replica, noted, tend)
        finally:
            if replica.poll() is None:
                replica.kill()
                replica.wait()


def _watch(replica: subprocess.Popen[bytes], noted: list[int], tend: Callable[[], object]) -> int:
    passed = 0
    while True:
        try:
            code = replica.wait(POLL_S)
            break
        except subprocess.TimeoutExpired:
            pass
        while noted:
            number = noted.pop(0)
            passed += 1
            replica.send_signal(number if passed < _AT_ONCE else signal.SIGKILL)
        tend()
    if code >= 0:
        return code
    if not passed:
        name = signal.Signals(-code).name
        sys.stderr.write(f"[paddle_ft] the replica of this node was ended by {name}\n")
    return 128 - code


@contextmanager
def _noted() -> Iterator[list[int]]:
    """Signals that ask to stop, as they come."""
    noted: list[int] = []

    def note(number: int, _frame: object) -> None:
        noted.append(signal.SIGTERM if number == signal.SIGHUP else number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
