"""Routes as a configuration of nginx. Pure.

``to_nginx`` gives what stands inside ``http { }`` and works with anybody's nginx; ``whole_nginx``
the complete file of a gateway. Invariant: what is not a number comes from a value that ``routing``
has checked, so no record and no setting can add a directive.

What is not obvious:

- gRPC bodies are passed on as they come in, and what has been passed on in part cannot be sent
  again; ``mirror`` makes nginx read the whole body first, and so a lost call can be repeated.
- A try that takes longer than the learnt time-out is given up for the next replica. If that was
  the last one, ``@patient_…`` starts again with the configured time-outs: a request that is slower
  than any before it is answered late rather than not at all.
- A client that reuses its connection just as an old worker closes it, after a reload, would see
  its request fail: ``keepalive_min_timeout`` (nginx 1.27.4) leaves such connections open. Older
  versions get a connection for each HTTP request.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

from paddle_ft.serve.routing import Pool, Routes, Timeouts, configured, split_listen

NEW = (1, 28, 0)
FIRST_HTTP2_ON = (1, 25, 1)
FIRST_MIN_TIMEOUT = (1, 27, 4)
TO_PRIMARY = r"^/v2/(state|admin|repository/models)(/|$)"
TO_PRIMARY_GRPC = r"^/inference\.GRPCInferenceService/Repository(ModelLoad|ModelUnload)$"
STREAMS_GRPC = (
    r"^/(inference\.GRPCInferenceService/ModelStreamInfer|grpc\.health\.v1\.Health/Watch)$"
)
NOBODY = "no replica can answer now: try again"
NO_PRIMARY = "there is no primary now: try again"
UNKNOWN = "the primary has not answered: whether this call took effect is not known"
LOG = "requests.log"
CONTROL = "control.sock"
"""Where nginx tells which configuration it runs, beside its other files."""
STREAM_S = 3600


@dataclass(frozen=True, slots=True)
class Place:
    """What only the gateway's own nginx needs to be told."""

    version: tuple[int, ...] = NEW
    user: str = ""
    """Of the worker processes, where nginx is started by root."""


def whole_nginx(routes: Routes, place: Place, digest: str) -> str:
    """nginx.conf, all paths relative to its folder; ``digest`` is what ``/digest`` answers."""
    head = f"""\
{f"user {place.user};" if place.user else "# workers run as who started nginx"}
worker_processes {routes.settings.workers or "auto"};
worker_shutdown_timeout {_seconds(2 * routes.settings.read_timeout_s + 10)};
pid nginx.pid;
error_log stderr warn;
events {{
    worker_connections 4096;
}}
http {{
    client_body_temp_path bodies;
    proxy_temp_path answers;
    fastcgi_temp_path unused;
    uwsgi_temp_path unused;
    scgi_temp_path unused;
    default_type application/octet-stream;
    split_clients "$request_id" $pft_sampled {{ 10% 1; * 0; }}
    # Of the quick ones, which are many, every tenth tells as much as all.
    map "$pft_sampled$status$upstream_response_time" $pft_told {{
        "~^02000\\.0[0-9]*$" 0;
        default 1;
    }}
    log_format pft "$msec\\t$status\\t$upstream_addr\\t$upstream_status\\t"
                   "$upstream_connect_time\\t$upstream_response_time";
    access_log {LOG} pft if=$pft_told;
    server {{
        listen unix:{CONTROL};
        access_log off;
        location = /digest {{ return 200 "{digest}"; }}
        location / {{ return 404; }}
    }}
"""
    return head + _indented(to_nginx(routes, place.version)) + "}\n"


def to_nginx(routes: Routes, version: tuple[int, ...] = NEW) -> str:
    """Directives for ``http { }``: upstreams, and a server each for HTTP and gRPC."""
    blocks = [*_upstreams(routes), *_choice(routes), _http_server(routes, version)]
    if routes.settings.listen_grpc:
        blocks.append(_grpc_server(routes, version))
    told = ".".join(map(str, version))
    return f"# serving group {routes.group}, for nginx {told} or later\n" + "".join(blocks)


def _upstreams(routes: Routes) -> Iterator[str]:
    kinds = ("http", "grpc") if routes.settings.listen_grpc else ("http",)
    for pool in routes.pools:
        for kind in kinds:
            yield _upstream(routes, pool, kind)


def _upstream(routes: Routes, pool: Pool, kind: str) -> str:
    s = routes.settings
    lines = [f"zone pft_{kind}_{pool.name} 256k;"]
    if pool is routes.sticky:
        lines.append(f"hash $http_{s.sticky_header.lower().replace('-', '_')} consistent;")
    elif s.balance == "least_conn":
        lines.append("least_conn;")
    for server in pool.servers:
        port = server.http_port if kind == "http" else server.grpc_port
        backup = " backup" if server.backup else ""
        lines.append(
            f"server {server.host}:{port} weight={server.weight} max_fails={s.max_fails} "
            f"fail_timeout={math.ceil(s.fail_timeout_s)}s{backup};  # {server.name}"
        )
    if pool is routes.primary:
        # A call on a kept connection that the other end is closing would be lost, and is not sent
        # again. Newer versions keep connections unless told otherwise, and take no 0.
        lines += ["keepalive 1;", "keepalive_requests 1;"]
    else:
        lines.append(f"keepalive {s.keepalive};")
    return _block(f"upstream pft_{kind}_{pool.name}", lines)


def _choice(routes: Routes) -> Iterator[str]:
    """Variables with the name of the pool, where there is a choice."""
    if routes.shares:
        parts = [f"{share.percent:.2f}% {share.pool.name};" for share in routes.shares]
        yield _block('split_clients "$request_id" $pft_share', [*parts, "* main;"])
    if routes.sticky is not None:
        rest = "$pft_share" if routes.shares else "main"
        header = routes.settings.sticky_header.lower().replace("-", "_")
        yield _block(f"map $http_{header} $pft_pool", [f'"" {rest};', "default sticky;"])


def _target(routes: Routes) -> str:
    if routes.sticky is not None:
        return "$pft_pool"
    return "$pft_share" if routes.shares else "main"


# ---------------------------------------------------------------- servers


def _http_server(routes: Routes, version: tuple[int, ...]) -> str:
    s = routes.settings
    scheme = "https" if s.replica_ca_file else "http"
    lines = [
        *_listen(routes, s.listen, version, ""),
        "client_body_buffer_size 1m;",
        "proxy_http_version 1.1;",
        'proxy_set_header Connection "";',
        "proxy_set_header Host $http_host;",
        "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;",
        "proxy_set_header X-Forwarded-Proto $scheme;",
        "proxy_set_header X-Request-Id $request_id;",
        "proxy_buffers 16 64k;",
        "proxy_buffer_size 64k;",
        "proxy_busy_buffers_size 128k;",
        *_tls_to_replicas(routes, "proxy"),
    ]
    return _block("server", [*lines, *_locations(routes, "proxy", scheme, "http", TO_PRIMARY)])


def _grpc_server(routes: Routes, version: tuple[int, ...]) -> str:
    s = routes.settings
    scheme = "grpcs" if s.replica_ca_file else "grpc"
    lines = [
        *_listen(routes, s.listen_grpc, version, "http2"),
        "client_body_buffer_size 1m;",
        "http2_max_concurrent_streams 1024;",
        "keepalive_timeout 1h;",
        "grpc_buffer_size 64k;",
        *_tls_to_replicas(routes, "grpc"),
        _block("location = /pft_nowhere", ["internal;", "access_log off;", "return 204;"]),
    ]
    if routes.main is not None:
        stream = [
            f"grpc_pass {scheme}://pft_grpc_{_target(routes)};",
            "grpc_next_upstream error;",
            f"grpc_next_upstream_tries {s.tries};",
            *_timeouts("grpc", configured(s), STREAM_S),
            f"client_body_timeout {STREAM_S}s;",
            "client_max_body_size 0;",
            "access_log off;",
        ]
        lines.append(_block(f'location ~ "{STREAMS_GRPC}"', stream))
    found = _locations(routes, "grpc", scheme, "grpc", TO_PRIMARY_GRPC)
    return _block("server", [*lines, *found])


def _listen(routes: Routes, address: str, version: tuple[int, ...], protocol: str) -> Iterator[str]:
    s = routes.settings
    host, port = split_listen(address)
    old = " http2" if protocol and version < FIRST_HTTP2_ON else ""
    yield f"listen {host}:{port}{' ssl' if s.cert_file else ''}{old} backlog=4096;"
    if protocol and not old:
        yield "http2 on;"
    if version >= FIRST_MIN_TIMEOUT:
        yield "keepalive_min_timeout 5s;"
    elif not protocol:
        yield "keepalive_timeout 0;"
    if s.cert_file:
        yield f"ssl_certificate {s.cert_file};"
        yield f"ssl_certificate_key {s.key_file};"
        yield "ssl_protocols TLSv1.2 TLSv1.3;"
        yield "ssl_session_cache shared:pft_tls:4m;"
    yield "server_tokens off;"
    yield "keepalive_requests 1000000;"
    yield "reset_timedout_connection on;"
    yield "recursive_error_pages on;"
    yield f"client_max_body_size {s.body_bytes_max};"


def _tls_to_replicas(routes: Routes, module: str) -> Iterator[str]:
    s = routes.settings
    if not s.replica_ca_file:
        return
    yield f"{module}_ssl_trusted_certificate {s.replica_ca_file};"
    yield f"{module}_ssl_verify on;"
    yield f"{module}_ssl_verify_depth 3;"
    yield f"{module}_ssl_server_name on;"
    yield f"{module}_ssl_name {s.replica_name};"
    if s.replica_cert_file:
        yield f"{module}_ssl_certificate {s.replica_cert_file};"
        yield f"{module}_ssl_certificate_key {s.replica_key_file};"


def _locations(
    routes: Routes, module: str, scheme: str, kind: str, to_primary: str
) -> Iterator[str]:
    s = routes.settings
    usual = configured(s)
    to = f"{module}_pass {scheme}://pft_{kind}_"
    pages = ["error_page 502 = @nobody;", "error_page 413 = @too_large;"]
    if routes.main is None:
        yield _block("location /", _refusal(503, NOBODY))
    else:
        retry = "error timeout invalid_header non_idempotent http_502 http_503 http_504"
        tries = [f"{module}_next_upstream {retry};", f"{module}_next_upstream_tries {s.tries};"]
        whole = ["mirror /pft_nowhere;"] if kind == "grpc" else []
        body = [f"{to}{_target(routes)};", *whole, *tries, *_retry_time(module, routes.timeouts)]
        patient = routes.timeouts != usual
        late = [f"error_page 504 = @patient_{kind};"] if patient else []
        within = _timeouts(module, routes.timeouts, routes.timeouts.read_s)
        yield _block("location /", [*body, *within, *pages, *late])
        if patient:
            body = [f"{to}{_target(routes)};", *tries, *_retry_time(module, usual)]
            within = _timeouts(module, usual, usual.read_s)
            yield _block(f"location @patient_{kind}", [*body, *within, pages[0]])
    if routes.primary is None:
        refusal = _refusal(503, NO_PRIMARY)
        yield _block(f'location ~ "{to_primary}"', refusal)
    else:
        # Nothing here is sent twice: whether the first try took effect is not known.
        once = [f"{to}primary;", f"{module}_next_upstream off;"]
        once += _timeouts(module, usual, usual.read_s)
        lost = ["error_page 502 = @broken;", "error_page 504 = @late;"]
        yield _block(f'location ~ "{to_primary}"', [*once, *lost, pages[1]])
        yield _block("location @broken", _refusal(502, UNKNOWN))
        yield _block("location @late", _refusal(504, UNKNOWN))
    yield _block("location @nobody", _refusal(503, NOBODY))
    yield _block("location @too_large", _refusal(413, f"more than {s.body_bytes_max} bytes"))


def _timeouts(module: str, timeouts: Timeouts, read_s: float) -> list[str]:
    return [
        f"{module}_connect_timeout {_seconds(timeouts.connect_s)};",
        f"{module}_send_timeout {_seconds(timeouts.send_s)};",
        f"{module}_read_timeout {_seconds(read_s)};",
    ]


def _retry_time(module: str, timeouts: Timeouts) -> list[str]:
    """Long enough for another replica after one that took all its time, not for a third one."""
    return [f"{module}_next_upstream_timeout {_seconds(timeouts.read_s + timeouts.connect_s)};"]


def _refusal(status: int, message: str) -> list[str]:
    again = ["add_header Retry-After 1 always;"] if status == 503 else []
    body = json.dumps({"error": message})
    return ["default_type application/json;", *again, f"return {status} '{body}';"]


# ---------------------------------------------------------------- text


def _seconds(value: float) -> str:
    """nginx counts in milliseconds, and 0 is often no limit at all."""
    value_ms = max(1, round(value * 1000))
    return f"{value_ms}ms" if value_ms % 1000 else f"{value_ms // 1000}s"


def _block(head: str, lines: list[str]) -> str:
    return f"{head} {{\n{_indented(''.join(_line(line) for line in lines))}}}\n"


def _line(text: str) -> str:
    return text if text.endswith("\n") else f"{text}\n"


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())
