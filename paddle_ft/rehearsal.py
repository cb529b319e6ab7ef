"""What takes long only the first time in a process, done once where nobody waits for it yet.

The first product and its gradient, the first state that is put back, and what is imported for the
first step: some 20 ms of processor time. Workers that take over begin all at once, often more of
them than there are processors, so each would cost the others as much.

Invariant: the script notices nothing. No random number is drawn, no automatic name is used up, and
nobody has asked for a rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import threading
from typing import Any

from paddle_ft.agent import door
from paddle_ft.checkpoint.plan import image_bytes, share
from paddle_ft.checkpoint.snapshot import Image, Source
from paddle_ft.slots import make_slots
from paddle_ft.state import TrainingState
from paddle_ft.types import ImageInfo, decode, encode

_LATE = ("numpy.random", "paddle.optimizer.fusion_utils")
"""Imported when they are needed, that is by each seed and by the first step of an optimizer."""


def rehearse() -> None:
    """The gradient of a model of four numbers, and its state, which is put back."""
    import paddle
    from paddle.base import unique_name

    for name in _LATE:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    "127.0.0.1".encode("idna")  # as every connection does with its address
    if threading.current_thread() is not threading.main_thread():
        return  # the script may be making layers meanwhile, whose names would be others
    with (
        door.unasked(),
        unique_name.guard(),
        paddle.enable_grad(),
        paddle.amp.auto_cast(enable=False),
    ):
        model, optimizer = _tiny()
        x = paddle.ones([2, 2], dtype="float32")
        paddle.nn.functional.linear(x, model.parameters()[0]).square().mean().backward()
        make_slots(optimizer, model.parameters())  # its step would ask for the size of the world
        state = TrainingState(model, optimizer)
        state.restore(_image(state))


def _tiny() -> tuple[Any, Any]:
    import paddle

    model = paddle.nn.Layer()
    # Of another initializer, also of a global one of the script, the random state would move.
    constant = paddle.ParamAttr(initializer=paddle.nn.initializer.Constant(1.0))
    weight = paddle.create_parameter([2, 2], "float32", attr=constant)
    model.add_parameter("weight", weight)
    return model, paddle.optimizer.Adam(parameters=model.parameters())


def _image(state: TrainingState) -> Image:
    """What a checkpoint of ``state`` would give back."""
    entries = state.entries()
    pieces = share([entry.spec() for entry in entries], 0, 1, 1)
    memory = bytearray(image_bytes(pieces))
    for entry, piece in zip(entries, pieces, strict=True):
        source = Source.of(entry.tensor, piece.start, piece.nbytes, piece.offset)
        data = ctypes.string_at(source.address, source.nbytes)
        memory[piece.offset : piece.offset + piece.nbytes] = data
    info = ImageInfo(0, 0, 1, pieces, {"state": state.meta()})
    return Image(decode(ImageInfo, encode(info)), memoryview(memory))
