"""What the gateway learns from nginx's log, and the forms of its configurations."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from paddle_ft.errors import ConfigError
from paddle_ft.gateway_config import GatewayConfig
from paddle_ft.serve.gateway import Log, kept
from paddle_ft.serve.haproxy_text import to_haproxy
from paddle_ft.serve.latency import LEAST, WINDOW_S, Learner, Try, tries_of
from paddle_ft.serve.nginx import emergency, find_nginx
from paddle_ft.serve.nginx_text import Place, to_nginx, whole_nginx
from paddle_ft.serve.registry import Group, Level, ReplicaRecord
from paddle_ft.serve.routing import Routes, Timeouts, configured, routes, split_listen

USUAL = Timeouts(10, 30, 30)
A = ReplicaRecord("a", "127.0.0.1", 8000, 8001, 1, "ready")
B = ReplicaRecord("b", "127.0.0.1", 8002, 8003, 1, "ready", weight=3, share=0.1)


def learner(answer_s: float, at_s: float = 0.0) -> Learner:
    found = Learner(USUAL, 1.0)
    for _ in range(LEAST):
        found.observe(Try("a:1", 200, 0.001, answer_s), at_s, {"a:1"})
    return found


def test_nothing_is_learnt_from_little() -> None:
    found = Learner(USUAL, 1.0)
    for _ in range(LEAST - 1):
        found.observe(Try("a:1", 200, 0.001, 0.01), 0.0, set())
    assert found.timeouts() == USUAL


@pytest.mark.parametrize(("answer_s", "read_s"), [(0.01, 1), (0.2, 1), (0.25, 1.25), (9, 30)])
def test_time_outs_follow_the_slowest_answer(answer_s: float, read_s: float) -> None:
    assert learner(answer_s).timeouts() == Timeouts(1, min(30, read_s), read_s)


def test_too_short_a_time_out_grows_at_once_and_shrinks_later() -> None:
    found = learner(0.01)
    assert found.timeouts().read_s == 1
    found.observe(Try("a:1", 504, 0.001, 1.0), 1.0, {"a:1"})
    grown_s = found.timeouts().read_s
    assert 2 <= grown_s < 3
    for now_s in range(0, int(2.5 * WINDOW_S), 10):
        found.observe(Try("a:1", 200, 0.001, 0.01), now_s, {"a:1"})
        if now_s < WINDOW_S / 2:
            assert found.timeouts().read_s == grown_s
    assert found.timeouts().read_s == 1


def test_a_dead_replica_teaches_nothing() -> None:
    found = learner(0.01)
    found.observe(Try("a:1", 504, 0.001, 1.0), 1.0, set())
    found.observe(Try("a:1", 502, None, 8.0), 1.0, {"a:1"})
    assert found.timeouts().read_s == 1


def test_lines_of_the_log() -> None:
    line = "1.5\t200\ta:1, b:2 : b:2\t504, 502 : 200\t0.001, - : 0.000\t1.000, 0.002 : 0.5\n"
    assert list(tries_of(line)) == [
        Try("a:1", 504, 0.001, 1.0),
        Try("b:2", 502, None, 0.002),
        Try("b:2", 200, 0.0, 0.5),
    ]
    assert list(tries_of("1.5\t400\t-\t-\t-\t-")) == [Try("-", 0, None, None)]
    for bad in ("", "1.5\t200\ta:1", "1\t2\ta, b\t200\t0\t0", "\t" * 5 + "x\t"):
        assert list(tries_of(bad)) in ([], [Try("", 0, None, None)])


def test_the_log_is_followed_and_kept_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paddle_ft.serve.gateway.LOG_BYTES_MAX", 10)
    path = tmp_path / "log"
    path.write_text("before\n")
    log = Log(path)
    assert list(log.lines()) == []
    with path.open("a") as writer:
        for text, expected in (("on", []), ("e\ntwo\n", ["one", "two"]), ("three\n", ["three"])):
            writer.write(text)
            writer.flush()
            assert list(log.lines()) == expected
    assert path.stat().st_size == len("three\n")
    log.close()


def test_an_empty_registry_keeps_who_was_there() -> None:
    before = Group(replicas={"a": A}, primary="a", term=4)
    assert kept(before, Group()) == Group(replicas={"a": A})
    assert kept(before, Group(replicas={"b": B})) == Group(replicas={"b": B})
    assert kept(None, Group()) == Group()


def test_addresses() -> None:
    assert split_listen("[::1]:80") == ("[::1]", 80)
    assert split_listen("0.0.0.0:65535") == ("0.0.0.0", 65535)
    for bad in ("80", ":80", "h:0", "h:65536", "::1:80", "[h]:80", "h:８0", "h :80"):
        with pytest.raises(ConfigError, match="host:port"):
            split_listen(bad)


def test_what_nginx_could_not_do_is_told_without_its_surroundings() -> None:
    text = "nginx: [warn] x\n2026/01/01 00:00:00 [emerg] 1#1: bind() to 1.2.3.4:80 failed\nb"
    assert emergency(text) == "bind() to 1.2.3.4:80 failed"
    assert emergency("") == ""


def test_a_program_that_is_no_nginx() -> None:
    for path in ("/bin/true", "/nowhere"):
        with pytest.raises(ConfigError, match="is not an nginx"):
            find_nginx(path)


# ---------------------------------------------------------------- read by the proxies themselves


def forms(level: Level, **given: object) -> Routes:
    settings = GatewayConfig(**given)  # type: ignore[arg-type]
    group = Group(replicas={"a": A, "b": B}, primary="a", level=level)
    return routes("g", group, settings, timeouts=Timeouts(1, 1, 1.25))


def every_form(folder: Path) -> dict[str, Routes]:
    """With a certificate of our own in every place for one."""
    certificate, key = folder / "c.pem", folder / "c.pem.key"
    subject = ["-subj", "/CN=g", "-addext", "subjectAltName=DNS:g", "-days", "9", "-nodes"]
    new = ["openssl", "req", "-x509", "-newkey", "ed25519", *subject]
    subprocess.run(
        [*new, "-keyout", key, "-out", certificate], check=True, timeout=30, capture_output=True
    )
    tls = {
        "cert_file": str(certificate),
        "key_file": str(key),
        "replica_ca_file": str(certificate),
        "replica_name": "g",
    }
    nobody = routes("g", Group(), GatewayConfig(listen="[::1]:8080"))
    return {
        "two": forms("active-active"),
        "standby": forms("hot-standby", balance="round_robin"),
        "http only": forms("cold-standby", listen_grpc="", sticky_header=""),
        "TLS": forms("active-active", **tls),
        "nobody": nobody,
    }


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_nginx_accepts_them(tmp_path: Path) -> None:
    try:
        binary = find_nginx(os.environ.get("PADDLE_FT_TEST_NGINX", ""))
    except ConfigError as error:
        pytest.skip(str(error))
    for name, found in every_form(tmp_path).items():
        user = "root" if os.geteuid() == 0 else ""
        whole = whole_nginx(found, Place(binary.version, user), "d")
        assert to_nginx(found, binary.version).splitlines()[1].strip() in whole
        (tmp_path / "nginx.conf").write_text(whole)
        argv = [binary.path, "-t", "-p", f"{tmp_path}/", "-c", "nginx.conf"]
        run = subprocess.run(argv, capture_output=True, text=True, timeout=20, cwd=tmp_path)
        assert run.returncode == 0, f"{name}: {run.stderr}"
        assert "[warn]" not in run.stderr, f"{name}: {run.stderr}"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
@pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs haproxy")
def test_haproxy_accepts_them(tmp_path: Path) -> None:
    for name, found in every_form(tmp_path).items():
        path = tmp_path / "haproxy.cfg"
        path.write_text(to_haproxy(found))
        run = subprocess.run(
            ["haproxy", "-c", "-f", path], capture_output=True, text=True, timeout=20
        )
        assert run.returncode == 0, f"{name}: {run.stderr}"


def test_time_outs_and_fails_are_those_of_the_settings() -> None:
    text = to_nginx(routes("g", Group(replicas={"a": A}), GatewayConfig()))
    assert "max_fails=3 fail_timeout=30s" in text
    for wanted in ("connect_timeout 10s", "send_timeout 30s", "read_timeout 30s", "least_conn"):
        assert wanted in text
    assert configured(GatewayConfig()) == USUAL
    assert "@patient" not in text
