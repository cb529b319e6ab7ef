"""Requests that wait, end too late or lose their client; a replica that is asked to stop."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from paddle_ft.coordination.etcd_grpc import grpc
from paddle_ft.serve.grpc_messages import inference
from tests.integration.serve_world import DOUBLE, NumpyRunner, Running, doubled, front
from tests.test_tidy import ROOT

INFER = "/v2/models/double/infer"


def asked(value: float) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [value]}]}


def held(made: Running) -> NumpyRunner:
    return made.serve(DOUBLE, doubled, gate=made.do(asyncio.Event))


def waiting(made: Running) -> int:
    count: int = made.do(lambda: made.catalog.find("double").waiting)
    return count


def infer(channel: Any) -> Any:
    api = inference()
    return channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        api.ModelInferRequest.SerializeToString,
        api.ModelInferResponse.FromString,
    )


def message(value: float) -> Any:
    request = inference().ModelInferRequest(model_name="double")
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 1])
    tensor.contents.fp32_contents.append(value)
    return request


def test_http_and_grpc_share_batches_and_a_bad_one_fails_alone(
    wait_for: Callable[..., None],
) -> None:
    with front() as made, ThreadPoolExecutor(8) as pool, grpc.insecure_channel(made.grpc) as chan:
        runner = held(made)
        first = pool.submit(made.ask, "POST", INFER, asked(0))
        wait_for(lambda: runner.batches == [1])
        others = [pool.submit(made.ask, "POST", INFER, asked(v)) for v in (1, 13)]
        other = pool.submit(infer(chan), message(3), timeout=10)
        wait_for(lambda: waiting(made) == 3)
        made.do(runner.gate.set)
        assert [f.result()[0] for f in (first, *others)] == [200, 200, 400]
        assert others[0].result()[2]["outputs"][0]["data"] == [2.0]
        assert list(other.result().outputs[0].contents.fp32_contents) == [6.0]
        assert runner.batches == [1, 3, 1, 1, 1]


def test_a_full_queue_is_429_with_retry_after(wait_for: Callable[..., None]) -> None:
    with front(queue_max=1) as made, ThreadPoolExecutor(4) as pool:
        runner = held(made)
        first = pool.submit(made.ask, "POST", INFER, asked(1))
        wait_for(lambda: runner.batches == [1])
        second = pool.submit(made.ask, "POST", INFER, asked(2))
        wait_for(lambda: waiting(made) == 1)
        status, headers, answer = made.ask("POST", INFER, asked(3))
        assert (status, headers["retry-after"]) == (429, "1")
        assert "waiting" in answer["error"]
        with grpc.insecure_channel(made.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
            infer(channel)(message(3), timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        made.do(runner.gate.set)
        assert [first.result()[0], second.result()[0]] == [200, 200]


def test_requests_past_their_deadline_or_without_a_client_do_not_run(
    wait_for: Callable[..., None],
) -> None:
    with front() as made, ThreadPoolExecutor(4) as pool, grpc.insecure_channel(made.grpc) as chan:
        runner = held(made)
        first = pool.submit(made.ask, "POST", INFER, asked(1))
        wait_for(lambda: runner.batches == [1])
        status, _, answer = made.ask("POST", INFER, asked(2), X_Request_Timeout_Ms="20")
        assert (status, "20 ms" in answer["error"]) == (408, True)
        body = asked(2) | {"parameters": {"timeout": 20_000}}
        assert made.ask("POST", INFER, body)[0] == 408
        with pytest.raises(grpc.RpcError) as caught:
            infer(chan)(message(3), timeout=0.05)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

        gone = http.client.HTTPConnection(made.http, timeout=10)
        gone.request("POST", INFER, json.dumps(asked(4)))
        left = infer(chan).future(message(5), timeout=10)
        wait_for(lambda: waiting(made) == 2)
        gone.close()
        left.cancel()
        wait_for(lambda: waiting(made) == 0)
        made.do(runner.gate.set)
        assert first.result()[0] == 200
        assert runner.batches == [1]


def test_a_body_that_does_not_come_is_given_up() -> None:
    with (
        front(body_timeout_s=0.1) as made,
        socket.create_connection(("127.0.0.1", made.front.http_port), timeout=10) as slow,
    ):
        slow.sendall(b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: x\r\n")
        slow.sendall(b"Content-Length: 100\r\n\r\n{")
        assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_a_replica_that_is_asked_to_stop_answers_what_it_has_taken() -> None:
    script = ROOT / "tests/integration/scripts/serve_double.py"
    with subprocess.Popen(
        [sys.executable, str(script), "0.5"],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        try:
            assert process.stdout is not None
            ports = json.loads(process.stdout.readline())
            taken = http.client.HTTPConnection("127.0.0.1", ports["http"], timeout=10)
            taken.request("POST", INFER, json.dumps(asked(4)))
            with grpc.insecure_channel(f"127.0.0.1:{ports['grpc']}") as channel:
                grpc.channel_ready_future(channel).result(10)
                over_grpc = infer(channel).future(message(5), timeout=10)
                assert process.stdout.readline() == b"begun\n"
                assert process.stdout.readline() == b"begun\n"
                process.send_signal(signal.SIGTERM)
                answer = taken.getresponse()
                assert (answer.status, json.loads(answer.read())["outputs"][0]["data"]) == (
                    200,
                    [8.0],
                )
                assert list(over_grpc.result().outputs[0].contents.fp32_contents) == [10.0]
            taken.close()
            assert process.wait(10) == 0
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", ports["http"]), timeout=5)
        finally:
            process.kill()
