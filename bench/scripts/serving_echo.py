"""Servers of the kinds that a replica's are, which give back what they get: what those take alone.

python serving_echo.py

Says {"http": port, "grpc": port} and serves until its stdin ends.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import Any

import uvicorn

from paddle_ft.coordination.etcd_grpc import grpc


async def app(scope: Any, receive: Any, send: Any) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": body})


async def echo(data: bytes, context: Any) -> bytes:
    return data


async def main() -> None:
    loop = asyncio.get_running_loop()
    calls = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(echo)
    name = "inference.GRPCInferenceService"
    services = grpc.method_handlers_generic_handler(name, {"ModelInfer": handler})
    calls.add_generic_rpc_handlers((services,))
    grpc_port = calls.add_insecure_port("127.0.0.1:0")
    await calls.start()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(
        app, ws="none", lifespan="off", log_config=None, access_log=False, timeout_keep_alive=75
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print(json.dumps({"http": listener.getsockname()[1], "grpc": grpc_port}), flush=True)
    await reader.read()
    server.should_exit = True
    await serving
    await calls.stop(None)


asyncio.run(main())
