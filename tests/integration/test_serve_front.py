"""HTTP and gRPC of a replica, as unmodified clients and plain HTTP see them."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import importlib
import json
import queue
import socket
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from paddle_ft.coordination.etcd_grpc import grpc
from paddle_ft.errors import ConfigError
from paddle_ft.serve import grpc_messages, openapi
from paddle_ft.serve.bodies import unpack
from paddle_ft.serve.front import Front
from paddle_ft.serve.http_paths import ROUTES
from paddle_ft.serve.tensors import BadRequest
from paddle_ft.serve_config import ServeConfig
from tests.integration.serve_world import (
    DOUBLE,
    ECHO,
    TOKEN,
    TYPES,
    Running,
    doubled,
    echoed,
    front,
)
from tests.test_tidy import ROOT

INFER = "/v2/models/double/infer"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with front(body_bytes_max=100_000) as made:
        made.serve(DOUBLE, doubled)
        made.serve(ECHO, echoed)
        yield made


def asked(*values: float, **more: Any) -> dict[str, Any]:
    data = list(values)
    return {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, len(data)], "data": data}]
    } | more


# ---------------------------------------------------------------- unmodified clients


@pytest.fixture(params=["http", "grpc"])
def triton(request: pytest.FixtureRequest, running: Running) -> Iterator[tuple[Any, Any]]:
    """The module of tritonclient, and a client of it."""
    module = pytest.importorskip(f"tritonclient.{request.param}")
    client = module.InferenceServerClient(getattr(running, request.param))
    yield module, client
    client.close()


def given(module: Any, name: str, datatype: str, array: NDArray[Any], **how: Any) -> Any:
    made = module.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, **how)
    return made


def as_json(answer: Any) -> Any:
    if isinstance(answer, dict | list):
        return answer
    json_format = importlib.import_module("google.protobuf.json_format")
    return json_format.MessageToDict(answer, preserving_proto_field_name=True)


def test_tritonclient_sees_the_server_and_its_models(triton: tuple[Any, Any]) -> None:
    _, client = triton
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("double")
    assert client.is_model_ready("double", "1")
    assert as_json(client.get_server_metadata())["name"] == "paddle_ft"
    model = as_json(client.get_model_metadata("double"))
    assert (model["name"], model["versions"], model["platform"]) == ("double", ["1"], "numpy")
    assert model["inputs"][0]["datatype"] == "FP32"
    index = as_json(client.get_model_repository_index())
    entries = index if isinstance(index, list) else index["models"]
    assert {(e["name"], e["state"]) for e in entries} >= {("double", "READY")}


def test_tritonclient_infers_every_type(triton: tuple[Any, Any], running: Running) -> None:
    module, client = triton
    arrays = {
        "BOOL": np.array([[True, False]]),
        "INT8": np.array([[-128, 127]], np.int8),
        "INT64": np.array([[-(2**63), 2**63 - 1]], np.int64),
        "UINT16": np.array([[0, 65535]], np.uint16),
        "FP16": np.array([[0.5, np.inf]], np.float16),
        "FP32": np.array([[1.5, np.nan]], np.float32),
        "FP64": np.array([[1e300, -0.0]], np.float64),
        "BYTES": np.array([[b"\xff\x00", "é".encode()]], np.object_),
    }
    inputs = [given(module, name, name, array) for name, array in arrays.items()]
    result = client.infer("echo", inputs, request_id="42")
    answer = as_json(result.get_response())
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("echo", "7", "42")
    for name in TYPES:
        got = result.as_numpy(f"{name}_out")
        assert got.shape == (1, 2)
        assert got.dtype == arrays[name].dtype
        assert got.tobytes() == arrays[name].tobytes() or name == "BYTES"
    assert result.as_numpy("BYTES_out").tolist() == arrays["BYTES"].tolist()


def test_tritonclient_asks_for_one_output_of_one_version(triton: tuple[Any, Any]) -> None:
    module, client = triton
    array = np.array([[1.0, 2.0]], np.float32)
    wanted = [module.InferRequestedOutput("y")]
    result = client.infer(
        "double", [given(module, "x", "FP32", array)], model_version="1", outputs=wanted
    )
    assert result.as_numpy("y").tolist() == [[2.0, 4.0]]


@pytest.mark.parametrize(
    ("model", "version", "shape", "message"),
    [
        ("none", "", [1, 2], "no model 'none'"),
        ("double", "9", [1, 2], "no version '9'"),
        ("double", "", [2], "not \\[2\\]"),
        ("double", "", [0, 2], "at least one row"),
    ],
)
def test_tritonclient_gets_one_sentence_for_what_is_wrong(
    triton: tuple[Any, Any], model: str, version: str, shape: list[int], message: str
) -> None:
    module, client = triton
    utils = importlib.import_module("tritonclient.utils")
    array = np.full(shape, 3, np.float32)
    with pytest.raises(utils.InferenceServerException, match=message):
        client.infer(model, [given(module, "x", "FP32", array)], model_version=version)


def test_what_the_model_refuses_harms_nobody_else(triton: tuple[Any, Any]) -> None:
    module, client = triton
    utils = importlib.import_module("tritonclient.utils")
    with pytest.raises(utils.InferenceServerException, match="13 is not doubled"):
        client.infer("double", [given(module, "x", "FP32", np.array([[13]], np.float32))])
    good = client.infer("double", [given(module, "x", "FP32", np.array([[12]], np.float32))])
    assert good.as_numpy("y").tolist() == [[24.0]]


def test_tritonclient_reads_statistics(triton: tuple[Any, Any]) -> None:
    module, client = triton
    client.infer("double", [given(module, "x", "FP32", np.ones((1, 1), np.float32))])
    (figures,) = as_json(client.get_inference_statistics("double"))["model_stats"]
    assert int(figures["inference_count"]) >= 1
    assert int(figures["inference_stats"]["success"]["count"]) >= 1
    everything = as_json(client.get_inference_statistics())["model_stats"]
    assert {each["name"] for each in everything} == {"double", "echo"}


def test_an_administrator_unloads_and_loads(triton: tuple[Any, Any]) -> None:
    _, client = triton
    utils = importlib.import_module("tritonclient.utils")
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        named = {key.lower(): value for key, value in headers.items()}
        with pytest.raises(utils.InferenceServerException, match="Authorization: Bearer"):
            client.unload_model("echo", headers=named)
    admin = {key.lower(): value for key, value in ADMIN.items()}
    client.unload_model("echo", headers=admin)
    with pytest.raises(utils.InferenceServerException, match="no model 'echo'"):
        client.get_model_metadata("echo")
    with pytest.raises(utils.InferenceServerException, match="no model nothing is published"):
        client.load_model("nothing", headers=admin)
    client.load_model("echo", headers=admin)
    assert client.is_model_ready("echo")


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_packs_both_ways(running: Running, algorithm: str, binary: bool) -> None:
    module = pytest.importorskip("tritonclient.http")
    client = module.InferenceServerClient(running.http)
    array = np.arange(20_000, 22_000, dtype=np.float32).reshape(1, 2000)
    result = client.infer(
        "double",
        [given(module, "x", "FP32", array, binary_data=binary)],
        outputs=[module.InferRequestedOutput("y", binary_data=binary)],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert (result.as_numpy("y") == 2 * array).all()
    client.close()


def test_tritonclient_streams_over_grpc(running: Running) -> None:
    module = pytest.importorskip("tritonclient.grpc")
    answered: queue.Queue[Any] = queue.Queue()
    client = module.InferenceServerClient(running.grpc)
    client.start_stream(lambda result, error: answered.put((result, error)))
    for value in (1, 13, 3):
        inputs = [given(module, "x", "FP32", np.array([[value]], np.float32))]
        client.async_stream_infer("double", inputs, request_id=str(value))
    answers = [answered.get(timeout=10) for _ in range(3)]
    client.stop_stream()
    client.close()
    errors = [str(error) for _, error in answers if error]
    assert len(errors) == 1 and "13 is not doubled" in errors[0]
    found = sorted(result.as_numpy("y").item() for result, error in answers if not error)
    assert found == [2.0, 6.0]


def test_typed_contents_are_answered_with_typed_contents(running: Running) -> None:
    module = pytest.importorskip("tritonclient.grpc")
    pb = module.service_pb2
    request = pb.ModelInferRequest(model_name="double")
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    tensor.contents.fp32_contents.extend([1, 2])
    with grpc.insecure_channel(running.grpc) as channel:
        stub = module.service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answer = stub.ModelInfer(request, timeout=10)
        assert list(answer.outputs[0].contents.fp32_contents) == [2.0, 4.0]
        assert not answer.raw_output_contents
        for spoil in (
            lambda: tensor.contents.fp32_contents.append(3),
            lambda: request.raw_input_contents.append(b"12345678"),
        ):
            spoil()
            with pytest.raises(grpc.RpcError) as caught:
                stub.ModelInfer(request, timeout=10)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# ---------------------------------------------------------------- plain HTTP


def test_curl_gets_json_for_json(running: Running) -> None:
    status, headers, answer = running.ask("POST", INFER, asked(1, 2.5, id="a"))
    assert (status, headers["content-type"]) == (200, "application/json")
    assert answer["id"] == "a"
    assert answer["outputs"] == [
        {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [2.0, 5.0]}
    ]


def dumped(body: object) -> bytes:
    return json.dumps(body).encode()


WRONG: list[tuple[str, str, Any, dict[str, str], int]] = [
    ("GET", "/", None, {}, 404),
    ("GET", "/v2/models/none", None, {}, 404),
    ("GET", "/v2/models/double/versions/2", None, {}, 404),
    ("GET", INFER, None, {}, 405),
    ("DELETE", "/v2", None, {}, 405),
    ("POST", INFER, b"", {}, 400),
    ("POST", INFER, b"{", {}, 400),
    ("POST", INFER, b"\xff\xfe", {}, 400),
    ("POST", INFER, b"[" * 50_000, {}, 400),
    ("POST", INFER, {"inputs": []}, {}, 400),
    ("POST", INFER, asked(1, outputs=[{"name": "z"}]), {}, 400),
    ("POST", INFER, asked(13), {}, 400),
    ("POST", INFER, asked(1), {"Inference_Header_Content_Length": "x"}, 400),
    ("POST", INFER, asked(1), {"Inference_Header_Content_Length": "999999"}, 400),
    ("POST", INFER, asked(1), {"X_Request_Timeout_Ms": "0"}, 400),
    ("POST", INFER, asked(1), {"X_Request_Timeout_Ms": "soon"}, 400),
    ("POST", INFER, asked(1), {"Content_Encoding": "br"}, 415),
    ("POST", INFER, b"not gzip", {"Content_Encoding": "gzip"}, 400),
    ("POST", INFER, gzip.compress(dumped(asked(1)))[:-4], {"Content_Encoding": "gzip"}, 400),
    ("POST", INFER, gzip.compress(dumped(asked(1))) + b"x", {"Content_Encoding": "gzip"}, 400),
    ("POST", INFER, gzip.compress(bytes(10**8), 1), {"Content_Encoding": "gzip"}, 413),
    ("POST", INFER, zlib.compress(bytes(10**6)), {"Content_Encoding": "deflate"}, 413),
    ("POST", INFER, bytes(100_001), {}, 413),
    ("POST", "/v2/repository/index", b"[1]", {}, 400),
    ("POST", "/v2/repository/models/echo/unload", b"", {}, 401),
    ("POST", "/v2/repository/models/echo/load", b"7", ADMIN, 400),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_is_wrong_gets_its_status_and_a_sentence(running: Running, number: int) -> None:
    method, path, body, headers, expected = WRONG[number]
    status, found, answer = running.ask(method, path, body, **headers)
    assert status == expected, answer
    assert isinstance(answer["error"], str) and answer["error"]
    assert ("allow" in found) == (status == 405)
    assert running.ask("POST", INFER, asked(2))[0] == 200


def test_a_body_that_would_unpack_to_a_lot_takes_little_memory() -> None:
    packed = gzip.compress(bytes(10**7), 1)
    tracemalloc.start()
    with pytest.raises(BadRequest):
        unpack(packed, "gzip", 10_000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 200_000


def test_junk_on_the_sockets_harms_nobody(running: Running) -> None:
    for port in (running.front.http_port, running.front.grpc_port):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"\x16\x03\x01 not a request\r\n\r\n" * 10)
            connection.settimeout(10)
            while connection.recv(4096):
                pass
    assert running.ask("POST", INFER, asked(2))[0] == 200


def test_an_answer_is_packed_where_the_client_takes_it(running: Running) -> None:
    many = asked(*range(20_000, 22_000))
    _, headers, content = running.ask("POST", INFER, many, Accept_Encoding="br, gzip;q=0.5")
    assert headers["content-encoding"] == "gzip"
    assert gzip.decompress(content).startswith(b'{"model_name":"double"')
    _, headers, _ = running.ask("POST", INFER, many, Accept_Encoding="gzip;q=0")
    assert "content-encoding" not in headers


def test_a_chunked_body_is_read_and_bounded(running: Running) -> None:
    for body, expected in ((dumped(asked(1)), 200), (bytes(200_000), 413)):
        connection = http.client.HTTPConnection(running.http, timeout=10)
        parts = (body[at : at + 1000] for at in range(0, len(body), 1000))
        connection.request("POST", INFER, parts, encode_chunked=True)
        assert connection.getresponse().status == expected
        connection.close()


def test_the_openapi_file_is_current_and_every_path_is_served(running: Running) -> None:
    assert (ROOT / "docs/serving-openapi.json").read_text() == openapi.text()
    for route in ROUTES:
        path = route.path.format(model="double", version="1", session="s", key="k")
        if path.startswith("/v2/state"):  # which only a group keeps
            status, _, answer = running.ask(route.method, path, b"v")
            assert (status, "in no group" in answer["error"]) == (404, True)
        elif not route.admin:
            body = asked(1) if route.operation == "infer" else None
            status, _, answer = running.ask(route.method, path, body)
            assert status == 200, (path, answer)
            if isinstance(answer, dict):
                assert set(openapi.SCHEMAS[route.answer]["required"]) <= set(answer), path


# ---------------------------------------------------------------- health and ports


def test_health_over_grpc_follows_the_models(wait_for: Callable[..., None]) -> None:
    messages = pytest.importorskip("grpc_health.v1.health_pb2")
    stubs = importlib.import_module("grpc_health.v1.health_pb2_grpc")
    with front() as made, grpc.insecure_channel(made.grpc) as channel:
        stub = stubs.HealthStub(channel)
        names = {0: "UNKNOWN", 1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}
        seen: list[str] = []
        watch = stub.Watch(messages.HealthCheckRequest(service="double"), timeout=30)
        made.do(lambda: made.catalog.loading("double", "1", 0.5))
        assert stub.Check(messages.HealthCheckRequest(), timeout=10).status == 2
        seen.append(names[next(watch).status])
        if seen == ["SERVICE_UNKNOWN"]:  # the stream was there first
            seen = [names[next(watch).status]]
        made.serve(DOUBLE, doubled)
        seen.append(names[next(watch).status])
        assert stub.Check(messages.HealthCheckRequest(), timeout=10).status == 1
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(messages.HealthCheckRequest(service="none"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        made.do(made.catalog.drain)
        seen.append(names[next(watch).status])
        watch.cancel()
        assert seen == ["NOT_SERVING", "SERVING", "NOT_SERVING"]
        assert made.ask("GET", "/v2/health/live")[0] == 200
        assert made.ask("GET", "/v2/health/ready")[0] == 503
        assert made.ask("POST", INFER, asked(1))[0] == 200  # what comes is still answered


def test_a_model_on_its_way_says_how_far_it_is() -> None:
    messages = grpc_messages.inference()
    with front() as made, grpc.insecure_channel(made.grpc) as channel:
        assert made.ask("GET", "/v2/health/ready")[0] == 503  # no model is not ready
        made.do(lambda: made.catalog.loading("double", "1", 0.25, 3.0))
        status, headers, answer = made.ask("POST", INFER, asked(1))
        assert (status, headers["retry-after"], answer["progress"]) == (503, "3", 0.25)
        assert "25%" in answer["error"]
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            messages.ModelInferRequest.SerializeToString,
            messages.ModelInferResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as caught:
            call(messages.ModelInferRequest(model_name="double"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert ("retry-after", "3") in [(k, v) for k, v in caught.value.trailing_metadata()]
        made.do(lambda: made.catalog.failed("double", "1", "it is damaged"))
        assert "it is damaged" in made.ask("POST", INFER, asked(1))[2]["error"]
        made.serve(DOUBLE, doubled)
        made.do(lambda: made.catalog.loading("double", "2", 0.1))
        assert made.ask("POST", INFER, asked(1))[0] == 200  # the one before goes on
        assert made.ask("GET", "/v2/health/ready")[0] == 200
        status, _, answer = made.ask("POST", "/v2/models/double/versions/2/infer", asked(1))
        assert status == 503


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for setting in ("http_port", "grpc_port"):
            config = ServeConfig(**{"http_port": 0, "grpc_port": 0} | {setting: port})
            with pytest.raises(ConfigError, match=f"serve.{setting}"):
                asyncio.run(Front(config).start())
