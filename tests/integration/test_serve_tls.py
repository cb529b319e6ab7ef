"""TLS of a replica for its clients, over HTTP and gRPC, and who administers by certificate."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paddle_ft.coordination.etcd_grpc import grpc
from paddle_ft.errors import ConfigError
from paddle_ft.serve.grpc_messages import inference
from paddle_ft.serve.tls import server_tls
from paddle_ft.serve_config import ServeConfig
from tests.integration.authority import Authority
from tests.integration.serve_world import DOUBLE, ECHO, TOKEN, Running, doubled, echoed, front

INFER = "/v2/models/double/infer"
UNLOAD = "/v2/repository/models/echo/unload"
LOAD = "/v2/repository/models/echo/load"
BODY = json.dumps(
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [2]}]}
).encode()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority.make(tmp_path_factory.mktemp("tls") / "ca")
    for who in ("replica", "operator", "gateway"):
        made.issue(who)
    return made


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority.make(tmp_path_factory.mktemp("other") / "ca")
    made.issue("operator")
    return made


def settings(authority: Authority, **more: Any) -> dict[str, Any]:
    return {
        "cert_file": authority.file("replica.crt"),
        "key_file": authority.file("replica.key"),
        **more,
    }


@pytest.fixture
def asking(authority: Authority) -> Iterator[Running]:
    """A replica that takes certificates, and obeys the operator's."""
    more = {"client_ca_file": authority.file("ca.crt"), "admin_clients": ("operator",)}
    with front(**settings(authority, **more)) as made:
        made.serve(DOUBLE, doubled)
        made.serve(ECHO, echoed)
        yield made


def ask(
    running: Running,
    authority: Authority,
    path: str,
    shown: tuple[Authority, str] | None = None,
    **headers: str,
) -> int:
    context = ssl.create_default_context(cafile=authority.file("ca.crt"))
    if shown:
        whose, who = shown
        context.load_cert_chain(whose.file(f"{who}.crt"), whose.file(f"{who}.key"))
    connection = http.client.HTTPSConnection(running.http, timeout=10, context=context)
    try:
        connection.request("POST", path, BODY if path == INFER else b"{}", headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def infer(running: Running, authority: Authority, who: str = "") -> float:
    api = inference()
    pem = Path(authority.file("ca.crt")).read_bytes()
    pair = [
        Path(authority.file(f"{who}.{end}")).read_bytes() if who else None for end in ("key", "crt")
    ]
    request = api.ModelInferRequest(model_name="double")
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 1])
    tensor.contents.fp32_contents.append(2)
    credentials = grpc.ssl_channel_credentials(pem, *pair)
    with grpc.secure_channel(running.grpc, credentials) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            api.ModelInferRequest.SerializeToString,
            api.ModelInferResponse.FromString,
        )
        answer = call(request, timeout=10)
    value: float = answer.outputs[0].contents.fp32_contents[0]
    return value


def test_clients_are_answered_over_tls_alone(authority: Authority) -> None:
    with front(**settings(authority)) as made:
        made.serve(DOUBLE, doubled)
        assert ask(made, authority, INFER) == 200
        assert infer(made, authority) == 4
        with pytest.raises((http.client.HTTPException, OSError)):
            made.ask("POST", INFER, BODY)
        with grpc.insecure_channel(made.grpc) as channel, pytest.raises(grpc.FutureTimeoutError):
            grpc.channel_ready_future(channel).result(0.5)


def test_an_operator_administers_by_certificate_and_nobody_else(
    asking: Running, authority: Authority, stranger: Authority
) -> None:
    assert ask(asking, authority, INFER) == 200  # without a certificate
    assert ask(asking, authority, UNLOAD) == 401
    assert ask(asking, authority, UNLOAD, (authority, "gateway")) == 401
    assert ask(asking, authority, INFER, (authority, "gateway")) == 200
    with pytest.raises((ssl.SSLError, http.client.HTTPException, ConnectionError)):
        ask(asking, authority, UNLOAD, (stranger, "operator"))
    assert ask(asking, authority, UNLOAD, (authority, "operator")) == 200
    assert ask(asking, authority, LOAD, Authorization=f"Bearer {TOKEN}") == 200


def test_where_certificates_are_required_nobody_is_answered_without(authority: Authority) -> None:
    more = {
        "client_ca_file": authority.file("ca.crt"),
        "client_ca_required": True,
        "admin_clients": ("operator",),
        "admin_token": "",
    }
    api = inference()
    with front(**settings(authority, **more)) as made:
        made.serve(DOUBLE, doubled)
        made.serve(ECHO, echoed)
        with pytest.raises((ssl.SSLError, http.client.HTTPException, ConnectionError)):
            ask(made, authority, INFER)
        with pytest.raises(grpc.RpcError) as caught:
            infer(made, authority)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert ask(made, authority, INFER, (authority, "gateway")) == 200
        assert infer(made, authority, "gateway") == 4
        for who, allowed in (("gateway", False), ("operator", True)):
            files = [
                Path(authority.file(f)).read_bytes() for f in ("ca.crt", f"{who}.key", f"{who}.crt")
            ]
            with grpc.secure_channel(made.grpc, grpc.ssl_channel_credentials(*files)) as channel:
                call = channel.unary_unary(
                    "/inference.GRPCInferenceService/RepositoryModelUnload",
                    api.RepositoryModelUnloadRequest.SerializeToString,
                    api.RepositoryModelUnloadResponse.FromString,
                )
                request = api.RepositoryModelUnloadRequest(model_name="echo")
                if allowed:
                    call(request, timeout=10)
                    continue
                with pytest.raises(grpc.RpcError) as caught:
                    call(request, timeout=10)
                assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_a_silent_or_broken_handshake_harms_nobody(authority: Authority, tmp_path: Path) -> None:
    with front(**settings(authority)) as made:
        made.serve(DOUBLE, doubled)
        with socket.create_connection(("127.0.0.1", made.front.http_port), timeout=10) as junk:
            junk.sendall(b"GET / HTTP/1.1\r\n\r\n")
            junk.settimeout(10)
            assert junk.recv(100) is not None
            assert ask(made, authority, INFER) == 200


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_a_handshake_has_so_long_to_be_done(authority: Authority, kind: str) -> None:
    with front(**settings(authority), silent_timeout_s=0.3) as made:
        port = made.front.http_port if kind == "http" else made.front.grpc_port
        with socket.create_connection(("127.0.0.1", port), timeout=10) as silent:
            try:
                assert silent.recv(1) == b""
            except ConnectionResetError:
                pass


def test_what_is_wrong_is_one_sentence(authority: Authority, tmp_path: Path) -> None:
    good = settings(authority)
    junk = tmp_path / "junk.pem"
    junk.write_text("nothing")
    for wrong, said in (
        ({**good, "cert_file": str(tmp_path / "none")}, "none cannot be read"),
        ({**good, "key_file": str(junk)}, "are not a certificate and its key"),
        ({**good, "key_file": authority.file("operator.key")}, "are not a certificate and its key"),
        ({**good, "client_ca_file": str(junk)}, "holds no certificate"),
        ({"host": "0.0.0.0"}, "without TLS: give serve.cert_file"),
        ({"host": "::"}, "without TLS"),
    ):
        with pytest.raises(ConfigError, match=said):
            server_tls(ServeConfig(**wrong))
    for harmless in ({"host": "0.0.0.0", "plain": True}, {"host": "localhost"}, {"host": "::1"}):
        assert server_tls(ServeConfig(**harmless)) is None
    for wrong in ({"cert_file": "a"}, {"client_ca_file": "a"}, {"client_ca_required": True}):
        with pytest.raises(ValueError, match=r"go together|needs TLS|need client_ca_file"):
            ServeConfig(**wrong)
