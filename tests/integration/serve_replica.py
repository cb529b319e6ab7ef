"""One replica in a process of its own, steered over a socket: a JSON request and answer a line.

Started as ``python -m tests.integration.serve_replica HOST:PORT GROUP NODE JSON``; prints its port.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
import time
from dataclasses import asdict
from typing import Any

from paddle_ft.config import EtcdConfig
from paddle_ft.errors import PaddleFTError
from paddle_ft.serve.front import Front
from paddle_ft.serve.ledger import Bounds
from paddle_ft.serve.log import Position
from paddle_ft.serve.replicated import GroupSettings, Replicated
from paddle_ft.serve_config import ServeConfig


async def answer(group: Replicated, request: dict[str, Any]) -> Any:
    op = request.pop("op")
    if op == "put":
        at = await group.put("state", request["key"], request["value"].encode(), request["s"])
        return [at.term, at.sequence]
    if op == "get":
        at_least = Position(*request["at"]) if request.get("at") else None
        held = await group.get("state", request["key"], at_least, request["s"])
        return held.value.decode() if held else None
    if op == "promote":
        return await group.promote(**request)
    if op == "items":
        return {key: value.decode() for key, value in group.items("state").items()}
    if op == "address":
        while group.name not in group.group.replicas:  # it has not read of itself yet
            await asyncio.sleep(0.01)
        return group.group.replicas[group.name].http_port
    if op == "tell":
        return group.tell(**request)
    if op == "block":
        return time.sleep(request["s"])  # the whole event loop
    assert op == "status"
    return asdict(group.status())


async def serve(group: Replicated, reader: Any, writer: Any) -> None:
    with contextlib.suppress(ConnectionError):
        while line := await reader.readline():
            try:
                said = {"ok": await answer(group, json.loads(line))}
            except PaddleFTError as error:
                said = {"error": type(error).__name__, "message": str(error)}
            writer.write(json.dumps(said).encode() + b"\n")
            await writer.drain()
    writer.close()


async def main() -> None:
    etcd, name, node, given = sys.argv[1:]
    settings = json.loads(given)
    ttl_s = settings.pop("lease_ttl_s", 2)
    config = EtcdConfig(
        endpoints=(etcd,), lease_ttl_s=ttl_s, renew_interval_s=0.4, rpc_timeout_s=0.5
    )
    front = None
    if settings.pop("http", False):
        front = Front(ServeConfig(http_port=0, grpc_port=0, admin_token="let me in"))
        await front.start()
        settings["http_port"] = front.http_port
    bounds = Bounds(**settings.pop("bounds", {}))
    group = Replicated(GroupSettings(config, name, node, bounds=bounds, **settings))
    if front is not None:
        front.state.join(group)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    group.tell(condition="ready")
    await group.start()
    server = await asyncio.start_server(lambda r, w: serve(group, r, w), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await stop.wait()
    await group.close()
    if front is not None:
        await front.stop()
    server.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(asctime)s %(message)s")
    logging.getLogger("asyncio").setLevel(logging.INFO)
    asyncio.run(main())
