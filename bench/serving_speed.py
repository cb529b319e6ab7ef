"""What batching gives, and what a server adds to its predictor."""

from __future__ import annotations

import http.client
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc

from bench.drive import Line
from bench.recovery_analysis import percentile
from bench.report import Row
from bench.serving_analysis import failed, p99_s
from bench.serving_load import LENGTH, Spec, infer_request
from bench.serving_model import HERE, Model, environment
from bench.serving_rows import Say
from bench.serving_world import Broken, Load, Node, load, until
from paddle_ft.agent.tether import tethered
from paddle_ft.serve.grpc_messages import inference

CLIENTS = 16
WARM_S = 1.0
WARM_CALLS = 50


@contextmanager
def alone(folder: Path, model: Model, **settings: Any) -> Iterator[Node]:
    """A replica without a group, ready."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["--model", model.name, "--store", str(model.store), "--spares", "0", "--threads", "1"]
    flags += ["--alone"] if knows("--alone") else []
    named = {f"serve.{name}": value for name, value in settings.items()}
    node = Node(folder, "alone", flags, named)
    node.start()
    try:
        until(lambda: node.ended or ready(node), "a replica is ready", 120.0)
        if node.ended:
            raise Broken(f"a replica has ended: {node.last_words()}")
        yield node
    finally:
        node.stop()


def knows(flag: str) -> bool:
    """Whether a replica has this flag."""
    from paddle_ft.serve.command import build_parser

    return flag in build_parser().format_help()


def ready(node: Node) -> bool:
    try:
        return node.ask("GET", "/v2/health/ready", timeout_s=2.0)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


@contextmanager
def echo() -> Iterator[dict[str, int]]:
    """Servers of a replica's kinds that only give back what they get; their ports."""
    argv = [sys.executable, str(HERE / "scripts" / "serving_echo.py")]
    process = subprocess.Popen(
        tethered(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=environment({}), text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise Broken("the echo servers do not start")
        yield json.loads(line)
    finally:
        process.kill()
        process.communicate()


@contextmanager
def bare(model: Path, shape: Sequence[int] = (1, 64)) -> Iterator[Line]:
    """A predictor in a process of its own, that does what it is asked to."""
    script = HERE / "scripts" / "serving_bare.py"
    argv = [sys.executable, str(script), str(model), *map(str, shape)]
    process = subprocess.Popen(
        tethered(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=environment({}), text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise Broken("the bare predictor does not start")
        yield Line(process.stdout, process.stdin)
    finally:
        process.kill()
        process.communicate()


# ---------------------------------------------------------------- latency, one client


class Http:
    """One kept connection, blocking: the least that a client can do."""

    def __init__(self, port: int, request: bytes) -> None:
        self._port, self._request = port, request
        self._socket = socket.socket()

    def warm(self) -> None:
        """Connects anew, since servers close what is idle; raises Broken."""
        self._connect()
        for _ in range(WARM_CALLS):
            self.call()

    def _connect(self) -> None:
        self._socket.close()
        self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def call(self) -> float:
        """Seconds; raises Broken for anything but 200."""
        begin_s = time.perf_counter()
        self._socket.sendall(self._request)
        data = b""
        while True:
            part = self._socket.recv(65536)
            data += part
            head, end, body = data.partition(b"\r\n\r\n")
            found = LENGTH.search(head) if end else None
            if not part or (found is not None and len(body) >= int(found[1])):
                break
        took_s = time.perf_counter() - begin_s
        if data[9:12] != b"200":
            told = f"{data[:200]!r} instead of 200" if data else "the connection was closed"
            raise Broken(f"port {self._port}: {told}")
        if b"connection: close" in head.lower():  # nginx lets go of clients so when it reloads
            self._connect()
        return took_s

    def close(self) -> None:
        self._socket.close()


class Grpc:
    """One channel, one message serialized beforehand."""

    def __init__(self, port: int, model: str, row: Sequence[float]) -> None:
        import numpy as np

        messages = inference()
        asked = messages.ModelInferRequest(model_name=model)
        asked.inputs.add(name="image", datatype="FP32", shape=[1, len(row)])
        asked.raw_input_contents.append(np.array(row, "<f4").tobytes())
        self._data = asked.SerializeToString()
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self._ask = self._channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

    def warm(self) -> None:
        for _ in range(WARM_CALLS):
            self.call()

    def call(self) -> float:
        """Seconds; raises grpc.RpcError."""
        begin_s = time.perf_counter()
        self._ask(self._data, timeout=30)
        return time.perf_counter() - begin_s

    def close(self) -> None:
        self._channel.close()


def p50_ms(takes_s: Sequence[float]) -> float:
    return 1000 * percentile(list(takes_s), 0.5)


def row_of(model: Model) -> list[float]:
    found: list[float] = json.loads(model.samples.read_text())["x"][0]
    return found


def added(folder: Path, model: Model, rounds: int, calls: int, say: Say) -> list[Row]:
    """What a replica adds to a call of its predictor while nobody else asks; in turn."""
    group = "Added latency, one client"
    row = row_of(model)
    with ExitStack() as stack:
        node = stack.enter_context(alone(folder / "added", model))
        line, ports = stack.enter_context(bare(model.exported / "1")), stack.enter_context(echo())
        request = infer_request(model.name, row)
        clients: dict[str, Any] = {
            "HTTP": Http(node.http_port, request),
            "gRPC": Grpc(node.grpc_port, model.name, row),
            "HTTP echo": Http(ports["http"], request),
            "gRPC echo": Grpc(ports["grpc"], model.name, row),
        }
        takes: dict[str, list[float]] = {name: [] for name in ("bare", *clients)}
        for client in clients.values():
            stack.callback(client.close)
        for number in range(rounds):
            say(f"{group}: round {number + 1} of {rounds}")
            takes["bare"].append(p50_ms(line.ask(calls=calls)["s"]))
            for name, client in clients.items():
                client.warm()
                takes[name].append(p50_ms([client.call() for _ in range(calls)]))
    rows = []
    for name in ("HTTP", "gRPC"):
        more = [a - b for a, b in zip(takes[name], takes["bare"], strict=True)]
        note = (
            f"p50 of {calls} calls each round: {statistics.median(takes[name]):.3f} ms, the bare "
            f"predictor {statistics.median(takes['bare']):.3f} ms"
        )
        rows.append(Row(group, f"{name}, beyond a bare call", "ms", more, goal=1.0, note=note))
        server = "uvicorn" if name == "HTTP" else "grpc.aio"
        note = f"what the transport takes: {server} in a process of its own, the same request"
        rows.append(Row(group, f"{name}, an echo server alone", "ms", takes[f"{name} echo"],
                        note=note))  # fmt: skip
    return rows


# ---------------------------------------------------------------- throughput, many clients


def batching(
    folder: Path, models: Sequence[Model], rounds: int, for_s: float, say: Say
) -> list[Row]:
    rows: list[Row] = []
    for model in models:
        rows += _batching(folder, model, rounds, for_s, say)
    return rows


def _batching(folder: Path, model: Model, rounds: int, for_s: float, say: Say) -> list[Row]:
    """The same server with and without batches, and a loop around a predictor; in turn."""
    group = f"Batching, {CLIENTS} clients, {model.name}"
    rates: dict[str, list[float]] = {"on": [], "off": [], "bare": []}
    took: dict[str, list[float]] = {"on": [], "off": []}
    bad = 0
    with ExitStack() as stack:
        nodes = {
            "on": stack.enter_context(alone(folder / f"on-{model.name}", model)),
            "off": stack.enter_context(
                alone(folder / f"off-{model.name}", model, batch_rows_max=1)
            ),
        }
        line = stack.enter_context(bare(model.exported / "1"))
        for number in range(rounds):
            say(f"{group}: round {number + 1} of {rounds}")
            for name, node in nodes.items():
                found = closed(folder, node.http_port, model.name, str(model.samples), for_s)
                bad += failed(found.requests)
                rates[name].append(rate(found))
                took[name].append(1000 * p99_s(found.requests))
            rates["bare"].append(line.ask(for_s=for_s)["rows_per_s"])
    peers = {"a bare predictor, row by row": rates["bare"]}
    note = (
        f"p99 {statistics.median(took['on']):.1f} ms on, {statistics.median(took['off']):.1f} ms "
        f"off; {bad} failed; the clients take their share of the processors"
    )
    return [Row(group, "throughput", "rows/s", rates["on"], rates["off"], "batching off", peers,
                goal=1.0, sense=">=", note=note)]  # fmt: skip


def closed(folder: Path, port: int, model: str, samples: str, for_s: float) -> Load:
    """16 clients, each one request after the other; what the first second has shown is left out."""
    spec = Spec(port, str(folder / "closed"), samples, model, clients=CLIENTS)
    with load(folder, spec) as found:
        begin_s = time.monotonic() + WARM_S
        time.sleep(WARM_S + for_s)
    found.requests = [r for r in found.requests if begin_s <= r.intended_s < begin_s + for_s]
    return found


def rate(found: Load) -> float:
    good = [r for r in found.requests if r.status == 200]
    if not good:
        raise Broken(f"nobody was answered: {list(found.told)[:2]}")
    return len(good) / (max(r.answered_s for r in good) - min(r.intended_s for r in good))
