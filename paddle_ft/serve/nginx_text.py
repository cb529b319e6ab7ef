"""Routes as a configuration of nginx. Pure.

``to_nginx`` gives what stands inside ``http { }`` and works with anybody's nginx; ``whole_nginx``
the complete file of a gateway. Invariant: what is not a number comes from a value that ``routing``
has checked, so no record and no setting can add a directive.

What is not obvious:

- gRPC bodies are passed on as they come in, and what has been passed on in part cannot be sent
  again; ``mirror`` makes nginx read the whole body first, and so a lost call can be repeated.
- A try that takes longer than the learnt time-out is given up for the next replica. If that was
  the last one, ``@patient_…`` starts again with longer ones, at last with those configured: a
  request that is slower than any before it is answered late rather than not at all.
- Old workers serve kept connections for seconds after a reload, by the old configuration, and a
  reload takes nginx 0.1 s at the least. The link ``out/_now`` to ``out/<replica>`` takes one
  replica out at once, in old and new workers: while it is there, they use a second set of pools,
  without that replica, and so do requests that have begun before and come to ``@patient_…``.
- Requests that any replica may answer are passed on over connections with ``SO_KEEPALIVE``: these
  alone are broken when a replica stands still (``serve.waiting``).
- Changes of the state are tried at a second replica if the first one could not be reached, or has
  died over it: they may be made twice, with nothing of the same client in between. What was lost
  in another way is not sent again.
- The first buffer of an answer is taken for each request; one of 64k would have to be mapped each
  time. Beyond a plain configuration a request costs one look at a link, and every tenth a line of
  the log.
- nginx counts an answer that it passes on to another replica as a failure of the first. A model
  that loads would so take its replica away from all others: the gateway's own nginx counts nothing
  (``max_fails=0``), for its checks are quicker; somebody else's has nothing but that.
- A client that reuses its connection just as an old worker closes it, after a reload, would see
  its request fail: ``keepalive_min_timeout`` (nginx 1.27.4) leaves such connections open. Older
  versions get a connection for each HTTP request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from paddle_ft.serve.nginx_pools import (
    Without,
    block,
    choice,
    indented,
    switches,
    target_of,
    upstreams,
    without_one,
)
from paddle_ft.serve.routing import Routes, Timeouts, configured, split_listen

NEW = (1, 28, 0)
FIRST_HTTP2_ON = (1, 25, 1)
FIRST_MIN_TIMEOUT = (1, 27, 4)
TO_PRIMARY = r"^/v2/(state|admin|repository/models)(/|$)"
STATE = "^/v2/state(/|$)"
TO_PRIMARY_GRPC = r"^/inference\.GRPCInferenceService/Repository(ModelLoad|ModelUnload)$"
STREAMS_GRPC = (
    r"^/(inference\.GRPCInferenceService/ModelStreamInfer|grpc\.health\.v1\.Health/Watch)$"
)
RETRY = "error timeout invalid_header non_idempotent http_502 http_503 http_504"
NOBODY = "no replica can answer now: try again"
NO_PRIMARY = "there is no primary now: try again"
UNKNOWN = "the primary has not answered: whether this call took effect is not known"
LOG = "requests.log"
PATIENCE = 8.0
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
    # Who has the name of a session may read it.
    map $uri $pft_about {{
        "~^/v2/state(/|$)" /v2/state;
        default $uri;
    }}
    log_format pft "$msec\\t$status\\t$pft_about\\t$upstream_addr\\t$upstream_status\\t"
                   "$upstream_connect_time\\t$upstream_response_time";
    access_log {LOG} pft if=$pft_told;
    server {{
        listen unix:{CONTROL};
        access_log off;
        location = /digest {{ return 200 "{digest}"; }}
        location / {{ return 404; }}
    }}
"""
    return head + indented(to_nginx(routes, place.version, own=True)) + "}\n"


def to_nginx(routes: Routes, version: tuple[int, ...] = NEW, *, own: bool = False) -> str:
    """Directives for ``http { }``: upstreams, and a server each for HTTP and gRPC.

    ``own``: for an nginx that a gateway stands beside.
    """
    without = without_one(routes) if own else ()
    blocks = [*upstreams(routes, without, own), *choice(routes, without)]
    blocks.append(_http_server(routes, version, without))
    if routes.settings.listen_grpc:
        blocks.append(_grpc_server(routes, version, without))
    told = ".".join(map(str, version))
    return f"# serving group {routes.group}, for nginx {told} or later\n" + "".join(blocks)


# ---------------------------------------------------------------- servers


def _http_server(routes: Routes, version: tuple[int, ...], without: Sequence[Without]) -> str:
    s = routes.settings
    scheme = "https" if s.replica_ca_file else "http"
    lines = [
        *_listen(routes, s.listen, version, ""),
        *switches(without),
        "client_body_buffer_size 1m;",
        "proxy_http_version 1.1;",
        'proxy_set_header Connection "";',
        "proxy_set_header Host $http_host;",
        "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;",
        "proxy_set_header X-Forwarded-Proto $scheme;",
        "proxy_set_header X-Request-Id $request_id;",
        "proxy_buffers 16 64k;",
        "proxy_buffer_size 16k;",
        "proxy_busy_buffers_size 128k;",
        *_tls_to_replicas(routes, "proxy"),
    ]
    target = f"proxy_pass {scheme}://pft_http_{target_of(routes, without)};"
    # 404: it has not got the model yet; 429: it has too much to do, another one may not.
    retry = f"{RETRY} http_404 http_429"
    way = _Way("proxy", "http", target, f"proxy_next_upstream {retry};")
    if routes.main is not None:
        lines += _chain(way, routes, "/", "", routes.timeouts, s.tries)
        for i, model in enumerate(routes.models):
            at = of_model(model.name)
            lines += _chain(way, routes, at, f"_{i}", model.timeouts, model.tries)
    to_primary = f"proxy_pass {scheme}://pft_http_primary;"
    if routes.state is not None:
        lines.append(_state(routes, scheme))
    return block("server", [*lines, *_others(routes, "proxy", to_primary, TO_PRIMARY)])


def of_model(name: str) -> str:
    """The location of all that is asked of a model; for a prefix that ends with a slash nginx
    answers requests for the path without it by a redirection."""
    return f'~ "^/v2/models/{re.escape(name)}(/|$)"'


def _grpc_server(routes: Routes, version: tuple[int, ...], without: Sequence[Without]) -> str:
    s = routes.settings
    scheme = "grpcs" if s.replica_ca_file else "grpc"
    lines = [
        *_listen(routes, s.listen_grpc, version, "http2"),
        *switches(without),
        "client_body_buffer_size 1m;",
        "http2_max_concurrent_streams 1024;",
        "keepalive_timeout 1h;",
        "grpc_buffer_size 16k;",
        *_tls_to_replicas(routes, "grpc"),
        block("location = /pft_nowhere", ["internal;", "access_log off;", "return 204;"]),
    ]
    target = f"grpc_pass {scheme}://pft_grpc_{target_of(routes, without)};"
    if routes.main is not None:
        stream = [
            target,
            "grpc_next_upstream error;",
            f"grpc_next_upstream_tries {s.tries};",
            *_timeouts("grpc", configured(s), STREAM_S),
            f"client_body_timeout {STREAM_S}s;",
            "client_max_body_size 0;",
            "access_log off;",
        ]
        lines.append(block(f'location ~ "{STREAMS_GRPC}"', stream))
        way = _Way("grpc", "grpc", target, f"grpc_next_upstream {RETRY};")
        lines += _chain(way, routes, "/", "", routes.timeouts_grpc, s.tries)
    to_primary = f"grpc_pass {scheme}://pft_grpc_primary;"
    return block("server", [*lines, *_others(routes, "grpc", to_primary, TO_PRIMARY_GRPC)])


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


@dataclass(frozen=True, slots=True)
class _Way:
    """How requests that any replica may answer are passed on."""

    module: str
    kind: str
    target: str
    retry: str


def _chain(
    way: _Way, routes: Routes, at: str, mark: str, timeouts: Timeouts, tries: int
) -> Iterator[str]:
    """A location, and those that it goes on to while no replica has answered in time."""
    stages = _stages(timeouts, configured(routes.settings))
    tried = [way.retry, f"{way.module}_next_upstream_tries {tries};"]
    tried.append(f"{way.module}_socket_keepalive on;")
    for number, stage in enumerate(stages):
        lines = [way.target, *tried, *_retry_time(way.module, stage)]
        lines += _timeouts(way.module, stage, stage.read_s)
        if number == 0:
            lines += ["mirror /pft_nowhere;"] if way.kind == "grpc" else []
            lines.append("error_page 413 = @too_large;")
        if number + 1 < len(stages):
            lines.append(f"error_page 502 504 = @patient_{way.kind}{mark}_{number + 1};")
        else:
            lines.append("error_page 502 = @nobody;")
        name = at if number == 0 else f"@patient_{way.kind}{mark}_{number}"
        yield block(f"location {name}", lines)


def _stages(timeouts: Timeouts, usual: Timeouts) -> list[Timeouts]:
    """The learnt ones; longer ones, lest one unlucky request that is slow and meets a replica that
    stands still wait for all of the last; those configured."""
    if timeouts == usual:
        return [usual]
    longer_s = PATIENCE * timeouts.read_s
    if longer_s >= usual.read_s:
        return [timeouts, usual]
    connect_s = min(PATIENCE * timeouts.connect_s, usual.connect_s)
    return [timeouts, Timeouts(connect_s, min(longer_s, usual.send_s), longer_s), usual]


def _others(routes: Routes, module: str, to_primary: str, paths: str) -> Iterator[str]:
    """What goes to the primary, and to nobody."""
    usual = configured(routes.settings)
    if routes.main is None:
        yield block("location /", _refusal(503, NOBODY))
    if routes.primary is None:
        yield block(f'location ~ "{paths}"', _refusal(503, NO_PRIMARY))
    if routes.primary is not None:
        # Nothing here is sent twice: whether the first try took effect is not known.
        once = [to_primary, f"{module}_next_upstream off;"]
        once += _timeouts(module, usual, usual.read_s)
        lost = ["error_page 502 = @broken;", "error_page 504 = @late;"]
        yield block(f'location ~ "{paths}"', [*once, *lost, "error_page 413 = @too_large;"])
    if routes.primary is not None or routes.state is not None:
        yield block("location @broken", _refusal(502, UNKNOWN))
        yield block("location @late", _refusal(504, UNKNOWN))
    yield block("location @nobody", _refusal(503, NOBODY))
    most = routes.settings.body_bytes_max
    yield block("location @too_large", _refusal(413, f"more than {most} bytes"))


def _state(routes: Routes, scheme: str) -> str:
    """Changes and reads of the state; comes before what goes to the primary in any case."""
    usual = configured(routes.settings)
    lines = [f"proxy_pass {scheme}://pft_http_$pft_state;"]
    lines += ["proxy_next_upstream error;", "proxy_next_upstream_tries 2;"]
    lines += _timeouts("proxy", usual, usual.read_s)
    lines += [
        "error_page 502 = @broken;",
        "error_page 504 = @late;",
        "error_page 413 = @too_large;",
    ]
    if routes.primary is None:
        refusal = _refusal(503, NO_PRIMARY)
        lines += [*refusal[:-1], block("if ($pft_state = primary)", refusal[-1:])]
    return block(f'location ~ "{STATE}"', lines)


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
