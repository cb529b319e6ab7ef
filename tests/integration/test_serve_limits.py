"""What one client may take from the others: time of the event loop, memory, connections."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import queue
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from paddle_ft.coordination.etcd_grpc import grpc
from paddle_ft.serve.bodies import gently
from paddle_ft.serve.budget import Budget, Charge
from paddle_ft.serve.grpc_api import HEALTH_SERVICE, INFERENCE_SERVICE
from paddle_ft.serve.grpc_messages import inference
from paddle_ft.serve.tensors import nbytes_of
from paddle_ft.serve.types import Feature, ModelInfo, ServeError, Tensors, Unavailable
from paddle_ft.serve.wire import Asked, Request, encode, encoding
from paddle_ft.serve_config import ServeConfig
from tests.integration.serve_world import DOUBLE, doubled, front

INFER = "/v2/models/double/infer"
JUNK = b"\xff\xff\xff\xff"
MAP = ModelInfo(
    "map", "1", "numpy", (Feature("n", "INT64", (1,)),), (Feature("y", "FP32", (-1,)),), False
)
TEXTS = ModelInfo("texts", "1", "numpy", (Feature("t", "BYTES", (-1,)),), (), False)


def asked(value: float) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [value]}]}


def of_size(n: int, **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "n", "datatype": "INT64", "shape": [1], "data": [n]}]} | more


def ones(inputs: Tensors) -> Tensors:
    return {"y": np.full(int(inputs["n"][0]), 1 / 3, np.float32)}


# ---------------------------------------------------------------- elements


@pytest.mark.parametrize("binary", [False, True])
def test_a_large_answer_is_made_in_many_steps(binary: bool) -> None:
    array = {"y": np.full(400_000, 1 / 3, np.float32 if not binary else np.float64)}
    request = Request({}, (Asked("y", binary),))
    steps, result = 0, encoding(MAP, request, array)
    with contextlib.suppress(StopIteration):
        while True:
            next(result)
            steps += 1
    assert steps >= (400_000 // 8192 if not binary else 3)

    async def others_meanwhile() -> int:
        turns = 0

        async def tick() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        ticker = asyncio.create_task(tick())
        parts, json_bytes = await gently(encoding(MAP, request, array))
        ticker.cancel()
        assert (parts, json_bytes) == encode(MAP, request, array)
        return turns

    assert asyncio.run(others_meanwhile()) >= steps


def test_what_is_listed_one_by_one_is_bounded_and_binary_data_is_not() -> None:
    with front(elements_max=1000, json_bytes_max=20_000, strings_max=50) as made:
        made.serve(MAP, ones)
        made.serve(DOUBLE, doubled)
        made.serve(TEXTS, lambda _: {})
        path = "/v2/models/map/infer"
        assert made.ask("POST", path, of_size(1000))[0] == 200
        status, _, answer = made.ask("POST", path, of_size(1001))
        assert (status, "binary data" in answer["error"]) == (413, True)
        binary = of_size(100_000, parameters={"binary_data_output": True})
        status, headers, content = made.ask("POST", path, binary)
        length = int(headers["inference-header-content-length"])
        assert (status, len(content) - length) == (200, 400_000)
        assert json.loads(content[:length])["outputs"][0]["shape"] == [100_000]

        wide = {"name": "x", "datatype": "FP32", "shape": [1, 1001], "data": [0] * 1001}
        assert made.ask("POST", INFER, {"inputs": [wide]})[0] == 413
        assert made.ask("POST", INFER, b" " * 20_001)[0] == 413
        with grpc.insecure_channel(made.grpc) as channel:
            message = inference().ModelInferRequest(model_name="double")
            tensor = message.inputs.add(name="x", datatype="FP32", shape=[1, 1001])
            tensor.contents.fp32_contents.extend([0.0] * 1001)
            assert _code(channel, message) is grpc.StatusCode.RESOURCE_EXHAUSTED
            tensor.ClearField("contents")
            message.raw_input_contents.append(bytes(4004))
            assert _infer(channel)(message, timeout=10).raw_output_contents[0] == bytes(4004)

        for count, expected in ((50, 200), (51, 413)):
            head = {"name": "t", "datatype": "BYTES", "shape": [count]}
            head["parameters"] = {"binary_data_size": 4 * count}
            text = json.dumps({"inputs": [head]}).encode()
            status, _, answer = made.ask(
                "POST",
                "/v2/models/texts/infer",
                text + bytes(4 * count),
                Inference_Header_Content_Length=str(len(text)),
            )
            assert (status, answer.get("error", "BYTES").count("BYTES")) == (expected, 1)


def _infer(channel: Any) -> Any:
    api = inference()
    return channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        api.ModelInferRequest.SerializeToString,
        api.ModelInferResponse.FromString,
    )


def _slow(channel: Any, requests: Iterator[Any]) -> Any:
    """A call whose message comes once ``requests`` gives it."""
    api = inference()
    return channel.stream_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        api.ModelInferRequest.SerializeToString,
        api.ModelInferResponse.FromString,
    ).future(requests, timeout=30)


def _code(channel: Any, message: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        _infer(channel)(message, timeout=10)
    return caught.value.code()


# ---------------------------------------------------------------- what is under way


def test_the_budget_bounds_requests_and_bytes_and_gets_everything_back() -> None:
    budget = Budget(2, 100)
    with budget.request() as first:
        first.add(500)  # alone, whatever its size
        with budget.request() as second:
            with pytest.raises(Unavailable, match="hold 500 bytes"):
                second.add(1)
            with pytest.raises(Unavailable, match="2 requests"):
                budget.request()
            first.close()
            second.add(60)
            second.add(60)
    assert (budget.requests, budget.nbytes) == (0, 0)


def test_what_strings_hold_is_counted() -> None:
    array = np.array([[b"x" * 1000, b""], ["ä", b"yy"]], np.object_)
    assert nbytes_of({"t": array, "x": np.zeros(3, np.float32)}) == 1003 + 4 * 8 + 12


@pytest.mark.parametrize("way", ["http", "grpc"])
def test_strings_of_requests_and_answers_count_in_the_budget(way: str) -> None:
    info = ModelInfo(
        "pages", "1", "numpy", (Feature("n", "INT64", (1,)),), (Feature("t", "BYTES", (1,)),), False
    )
    with front() as made:
        made.serve(info, lambda inputs: {"t": np.array([b"x" * int(inputs["n"][0])], np.object_)})
        seen = [0]
        add = Charge.add
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Charge, "add", lambda me, n: (seen.append(n), add(me, n))[1])
            if way == "http":
                path = "/v2/models/pages/infer"
                assert made.ask("POST", path, of_size(100_000))[0] == 200
            else:
                api = inference()
                message = api.ModelInferRequest(model_name="pages")
                given = message.inputs.add(name="n", datatype="INT64", shape=[1])
                given.contents.int64_contents.append(100_000)
                with grpc.insecure_channel(made.grpc) as channel:
                    _infer(channel)(message, timeout=10)
        assert max(seen) >= 100_000


def test_beyond_the_bound_are_503_and_health_checks_are_answered(
    wait_for: Callable[..., None],
) -> None:
    with front(requests_max=1) as made, ThreadPoolExecutor(1) as pool:
        runner = made.serve(DOUBLE, doubled, gate=made.do(asyncio.Event))
        first = pool.submit(made.ask, "POST", INFER, asked(1))
        wait_for(lambda: runner.batches == [1])
        status, headers, answer = made.ask("POST", INFER, asked(2))
        assert (status, headers["retry-after"]) == (503, "1")
        assert "under way" in answer["error"]
        assert made.ask("GET", "/v2/health/ready")[0] == 200
        with grpc.insecure_channel(made.grpc) as channel:
            message = inference().ModelInferRequest(model_name="double")
            assert _code(channel, message) is grpc.StatusCode.UNAVAILABLE
        made.do(runner.gate.set)
        assert first.result()[0] == 200
        assert made.ask("POST", INFER, asked(2))[0] == 200


@pytest.mark.parametrize("streams", [False, True])
def test_no_more_messages_are_on_their_way_than_fit_into_the_budget(
    wait_for: Callable[..., None], streams: bool
) -> None:
    size = 2**20
    with front(in_flight_bytes_max=2 * size, body_bytes_max=size, body_timeout_s=2.0) as made:
        made.serve(DOUBLE, doubled)
        api = made.front._grpc_api
        requests: queue.Queue[Any] = queue.Queue()
        with grpc.insecure_channel(made.grpc) as channel:
            call = _stream if streams else _slow
            open_calls = [call(channel, iter(requests.get, None)) for _ in range(2)]
            if streams:
                wait_for(lambda: api._streams == 2)
                refused = call(channel, iter([]))
                assert refused.code() is grpc.StatusCode.UNAVAILABLE
                assert "2 streams are open" in refused.details()
            else:
                wait_for(lambda: api._reading.locked())
                late = [each.code() for each in open_calls]
                assert late == [grpc.StatusCode.DEADLINE_EXCEEDED] * 2
            answer = _infer(channel)(_message(3), timeout=10)
            assert list(answer.outputs[0].contents.fp32_contents) == [6.0]
            for _ in open_calls:
                requests.put(None)
            wait_for(lambda: (api._streams, made.front.budget.requests) == (0, 0))
            assert not api._reading.locked()


def test_bodies_that_come_slowly_count_in_the_budget(wait_for: Callable[..., None]) -> None:
    with front(in_flight_bytes_max=2**20) as made:
        made.serve(DOUBLE, doubled)
        budget = made.front.budget
        with socket.create_connection(("127.0.0.1", made.front.http_port), timeout=10) as slow:
            head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n"
            slow.sendall(head.encode() + bytes(2**20))
            wait_for(lambda: budget.nbytes >= 2**20)
            assert made.ask("POST", INFER, asked(2))[0] == 503
        wait_for(lambda: budget.nbytes == 0)
        assert made.ask("POST", INFER, asked(2))[0] == 200


def test_silent_and_unread_connections_are_closed(wait_for: Callable[..., None]) -> None:
    with front(silent_timeout_s=0.2, send_timeout_s=0.3) as made:
        made.serve(MAP, ones)
        address = ("127.0.0.1", made.front.http_port)
        with (
            socket.create_connection(address, timeout=10) as silent,
            contextlib.suppress(ConnectionResetError),
        ):
            assert silent.recv(1) == b""
        body = json.dumps(of_size(2**22, parameters={"binary_data_output": True}))
        with socket.socket() as unread:
            unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            unread.connect(address)
            head = f"POST /v2/models/map/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
            unread.sendall(f"{head}\r\n\r\n{body}".encode())
            wait_for(lambda: made.front.budget.nbytes > 0)
            wait_for(lambda: made.front.budget.nbytes == 0)


def _ended(connection: socket.socket) -> bool:
    """Waits until the other end has closed; what it says before does not count."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def test_connections_of_grpc_that_do_not_begin_are_ended_and_more_are_refused() -> None:
    with front(connections_max=2, silent_timeout_s=0.3) as made, contextlib.ExitStack() as held:
        address = ("127.0.0.1", made.front.grpc_port)
        silent = [held.enter_context(socket.create_connection(address, 10)) for _ in range(4)]
        assert all(_ended(each) for each in silent)
        alone = [("grpc.use_local_subchannel_pool", 1)]
        codes = [
            _code(held.enter_context(grpc.insecure_channel(made.grpc, alone)), _message(1.0))
            for _ in range(3)
        ]
        assert codes == [grpc.StatusCode.NOT_FOUND] * 2 + [grpc.StatusCode.UNAVAILABLE]


@pytest.mark.parametrize("what", ["head", "line", "trailers"])
def test_what_a_request_sends_beside_its_body_is_bounded(what: str) -> None:
    start = {
        "head": b"GET /v2 HTTP/1.1\r\nHost: x\r\n",
        "line": b"GET /v2 HTTP/1.1\r\nHost: x\r\nA: ",
        "trailers": f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        "5\r\nhello\r\n0\r\n".encode(),
    }[what]
    more = b"x" * 4096 if what == "line" else b"a: " + b"x" * 4096 + b"\r\n"
    with front() as made, contextlib.suppress(ConnectionError):
        made.serve(DOUBLE, doubled)
        with socket.create_connection(("127.0.0.1", made.front.http_port), timeout=10) as sender:
            sender.sendall(start)
            for _ in range(5000):  # 20 MB; more than sockets hold
                sender.sendall(more)
            pytest.fail("all of it was taken")


def test_requests_sent_without_waiting_are_all_answered() -> None:
    with front() as made:
        address = ("127.0.0.1", made.front.http_port)
        with socket.create_connection(address, timeout=10) as sender:
            sender.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n" * 4)
            got = b""
            while got.count(b'"extensions"') < 4:
                came = sender.recv(65536)
                assert came
                got += came
        assert got.count(b"HTTP/1.1 200") == 4


def test_bytes_that_are_no_message_are_the_clients_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with front() as made, grpc.insecure_channel(made.grpc) as channel:
        made.serve(DOUBLE, doubled)

        def code(method: str, kind: str = "unary_unary") -> Any:
            call = getattr(channel, kind)(method)
            with pytest.raises(grpc.RpcError) as caught:
                list(call(JUNK, timeout=10))
            return caught.value.code()

        for method in ("ModelInfer", "ModelReady", "RepositoryIndex"):
            assert code(f"/{INFERENCE_SERVICE}/{method}") is grpc.StatusCode.INVALID_ARGUMENT
        for method, kind in (("Check", "unary_unary"), ("Watch", "unary_stream")):
            assert code(f"/{HEALTH_SERVICE}/{method}", kind) is grpc.StatusCode.INVALID_ARGUMENT
        stream = channel.stream_stream(
            f"/{INFERENCE_SERVICE}/ModelStreamInfer",
            response_deserializer=inference().ModelStreamInferResponse.FromString,
        )
        asked_for = [JUNK, _message(1.0).SerializeToString()]
        first, second = sorted(stream(iter(asked_for), timeout=10), key=lambda a: a.error_message)
        assert not first.error_message
        assert second.error_message == "the request is no ModelInferRequest"
    assert not caplog.records


def test_an_upgrade_is_passed_over_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with front() as made:
        for wanted in ("websocket", "h2c"):
            assert made.ask("GET", "/v2", Connection="Upgrade", Upgrade=wanted)[0] == 200
    assert not caplog.records


def test_a_shape_without_elements_is_one_that_numpy_can_have() -> None:
    with front() as made:
        made.serve(DOUBLE, doubled)
        sizes = [0, *[2**31 - 1] * 3]
        empty = {"name": "x", "datatype": "FP32", "shape": sizes, "data": []}
        assert made.ask("POST", INFER, {"inputs": [empty]})[0] == 400


def test_the_longest_idle_connection_makes_room(wait_for: Callable[..., None]) -> None:
    with front(connections_max=2) as made:
        kept = [http.client.HTTPConnection(made.http, timeout=10) for _ in range(2)]
        for each in kept:
            each.request("GET", "/v2")
            assert each.getresponse().read()
        assert made.ask("GET", "/v2")[0] == 200
        kept[1].request("GET", "/v2")
        assert kept[1].getresponse().status == 200
        with pytest.raises((ConnectionError, http.client.HTTPException)):  # noqa: PT012
            kept[0].request("GET", "/v2")
            kept[0].getresponse()
        for each in kept:
            each.close()


def test_an_idle_connection_holds_no_answer(wait_for: Callable[..., None]) -> None:
    with front() as made:
        made.serve(DOUBLE, doubled)
        kept = http.client.HTTPConnection(made.http, timeout=10)
        kept.request("POST", INFER, json.dumps(asked(1.5)))
        assert json.loads(kept.getresponse().read())["outputs"][0]["data"] == [3.0]

        def held() -> list[Any]:
            connections = made.front._http.server_state.connections
            assert len(connections) == 1
            return [each._waiting for each in connections]

        wait_for(lambda: made.do(held) == [None])
        kept.close()


# ---------------------------------------------------------------- streams and stopping


def _stream(channel: Any, requests: Iterator[Any]) -> Any:
    api = inference()
    return channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        api.ModelInferRequest.SerializeToString,
        api.ModelStreamInferResponse.FromString,
    )(requests, timeout=30)


def _message(value: float) -> Any:
    request = inference().ModelInferRequest(model_name="double", id=str(value))
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 1])
    tensor.contents.fp32_contents.append(value)
    return request


def test_a_defect_answers_the_request_of_a_stream(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    with front() as made, grpc.insecure_channel(made.grpc) as channel:
        made.serve(DOUBLE, doubled)
        monkeypatch.setattr("paddle_ft.serve.grpc_tensors.decode", broken)
        (answer,) = list(_stream(channel, iter([_message(1)])))
        assert ("a defect" in answer.error_message, answer.infer_response.id) == (True, "1")
    assert "ZeroDivisionError" in caplog.text


def test_a_stop_waits_for_no_open_stream_or_watch(wait_for: Callable[..., None]) -> None:
    messages = pytest.importorskip("grpc_health.v1.health_pb2")
    with front() as made:
        runner = made.serve(DOUBLE, doubled, gate=made.do(asyncio.Event))
        requests: queue.Queue[Any] = queue.Queue()
        with grpc.insecure_channel(made.grpc) as channel:
            stream = _stream(channel, iter(requests.get, None))
            watch = channel.unary_stream(
                "/grpc.health.v1.Health/Watch",
                messages.HealthCheckRequest.SerializeToString,
                messages.HealthCheckResponse.FromString,
            )(messages.HealthCheckRequest(), timeout=30)
            assert next(watch).status == 1
            requests.put(_message(4))
            wait_for(lambda: runner.batches == [1])
            stopped = made.start(made.front.stop())
            assert [each.status for each in watch] == [2]  # and its end
            made.do(runner.gate.set)
            assert list(next(stream).infer_response.outputs[0].contents.fp32_contents) == [8.0]
            with pytest.raises(grpc.RpcError) as caught:
                next(stream)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            stopped.result(10)  # drain_s is 30
            requests.put(None)


def test_a_server_that_ends_by_itself_is_noticed() -> None:
    with front() as made:
        ended = made.start(made.front.ended())
        made.do(lambda: setattr(made.front._http, "should_exit", True))
        with pytest.raises(ServeError, match="ended by itself"):
            ended.result(10)


def test_a_stop_gives_requests_the_time_they_have() -> None:
    with pytest.raises(ValueError, match=r"drain_s \(10\) must be at least request_timeout_s"):
        ServeConfig(drain_s=10)
    ServeConfig(drain_s=10, request_timeout_s=10)
