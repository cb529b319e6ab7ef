"""A worker process: one model, one batch at a time, its tensors in shared memory.

    python -m paddle_ft.serve.worker SOCKET LIFE INPUTS OUTPUTS     (file descriptors)

Over the socket, a message each (SOCK_SEQPACKET; as bytes: ``messages``):

    front                                    worker
      {"load": {folder, name, version,   ->
        settings, bytes_max}}
                                         <-   {"stage": "…"}         (0 or more)
                                         <-   {"ready": model info}  or {"failed": text}
      {"run": n, "tensors": header,      ->
        "nbytes": of the memory,
        "session": bool}
                                         <-   {"get": key, "of": n}   (of the session's state)
      {"value": header, "nbytes": …}     ->
        or {"refused": text, "for_good": bool}
                                         <-   {"done": header, "nbytes": …, "of": n}
                                              or {"error": kind, "text": …, "of": n}

What a pipeline puts into the state of the session comes with the outputs, as the tensor ``STATE``.

Invariant: it ends with its front. The kernel sends SIGIO when the other end of LIFE is closed,
whatever this process is doing: Paddle 3 holds the interpreter's lock while it computes.
"""

from __future__ import annotations

import fcntl
import gc
import os
import select
import signal
import socket
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from paddle_ft.errors import EXIT_CONFIG, PaddleFTError
from paddle_ft.exits import end
from paddle_ft.serve import messages, shared
from paddle_ft.serve.gentle import import_gently
from paddle_ft.serve.pipeline import Loaded, PipelineModel, State, said
from paddle_ft.serve.types import Feature, ModelError, ModelInfo, Unavailable

assert zlib  # loaded before paddle, or 2.6.2 crashes at the first decompression
STATE = "\0state"
"""Keys and values in turn; no output of a model has this name."""
_TEXT_MAX = 2000


def set_up(life: int) -> None:
    """What each process of a replica does first that computes for it."""
    die_with(life)
    # What is sent to the whole group or session is the front's to answer: it drains.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.environ.setdefault("GLOG_minloglevel", "2")
    warnings.filterwarnings("ignore", message="No ccache found")


def work(control: int, life: int, inputs: int, outputs: int) -> NoReturn:
    """The worker of these descriptors, until its front ends or has no use for it."""
    set_up(life)
    with socket.socket(fileno=control) as connection:
        order = _receive(connection)["load"]
        bytes_max = order["bytes_max"]
        memories = shared.Memory(inputs, bytes_max), shared.Memory(outputs, bytes_max)
        try:
            model = _load(connection, order)
        except PaddleFTError as error:
            _send(connection, {"failed": str(error)})
            end(error.exit_code)
        except Exception as error:  # noqa: BLE001 - whatever it is, the front is to hear of it
            _send(connection, {"failed": f"{order['name']} cannot be loaded: {said(error)}"})
            end(EXIT_CONFIG)
        gc.freeze()  # or the collector goes through all that Paddle has made: 0.2 s each time
        _send(connection, {"ready": asdict(model.info)})
        while True:
            message = _receive(connection)
            fetch = partial(_fetch, connection, message["run"], memories[0])
            answer = _answer(model, message, *memories, fetch if message["session"] else None)
            _send(connection, {**answer, "of": message["run"]})


def die_with(life: int) -> None:
    """Ends this process when the other end of the socket ``life`` is closed."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(life, fcntl.F_GETFL)
    fcntl.fcntl(life, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
    if select.select([life], [], [], 0)[0]:  # closed before this was said
        os._exit(0)


def _load(connection: socket.socket, order: dict[str, Any]) -> Loaded:
    import_gently("paddle", "paddle.inference")  # most of the processor time of a start
    from paddle_ft.serve.predictor import Settings, open_model, warm_up
    from paddle_ft.serve.program import description_of

    folder, settings = Path(order["folder"]), Settings(**order["settings"])
    _send(connection, {"stage": "loads the model"})
    model = open_model(folder, order["name"], order["version"], settings)
    _send(connection, {"stage": "warms up"})
    warm_up(model, description_of(folder), settings.rows_max)
    return model


def _answer(
    model: Loaded,
    message: dict[str, Any],
    inputs: shared.Memory,
    outputs: shared.Memory,
    fetch: Callable[[str], bytes | None] | None,
) -> dict[str, Any]:
    try:
        view = inputs.seen(message["nbytes"])
        if isinstance(model, PipelineModel):  # its code may keep what it is given
            given = shared.read(view, message["tensors"], copy=True)
            state = State(fetch)
            results = dict(model.run(given, state))
            if changes := state.close():
                results[STATE] = np.array([x for item in changes.items() for x in item], object)
        else:
            given = shared.read(view, message["tensors"], copy=False)
            results = dict(model.run(given))
        header, _ = shared.write(outputs, results)
        return {"done": header, "nbytes": outputs.nbytes}
    except ModelError as error:
        return {"error": "model", "text": str(error)[:_TEXT_MAX]}
    except (Unavailable, MemoryError) as error:
        text = str(error) or "There is not enough memory for this batch."
        return {"error": "unavailable", "text": text[:_TEXT_MAX]}
    except Exception as error:  # noqa: BLE001 - a pipeline's own code may raise anything
        text = f"{model.info.name} fails on these inputs: {said(error)}"
        return {"error": "model", "text": text}


def _fetch(connection: socket.socket, number: int, inputs: shared.Memory, key: str) -> bytes | None:
    """What the session has under ``key``. Raises ModelError, Unavailable."""
    _send(connection, {"get": key, "of": number})
    answer = _receive(connection)
    if "refused" in answer:
        raise (ModelError if answer.get("for_good") else Unavailable)(answer["refused"])
    found = shared.read(inputs.seen(answer["nbytes"]), answer["value"], copy=True)
    value: bytes | None = found["value"][0] if found else None
    return value


def info_of(wire: dict[str, Any]) -> ModelInfo:
    """From what ``ready`` carries."""
    sides = {
        side: tuple(Feature(f["name"], f["datatype"], tuple(f["shape"])) for f in wire[side])
        for side in ("inputs", "outputs")
    }
    return ModelInfo(**{**wire, **sides})


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    try:
        connection.sendall(messages.pack(message))
    except OSError:
        end(0)


def _receive(connection: socket.socket) -> dict[str, Any]:
    try:
        data = connection.recv(messages.BYTES_MAX)
    except OSError:
        data = b""
    if not data:
        end(0)  # the front has gone
    return messages.unpack(data)


if __name__ == "__main__":
    work(*map(int, sys.argv[1:]))
