"""Routes as a configuration of HAProxy, for those who have one already. Pure.

HAProxy checks health by itself, so only replicas that are registered matter here, not what our
checks have found. Its retries hold back what fits into ``tune.bufsize``: a larger request is not
sent a second time once a part of it has been. Invariant: as in ``nginx_text``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from paddle_ft.serve.nginx_text import NO_PRIMARY, NOBODY, STATE, TO_PRIMARY, TO_PRIMARY_GRPC
from paddle_ft.serve.routing import Pool, Routes, split_listen

RETRIED = "conn-failure empty-response response-timeout 404 502 503 504 0rtt-rejected"
WEIGHT_MAX = 256


def to_haproxy(routes: Routes) -> str:
    """A whole configuration: a frontend and its backends each for HTTP and gRPC."""
    parts = [f"# serving group {routes.group}\n", *_head(routes), *_side(routes, "http")]
    if routes.settings.listen_grpc:
        parts += _side(routes, "grpc")
    return "".join(parts)


def _head(routes: Routes) -> Iterator[str]:
    s = routes.settings
    yield _section(
        "global",
        ["tune.bufsize 262144", "tune.h2.initial-window-size 1048576", "hard-stop-after 60s"],
    )
    yield _section(
        "defaults",
        [
            "mode http",
            "option http-keep-alive",
            "option redispatch 1",
            f"retries {s.tries - 1}",
            f"timeout connect {_ms(s.connect_timeout_s)}",
            f"timeout client {_ms(s.send_timeout_s)}",
            f"timeout server {_ms(s.read_timeout_s)}",
            f"timeout check {_ms(s.check_timeout_s)}",
            "timeout http-request 30s",
        ],
    )


def _side(routes: Routes, kind: str) -> Iterator[str]:
    """All of one protocol."""
    s = routes.settings
    host, port = split_listen(s.listen if kind == "http" else s.listen_grpc)
    tls = f" ssl crt {s.cert_file}" if s.cert_file else ""
    # Of a certificate in two files HAProxy finds the key beside it, as <cert_file>.key.
    protocol = {("http", True): " alpn http/1.1", ("grpc", True): " alpn h2"}.get(
        (kind, bool(tls)), " proto h2" if kind == "grpc" else ""
    )
    to_primary = TO_PRIMARY if kind == "http" else TO_PRIMARY_GRPC
    lines = [
        f"bind {'*' if host == '0.0.0.0' else host}:{port}{tls}{protocol}",
        f"http-request set-var(txn.primary) bool(true) if {{ path_reg {to_primary} }}",
        f"http-request deny status 413 if {{ req.hdr_val(content-length) gt {s.body_bytes_max} }}",
        f"use_backend pft_{kind}_primary if {{ var(txn.primary) -m bool }}",
    ]
    if kind == "http" and routes.state is not None:
        changes = f"{{ path_reg {STATE} }} {{ method PUT DELETE }}"
        lines.insert(-1, f"use_backend pft_http_state if {changes}")
    if routes.sticky is not None:
        lines.append(f"use_backend pft_{kind}_sticky if {{ req.hdr({s.sticky_header}) -m found }}")
    if routes.shares:
        lines.append("http-request set-var(txn.share) rand(10000)")
    below = 0
    for share in routes.shares:
        below += round(share.percent * 100)
        condition = f"{{ var(txn.share) -m int lt {below} }}"
        lines.append(f"use_backend pft_{kind}_{share.pool.name} if {condition}")
    yield _section(f"frontend pft_{kind}", [*lines, f"default_backend pft_{kind}_main"])
    for pool in (p for p in routes.pools if kind == "http" or p is not routes.state):
        yield _backend(routes, pool, kind)
    if routes.main is None:
        yield _refusing(f"pft_{kind}_main", NOBODY)
    if routes.primary is None:
        yield _refusing(f"pft_{kind}_primary", NO_PRIMARY)


def _backend(routes: Routes, pool: Pool, kind: str) -> str:
    s = routes.settings
    lines = ["option httpchk GET /v2/health/ready", "http-check expect status 200"]
    if pool is routes.sticky:
        lines += [f"balance hdr({s.sticky_header})", "hash-type consistent"]
    else:
        lines.append("balance leastconn" if s.balance == "least_conn" else "balance roundrobin")
    if pool is routes.primary:
        # Whether the first try took effect is not known.
        lines += ["retries 0", "http-request disable-l7-retry"]
    elif pool is routes.state:
        lines += ["retries 1", "retry-on conn-failure", "option allbackups"]
    else:
        lines += ["option http-buffer-request", f"retry-on {RETRIED}"]
        lines += ["option allbackups"] if any(server.backup for server in pool.servers) else []
    every = max(round(s.check_interval_s * 1000), 50)
    most = max(server.weight for server in pool.servers)
    for server in pool.servers:
        port = server.http_port if kind == "http" else server.grpc_port
        weight = max(1, server.weight * WEIGHT_MAX // most) if most > WEIGHT_MAX else server.weight
        tls = _tls(routes, kind)
        extra = f"proto h2 check-proto h1 port {server.http_port}" if kind == "grpc" else ""
        words = [
            f"server {server.name} {server.host}:{port} weight {weight} check inter {every}ms",
            f"fall 1 rise 2 on-marked-down shutdown-sessions {extra}".rstrip(),
            *tls,
            *(["backup"] if server.backup else []),
        ]
        lines.append(" ".join(words))
    return _section(f"backend pft_{kind}_{pool.name}", lines)


def _tls(routes: Routes, kind: str) -> list[str]:
    s = routes.settings
    if not s.replica_ca_file:
        return []
    words = [f"ssl verify required ca-file {s.replica_ca_file}"]
    words += [f"verifyhost {s.replica_name}", f"sni str({s.replica_name})", "check-ssl"]
    if s.replica_cert_file:
        words.append(f"crt {s.replica_cert_file}")
    return words


def _refusing(name: str, told: str) -> str:
    body = json.dumps({"error": told}).replace("\\", "\\\\").replace('"', '\\"')
    answer = f'status 503 content-type application/json string "{body}" hdr Retry-After 1'
    return _section(f"backend {name}", [f"http-request return {answer}"])


def _ms(value_s: float) -> str:
    return f"{max(1, round(value_s * 1000))}ms"


def _section(head: str, lines: list[str]) -> str:
    return f"{head}\n" + "".join(f"    {line}\n" for line in lines) + "\n"
