"""A replica with one numpy model that takes its time; prints its ports, drains on SIGTERM."""

import asyncio
import json
import sys

from paddle_ft.serve.front import Front
from paddle_ft.serve.types import Tensors
from paddle_ft.serve_config import ServeConfig
from tests.integration.serve_world import DOUBLE, NumpyRunner, doubled


class Slow(NumpyRunner):
    async def run(
        self, inputs: Tensors, timeout_s: float, session: str = "", again: bool = False
    ) -> Tensors:
        self.running += 1
        print("begun", flush=True)
        try:
            await asyncio.sleep(float(sys.argv[1]))
            return self.function(inputs)
        finally:
            self.running -= 1


async def main() -> None:
    front = Front(ServeConfig(http_port=0, grpc_port=0))
    await front.start()
    front.catalog.serve(Slow(DOUBLE, doubled, workers=2))
    print(json.dumps({"http": front.http_port, "grpc": front.grpc_port}), flush=True)
    await front.run()


asyncio.run(main())
