"""A front over runners of numpy functions, on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.client
import json
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paddle_ft.serve.catalog import Catalog
from paddle_ft.serve.front import Front
from paddle_ft.serve.tensors import BadRequest
from paddle_ft.serve.types import Feature, ModelError, ModelInfo, Tensors
from paddle_ft.serve_config import ServeConfig

TOKEN = "let me in"

Function = Callable[[Tensors], Tensors]


def doubled(inputs: Tensors) -> Tensors:
    """y = 2 x; refuses what holds a 13."""
    if (inputs["x"] == 13).any():
        raise ModelError("13 is not doubled")
    return {"y": inputs["x"] * np.float32(2)}


def echoed(inputs: Tensors) -> Tensors:
    return {f"{name}_out": array for name, array in inputs.items()}


DOUBLE = ModelInfo(
    "double", "1", "numpy", (Feature("x", "FP32", (-1, -1)),), (Feature("y", "FP32", (-1, -1)),)
)
TYPES = ("BOOL", "INT8", "INT64", "UINT16", "FP16", "FP32", "FP64", "BYTES")
ECHO = ModelInfo(
    "echo",
    "7",
    "numpy",
    tuple(Feature(t, t, (-1, 2)) for t in TYPES),
    tuple(Feature(f"{t}_out", t, (-1, 2)) for t in TYPES),
)


@dataclass
class NumpyRunner:
    """Runs ``function`` on the loop, ``workers`` batches at once; ``gate`` holds them back."""

    info: ModelInfo
    function: Function
    workers: int = 1
    running: int = 0
    batches: list[int] = field(default_factory=list)
    """Rows of each that began."""
    gate: asyncio.Event | None = None
    closed: bool = False

    @property
    def idle(self) -> int:
        return self.workers - self.running

    async def run(
        self, inputs: Tensors, timeout_s: float, session: str = "", again: bool = False
    ) -> Tensors:
        self.running += 1
        try:
            self.batches.append(len(next(iter(inputs.values()))))
            if self.gate is not None:
                await asyncio.wait_for(self.gate.wait(), timeout_s)
            return self.function(inputs)
        finally:
            self.running -= 1

    async def close(self) -> None:
        self.closed = True


@dataclass
class Keeper:
    """Loads ``echo`` for an administrator."""

    catalog: Catalog | None = None

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        assert self.catalog is not None
        if name != "echo":
            raise BadRequest(f"no model {name} is published", 404)
        if not self.catalog.versions("echo"):
            self.catalog.serve(NumpyRunner(ECHO, echoed))

    async def unload(self, name: str) -> None:
        assert self.catalog is not None
        await self.catalog.retire(name, self.catalog.find(name).info.version)


class Running:
    """A front that answers, and how a test reaches what lives on its loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, front: Front) -> None:
        self.loop, self.front, self.catalog = loop, front, front.catalog

    def do(self, action: Callable[[], Any]) -> Any:
        """``action()``, done on the loop."""

        async def act() -> Any:
            return action()

        return self.start(act()).result(10)

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def serve(self, info: ModelInfo, function: Function, **more: Any) -> NumpyRunner:
        runner = NumpyRunner(info, function, **more)
        self.do(lambda: self.catalog.serve(runner))
        return runner

    @property
    def http(self) -> str:
        return f"127.0.0.1:{self.front.http_port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.front.grpc_port}"

    def ask(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """(status, headers, JSON or bytes) as a plain HTTP client gets them."""
        connection = http.client.HTTPConnection(self.http, timeout=10)
        try:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, data, named)
            answer = connection.getresponse()
            content: Any = answer.read()
            found = {name.lower(): value for name, value in answer.getheaders()}
            if found.get("content-type") == "application/json" and "content-encoding" not in found:
                content = json.loads(content)
            return answer.status, found, content
        finally:
            connection.close()


@contextmanager
def front(**settings: Any) -> Iterator[Running]:
    """A front with no model yet, stopped at the end."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="front")
    thread.start()
    keeper = Keeper()
    config = ServeConfig(
        **{"http_port": 0, "grpc_port": 0, "admin_token": TOKEN, "drain_s": 30.0} | settings
    )

    async def begin() -> Running:
        made = Front(config, keeper)
        keeper.catalog = made.catalog
        await made.start()
        return Running(loop, made)

    try:
        running = asyncio.run_coroutine_threadsafe(begin(), loop).result(20)
        try:
            yield running
        finally:
            running.start(running.front.stop()).result(20)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
