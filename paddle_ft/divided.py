"""Tensors of which each rank has a part: marked when a session is made, or registered.

Each part is saved with its place in the whole (``ShardOf``), and whoever restores reads the part it
now has, however the tensor was divided when it was saved. A part is nowhere else, so a session with
such tensors cannot go on in place without a rank that it has lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from paddle_ft.checkpoint.boxes import Box
from paddle_ft.checkpoint.snapshot import Image, nbytes_of, write_tensor
from paddle_ft.errors import CheckpointMismatch, ConfigError
from paddle_ft.nested import Entry
from paddle_ft.types import ShardOf


class Divided:
    """``shards``: which of the model's ``tensors`` are parts. Raises ConfigError."""

    def __init__(self, tensors: Mapping[str, Any], shards: Mapping[str, ShardOf]) -> None:
        self.shards = dict(shards)
        """By key of the model's state_dict."""
        self.registered: list[Entry] = []
        self._shapes: dict[str, list[int]] = {}
        for key, shard in shards.items():
            if key not in tensors:
                raise ConfigError(
                    f"shards names {key!r}, which the model has not; use a key of its state_dict."
                )
            check_inside(key, tensors[key], shard)
            self._shapes[key] = list(tensors[key].shape)

    def __bool__(self) -> bool:
        return bool(self.shards or self.registered)

    def entry(self, entry: Entry, key: str) -> Entry:
        """``entry``, of the tensor ``key`` or a slot of it, as a shard if it is one."""
        shard = self.shards.get(key)
        if shard is None or list(entry.tensor.shape) != self._shapes[key]:
            return entry  # beta powers are the same everywhere
        return replace(entry, scope="local", shard=shard)

    def register(self, name: str, tensor: Any, shard: ShardOf) -> Entry:
        full = f"shard/{name}"
        if not name or "/" in name or any(e.name == full for e in self.registered):
            raise ConfigError(f"{name!r} cannot be registered: use a new name without '/'.")
        if not hasattr(tensor, "data_ptr"):
            raise ConfigError(f"{name!r} is a {type(tensor).__name__}: give a Paddle tensor.")
        check_inside(name, tensor, shard)
        self.registered.append(Entry(full, tensor, "local", "any time", shard=shard))
        return self.registered[-1]

    def check_all_registered(self, image: Image) -> None:
        """Raises CheckpointMismatch if ``image`` has registered shards that are not there."""
        known = {entry.name for entry in self.registered}
        for name in saved_shards(image):
            if name.startswith("shard/") and name not in known:
                raise CheckpointMismatch(
                    f"The checkpoint of step {image.info.step} has the registered shard "
                    f"{name.removeprefix('shard/')!r}, which this script has not; call "
                    f"s.register_shard before the first batch, or start with another --checkpoint."
                )


def check_inside(name: str, tensor: Any, shard: ShardOf) -> None:
    """Raises ConfigError unless ``tensor`` lies where ``shard`` says."""
    box = _box(tensor, shard)
    if not box.inside(shard.whole):
        raise ConfigError(
            f"The shard {name!r} of shape {list(box.shape)} from {list(box.start)} is not inside "
            f"of {list(shard.whole)}; correct start or whole."
        )


def names_of_shards(entries: Sequence[Entry]) -> list[str]:
    return [entry.name for entry in entries if entry.shard is not None]


def saved_shards(image: Image) -> list[str]:
    names: list[str] = image.info.meta.get("state", {}).get("shards", [])
    return names


def split(image: Image, entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """What has to be read in parts, and what is in ``image`` itself."""
    saved = set(saved_shards(image))
    apart = [e for e in entries if e.shard is not None or e.name in saved]
    names = {entry.name for entry in apart}
    return apart, [entry for entry in entries if entry.name not in names]


def read_shards(image: Image, entries: Sequence[Entry]) -> None:
    """Overwrites the tensors of ``entries`` with the parts they are, or with the whole.

    Raises CheckpointMismatch.
    """
    if not entries:
        return
    boxes = {}
    for entry in entries:
        whole = tuple(int(n) for n in entry.tensor.shape)
        boxes[entry.name] = _box(entry.tensor, entry.shard or ShardOf((0,) * len(whole), whole))
    saved = {*saved_shards(image), *image.names()}
    missing = sorted(boxes.keys() - saved)
    if missing or image.boxes is None:
        what = missing[0] if missing else "tensor"
        raise CheckpointMismatch(
            f"The checkpoint of step {image.info.step} has no {what} that could be read in parts; "
            f"use the shards it was saved with, or start with another --checkpoint."
        )
    found = image.boxes(boxes)
    for entry in entries:
        data = found[entry.name]
        if len(data) != nbytes_of(entry.tensor):
            raise CheckpointMismatch(
                f"The checkpoint of step {image.info.step} has {entry.name} with another dtype; "
                f"use the model it was saved with, or start with another --checkpoint."
            )
        write_tensor(entry.tensor, data)


def _box(tensor: Any, shard: ShardOf) -> Box:
    return Box(tuple(shard.start), tuple(int(n) for n in tensor.shape))
