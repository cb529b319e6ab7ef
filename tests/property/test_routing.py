"""Whatever etcd holds: routes keep their invariant, and nothing gets into a configuration."""

from __future__ import annotations

import re
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_ft.errors import ConfigError
from paddle_ft.gateway_config import GatewayConfig
from paddle_ft.serve.haproxy_text import to_haproxy
from paddle_ft.serve.nginx_text import Place, to_nginx, whole_nginx
from paddle_ft.serve.registry import Group, ReplicaRecord
from paddle_ft.serve.routing import Health, Pool, Routes, routes

NAMES = ["r0", "r1", "r2", "r3"]
SETTINGS = GatewayConfig()
hosts = st.sampled_from(["10.0.0.1", "fd00::1", "host-1.example", "localhost"])
records = st.builds(
    ReplicaRecord,
    name=st.sampled_from(NAMES),
    host=hosts,
    http_port=st.integers(1, 65535),
    grpc_port=st.integers(1, 65535),
    peer_port=st.just(1),
    condition=st.sampled_from(["loading", "ready", "degraded", "draining"]),
    weight=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.0, 1.0]),
    models=st.dictionaries(st.sampled_from(["m", "n", "x; }"]), st.just("1"), max_size=2),
)
healths = st.dictionaries(
    st.sampled_from(NAMES), st.sampled_from(["ready", "refusing", "silent"]), max_size=4
)


@st.composite
def groups(draw: st.DrawFn) -> Group:
    found = {record.name: record for record in draw(st.lists(records, max_size=4))}
    return Group(
        replicas=found,
        primary=draw(st.sampled_from([None, *NAMES])),
        level=draw(st.sampled_from(["active-active", "hot-standby", "cold-standby"])),
    )


def names(pool: Pool | None) -> list[str]:
    return [server.name for server in pool.servers] if pool else []


def ready(group: Group, health: dict[str, Health]) -> set[str]:
    return {
        r.name
        for r in group.replicas.values()
        if r.condition != "draining"
        and (
            health[r.name] == "ready" if r.name in health else r.condition in ("ready", "degraded")
        )
    }


@given(groups(), healths)
def test_who_may_be_asked(group: Group, health: dict[str, Health]) -> None:
    found = routes("g", group, SETTINGS, health)
    good = ready(group, health)
    inference = [found.main, found.sticky, *(share.pool for share in found.shares)]
    for pool in inference:
        assert not good or set(names(pool)) <= good, "a replica that cannot answer is in a pool"
        assert len(names(pool)) == len(set(names(pool)))
        if pool is not None:
            assert any(not server.backup for server in pool.servers), "nginx would refuse it"
    somebody = group.replicas.keys() & {group.primary} or group.level != "cold-standby" or good
    assert bool(found.main) == bool(group.replicas and somebody), (
        "somebody is there, and nobody is asked"
    )
    if found.main is not None and good:
        assert set(names(found.main)) == good, "a request has fewer replicas than it could"
    assert names(found.primary) in ([], [group.primary])
    assert sum(share.percent for share in found.shares) < 100


@given(groups(), healths)
def test_shares(group: Group, health: dict[str, Health]) -> None:
    """A replica let in slowly gets at most its share of what it would get otherwise."""
    found = routes("g", replace(group, level="active-active"), SETTINGS, health)
    asked = [group.replicas[name] for name in names(found.main)]
    total = sum(r.weight for r in asked)
    for share in found.shares:
        first = group.replicas[share.pool.servers[0].name]
        assert abs(share.percent - 100 * first.share * first.weight / total) <= 0.01
        assert found.main is not None
        assert [s.backup for s in found.main.servers if s.name == first.name] == [True]


@given(groups(), healths)
def test_the_order_of_records_changes_nothing(group: Group, health: dict[str, Health]) -> None:
    turned = replace(group, replicas=dict(reversed(group.replicas.items())))
    one, two = (routes("g", g, SETTINGS, health) for g in (group, turned))
    assert (to_nginx(one), to_haproxy(one)) == (to_nginx(two), to_haproxy(two))


WORDS = re.compile(r"[^\s;{}]+")
FORM = {"a": ReplicaRecord("a", "10.0.0.1", 8000, 8001, 1, "ready")}
rude = st.text(min_size=1, max_size=20) | st.sampled_from(
    [
        "x; }",
        "a b",
        "127.0.0.1:80; return 200",
        "$host",
        "a\nb",
        "a#",
        "unix:/x",
        "[::1]",
        "fe80::1%x;",
    ]
)


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


def skeleton(text: str) -> list[str]:
    """Each line's first word, its words and its ends: what a directive more would change."""
    named = re.sub(r'"~/out/[A-Za-z0-9._\\-]+\$"', "out", text)
    return [f"{line.split()[0]} {len(line.split())} {line.count(';')}" for line in lines(named)]


good_or_rude = st.sampled_from(["b", "c.1"]) | rude
ports = st.integers() | st.integers(1, 65535)


@settings(max_examples=200)
@given(
    good_or_rude,
    hosts | rude,
    ports,
    ports,
    st.just(1.0) | st.floats(),
    st.integers() | st.integers(1, 9),
)
def test_no_record_adds_a_directive(
    name: str, host: str, http_port: int, grpc_port: int, share: float, weight: int
) -> None:
    bad = ReplicaRecord(name, host, http_port, grpc_port, 1, "ready", weight, share)
    found = routes("g", Group(replicas=FORM | {name: bad}), SETTINGS)
    if found.refused:
        assert names(found.main) == ["a"], "a bad record has taken another one along"
        return
    plain = replace(bad, name="b", host="10.0.0.2")
    like = routes("g", Group(replicas=FORM | {"b": plain}), SETTINGS)
    if name > "a":  # the order of servers is that of their names
        for write in (to_nginx, to_haproxy, lambda r: whole_nginx(r, Place(), "d")):
            assert skeleton(write(found)) == skeleton(write(like))


@settings(max_examples=50)
@given(rude, rude, rude, rude)
def test_no_setting_adds_a_directive(group: str, listen: str, cert: str, name: str) -> None:
    given = {"listen": listen, "cert_file": cert, "key_file": cert}
    chosen = GatewayConfig(**given, replica_ca_file=cert, replica_name=name)
    try:
        found = routes(group, Group(replicas=FORM), chosen)
    except ConfigError:
        return
    good = {"listen": "h:1", "cert_file": "c", "key_file": "c"}
    chosen = GatewayConfig(**good, replica_ca_file="c", replica_name="h")
    like = routes("g", Group(replicas=FORM), chosen)
    for write in (to_nginx, to_haproxy, lambda r: whole_nginx(r, Place(), "d")):
        assert skeleton(write(found)) == skeleton(write(like))


def test_the_check_would_see_a_directive_more() -> None:
    found = routes("g", Group(replicas=FORM), SETTINGS)
    server = replace(found.main.servers[0], host="x; return 200") if found.main else None
    bad: Routes = replace(found, main=Pool("main", (server,))) if server else found
    assert skeleton(to_nginx(bad)) != skeleton(to_nginx(found))
