"""Paddle's own files, ``.pdparams`` and ``.pdopt``: written by Paddle, read without running code.

They are pickles, and a pickle can call anything. So none is handed to ``paddle.load``: the reader
knows a handful of names, all of which stand for making an array, a tuple or a dict here, and
refuses the file at any other. Not even NumPy's own functions are called with what the file says.

Paddle (3.3.1 and 2.6.2 alike) stores a ``state_dict`` as bare arrays beside a table of their other
names, any other tensor as ``tuple((name, array))``, and bfloat16 as uint16.
"""

from __future__ import annotations

import math
import pickle  # noqa: TID251  find_class admits nothing that runs code
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from paddle_ft.checkpoint.manifest import ITEM_BYTES
from paddle_ft.checkpoint.raw import Raw
from paddle_ft.checkpoint.snapshot import array_of, write_tensor
from paddle_ft.errors import CheckpointDamaged, ConfigError

_TYPE = re.compile(r"[biufc]\d{1,2}\Z")
_LEGACY_KEY = "StructuredToParameterName@@"


# ---------------------------------------------------------------- writing


def write_paddle(path: Path, state: Any) -> None:
    """``paddle.save`` of ``state``, its Raw leaves made tensors or arrays.

    Raises ConfigError if there is no Paddle here or it cannot save one of them, OSError.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No ccache found")  # as bootstrap does
            import paddle
    except ImportError:
        raise ConfigError(
            "Paddle is not installed here, and only Paddle writes its files; export with --format "
            "safetensors, or install it."
        ) from None

    def make(raw: Raw) -> Any:
        if raw.array:
            return array_of(raw.dtype, raw.shape, raw.data)
        tensor = paddle.empty(list(raw.shape), dtype=raw.dtype)
        write_tensor(tensor, raw.data)
        return tensor

    try:
        with paddle.base.dygraph.guard(paddle.CPUPlace()):
            paddle.save(map_leaves(state, make), str(path))
    except (TypeError, ValueError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"Paddle cannot save {path.name} ({first}); export with --format safetensors."
        ) from None


def map_leaves(value: Any, make: Callable[[Raw], Any]) -> Any:
    """``value`` with ``make(raw)`` in place of each Raw in its dicts, lists and tuples."""
    if isinstance(value, Raw):
        return make(value)
    if isinstance(value, dict):
        return {key: map_leaves(item, make) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_leaves(item, make) for item in value)
    return value


# ---------------------------------------------------------------- reading


class _Refused(Exception):
    """The pickle asks for something that is not in an honest file."""


class _Known:
    """Stands for a function that a pickle names; nothing of it can be changed from there."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _Refused("the state of a function")


class _Type:
    """A dtype in the making."""

    __slots__ = ("code",)

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _TYPE.match(code):
            raise _Refused(f"arrays of type {str(code)[:40]!r}")
        self.code = code

    def __setstate__(self, state: Any) -> None:
        order, *composed = state[1:5]
        if order not in ("<", "|", "=") or any(part is not None for part in composed):
            raise _Refused("arrays that are composed or have another byte order")

    @property
    def name(self) -> str:
        name = str(np.dtype(self.code).name)
        if name not in ITEM_BYTES:
            raise _Refused(f"arrays of type {name}")
        return name


class _Array:
    """An array in the making."""

    __slots__ = ("raw",)

    def __init__(self, raw: Raw | None = None) -> None:
        self.raw = raw

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, by_column, data = state
        self.raw = _raw(data, kind, shape, by_column)


def _raw(data: Any, kind: Any, shape: Any, by_column: Any) -> Raw:
    if not isinstance(kind, _Type) or not isinstance(data, bytes | bytearray):
        raise _Refused("an array without type or bytes")
    sizes = tuple(shape)
    if not all(type(n) is int and n >= 0 for n in sizes):
        raise _Refused("an array without a shape")
    if math.prod(sizes) * ITEM_BYTES[kind.name] != len(data):
        raise _Refused("an array that has not as many bytes as its shape says")
    view = memoryview(data)
    if by_column and len(sizes) > 1:
        view = memoryview(np.frombuffer(data, kind.name).reshape(sizes, order="F").tobytes())
    return Raw(kind.name, sizes, view, array=True)


def _scalar(kind: Any, data: Any) -> Any:
    return np.frombuffer(_raw(data, kind, (), False).data, kind.name)[0].item()


def _encode(text: Any, coding: Any = "") -> bytes:
    if not isinstance(text, str) or coding not in ("latin1", "latin-1"):
        raise _Refused("another way to write bytes")
    return text.encode("latin1")


_ARRAYS: dict[str, Any] = {
    "_reconstruct": _Known(lambda *_: _Array()),
    "_frombuffer": _Known(
        lambda data, kind, shape, order: _Array(_raw(data, kind, shape, order == "F"))
    ),
    "scalar": _Known(_scalar),
}
_NAMES: dict[tuple[str, str], Any] = {
    ("builtins", "tuple"): _Known(tuple),
    ("builtins", "bytes"): _Known(lambda: b""),  # protocol 2 has no other way to write no bytes
    ("collections", "OrderedDict"): _Known(dict),
    ("_codecs", "encode"): _Known(_encode),
    ("numpy", "dtype"): _Known(_Type),
    ("numpy", "ndarray"): "numpy.ndarray",
}
_ARRAY_MODULES = re.compile(r"numpy\.(_core|core)\.(multiarray|numeric)\Z")


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if _ARRAY_MODULES.match(module) and name in _ARRAYS:
            return _ARRAYS[name]
        module = "builtins" if module == "__builtin__" else module  # as protocol 2 has it
        if (module, name) not in _NAMES:
            raise _Refused(f"{module}.{name}")
        return _NAMES[module, name]


def read_paddle(path: Path) -> dict[Any, Any]:
    """The dict in ``path``, its tensors and arrays as Raw.

    Raises CheckpointDamaged if it is none, or is more than tensors and plain values; OSError.
    """
    with path.open("rb") as stream:
        try:
            value = _plain(_Reader(stream).load(), 0)
        except OSError:
            raise
        except _Refused as error:
            raise CheckpointDamaged(
                f"{path} is refused: it asks for {error}, which no file of tensors needs and could "
                f"run code; get it from somebody you trust, or as safetensors."
            ) from None
        except Exception as error:  # noqa: BLE001  a broken pickle raises whatever it likes
            raise CheckpointDamaged(
                f"{path} is not a whole file of paddle.save ({type(error).__name__}); get it again "
                f"from where it was made."
            ) from None
    if not isinstance(value, dict):
        raise CheckpointDamaged(f"{path} holds no dict of tensors; use another file.")
    if _LEGACY_KEY not in value:
        return value
    # A state_dict: its tensors are stored as bare arrays, and these are their other names.
    del value[_LEGACY_KEY]
    tensors: dict[Any, Any] = map_leaves(value, _tensor)
    return tensors


def _tensor(raw: Raw) -> Raw:
    return Raw("bfloat16" if raw.dtype == "uint16" else raw.dtype, raw.shape, raw.data)


def _plain(value: Any, depth: int) -> Any:
    if depth > 100:
        raise _Refused("values within values without end")
    if isinstance(value, _Array):
        if value.raw is None:
            raise _Refused("an array without content")
        return value.raw
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], _Array):
        raw = _plain(value[1], depth + 1)
        return _tensor(raw) if isinstance(value[0], str) else (_plain(value[0], depth + 1), raw)
    if isinstance(value, dict):
        return {_key(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item, depth + 1) for item in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise _Refused(f"a {type(value).__name__}")


def _key(key: Any) -> Any:
    if not isinstance(key, str | int):
        raise _Refused(f"a {type(key).__name__} as a key")
    return key
