"""A tensor as its bytes, on the way between a checkpoint and a file of another format; and the
safetensors format, which is read and written here.

https://github.com/huggingface/safetensors#format: eight bytes with the length of the header, the
header (JSON: dtype, shape and place of each tensor), the bytes. It is small enough to be written
here: the library's own interface for bytes has changed between versions, and what it offers for
NumPy has no bfloat16.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddle_ft.checkpoint.manifest import ITEM_BYTES
from paddle_ft.errors import CheckpointDamaged, ConfigError

_HEADER_BYTES_MAX = 100_000_000
_METADATA = "__metadata__"
_NAMES = {
    "BOOL": "bool", "I8": "int8", "U8": "uint8", "I16": "int16", "U16": "uint16", "I32": "int32",
    "U32": "uint32", "I64": "int64", "U64": "uint64", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F16": "float16", "BF16": "bfloat16", "F32": "float32",
    "F64": "float64", "C64": "complex64",
}  # fmt: skip
_CODES = {name: code for code, name in _NAMES.items()}


@dataclass(frozen=True, slots=True)
class Raw:
    """``data``: the bytes of a tensor of ``dtype`` (as in a manifest) and ``shape`` in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview
    array: bool = False
    """It was a NumPy array, not a tensor."""
    name: str = ""
    """In the checkpoint, if it comes from one."""


def write_safetensors(path: Path, tensors: Mapping[str, Raw], metadata: Mapping[str, str]) -> None:
    """Writes the new file ``path``; raises ConfigError for a dtype that it cannot hold, OSError."""
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    # The widest first, so that all are aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-ITEM_BYTES[item[1].dtype], item[0]))
    for name, raw in ordered:
        if raw.dtype not in _CODES or name == _METADATA:
            raise ConfigError(
                f"The tensor {name} ({raw.dtype}) cannot be put into a safetensors file; export "
                f"with --format paddle."
            )
        end = offset + raw.data.nbytes
        place = {"dtype": _CODES[raw.dtype], "shape": raw.shape, "data_offsets": [offset, end]}
        header[name], offset = place, end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    with path.open("xb") as stream:
        stream.write(struct.pack("<Q", len(content)))
        stream.write(content)
        for _, raw in ordered:
            stream.write(raw.data)
        stream.flush()
        os.fsync(stream.fileno())


def read_safetensors(path: Path) -> dict[str, Raw]:
    """The tensors in ``path``, which is mapped; raises CheckpointDamaged, OSError."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))[0]
        if size < 8 or length > min(size - 8, _HEADER_BYTES_MAX):
            raise _damaged(path, "its header is too long for it")
        header = stream.read(length)
        body = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))[8 + length :]
    try:
        entries = json.loads(header)
        entries.pop(_METADATA, None)
        result = {name: _entry(name, entry, body) for name, entry in entries.items()}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not one: {error}") from None
    if sum(raw.data.nbytes for raw in result.values()) != body.nbytes:
        raise _damaged(path, "its tensors do not fill it")
    return result


def _entry(name: str, entry: Mapping[str, Any], body: memoryview) -> Raw:
    dtype, shape = _NAMES[entry["dtype"]], entry["shape"]
    begin, end = entry["data_offsets"]
    numbers = [begin, end, *shape]
    if not all(type(n) is int and n >= 0 for n in numbers) or not begin <= end <= body.nbytes:
        raise ValueError(f"the place of {name}")
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"the size of {name}")
    return Raw(dtype, tuple(shape), body[begin:end])


def _damaged(path: Path, reason: str) -> CheckpointDamaged:
    return CheckpointDamaged(
        f"{path} is not a whole safetensors file ({reason}); get it again from where it was made."
    )
