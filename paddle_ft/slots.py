"""The optimizer's slots (moments, master weights) of parameters that have not been trained yet."""

from __future__ import annotations

from typing import Any


def make_slots(optimizer: Any, parameters: list[Any]) -> None:
    """Lets ``optimizer`` create them, as its first step would; those that are there stay."""
    if not parameters or not hasattr(optimizer, "_create_accumulators"):
        return
    from paddle.base import framework
    from paddle.base.layer_helper import LayerHelper

    if not isinstance(optimizer.helper, LayerHelper):
        optimizer.helper = LayerHelper(type(optimizer).__name__)
    block = framework.default_main_program().global_block()
    optimizer._create_accumulators(block, parameters)
