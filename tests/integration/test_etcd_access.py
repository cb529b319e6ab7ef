"""TLS, client certificates, users and passwords against a real etcd; each mistake is named."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paddle_ft.coordination import etcd_stubs
from paddle_ft.coordination.etcd import EtcdCoordinator
from paddle_ft.coordination.etcd_grpc import grpc
from paddle_ft.coordination.kv import Event, Put, Snapshot, Transaction
from paddle_ft.errors import ConfigError, EtcdUnavailable
from tests.integration.authority import Authority
from tests.integration.etcd_cluster import EtcdCluster, wait_until

pytestmark = pytest.mark.etcd
PREFIX = "/paddle_ft/access/"
WRITE = Transaction((), (Put(PREFIX + "a", b"1"),))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    authority = Authority.make(tmp_path_factory.mktemp("tls") / "ours")
    authority.issue("server")
    authority.issue("client")
    return authority


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    authority = Authority.make(tmp_path_factory.mktemp("tls") / "theirs")
    authority.issue("client")
    return authority


@pytest.fixture(scope="module")
def tls(ours: Authority) -> Iterator[EtcdCluster]:
    """An etcd that speaks TLS and wants a client certificate of ``ours``."""
    flags = [
        *("--cert-file", ours.file("server.crt"), "--key-file", ours.file("server.key")),
        *("--trusted-ca-file", ours.file("ca.crt"), "--client-cert-auth"),
    ]
    with EtcdCluster(1, flags=flags, scheme="https") as cluster:
        yield cluster


def files(ca: Authority, client: Authority) -> dict[str, str]:
    return {
        "ca_file": ca.file("ca.crt"),
        "cert_file": client.file("client.crt"),
        "key_file": client.file("client.key"),
    }


class TestTLS:
    def test_everything_works_over_it(self, tls: EtcdCluster, ours: Authority) -> None:
        client = EtcdCoordinator(tls.config(**files(ours, ours)))
        seen: list[Event] = []
        try:
            start = client.read(PREFIX).revision
            client.watch(PREFIX, start, lambda _, events: seen.extend(events), lambda _: None)
            assert client.transact(WRITE).succeeded
            assert client.keep_alive(client.grant(10)) == 10
            wait_until(lambda: bool(seen), "the watch works over TLS")
            assert client.ping().endpoint == tls.endpoints[0]
        finally:
            client.close()

    @pytest.mark.parametrize("mistake", ["server unknown", "client unknown", "no client", "plain"])
    def test_a_mistake_ends_in_time_with_a_sentence(
        self, tls: EtcdCluster, ours: Authority, theirs: Authority, mistake: str
    ) -> None:
        settings, words = {
            "server unknown": (files(theirs, ours), "not of the authority in etcd.ca_file"),
            "client unknown": (files(ours, theirs), "refuses our client certificate"),
            "no client": ({"ca_file": ours.file("ca.crt")}, "refuses our client certificate"),
            "plain": ({}, "closed the connection"),
        }[mistake]
        client = EtcdCoordinator(tls.config(call_timeout_s=1.0, rpc_timeout_s=0.5, **settings))
        try:
            start = time.monotonic()
            with pytest.raises(EtcdUnavailable) as caught:
                client.read(PREFIX)
            assert time.monotonic() - start < 2.0
            assert words in str(caught.value)
            assert "\n" not in str(caught.value)
        finally:
            client.close()

    def test_a_missing_file_is_named(self, tls: EtcdCluster, ours: Authority) -> None:
        for name in ("ca_file", "cert_file", "key_file"):
            settings = {**files(ours, ours), name: ours.file("nothing.pem")}
            client = EtcdCoordinator(tls.config(**settings))
            with pytest.raises(ConfigError, match=rf"{name} .*nothing\.pem .*No such file"):
                client.ping()
            client.close()

    def test_a_file_that_is_no_certificate_is_named(
        self, tls: EtcdCluster, ours: Authority, tmp_path: Path
    ) -> None:
        bad = tmp_path / "bad.pem"
        bad.write_text("no certificate")
        for name in ("ca_file", "cert_file", "key_file"):
            settings = {**files(ours, ours), name: str(bad)}
            client = EtcdCoordinator(tls.config(**settings))
            with pytest.raises(ConfigError, match=r"bad\.pem"):
                client.ping()
            client.close()

    def test_a_certificate_without_its_key_is_refused(
        self, tls: EtcdCluster, ours: Authority
    ) -> None:
        client = EtcdCoordinator(tls.config(cert_file=ours.file("client.crt")))
        with pytest.raises(ConfigError, match="key_file"):
            client.ping()
        client.close()


@pytest.fixture
def guarded() -> Iterator[EtcdCluster]:
    """An etcd without TLS whose user ``job`` may write below PREFIX; root's password is ``r``."""
    with EtcdCluster(1, flags=("--bcrypt-cost", "4")) as cluster:
        api = etcd_stubs.load()
        with grpc.insecure_channel(cluster.endpoints[0]) as channel:
            auth = api.AuthStub(channel)
            auth.UserAdd(api.AuthUserAddRequest(name="root", password="r"), timeout=5)
            auth.RoleAdd(api.AuthRoleAddRequest(name="root"), timeout=5)
            auth.UserGrantRole(api.AuthUserGrantRoleRequest(user="root", role="root"), timeout=5)
            auth.UserAdd(api.AuthUserAddRequest(name="job", password="secret"), timeout=5)
            auth.RoleAdd(api.AuthRoleAddRequest(name="writer"), timeout=5)
            permission = api.Permission(
                permType=api.Permission.READWRITE,
                key=PREFIX.encode(),
                range_end=PREFIX.encode()[:-1] + b"0",
            )
            auth.RoleGrantPermission(
                api.AuthRoleGrantPermissionRequest(name="writer", perm=permission), timeout=5
            )
            auth.UserGrantRole(api.AuthUserGrantRoleRequest(user="job", role="writer"), timeout=5)
            auth.AuthEnable(api.AuthEnableRequest(), timeout=5)
        yield cluster


class TestUsers:
    def test_a_user_logs_in_and_stays_in_over_a_restart_that_forgets_all_tokens(
        self, guarded: EtcdCluster
    ) -> None:
        client = EtcdCoordinator(guarded.config(user="job", password="secret"))
        seen: list[bytes] = []
        resets: list[Snapshot] = []
        try:
            start = client.read(PREFIX).revision
            client.watch(
                PREFIX,
                start,
                lambda _, events: seen.extend(e.kv.value for e in events),
                resets.append,
            )
            assert client.transact(WRITE).succeeded
            wait_until(lambda: seen == [b"1"], "the watch is allowed")
            guarded.kill(0)
            guarded.start(0)
            guarded.wait_healthy()
            # The first request after it is refused for its token alone, so it is sent again.
            assert client.transact(Transaction((), (Put(PREFIX + "a", b"2"),))).succeeded
            wait_until(lambda: seen == [b"1", b"2"], "the watch is allowed again")
            assert client.keep_alive(client.grant(10)) == 10
            assert not resets
        finally:
            client.close()

    @pytest.mark.parametrize(
        ("user", "password", "words"),
        [
            ("job", "wrong", "user or the password is wrong"),
            ("nobody", "secret", "user or the password is wrong"),
            ("", "", "wants a user and a password"),
        ],
    )
    def test_who_is_not_let_in_is_told_why(
        self, guarded: EtcdCluster, user: str, password: str, words: str
    ) -> None:
        client = EtcdCoordinator(guarded.config(user=user, password=password))
        try:
            for call in (lambda: client.read(PREFIX), lambda: client.transact(WRITE)):
                with pytest.raises(ConfigError, match=words) as caught:
                    call()
                assert guarded.endpoints[0] in str(caught.value)
                assert "secret" not in str(caught.value)
        finally:
            client.close()

    def test_what_a_user_may_not_do_is_said(self, guarded: EtcdCluster) -> None:
        client = EtcdCoordinator(guarded.config(user="job", password="secret"))
        try:
            with pytest.raises(ConfigError, match="denies user 'job'"):
                client.read("/elsewhere/")
        finally:
            client.close()

    def test_a_user_where_etcd_knows_none_does_no_harm(self) -> None:
        with EtcdCluster(1) as open_to_all:
            client = EtcdCoordinator(open_to_all.config(user="job", password="secret"))
            try:
                assert client.transact(WRITE).succeeded
            finally:
                client.close()
