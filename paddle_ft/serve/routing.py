"""Who gets which request: a serving group and what the checks say of it, as ``Routes``.

Invariant: a replica that is known not to answer is in no pool, so neither balancing nor affinity
can choose it, unless nothing better is left; and where replicas are known, there is somebody to
ask for inference. Changes of the state go to the primary or to who passes them on, administration
to the primary or nowhere. Pure: the same arguments give the same routes, in the same order.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from paddle_ft.errors import ConfigError
from paddle_ft.gateway_config import GatewayConfig
from paddle_ft.serve.registry import Group, ReplicaRecord

Health = Literal["ready", "refusing", "silent"]
"""What an active check of ``/v2/health/ready`` found: 200; another status; no answer in time."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HOST = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9-]{1,63})*"
)
_PATH = re.compile(r"[^\x00-\x20\x7f\"'$\\;{}#]+")
WEIGHT_MAX = 1000
MODELS_MAX = 128
"""With time-outs of their own; those beyond have the ones of the rest."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a replica may take, in s, before another one is asked."""

    connect_s: float
    send_s: float
    read_s: float


@dataclass(frozen=True, slots=True)
class Learnt:
    """Time-outs by what is asked for."""

    rest: Timeouts
    """For HTTP that is about no known model."""
    grpc: Timeouts
    models: Mapping[str, Timeouts] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is asked for otherwise than the rest."""

    name: str
    timeouts: Timeouts
    tries: int


@dataclass(frozen=True, slots=True)
class Server:
    """One replica in one pool."""

    name: str
    host: str
    """Bracketed if it is an IPv6 address."""
    http_port: int
    grpc_port: int
    weight: int = 1
    backup: bool = False
    """Asked only if none of the others can be."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Replicas among which requests are spread."""

    name: str
    servers: tuple[Server, ...]


@dataclass(frozen=True, slots=True)
class Share:
    """So much of the requests goes to this pool."""

    percent: float
    pool: Pool


@dataclass(frozen=True, slots=True)
class Routes:
    """All that a proxy needs to know."""

    group: str
    settings: GatewayConfig
    timeouts: Timeouts
    """For a try after which there may be another; the last one has those of ``settings``."""
    timeouts_grpc: Timeouts
    models: tuple[Model, ...] = ()
    main: Pool | None = None
    """None: nobody is known, every request is refused with 503."""
    shares: tuple[Share, ...] = ()
    """Replicas that are let in slowly; what they do not take is ``main``'s."""
    sticky: Pool | None = None
    """For requests with the header ``settings.sticky_header``, by consistent hash."""
    primary: Pool | None = None
    """Whom etcd says that it is, whatever its checks say; for administration and reads of the
    state. None: refused with 503."""
    state: Pool | None = None
    """For changes of the state: the primary, then those who would pass them on to it, also before
    it is known; None: refused with 503."""
    refused: tuple[str, ...] = field(default=(), compare=False)
    """Sentences about records that cannot be used."""

    @property
    def pools(self) -> tuple[Pool, ...]:
        shares = (share.pool for share in self.shares)
        found = (self.main, *shares, self.sticky, self.primary, self.state)
        return tuple(pool for pool in found if pool is not None)


def configured(settings: GatewayConfig) -> Timeouts:
    """The time-outs of somebody who has learnt nothing."""
    return Timeouts(settings.connect_timeout_s, settings.send_timeout_s, settings.read_timeout_s)


def routes(
    name: str,
    group: Group,
    settings: GatewayConfig,
    health: Mapping[str, Health] | None = None,
    learnt: Learnt | None = None,
) -> Routes:
    """Routes for ``group``, which is called ``name``.

    Args:
        health: by replica; one that has not been checked is judged by its record.

    Raises:
        ConfigError: a setting or the name of the group cannot stand in a proxy's configuration.
    """
    check_settings(name, settings)
    health = health or {}
    learnt = learnt or Learnt(configured(settings), configured(settings))
    known, refused = _usable(group)
    ready = [r for r in known if _is_ready(r, health.get(r.name))]
    # With nobody ready, a replica that loads its model says so better than a proxy could, and one
    # that seems silent may only be slow.
    answering = ready or [r for r in known if health.get(r.name) != "silent"] or known
    if group.level == "cold-standby" and not ready:
        # A standby has nothing running that could answer; the primary may be about to.
        answering = [r for r in known if r.name == group.primary]
    main, shares = _spread(group, answering)
    unheard = [r for r in known if health.get(r.name) == "silent" and _is_ready(r, None)]
    if not ready and unheard and group.level != "cold-standby":
        # Slow, it may be: it comes before who says that it loads.
        main, shares = _pool("main", unheard, [r for r in answering if r not in unheard]), ()
        answering = unheard
    standby = group.level != "active-active"
    sticky = None
    if settings.sticky_header and not standby and len(answering) > 1:
        sticky = Pool("sticky", tuple(_server(r, weight=w) for r, w in _scaled(answering)))
    primary = next((r for r in known if r.name == group.primary), None)
    return Routes(
        group=name,
        settings=settings,
        timeouts=learnt.rest,
        timeouts_grpc=learnt.grpc,
        models=_models(answering, settings, learnt),
        main=main,
        shares=shares,
        sticky=sticky,
        primary=Pool("primary", (_server(primary),)) if primary else None,
        state=_state(primary, ready, health),
        refused=tuple(refused),
    )


def models_of(group: Group) -> list[str]:
    """Names of the models in it that may stand in a configuration."""
    found = {model for r in group.replicas.values() for model in r.models}
    return sorted(filter(_NAME.fullmatch, found))[:MODELS_MAX]


def _models(
    answering: Sequence[ReplicaRecord], settings: GatewayConfig, learnt: Learnt
) -> tuple[Model, ...]:
    """Those with time-outs of their own, and those that not every replica has: it takes as many
    tries as there are replicas to find one that does."""
    found = []
    for name in models_of(Group(replicas={r.name: r for r in answering})):
        partial = any(name not in r.models for r in answering)
        tries = max(settings.tries, len(answering)) if partial else settings.tries
        timeouts = learnt.models.get(name, configured(settings))
        if (timeouts, tries) != (learnt.rest, settings.tries):
            found.append(Model(name, timeouts, tries))
    return tuple(found)


def _is_ready(replica: ReplicaRecord, found: Health | None) -> bool:
    """What a check has found is newer than the record, but only the record tells of leaving."""
    if replica.condition == "draining":
        return False
    return found == "ready" if found else replica.condition in ("ready", "degraded")


def _spread(
    group: Group, replicas: Sequence[ReplicaRecord]
) -> tuple[Pool | None, tuple[Share, ...]]:
    """The main pool, and one for each replica that is let in slowly."""
    if not replicas:
        return None, ()
    whole = [r for r in replicas if r.share >= 1] or list(replicas)
    gray = [r for r in replicas if r not in whole]
    leader = next((r for r in replicas if r.name == group.primary), None)
    if group.level != "active-active" and leader is not None:
        others = [r for r in whole if r is not leader] or [r for r in gray if r is not leader]
        backups = [r for r in replicas if r is not leader]
        first = _pool("main", [leader], backups)
        if leader in whole or not others:
            return first, ()
        rest = _pool("main", others, [r for r in replicas if r not in others])
        return rest, _shares([Share(100 * leader.share, replace(first, name="gray_0"))])
    total = sum(r.weight for r in replicas)
    parts = [
        Share(
            100 * r.share * r.weight / total,
            _pool(f"gray_{i}", [r], [other for other in replicas if other is not r]),
        )
        for i, r in enumerate(gray)
    ]
    return _pool("main", whole, gray), _shares(parts)


def _state(
    primary: ReplicaRecord | None, ready: Sequence[ReplicaRecord], health: Mapping[str, Health]
) -> Pool | None:
    """A primary that does not answer comes last: the others know better whether it is one."""
    first = [primary] if primary is not None else []
    others = [r for r in ready if r is not primary]
    if primary is None or (others and health.get(primary.name) == "silent"):
        first, others = others, first
    return _pool("state", first, others) if first else None


def _shares(parts: Sequence[Share]) -> tuple[Share, ...]:
    """To hundredths of a per cent, without those that round to nothing."""
    rounded = [replace(part, percent=round(part.percent, 2)) for part in parts]
    return tuple(part for part in rounded if part.percent > 0)


def _pool(name: str, first: Sequence[ReplicaRecord], backups: Sequence[ReplicaRecord]) -> Pool:
    return Pool(name, (*(_server(r) for r in first), *(_server(r, backup=True) for r in backups)))


def _server(replica: ReplicaRecord, *, weight: int = 0, backup: bool = False) -> Server:
    host = replica.host
    if ":" in host:
        host = f"[{host}]"
    return Server(
        replica.name, host, replica.http_port, replica.grpc_port, weight or replica.weight, backup
    )


def _scaled(replicas: Sequence[ReplicaRecord]) -> list[tuple[ReplicaRecord, int]]:
    """Weights with the share worked in; as they are where nobody is let in slowly."""
    if all(r.share >= 1 for r in replicas):
        return [(r, r.weight) for r in replicas]
    return [(r, max(1, round(10 * r.weight * min(r.share, 1.0)))) for r in replicas]


# ---------------------------------------------------------------- what may be written into a file


def _usable(group: Group) -> tuple[list[ReplicaRecord], list[str]]:
    """Replicas by name, and why some of them cannot be used; no record harms the others."""
    found, refused = [], []
    for _, replica in sorted(group.replicas.items()):
        fault = fault_of(replica)
        if fault:
            refused.append(f"replica {replica.name!r:.110} is left out: {fault}")
        else:
            found.append(replica)
    return found, refused


def fault_of(replica: ReplicaRecord) -> str:
    """What is wrong with a record, or ""."""
    if not _NAME.fullmatch(replica.name):
        return "its name is not made of letters, digits, dots, hyphens and _"
    if not is_host(replica.host):
        return f"{replica.host!r:.110} is neither an address nor a name of a host"
    if not all(0 < port < 65536 for port in (replica.http_port, replica.grpc_port)):
        return f"its ports are {replica.http_port} and {replica.grpc_port}"
    if not 1 <= replica.weight <= WEIGHT_MAX:
        return f"its weight {replica.weight} is not from 1 to {WEIGHT_MAX}"
    if not 0 <= replica.share <= 1:
        return f"its share {replica.share} is not from 0 to 1"
    return ""


def is_host(text: str) -> bool:
    try:
        # A scope ("fe80::1%eth0") may hold any sign.
        return "%" not in text and bool(ipaddress.ip_address(text))
    except ValueError:
        return _HOST.fullmatch(text) is not None


def split_listen(text: str) -> tuple[str, int]:
    """Host (bracketed if IPv6) and port of ``host:port``; raises ConfigError."""
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    named = is_host(bare) and (":" in bare) == (bare != host)
    if not named or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ConfigError(f"{text!r:.110} is no address to listen on: give host:port")
    return host, int(port)


def check_settings(name: str, settings: GatewayConfig) -> None:
    """Raises ConfigError for what could change the meaning of a configuration it stands in."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r:.110} is no name of a group: letters, digits, dots, hyphens and _"
        )
    split_listen(settings.listen)
    if settings.listen_grpc and split_listen(settings.listen_grpc) == split_listen(settings.listen):
        raise ConfigError(f"HTTP and gRPC cannot both listen on {settings.listen}")
    for path in (
        settings.cert_file,
        settings.key_file,
        settings.replica_ca_file,
        settings.replica_cert_file,
        settings.replica_key_file,
    ):
        if path and not _PATH.fullmatch(path):
            raise ConfigError(
                f"{path!r:.110} has a blank or a sign that proxies give a meaning: rename the file"
            )
    name = settings.replica_name
    if name and (not is_host(name) or ":" in name or re.fullmatch(r"[0-9.]+", name)):
        raise ConfigError(
            f"gateway.replica_name {name!r:.110} is no host name: give a DNS name that the "
            f"certificates of all replicas hold (nginx compares no addresses)"
        )
