"""Tensors inside of nested values: taken out to be saved beside the JSON, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from paddle_ft.checkpoint.manifest import ITEM_BYTES
from paddle_ft.checkpoint.snapshot import Image, array_of, dtype_name, nbytes_of, write_tensor
from paddle_ft.errors import CheckpointMismatch, ConfigError
from paddle_ft.plain import from_plain, to_plain
from paddle_ft.types import Changes, Scope, ShardOf, TensorSpec


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to be saved."""

    name: str
    tensor: Any
    """A Paddle tensor or a NumPy array."""
    scope: Scope
    changes: Changes
    shard: ShardOf | None = None
    """With ``local``: which part of a tensor that is divided among the ranks."""

    def spec(self) -> TensorSpec:
        shape = tuple(int(n) for n in self.tensor.shape)
        nbytes = nbytes_of(self.tensor)
        form = (self.name, dtype_name(self.tensor), shape, self.scope, 0, nbytes)
        return TensorSpec(*form, shard=self.shard)


def is_tensor(value: object) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "data_ptr")


def taken_from(name: str, state: object) -> tuple[Any, list[Entry]]:
    """``state`` as JSON, and the tensors that were in it."""
    entries: list[Entry] = []

    def take(where: str, value: object) -> dict[str, Any] | None:
        if not is_tensor(value) or dtype_name(value) not in ITEM_BYTES:
            return None
        entries.append(Entry(where, value, "replicated", "any time"))
        return {"name": where, "array": isinstance(value, np.ndarray)}

    plain = to_plain(state, name, take)
    if len({entry.name for entry in entries}) != len(entries):
        raise ConfigError(f"{name}: two tensors have the same path; use keys without '/'.")
    return plain, entries


def given_back(image: Image, reference: Mapping[str, Any]) -> Any:
    name = reference["name"]
    if not reference["array"]:
        return tensor_of(image, name)
    spec = image.spec(name)
    assert spec is not None, f"{name} is referred to but not in the image"
    return array_of(spec.dtype, spec.shape, image.read(name)).copy()


def tensor_of(image: Image, name: str) -> Any:
    import paddle

    spec = image.spec(name)
    assert spec is not None, f"{name} is referred to but not in the image"
    tensor = paddle.empty(list(spec.shape), dtype=spec.dtype)
    write_tensor(tensor, image.read(name))
    return tensor


def refuse(where: str, value: object) -> None:
    return None


def no_tensor(reference: Mapping[str, Any]) -> Any:
    raise ValueError(f"{reference} refers to a tensor where there cannot be one")


def compare(image: Image, expected: list[TensorSpec], given: list[str]) -> None:
    """Raises CheckpointMismatch unless the tensors ``given`` in ``image`` are those expected."""
    wanted = {spec.name: spec for spec in expected}
    faults = [f"{name} is missing in it" for name in wanted if image.spec(name) is None]
    faults += [f"{name} is not in this script" for name in given if name not in wanted]
    for name, spec in wanted.items():
        there = image.spec(name)
        if there is not None and (there.dtype, there.shape) != (spec.dtype, spec.shape):
            faults.append(f"{name} is {_form(there)} there and {_form(spec)} here")
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointMismatch(
            f"The checkpoint of step {image.info.step} does not fit: {'; '.join(faults[:3])}{more}"
            f"; use the model and optimizer it was saved with, or start with another --checkpoint."
        )


def _form(spec: TensorSpec) -> str:
    return f"{spec.dtype}{list(spec.shape)}"


@dataclass(frozen=True, slots=True)
class Copy:
    """A nested value as it was at one moment; what is changed in place later does not change it."""

    plain: Any
    tensors: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, value: object) -> Copy:
        """Raises ConfigError, naming ``name``, if ``value`` holds what cannot be copied."""
        plain, entries = taken_from(name, value)
        return cls(plain, {e.name: _copied(e.tensor) for e in entries})

    def value(self) -> Any:
        return from_plain(self.plain, lambda reference: _copied(self.tensors[reference["name"]]))


def _copied(tensor: Any) -> Any:
    return tensor.copy() if isinstance(tensor, np.ndarray) else tensor.detach().clone()
