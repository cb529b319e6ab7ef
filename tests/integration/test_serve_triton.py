"""Every call of an unmodified tritonclient, over HTTP and gRPC: what it answers, or that it is not
served, in one sentence."""

from __future__ import annotations

import importlib
import inspect
import queue
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from tests.integration.serve_world import DOUBLE, ECHO, TOKEN, Running, doubled, echoed, front

ADMIN = {"authorization": f"Bearer {TOKEN}"}
TRANSPORTS = ("http", "grpc")


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with front() as made:
        made.serve(DOUBLE, doubled)
        made.serve(ECHO, echoed)
        yield made


@pytest.fixture(params=TRANSPORTS)
def triton(request: pytest.FixtureRequest, running: Running) -> Iterator[tuple[Any, Any]]:
    """The module of tritonclient, and a client of it."""
    module = pytest.importorskip(f"tritonclient.{request.param}")
    client = module.InferenceServerClient(getattr(running, request.param))
    yield module, client
    client.close()


def plain(answer: Any) -> Any:
    if hasattr(answer, "DESCRIPTOR"):
        json_format = importlib.import_module("google.protobuf.json_format")
        return json_format.MessageToDict(answer, preserving_proto_field_name=True)
    return answer


def tensors(module: Any) -> list[Any]:
    made = module.InferInput("x", [1, 2], "FP32")
    made.set_data_from_numpy(np.array([[1, 2]], np.float32))
    return [made]


def outputs(result: Any) -> Any:
    return result.as_numpy("y").tolist()


def infer(module: Any, client: Any) -> Any:
    return outputs(client.infer("double", tensors(module)))


def later(module: Any, client: Any) -> Any:
    if module.__name__.endswith("http"):
        return outputs(client.async_infer("double", tensors(module)).get_result(timeout=10))
    answers: queue.Queue[Any] = queue.Queue()
    client.async_infer("double", tensors(module), lambda result, error: answers.put(result))
    return outputs(answers.get(timeout=10))


def stream(module: Any, client: Any) -> Any:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put(result))
    client.async_stream_infer("double", tensors(module), request_id="7")
    found = outputs(answers.get(timeout=10))
    client.stop_stream()
    return found


def config(_: Any, client: Any) -> Any:
    found = plain(client.get_model_config("double"))
    found = found.get("config", found)
    one = {"name": "x", "dims": [-1]}
    (given,) = found["input"]
    # An enumeration is its name in JSON.
    assert (given["data_type"], given["name"]) == ("TYPE_FP32", one["name"])
    assert [int(size) for size in given["dims"]] == one["dims"]
    assert found["output"][0]["name"] == "y"
    return found["name"], found["max_batch_size"]


def reload(_: Any, client: Any) -> Any:
    client.unload_model("echo", headers=ADMIN)
    client.load_model("echo", headers=ADMIN)
    return client.is_model_ready("echo")


def statistics(_: Any, client: Any) -> Any:
    (found,) = plain(client.get_inference_statistics("double"))["model_stats"]
    return found["name"], found["version"]


def index(_: Any, client: Any) -> Any:
    found = plain(client.get_model_repository_index())
    entries = found if isinstance(found, list) else found["models"]
    return sorted((entry["name"], entry["state"]) for entry in entries)


Call = Callable[[Any, Any], Any]
DOUBLED = [[2.0, 4.0]]
SERVED: Mapping[str, tuple[Call, Any]] = {
    "is_server_live": (lambda _, c: c.is_server_live(), True),
    "is_server_ready": (lambda _, c: c.is_server_ready(), True),
    "is_model_ready": (lambda _, c: (c.is_model_ready("double"), c.is_model_ready("echo", "7")),
                       (True, True)),
    "get_server_metadata": (lambda _, c: plain(c.get_server_metadata())["name"], "paddle_ft"),
    "get_model_metadata": (lambda _, c: plain(c.get_model_metadata("double"))["versions"], ["1"]),
    "get_model_config": (config, ("double", 4)),
    "get_model_repository_index": (index, [("double", "READY"), ("echo", "READY")]),
    "get_inference_statistics": (statistics, ("double", "1")),
    "load_model": (reload, True),
    "unload_model": (reload, True),
    "infer": (infer, DOUBLED),
    "async_infer": (later, DOUBLED),
    "start_stream": (stream, DOUBLED),
    "async_stream_infer": (stream, DOUBLED),
    "stop_stream": (stream, DOUBLED),
}  # fmt: skip
NOT_SERVED: Mapping[str, tuple[Any, ...]] = {
    "get_trace_settings": (),
    "update_trace_settings": (),
    "get_log_settings": (),
    "update_log_settings": ({"log_info": True},),
    "get_system_shared_memory_status": (),
    "register_system_shared_memory": ("a", "/a", 16),
    "unregister_system_shared_memory": (),
    "get_cuda_shared_memory_status": (),
    "register_cuda_shared_memory": ("a", b"", 0, 16),
    "unregister_cuda_shared_memory": (),
}
LOCAL = {"close", "plugin", "register_plugin", "unregister_plugin", "generate_request_body",
         "parse_response_body"}  # fmt: skip
"""These ask nobody."""


def test_no_call_is_forgotten(triton: tuple[Any, Any]) -> None:
    _, client = triton
    calls = {n for n, _ in inspect.getmembers(client, inspect.ismethod) if not n.startswith("_")}
    assert calls - LOCAL - {*SERVED, *NOT_SERVED} == set()


@pytest.mark.parametrize("name", SERVED)
def test_a_call_is_answered(triton: tuple[Any, Any], name: str) -> None:
    module, client = triton
    if module.__name__.endswith("http") and "stream" in name:
        assert not hasattr(client, name)
        return
    call, expected = SERVED[name]
    assert call(module, client) == expected


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_is_not_served_is_refused_and_harms_nothing(
    triton: tuple[Any, Any], name: str
) -> None:
    module, client = triton
    utils = importlib.import_module("tritonclient.utils")
    with pytest.raises(utils.InferenceServerException):
        getattr(client, name)(*NOT_SERVED[name])
    assert infer(module, client) == DOUBLED
