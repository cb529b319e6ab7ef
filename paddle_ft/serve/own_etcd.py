"""A private etcd for a replica to which none was named, so that others on its machine can join it.

It lives as long as this replica: for a group that is to outlive it, name an etcd with --etcd.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from paddle_ft.config import Config
from paddle_ft.coordination.embedded import EmbeddedEtcd, find_etcd
from paddle_ft.errors import ConfigError, PaddleFTError
from paddle_ft.serve.stream import is_loopback

log = logging.getLogger("paddle_ft")

TEND_S = 0.5
ANY = ("0.0.0.0", "::", "")
"""With these, a replica's address is that by which it reaches etcd: loopback."""


@contextmanager
def with_etcd(config: Config) -> Iterator[Config]:
    """``config`` with the endpoint of a private etcd, while it is entered; as it is if it names one
    or the replica is to be alone.

    Raises ConfigError, CoordinationError if the etcd that is installed does not start.
    """
    if config.etcd.endpoints or config.serve.alone:
        yield config
        return
    if why := _why_alone(config):
        log.info("this replica is alone: %s", why)
        yield config
        return
    logging.getLogger("paddle_ft.coordination.embedded").setLevel(logging.WARNING)
    with EmbeddedEtcd() as etcd:
        log.info("others on this machine join this replica with --etcd %s", etcd.endpoint)
        private = config.etcd.model_copy(update={"endpoints": (etcd.endpoint,)})
        with _tended(etcd):
            yield config.model_copy(update={"etcd": private})


def _why_alone(config: Config) -> str:
    """What keeps a replica from having a private etcd; "" if nothing does."""
    serve = config.serve
    host = config.job.host or serve.host
    if not (serve.peer_ca_file or serve.peer_plain or host in ANY or is_loopback(host)):
        return f"to join one at {host}, others need TLS (see serve.peer_ca_file) and --etcd"
    try:
        find_etcd()
    except ConfigError as error:
        return str(error)
    return ""


@contextmanager
def _tended(etcd: EmbeddedEtcd) -> Iterator[None]:
    """Starts the server again if it dies."""
    over = threading.Event()

    def tend() -> None:
        while not over.wait(TEND_S):
            try:
                etcd.revive()
            except PaddleFTError as error:
                log.warning("%s", error)

    # What a thread starts ends with that thread: this one lasts as long as the server is needed.
    thread = threading.Thread(target=tend, name="etcd", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
