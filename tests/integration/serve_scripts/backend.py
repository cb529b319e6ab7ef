"""A replica that only says who it is: HTTP with kept connections, and gRPC that echoes bytes.

    backend.py NAME HTTP_PORT GRPC_PORT [CERTIFICATE KEY AUTHORITY]

POST /control changes what it does, with some of {"ready": status, "ready_delay_s": s, "answer":
status, "delay_s": s, "models": {name: status}}. Every other call but /v2/health/ready gives
{"name", "path", "bytes"} after the delay. With a certificate it speaks TLS, and wants one of the
authority from its clients.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
from pathlib import Path
from typing import Any

import grpc

STATE: dict[str, Any] = {"ready": 200, "ready_delay_s": 0.0, "answer": 200, "delay_s": 0.0}
STATE["models"] = {}


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while request := await reader.readline():
            _, path, _ = request.decode().split()
            headers = {}
            while (line := (await reader.readline()).decode().strip()) != "":
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            status, said = await answer(path, body)
            data = json.dumps(said).encode()
            head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n"
            if status == 503:
                head += "Retry-After: 7\r\n"
            writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
            await writer.drain()
            if headers.get("connection", "").lower() == "close":
                break
    except (OSError, EOFError, ValueError):
        pass
    finally:
        writer.close()


async def answer(path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    if path == "/control":
        STATE.update(json.loads(body))
        return 200, {}
    if path == "/v2/health/ready":
        await asyncio.sleep(STATE["ready_delay_s"])
        return STATE["ready"], {}
    await asyncio.sleep(STATE["delay_s"])
    parts = path.split("/")
    status = STATE["models"].get(parts[3] if len(parts) > 3 else "", STATE["answer"])
    return status, {"name": sys.argv[1], "path": path, "bytes": len(body)}


class Echo(grpc.GenericRpcHandler):
    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def call(request: bytes, _context: object) -> bytes:
            await asyncio.sleep(STATE["delay_s"])
            return json.dumps({"name": sys.argv[1], "bytes": len(request)}).encode()

        return grpc.unary_unary_rpc_method_handler(call)


async def main() -> None:
    files = sys.argv[4:]
    context = None
    if files:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=files[2])
        context.load_cert_chain(files[0], files[1])
        context.verify_mode = ssl.CERT_REQUIRED
    server = await asyncio.start_server(
        serve, "127.0.0.1", int(sys.argv[2]), backlog=1024, ssl=context
    )
    options = [("grpc.max_receive_message_length", 2**26)]
    echo = grpc.aio.server(handlers=[Echo()], options=options)
    address = f"127.0.0.1:{sys.argv[3]}"
    if files:
        certificate, key, ca = (Path(file).read_bytes() for file in files)
        echo.add_secure_port(
            address, grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=True)
        )
    else:
        echo.add_insecure_port(address)
    await echo.start()
    async with server:
        await server.serve_forever()


asyncio.run(main())
