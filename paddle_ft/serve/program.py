"""What a folder of Paddle inference files says of itself: its files, inputs and outputs.

Paddle 3 writes ``<prefix>.json`` and ``<prefix>.pdiparams``, Paddle 2 ``<prefix>.pdmodel`` instead
of the first. ``paddle_ft.json`` beside them holds what the files cannot say (``Description``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from paddle_ft.errors import ConfigError
from paddle_ft.serve.types import Feature

DESCRIPTION = "paddle_ft.json"
_FILE_BYTES_MAX = 256 * 2**20

DATATYPES = {
    "bool": "BOOL", "int8": "INT8", "uint8": "UINT8", "int16": "INT16", "int32": "INT32",
    "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip
"""Of the Open Inference Protocol, by numpy's name."""
NUMPY = {datatype: np.dtype(name) for name, datatype in DATATYPES.items()}
_SHORT = {
    "i8": "int8", "ui8": "uint8", "u8": "uint8", "i16": "int16", "i32": "int32", "i64": "int64",
    "f16": "float16", "f32": "float32", "f64": "float64",
}  # fmt: skip
"""As Paddle 3 writes them."""


class Description(BaseModel):
    """What publishing adds to the files of a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    outputs: tuple[str, ...] = ()
    """Names for the outputs, in their order; empty: Paddle's own (``fetch_name_0``)."""
    batched: bool | None = None
    """Whether rows may be joined; None: if all inputs and outputs begin with a free dimension."""
    warm_up: dict[str, tuple[int, ...]] = {}
    """Shape of each input for the requests before the first real one; empty: guessed."""


@dataclass(frozen=True, slots=True)
class Files:
    program: Path
    parameters: Path


@dataclass(frozen=True, slots=True)
class Slot:
    """An input or output of a program."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def feature(self) -> Feature:
        """Raises ConfigError for a dtype that the protocol does not have."""
        if self.dtype not in DATATYPES:
            raise ConfigError(
                f"{self.name} is of {self.dtype}, which requests and replies cannot carry; cast it "
                f"to float32 in the model."
            )
        return Feature(self.name, DATATYPES[self.dtype], self.shape)


def find_files(path: Path) -> Files:
    """The inference files at ``path``: a folder with one model, a prefix, or one of the files.

    Raises ConfigError if there is none, or more than one.
    """
    if path.is_dir():
        programs = sorted(p for p in path.iterdir() if _is_program(p))
    else:
        whole = path.suffix in (".json", ".pdmodel", ".pdiparams")
        stem = str(path.with_suffix("")) if whole else str(path)
        programs = [p for s in (".json", ".pdmodel") if (p := Path(stem + s)).is_file()]
        programs = [p for p in programs if _is_program(p)][:1]
    if len(programs) == 1:
        return Files(programs[0], programs[0].with_suffix(".pdiparams"))
    if programs:
        names = ", ".join(p.name for p in programs)
        raise ConfigError(f"{path} holds several models ({names}); name one by its prefix.")
    raise ConfigError(
        f"{path} holds no Paddle inference model: a .json or .pdmodel file and a .pdiparams file "
        f"of the same name are needed, as paddle.jit.save writes them."
    )


def _is_program(path: Path) -> bool:
    parameters = path.with_suffix(".pdiparams")
    return path.suffix in (".json", ".pdmodel") and path.is_file() and parameters.is_file()


def description_of(folder: Path) -> Description:
    """What ``paddle_ft.json`` says, if there is one; raises ConfigError."""
    path = folder / DESCRIPTION
    return description_in(path) if path.is_file() else Description()


def description_in(path: Path) -> Description:
    try:
        return Description.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise ConfigError(f"{path} is not a description of a model ({first}).") from None


def slots_of(files: Files) -> tuple[list[Slot], list[Slot]]:
    """Inputs and outputs of a program, in their order. Raises ConfigError for a damaged one."""
    try:
        if files.program.suffix == ".json":
            return _slots_in_json(files.program)
        return _slots_in_protobuf(files.program)
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ConfigError(
            f"{files.program} is not a program of Paddle ({type(error).__name__}); export the "
            f"model again."
        ) from None


def _slots_in_json(path: Path) -> tuple[list[Slot], list[Slot]]:
    if path.stat().st_size > _FILE_BYTES_MAX:
        raise ValueError("too large")
    program = json.loads(path.read_bytes())
    ops = program["program"]["regions"][0]["blocks"][0]["ops"]
    inputs = [_slot(op) for op in ops if _kind(op) == "data"]
    fetched = [(_attribute(op, "col"), _slot(op)) for op in ops if _kind(op) == "fetch"]
    return inputs, [slot for _, slot in sorted(fetched, key=lambda item: int(item[0]))]


def _kind(op: dict[str, Any]) -> str:
    return str(op["#"]).rpartition(".")[2]


def _attribute(op: dict[str, Any], name: str) -> Any:
    return next(a["AT"]["D"] for a in op["A"] if a["N"] == name)


def _slot(op: dict[str, Any]) -> Slot:
    tensor = op["O"][0]["TT"]["D"]
    kind = str(tensor[0]["#"]).rpartition("t_")[2]
    return Slot(_attribute(op, "name"), _SHORT.get(kind, kind), tuple(map(int, tensor[1])))


def _slots_in_protobuf(path: Path) -> tuple[list[Slot], list[Slot]]:
    from paddle.base import core

    program = core.ProgramDesc(path.read_bytes())  # to be kept: its blocks live in it
    block = program.block(0)

    def slots(kind: str) -> Iterator[tuple[int, Slot]]:
        for i in range(block.op_size()):
            op = block.op(i)
            if op.type() == kind:
                name = (op.output("Out") if kind == "feed" else op.input("X"))[0]
                variable = block.find_var(name.encode())
                dtype = str(variable.dtype()).rpartition(".")[2].lower()
                dtype = {"fp16": "float16", "fp32": "float32", "fp64": "float64"}.get(dtype, dtype)
                yield int(op.attr("col")), Slot(name, dtype, tuple(variable.shape()))

    inputs, outputs = sorted(slots("feed"), key=_first), sorted(slots("fetch"), key=_first)
    return [slot for _, slot in inputs], [slot for _, slot in outputs]


def _first(item: tuple[int, Slot]) -> int:
    return item[0]
