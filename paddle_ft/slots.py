"""The optimizer's slots (moments, master weights) of parameters that have not been trained yet.

A rank that waits for its place makes those of all parameters beforehand (``SlotsAhead``): their
memory is touched for the first time then, which takes longer than a state needs to come in. Which
parameters really have some, a state tells; the others give theirs back, for a slot that nobody else
has would be saved, and looked for, by this rank alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paddle_ft.errors import ConfigError


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


def trained_by(optimizer: Any) -> list[Any]:
    """Parameters that ``optimizer`` was given to train."""
    listed = getattr(optimizer, "_parameter_list", None) or []
    groups = [item["params"] if isinstance(item, dict) else [item] for item in listed]
    return [p for group in groups for p in group if not p.stop_gradient]


def check_gives_out_all(optimizer: Any) -> None:
    """Raises ConfigError if ``optimizer`` has slots that its state_dict does not give."""
    if getattr(optimizer, "inner_optimizer", None) is not None:
        raise ConfigError(
            f"{type(optimizer).__name__} does not give out the state of the optimizer in it, so "
            f"that could not be saved; give ft.session the inner optimizer itself."
        )


class SlotsAhead:
    """Slots of one ``optimizer`` that were made before anything was known of its state."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._made: list[str] = []
        """Automatic names of their parameters."""

    def make(self, parameters: Sequence[Any]) -> None:
        """Makes those of ``parameters``, unless the script has given the optimizer a state."""
        optimizer = self._optimizer
        given = ("_accumulators_holder", "_master_weights")
        slots = getattr(optimizer, "_accumulators", None) or {}
        if any(slots.values()) or any(getattr(optimizer, name, None) for name in given):
            return
        make_slots(optimizer, list(parameters))
        self._made = [p.name for p in parameters]

    def settle(self, parameters: Sequence[Any]) -> None:
        """``parameters`` have slots, and of those that were made ahead no others."""
        make_slots(self._optimizer, list(parameters))
        wanted = {p.name for p in parameters}
        unwanted = [name for name in self._made if name not in wanted]
        self._made = [name for name in self._made if name in wanted]
        if unwanted:
            _drop(self._optimizer, unwanted)


def _drop(optimizer: Any, names: Sequence[str]) -> None:
    """Takes the slots of the parameters of these names away, as if they had never been made."""
    from paddle.base import unique_name

    masters = getattr(optimizer, "_master_weights", None) or {}
    of_masters = {name: masters.pop(name) for name in names if name in masters}
    owners = {*names, *(tensor.name for tensor in of_masters.values())}
    gone = [tensor.name for tensor in of_masters.values()]
    for slot, by_parameter in list(optimizer._accumulators.items()):
        gone += [by_parameter.pop(owner).name for owner in owners if owner in by_parameter]
        if not by_parameter:
            del optimizer._accumulators[slot]
    for known in ("_already_create_accumulator", "_already_create_accumulater"):  # 3.x, 2.6
        getattr(optimizer, known, set()).difference_update(owners)
    lost = set(gone)
    optimizer._opti_name_list[:] = [n for n in optimizer._opti_name_list if n not in lost]
    # What is made instead gets the same names again, which are keys of the optimizer's state_dict.
    ids, prefix = unique_name.generator.ids, unique_name.generator.prefix
    for name in gone:
        key, _, number = name.removeprefix(prefix).rpartition("_")
        if number.isdigit() and ids.get(key) == int(number) + 1:
            ids[key] = int(number)
