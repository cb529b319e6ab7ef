"""Whatever people type for an etcd address is understood or refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddle_ft.coordination.endpoints import Endpoints, parse_endpoints
from paddle_ft.errors import ConfigError


@pytest.mark.parametrize(
    ("texts", "targets", "tls"),
    [
        (["10.0.0.1:2379"], ["10.0.0.1:2379"], False),
        (["etcd"], ["etcd:2379"], False),
        (
            ["http://etcd-0.etcd.svc.cluster.local:2379/"],
            ["etcd-0.etcd.svc.cluster.local:2379"],
            False,
        ),
        (["https://a:1"], ["a:1"], True),
        (["etcd://a:1", "b:2"], ["a:1", "b:2"], False),
        (["https://a:1", "etcd://b:2", "c"], ["a:1", "b:2", "c:2379"], True),
        (["a:1,b:2", " c:3 ", ""], ["a:1", "b:2", "c:3"], False),
        (["a:1", "http://a:1"], ["a:1"], False),
        (["[::1]:2379", "http://[fe80::1]"], ["[::1]:2379", "[fe80::1]:2379"], False),
        (["etcd://detective:2379"], ["detective:2379"], False),
        (["my_host-1:2379"], ["my_host-1:2379"], False),
    ],
)
def test_accepted(texts: list[str], targets: list[str], tls: bool) -> None:
    assert parse_endpoints(texts) == Endpoints(tuple(targets), tls)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no etcd endpoint"),
        (" , ", "no etcd endpoint"),
        ("host:", "'host:'"),
        (":2379", "':2379'"),
        ("host:port", "'host:port'"),
        ("host:0", "between 1 and 65535"),
        ("host:65536", "between 1 and 65535"),
        ("host:2379/v3", "'host:2379/v3'"),
        ("ftp://host:1", "'ftp://host:1'"),
        ("unix:///run/etcd", "'unix:///run/etcd'"),
        ("user:secret@host:2379", "form host:port"),
        ("::1:2379", "form host:port"),
        ("a b:1", "form host:port"),
        ("-host:1", "form host:port"),
        ("http://a:1,https://b:1", "http:// and for TLS"),
    ],
)
def test_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match="etcd") as caught:
        parse_endpoints([text])
    assert words in str(caught.value)


def test_files_ask_for_tls_and_contradict_http() -> None:
    assert parse_endpoints(["a:1"], tls_files=True).tls
    with pytest.raises(ConfigError, match="at once"):
        parse_endpoints(["http://a:1"], tls_files=True)


@given(st.lists(st.text(max_size=20), max_size=3))
def test_anything_is_parsed_or_refused(texts: list[str]) -> None:
    try:
        endpoints = parse_endpoints(texts)
    except ConfigError:
        return
    for target in endpoints.targets:
        assert parse_endpoints([target]).targets == (target,)
