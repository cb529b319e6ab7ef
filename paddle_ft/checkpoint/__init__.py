"""Checkpoints: written once, verified block by block, committed or not there.

``save``, ``load`` and ``steps`` are for use without a launcher; a training script under one uses
``paddle_ft.session``, which saves and restores by itself.
"""

from __future__ import annotations

from typing import Any

from paddle_ft.checkpoint.boxes import Box
from paddle_ft.checkpoint.retention import KeepAll, KeepAny, KeepBest, KeepEvery, KeepLast

__all__ = [
    "Box",
    "KeepAll",
    "KeepAny",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "load",
    "load_shards",
    "save",
    "steps",
]


def __getattr__(name: str) -> Any:
    # On first use: a worker imports parts of this package and should not pay for the rest.
    if name in ("save", "load", "steps"):
        from paddle_ft.checkpoint import standalone

        return getattr(standalone, name)
    if name == "load_shards":
        from paddle_ft.checkpoint import shards

        return shards.load_shards
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
