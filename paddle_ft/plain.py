"""Python values as JSON and back, exactly.

Lossless for None, bool, int, float (nan and infinities too), str, list, tuple and dict with any of
these as keys; NumPy scalars become the Python number they hold. Tensors and arrays are taken out
by the caller and replaced by a reference. Everything else is refused: nothing is pickled, so
loading runs no code.

Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from paddle_ft.errors import ConfigError

Take = Callable[[str, object], "dict[str, Any] | None"]
"""``take(where, value)``: what stands for ``value`` if it is a tensor or array, else None."""

_TAG = "$"


def to_plain(value: object, where: str, take: Take) -> Any:
    """JSON for ``value``; raises ConfigError that names ``where`` if there is none."""
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, np.generic)):
        return value
    if isinstance(value, np.generic):
        return to_plain(value.item(), where, take)
    if isinstance(value, float):
        return value if math.isfinite(value) else {_TAG: "float", "value": repr(value)}
    if isinstance(value, dict):
        return _dict_to_plain(value, where, take)
    if isinstance(value, list | tuple):
        items = [to_plain(item, f"{where}/{i}", take) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {_TAG: "tuple", "value": items}
    taken = take(where, value)
    if taken is None:
        raise ConfigError(
            f"{where} is a {type(value).__name__}, which cannot be kept in a checkpoint; hold it "
            f"as tensors, arrays, numbers, strings, lists or dicts in its state_dict."
        )
    return {_TAG: "taken", "value": taken}


def _dict_to_plain(value: dict[Any, Any], where: str, take: Take) -> Any:
    if all(type(key) is str for key in value) and _TAG not in value:
        return {key: to_plain(item, f"{where}/{key}", take) for key, item in value.items()}
    pairs = [
        [to_plain(key, f"{where}: a key", _nothing), to_plain(item, f"{where}/{key}", take)]
        for key, item in value.items()
    ]
    return {_TAG: "dict", "value": pairs}


def _nothing(where: str, value: object) -> None:
    return None


def from_plain(value: Any, give: Callable[[dict[str, Any]], object]) -> Any:
    """What ``to_plain`` was given; ``give`` turns what was taken out back into its value."""
    if isinstance(value, list):
        return [from_plain(item, give) for item in value]
    if not isinstance(value, dict):
        return value
    tag, inner = value.get(_TAG), value.get("value")
    if tag is None:
        return {key: from_plain(item, give) for key, item in value.items()}
    if tag == "float":
        return float(str(inner))
    if tag == "tuple" and isinstance(inner, list):
        return tuple(from_plain(item, give) for item in inner)
    if tag == "dict" and isinstance(inner, list):
        return {from_plain(k, give): from_plain(v, give) for k, v in inner}
    if tag == "taken" and isinstance(inner, dict):
        return give(inner)
    raise ValueError(f"{tag!r} is not a tag of this format")
