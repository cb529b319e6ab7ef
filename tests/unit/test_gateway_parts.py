"""What the gateway learns from nginx's log, and the forms of its configurations."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from paddle_ft.errors import ConfigError
from paddle_ft.gateway_config import GatewayConfig
from paddle_ft.serve.checks import LEAST as CHECKS_LEAST
from paddle_ft.serve.checks import WINDOW_S as CHECKS_WINDOW_S
from paddle_ft.serve.checks import Pace
from paddle_ft.serve.haproxy_text import to_haproxy
from paddle_ft.serve.latency import LEAST, WINDOW_S, Learner, Learners, Try, tries_of
from paddle_ft.serve.nginx import Nginx, emergency, find_nginx
from paddle_ft.serve.nginx_pools import OUT
from paddle_ft.serve.nginx_text import Place, of_model, to_nginx, whole_nginx
from paddle_ft.serve.registry import Group, Level, ReplicaRecord
from paddle_ft.serve.request_log import Log
from paddle_ft.serve.routing import Learnt, Routes, Timeouts, configured, routes, split_listen
from paddle_ft.serve.steady import (
    CALM_S,
    HOLD_MAX_S,
    HOLD_S,
    KEEP_S,
    Damper,
    Roster,
    Standstill,
    believed,
)

USUAL = Timeouts(10, 30, 30)
SLOW, QUICK = Timeouts(1, 20, 20), Timeouts(1, 1, 1.25)
LEARNT = Learnt(QUICK, SLOW, {"slow": SLOW, "quick": QUICK})
A = ReplicaRecord("a", "127.0.0.1", 8000, 8001, 1, "ready", models={"slow": "3", "quick": "1"})
B = ReplicaRecord(
    "b", "127.0.0.1", 8002, 8003, 1, "ready", weight=3, share=0.1, models={"slow": "3"}
)


def learner(answer_s: float, at_s: float = 0.0) -> Learner:
    found = Learner(USUAL, 1.0)
    for _ in range(LEAST):
        found.observe(Try(0.0, "", "a:1", 200, 0.001, answer_s), at_s, {"a:1"})
    return found


def test_nothing_is_learnt_from_little() -> None:
    found = Learner(USUAL, 1.0)
    for _ in range(LEAST - 1):
        found.observe(Try(0.0, "", "a:1", 200, 0.001, 0.01), 0.0, set())
    assert found.timeouts() == USUAL


@pytest.mark.parametrize(
    ("answer_s", "read_s"), [(0.01, 1), (0.2, 1), (0.25, 1.25), (1, 3.06), (5, 11.64), (20, 30)]
)
def test_time_outs_follow_the_slowest_answer(answer_s: float, read_s: float) -> None:
    found = learner(answer_s).timeouts()
    assert found == Timeouts(1, found.read_s, pytest.approx(read_s, rel=0.01))


def test_too_short_a_time_out_grows_at_once_and_shrinks_later() -> None:
    found = learner(0.01)
    assert found.timeouts().read_s == 1
    found.observe(Try(0.0, "", "a:1", 504, 0.001, 1.0), 1.0, {"a:1"})
    grown_s = found.timeouts().read_s
    assert 4 <= grown_s < 5
    for now_s in range(0, int(2.5 * WINDOW_S), 10):
        found.observe(Try(0.0, "", "a:1", 200, 0.001, 0.01), now_s, {"a:1"})
        if now_s < WINDOW_S / 2:
            assert found.timeouts().read_s == grown_s
    assert found.timeouts().read_s == 1


def test_a_dead_replica_teaches_nothing() -> None:
    found = learner(0.01)
    found.observe(Try(0.0, "", "a:1", 504, 0.001, 1.0), 1.0, set())
    found.observe(Try(0.0, "", "a:1", 502, None, 8.0), 1.0, {"a:1"})
    assert found.timeouts().read_s == 1


def test_lines_of_the_log() -> None:
    line = "1795298211.125\t200\t/v2\t"
    line += "a:1, b:2 : b:2\t504, 502 : 200\t0.001, - : 0.000\t1.000, 0.002 : 0.5\n"
    assert list(tries_of(line)) == [
        Try(1795298211.125, "", "a:1", 504, 0.001, 1.0, 1.502),
        Try(1795298211.125, "", "b:2", 502, None, 0.002, 1.502),
        Try(1795298211.125, "", "b:2", 200, 0.0, 0.5, 1.502),
    ]
    assert list(tries_of("1.5\t400\t/\t-\t-\t-\t-")) == [Try(1.5, "", "-", 0, None, None)]
    for bad in ("", "1.5\t200\ta:1", "1\t2\t/\ta, b\t200\t0\t0", "\t" * 6 + "x\t"):
        assert list(tries_of(bad)) in ([], [Try(0.0, "", "", 0, None, None)])


def test_the_log_is_followed_and_kept_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paddle_ft.serve.request_log.LOG_BYTES_MAX", 10)
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


def test_a_slow_model_does_not_make_a_quick_one_wait() -> None:
    found = Learners(USUAL, 1.0)
    found.know(["quick", "slow"])
    for _ in range(LEAST):
        for about, answer_s in (("quick", 0.01), ("slow", 4.0), ("unknown", 0.3)):
            found.observe(Try(0.0, about, "a:1", 200, 0.001, answer_s), 0.0, set())
    learnt = found.learnt()
    assert learnt.models["quick"].read_s == 1
    assert learnt.models["slow"].read_s > 9
    assert 1.5 <= learnt.rest.read_s < 2, "one that is not known is learnt with the rest"
    assert learnt.grpc == USUAL
    found.know(["slow"])
    assert set(found.learnt().models) == {"slow"}, "what is gone takes no room"


# ---------------------------------------------------------------- what is not believed at once


def test_an_empty_registry_keeps_who_was_there() -> None:
    before = Group(replicas={"a": A}, primary="a", term=4)
    renew = Roster().renew
    assert renew(before, Group(), {}, 0.0) == Group(replicas={"a": A})
    assert renew(before, Group(), {"a": "silent"}, 10 * KEEP_S) == Group(replicas={"a": A})
    assert renew(before, Group(replicas={"b": B}), {}, 0.0) == Group(replicas={"b": B})
    assert renew(None, Group(), {}, 0.0) == Group()


def test_a_replica_that_answers_is_kept_for_a_while_after_its_lease() -> None:
    """As when etcd was away, and leases end one after the other."""
    before, fresh = Group(replicas={"a": A, "b": B}), Group(replicas={"b": B})
    roster = Roster()
    for now_s in (0.0, KEEP_S):
        assert set(roster.renew(before, fresh, {"a": "ready"}, now_s).replicas) == {"a", "b"}
    assert set(roster.renew(before, fresh, {"a": "ready"}, KEEP_S + 1).replicas) == {"b"}
    assert set(roster.renew(before, before, {}, KEEP_S + 2).replicas) == {"a", "b"}
    assert set(roster.renew(before, fresh, {"a": "ready"}, KEEP_S + 3).replicas) == {"a", "b"}, (
        "being there again begins the time anew"
    )


def test_a_replica_that_is_gone_is_not_kept() -> None:
    fresh = Group(replicas={"b": B})
    for gone, health in (
        (A, "silent"),
        (A, "refusing"),
        (replace(A, condition="draining"), "ready"),
        (replace(A, http_port=B.http_port), "ready"),
    ):
        before = Group(replicas={"a": gone, "b": B})
        assert Roster().renew(before, fresh, {"a": health}, 0.0) == fresh  # type: ignore[dict-item]


def test_one_that_comes_and_goes_is_let_in_later_each_time() -> None:
    damper, now_s, holds = Damper(), 0.0, []
    assert damper.settle({"a": "ready", "b": "ready"}, now_s)["a"] == "ready", "new ones at once"
    for _ in range(10):
        assert damper.settle({"a": "silent", "b": "ready"}, now_s)["a"] == "silent", "out at once"
        began_s = now_s
        while damper.settle({"a": "ready", "b": "ready"}, now_s)["a"] != "ready":
            now_s += 0.1
        holds.append(int(now_s - began_s))
    assert holds == [0, 0, 1, 2, 4, 8, 16, HOLD_MAX_S, HOLD_MAX_S, HOLD_MAX_S]
    now_s += CALM_S
    damper.settle({"a": "ready", "b": "ready"}, now_s)
    damper.settle({"a": "refusing", "b": "ready"}, now_s)
    assert damper.hold_s("a") == HOLD_S, "long ago"


def test_somebody_is_asked_while_somebody_is_ready() -> None:
    damper = Damper()
    damper.settle({"a": "ready", "b": "ready"}, 0.0)
    damper.settle({"a": "silent", "b": "ready"}, 1.0)
    assert damper.settle({"a": "ready", "b": "ready"}, 1.1)["a"] == "refusing"
    assert damper.settle({"a": "ready", "b": "silent"}, 1.2)["a"] == "ready"


def test_requests_are_taken_back_from_one_replica_for_a_while() -> None:
    still = Standstill()
    assert still.look({"a"}, 0.5, 0.0) == ""
    assert [still.look({"a", "b"}, 0.5, now_s) for now_s in (0.5, 1.4, 1.6)] == ["a", "a", ""]
    assert still.look({"b"}, 0.5, 1.7) == "", "not from another one so soon"
    assert still.look(set(), 0.5, 20.0) == ""
    assert [still.look({"b"}, 0.0, now_s) for now_s in (20.1, 21.0, 21.2)] == ["b", "b", ""]


def test_one_that_answers_requests_is_there() -> None:
    """On a busy machine a check takes long, and so does everything."""
    found = {"a": "silent", "b": "ready"}
    assert believed(found, {"a": 5.0}, {"a": 5.1}) == {"a": "ready", "b": "ready"}  # type: ignore[arg-type]
    for unanswered_s, answered_s in (({"a": 5.0}, {"a": 4.9}), ({}, {"a": 5.1}), ({"a": 5.0}, {})):
        assert believed(found, unanswered_s, answered_s) == found  # type: ignore[arg-type]


def test_checks_are_given_less_time_where_all_are_quick() -> None:
    pace = Pace(0.25)
    for number in range(CHECKS_LEAST):
        assert pace.timeout_s == 0.25
        pace.saw(0.002, 1000 + number / 10)
    assert pace.timeout_s == 0.1
    pace.saw(0.02, 1010)
    assert pace.timeout_s == pytest.approx(0.16)
    pace.saw(0.1, 1010)  # given up, and answered right after
    assert pace.timeout_s == 0.25
    for now_s in range(1020, int(1020 + 1.5 * CHECKS_WINDOW_S)):
        pace.saw(0.002, now_s)
    assert pace.timeout_s == 0.1, "long ago"


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
    return routes("g", group, settings, learnt=LEARNT)


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


def test_an_address_that_is_not_ours_and_a_folder_that_is_none_are_wrong_flags(
    tmp_path: Path,
) -> None:
    try:
        binary = find_nginx(os.environ.get("PADDLE_FT_TEST_NGINX", ""))
    except ConfigError as error:
        pytest.skip(str(error))
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="is no folder"):
            Nginx(binary, folder)
    before = os.umask(0o077)
    try:
        nginx = Nginx(binary, tmp_path / "run")
    finally:
        os.umask(before)
    try:
        assert (tmp_path / "run" / OUT).stat().st_mode & 0o777 == 0o755
        asked = routes("g", Group(), GatewayConfig(listen="192.0.2.1:8095", listen_grpc=""))
        with pytest.raises(ConfigError, match="192.0.2.1:8095"):
            nginx.start(whole_nginx(asked, Place(binary.version), "digest"), "digest")
    finally:
        nginx.close()


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


def test_the_gateways_own_nginx_counts_no_failures() -> None:
    found = forms("active-active")
    assert set(re.findall(r"max_fails=\d+", whole_nginx(found, Place(), "d"))) == {"max_fails=0"}
    assert set(re.findall(r"max_fails=\d+", to_nginx(found))) == {"max_fails=3"}


def test_the_log_of_requests_names_no_session() -> None:
    text = whole_nginx(forms("active-active"), Place(), "d")
    assert '"~^/v2/state(/|$)" /v2/state;' in text
    logged = text[text.index("log_format") : text.index("access_log")]
    assert "$pft_about" in logged
    assert not re.search(r"\$(request|request_uri|uri|args|http_\w+)\b", logged)


def block(text: str, head: str) -> str:
    """What stands between the braces after ``head``."""
    rest = text[text.index(f"{head} {{") :]
    depth = 0
    for at, sign in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if sign == "}" and depth == 0:
            return rest[:at]
    raise AssertionError(f"{head} does not end")


def test_each_model_has_its_own_time_outs_and_as_many_tries_as_it_takes() -> None:
    more = {name: replace(A, name=name, models={"slow": "3"}) for name in "cde"}
    group = Group(replicas={"a": A, **more})
    text = to_nginx(routes("g", group, GatewayConfig(tries=2), learnt=LEARNT))
    assert "read_timeout 1250ms" in block(text, "location /")
    slow, quick = (block(text, f"location {of_model(name)}") for name in ("slow", "quick"))
    assert "read_timeout 20s" in slow
    assert "upstream_tries 2;" in slow
    assert "read_timeout 1250ms" in quick
    assert "upstream_tries 4;" in quick, "one of four has it"
    assert "http_404" in quick
    assert "grpc_read_timeout 20s" in text, "gRPC is learnt as a whole"
    for bad in ("a b", "x;", "{", "ü"):
        found = routes("g", Group(replicas={"a": replace(A, models={bad: "1"})}), GatewayConfig())
        assert not found.models


def test_a_replica_that_is_let_in_slowly_gets_its_share() -> None:
    text = to_nginx(forms("active-active"))
    assert "7.50% gray_0;" in block(text, 'split_clients "$request_id" $pft_share')
    main = block(text, "upstream pft_http_main")
    assert "127.0.0.1:8000 weight=1" in main
    assert "127.0.0.1:8002 weight=3 max_fails=3 fail_timeout=30s backup" in main


def test_in_a_hot_standby_the_others_are_only_asked_if_the_primary_cannot() -> None:
    whole = replace(B, share=1.0)
    group = Group(replicas={"a": A, "b": whole}, primary="b", level="hot-standby")
    main = block(to_nginx(routes("g", group, GatewayConfig())), "upstream pft_http_main")
    assert re.findall(r"server \S+:(\d+) .*?( backup)?;", main) == [
        ("8002", ""),
        ("8000", " backup"),
    ]
    text = whole_nginx(routes("g", group, GatewayConfig()), Place(), "d")
    assert " backup" not in block(text, "upstream pft_http_main_0"), "the only one left"
    gray = replace(group, replicas={"a": A, "b": B})
    text = to_nginx(routes("g", gray, GatewayConfig()))
    assert "10.00% gray_0;" in text, "a new primary begins with a tenth"
    assert "127.0.0.1:8000 weight=1 max_fails=3 fail_timeout=30s;" in block(
        text, "upstream pft_http_main"
    )


def test_a_cold_standby_is_not_asked_before_it_is_ready() -> None:
    cold = {"a": replace(A, condition="loading"), "b": replace(B, condition="loading")}
    group = Group(replicas=cold, primary="a", level="cold-standby")
    asked = routes("g", group, GatewayConfig(), {"a": "refusing", "b": "refusing"}).main
    assert asked is not None
    assert [server.name for server in asked.servers] == ["a"], "it says how long it will take"
    nobody = replace(group, primary=None)
    assert routes("g", nobody, GatewayConfig(), {"a": "refusing"}).main is None
    asked = routes("g", nobody, GatewayConfig(), {"a": "refusing", "b": "ready"}).main
    assert asked is not None
    assert [server.name for server in asked.servers] == ["b"]


def test_one_that_seems_silent_comes_before_one_that_loads() -> None:
    """On a busy machine no check may pass; who was ready until then can still answer."""
    group = Group(replicas={"a": A, "b": replace(B, condition="loading")})
    found = routes("g", group, GatewayConfig(), {"a": "silent", "b": "refusing"})
    assert found.main is not None
    assert [(s.name, s.backup) for s in found.main.servers] == [("a", False), ("b", True)]
    assert found.sticky is None
    assert not found.shares


def test_a_name_for_replicas_that_nginx_would_never_find() -> None:
    for name in ("10.0.0.1", "::1", "a b"):
        settings = GatewayConfig(replica_ca_file="c", replica_name=name)
        with pytest.raises(ConfigError, match="replica_name"):
            routes("g", Group(), settings)
