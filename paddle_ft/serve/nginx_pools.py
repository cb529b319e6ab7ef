"""Pools of replicas as nginx has them, and which of them a request goes to. Pure.

Invariant: as in ``nginx_text``, which says what the second set of pools is for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from paddle_ft.serve.routing import Pool, Routes

OUT = "out"
"""A folder beside nginx's other files, with a file for each replica that was left out."""
NOW = "_now"
"""A link in it to the one that is left out now, or to ``NOBODY``; no replica has such a name."""
NOBODY = "_nobody"
SWITCHED_MAX = 16
"""In a larger group one replica is too few of the requests to be worth a set of pools for each."""


@dataclass(frozen=True, slots=True)
class Without:
    """The pools of a group without one replica."""

    left_out: str
    main: Pool
    sticky: Pool | None


def without_one(routes: Routes) -> tuple[Without, ...]:
    """For each replica that others can stand in for; none in a group that is too large."""
    names = [server.name for server in routes.main.servers] if routes.main else []
    if not 2 <= len(names) <= SWITCHED_MAX:
        return ()
    assert routes.main is not None
    return tuple(
        Without(
            name,
            _less(routes.main, i, name),
            _less(routes.sticky, i, name) if routes.sticky else None,
        )
        for i, name in enumerate(names)
    )


def _less(pool: Pool, number: int, name: str) -> Pool:
    rest = [server for server in pool.servers if server.name != name]
    if all(server.backup for server in rest):  # nginx wants somebody to be asked first
        rest = [replace(server, backup=False) for server in rest]
    return Pool(f"{pool.name}_{number}", tuple(rest))


def upstreams(routes: Routes, without: Sequence[Without], own: bool) -> Iterator[str]:
    kinds = ("http", "grpc") if routes.settings.listen_grpc else ("http",)
    bound = [pool for pool in (routes.sticky, *(each.sticky for each in without)) if pool]
    others = [pool for pool in routes.pools if pool is not routes.sticky]
    for pool in (*others, *(each.main for each in without), *bound):
        for kind in kinds if pool is not routes.state else ("http",):
            yield _upstream(routes, pool, kind, pool in bound, own)


def _upstream(routes: Routes, pool: Pool, kind: str, sticky: bool, own: bool) -> str:
    s = routes.settings
    lines = [f"zone pft_{kind}_{pool.name} 256k;"]
    if sticky:
        lines.append(f"hash $http_{_header(routes)} consistent;")
    elif s.balance == "least_conn":
        lines.append("least_conn;")
    fails = (
        "max_fails=0"
        if own
        else f"max_fails={s.max_fails} fail_timeout={math.ceil(s.fail_timeout_s)}s"
    )
    for server in pool.servers:
        port = server.http_port if kind == "http" else server.grpc_port
        backup = " backup" if server.backup else ""
        lines.append(
            f"server {server.host}:{port} weight={server.weight} {fails}{backup};  # {server.name}"
        )
    if pool in (routes.primary, routes.state):
        # A call on a kept connection that the other end is closing would be lost, and some are not
        # sent again. Newer versions keep connections unless told otherwise, and take no 0.
        lines += ["keepalive 1;", "keepalive_requests 1;"]
    else:
        lines.append(f"keepalive {s.keepalive};")
    return block(f"upstream pft_{kind}_{pool.name}", lines)


def _header(routes: Routes) -> str:
    return routes.settings.sticky_header.lower().replace("-", "_")


def choice(routes: Routes, without: Sequence[Without]) -> Iterator[str]:
    """Variables with the name of the pool, where there is a choice."""
    if routes.state is not None:
        changes = ["default primary;", "PUT state;", "DELETE state;"]
        yield block("map $request_method $pft_state", changes)
    if routes.shares:
        parts = [f"{share.percent:.2f}% {share.pool.name};" for share in routes.shares]
        yield block('split_clients "$request_id" $pft_share', [*parts, "* main;"])
    plain = "$pft_share" if routes.shares else "main"
    bound = "sticky"
    if without:
        pools = [(each.left_out, each.main) for each in without]
        yield _switch("$pft_plain", plain, pools)
        plain = "$pft_plain"
    if routes.sticky is None:
        return
    if without:
        pools = [(each.left_out, each.sticky) for each in without if each.sticky]
        yield _switch("$pft_bound", bound, pools)
        bound = "$pft_bound"
    lines = ["volatile;", f'"" {plain};', f"default {bound};"]
    yield block(f"map $http_{_header(routes)} $pft_pool", lines)


def _switch(variable: str, usual: str, pools: Sequence[tuple[str, Pool]]) -> str:
    """A variable that is looked up anew in each location that a request comes to."""
    others = [f'"~/{OUT}/{re.escape(name)}$" {pool.name};' for name, pool in pools]
    return block(f"map $realpath_root {variable}", ["volatile;", f"default {usual};", *others])


def target_of(routes: Routes, without: Sequence[Without]) -> str:
    if routes.sticky is not None:
        return "$pft_pool"
    if without:
        return "$pft_plain"
    return "$pft_share" if routes.shares else "main"


def switches(without: Sequence[Without]) -> Iterator[str]:
    """Where nginx looks who is left out: ``$realpath_root`` ends with the name."""
    if without:
        yield f"root {OUT}/{NOW};"


# ---------------------------------------------------------------- text


def block(head: str, lines: list[str]) -> str:
    return f"{head} {{\n{indented(''.join(_line(line) for line in lines))}}}\n"


def _line(text: str) -> str:
    return text if text.endswith("\n") else f"{text}\n"


def indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())
