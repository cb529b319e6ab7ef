"""What was typed for ``--etcd``, made into targets. Pure.

Accepted: ``host``, ``host:port``, ``[v6]:port``, each with ``http://``, ``https://`` or ``etcd://``
in front or nothing, several joined by commas. The port is etcd's own, 2379, if none is given.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from paddle_ft.errors import ConfigError

PORT_DEFAULT = 2379
_FORM = re.compile(
    r"(?:(?P<scheme>[a-z][a-z0-9+]*)://)?"
    r"(?P<host>\[[0-9a-fA-F:.%]+\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?\.?)"
    r"(?::(?P<port>[0-9]{1,5}))?/?"
)


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The members of one etcd: ``host:port`` each, and whether they are spoken to over TLS."""

    targets: tuple[str, ...]
    tls: bool


def parse_endpoints(texts: Iterable[str], *, tls_files: bool = False) -> Endpoints:
    """The endpoints that ``texts`` name, without repetitions, in the order given.

    ``tls_files``: a CA or a client certificate is configured, which asks for TLS as ``https://``
    does. Raises ConfigError, naming the text that is wrong.
    """
    targets: dict[str, None] = {}
    schemes: set[str] = set()
    for text in (part.strip() for entry in texts for part in entry.split(",")):
        if not text:
            continue
        found = _FORM.fullmatch(text)
        scheme = (found["scheme"] or "") if found else ""
        if found is None or scheme not in ("", "http", "https", "etcd"):
            raise ConfigError(f"etcd endpoint {text!r} is not of the form host:port")
        port = int(found["port"] or PORT_DEFAULT)
        if not 0 < port < 65536:
            raise ConfigError(f"etcd endpoint {text!r} has no port between 1 and 65535")
        targets[f"{found['host']}:{port}"] = None
        schemes.add(scheme)
    if not targets:
        raise ConfigError("no etcd endpoint is given: name at least one as host:port")
    plain = "http" in schemes
    if plain and ("https" in schemes or tls_files):
        raise ConfigError(
            "etcd endpoints ask for http:// and for TLS at once: write https:// for all of them, "
            "or leave out the CA and certificate files"
        )
    return Endpoints(tuple(targets), tls_files or "https" in schemes)
