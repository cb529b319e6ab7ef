"""Replicas as processes, the models that they serve, and clients that go on asking."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paddle_ft.serve.publish import Published, publish
from tests.test_tidy import ROOT

TOKEN = "let me in"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}
TIMES = """
import os, time
from pathlib import Path
import numpy as np
from paddle_ft.serve.pipeline import Pipeline
from paddle_ft.serve.types import Feature

GATE = Path({gate!r})


class Times(Pipeline):
    inputs = (Feature("x", "FP32", (-1, 1)),)
    outputs = (Feature("y", "FP32", (-1, 1)), Feature("pid", "INT64", (-1,)))
    batched = True

    def setup(self):
        while not GATE.exists():
            time.sleep(0.02)

    def run(self, inputs, state=None):
        x = inputs["x"]
        time.sleep({seconds})
        return {{"y": x * np.float32({factor}), "pid": np.full(len(x), os.getpid())}}
"""


def publish_times(
    place: Path, factor: int, *, name: str = "times", gate: Path | str = "/", seconds: float = 0.01
) -> Published:
    """A pipeline that multiplies, each batch in ``seconds``; it is set up once ``gate`` exists."""
    folder = place / "pipeline"
    folder.mkdir(exist_ok=True)
    source = TIMES.format(factor=factor, gate=str(gate), seconds=seconds)
    (folder / "pipeline.py").write_text(source)
    return publish(folder, name, str(place / "store"))


class ReplicaProcess:
    """``python -m paddle_ft.serve`` that listens; ``text`` is what it has said."""

    def __init__(self, place: Path, *flags: str, models: Sequence[str] = ("times",)) -> None:
        named = [part for model in models for part in ("--model", model)]
        ports = ["--http_port", "0", "--grpc_port", "0"]
        if "--etcd" not in flags and "--group" not in flags:
            flags = ("--alone", *flags)
        own = ["--store", str(place / "store"), "--cache", str(place / "cache"), *named, *ports]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "paddle_ft.serve", *own, *flags],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PADDLE_FT_SERVE__ADMIN_TOKEN": TOKEN},
            text=True,
        )
        self._asked = False
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        deadline = time.monotonic() + 60
        while not (found := re.search(r"HTTP (\d+), gRPC (\d+)", self.text)):
            assert self._process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)
        self.http, self.grpc = (f"127.0.0.1:{port}" for port in found.groups())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def text(self) -> str:
        return "".join(self._lines)

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
        """(status, headers, JSON); headers' names are lower case."""
        connection = http.client.HTTPConnection(self.http, timeout=60)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, headers)
            answer = connection.getresponse()
            content = answer.read()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, found, json.loads(content) if content else None
        finally:
            connection.close()

    def infer(self, value: float = 1.0, model: str = "times") -> tuple[int, Any]:
        """The status, and (y, pid) or the error."""
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [value]}
        status, _, answer = self.ask("POST", f"/v2/models/{model}/infer", {"inputs": [tensor]})
        if status != 200:
            return status, answer["error"]
        found = {each["name"]: each["data"][0] for each in answer["outputs"]}
        return status, (found["y"], found["pid"])

    def load(self, model: str, **parameters: Any) -> tuple[int, Any]:
        path, body = f"/v2/repository/models/{model}/load", {"parameters": parameters}
        status, _, answer = self.ask("POST", path, body, **ADMIN)
        return status, answer

    def is_ready(self) -> bool:
        return self.ask("GET", "/v2/health/ready")[0] == 200

    def stop(self) -> None:
        """SIGTERM, once."""
        if not self._asked:
            self._asked = True
            self._process.terminate()

    def wait(self) -> int:
        code = self._process.wait(60)
        self._reader.join(10)
        return code

    def kill(self) -> None:
        self._process.kill()
        self.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()


@contextmanager
def replica(place: Path, *flags: str, models: Sequence[str] = ("times",)) -> Iterator[Any]:
    """A replica that listens, ended by SIGTERM; it must end well."""
    made = ReplicaProcess(place, *flags, models=models)
    try:
        yield made
        made.stop()
        assert made.wait() == 0, made.text
        # grpc itself prints a traceback for a call of another replica that ends with its server.
        assert "paddle_ft/serve/" not in made.text, made.text
        assert "a defect of" not in made.text, made.text
    finally:
        made.kill()


class Clients:
    """Threads that ask one request after the other while the block lasts."""

    def __init__(self, replica: ReplicaProcess, count: int = 3) -> None:
        self._replica = replica
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        self.answers: Counter[float] = Counter()
        self.pids: list[int] = []
        self.failures: list[Any] = []

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                status, answer = self._replica.infer()
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(repr(error))
                return
            if status == 200:
                self.answers[answer[0]] += 1
                self.pids.append(answer[1])
            else:
                self.failures.append((status, answer))
