"""PyTorch's ways to save a state, timed; runs in an environment of its own.

    python torch_peer.py FOLDER MBYTES      then a line of JSON a request, on the standard input

Requests: {"do": "torch_save"}, {"do": "torch_save_fsync"}, {"do": "dcp", "stager": …}, {"do":
"facts"}. Answers: {"blocked_s": …, "durable_s": …}.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import staging

TENSORS = 50
FOLDER, MBYTES = sys.argv[1], float(sys.argv[2])


def stagers() -> dict[str, object]:
    """Ways to copy the state first; those that need an accelerator do not work on a CPU."""
    plain = staging.StagingOptions(False, False, False, False)
    shared = staging.StagingOptions(False, True, False, False)
    return {
        "default": None,
        "plain": staging.DefaultStager(plain),
        "shared": staging.DefaultStager(shared),
    }


def change(state: dict[str, torch.Tensor]) -> None:
    for tensor in state.values():
        tensor.add_(1.0)


def torch_save(state: dict[str, torch.Tensor], sync: bool) -> dict[str, float]:
    path = os.path.join(FOLDER, "torch.pt")
    start_s = time.perf_counter()
    with open(path, "wb") as file:
        torch.save(state, file)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    taken_s = time.perf_counter() - start_s
    os.unlink(path)
    return {"blocked_s": taken_s, "durable_s": taken_s if sync else float("nan")}


def dcp_async(state: dict[str, torch.Tensor], stager: object) -> dict[str, float]:
    path = os.path.join(FOLDER, "dcp")
    start_s = time.perf_counter()
    more = {} if stager is None else {"async_stager": stager}
    answer = dcp.async_save(state, storage_writer=dcp.FileSystemWriter(path), **more)
    blocked_s = time.perf_counter() - start_s
    getattr(answer, "upload_completion", answer).result()
    durable_s = time.perf_counter() - start_s
    shutil.rmtree(path)
    return {"blocked_s": blocked_s, "durable_s": durable_s}


def main() -> None:
    warnings.simplefilter("ignore")
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    count = int(MBYTES * 1e6 / 4 / TENSORS)
    state = {f"tensor_{i}": torch.randn(count) for i in range(TENSORS)}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    known = stagers()
    for line in sys.stdin:
        request = json.loads(line)
        change(state)
        if request["do"] == "dcp":
            answer: dict[str, object] = dict(dcp_async(state, known[request["stager"]]))
        elif request["do"] == "facts":
            answer = {"torch": torch.__version__, "stagers": list(known)}
        else:
            answer = dict(torch_save(state, request["do"] == "torch_save_fsync"))
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
