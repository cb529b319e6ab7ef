"""What is saved of a training run, under which names, and how it is put back.

    model/<state_dict key>                              parameters and buffers
    optimizer/<state_dict key of the parameter>/<slot>  moments, master weights …
    optimizer/other/<key>                               entries of an optimizer unknown to Paddle
    registered/<name>/<path in its state_dict>          what the user added

    shard/<name>                                        a shard that the user registered

Names do not depend on the order in which layers were made, as Paddle's automatic names do. Tensors
equal on all ranks are ``replicated``; buffers and BatchNorm's statistics are ``local`` to a rank
(on another world size, rank r takes those of rank r mod the old one). A tensor of which each rank
has a part (``shards``) is saved with its place in the whole, and each rank takes the part it now
has; so are its optimizer slots of the same shape. Everything that is not a tensor is JSON
(``plain``).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

from paddle_ft.checkpoint.snapshot import Image, in_place, write_tensor
from paddle_ft.divided import Divided, names_of_shards, read_shards, split
from paddle_ft.errors import CheckpointMismatch, ConfigError
from paddle_ft.nested import (
    Copy,
    Entry,
    compare,
    given_back,
    is_tensor,
    no_tensor,
    refuse,
    taken_from,
    tensor_of,
)
from paddle_ft.plain import from_plain, to_plain
from paddle_ft.slots import SlotsAhead, check_gives_out_all, trained_by
from paddle_ft.types import Changes, Scope, ShardOf

_STATISTICS = ("_mean", "_variance")
_MASTER = "master_weight"


class TrainingState:
    """Model, optimizer, scheduler and registered objects as one list of named tensors.

    Raises ConfigError if the optimizer trains parameters that are not the model's.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        lr_scheduler: Any = None,
        shards: Mapping[str, ShardOf] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        own = getattr(optimizer, "_learning_rate", None)
        self.lr_scheduler = lr_scheduler
        self._schedulers = {"lr_scheduler": lr_scheduler} if lr_scheduler is not None else {}
        if hasattr(own, "state_dict") and own is not lr_scheduler:
            self._schedulers["optimizer"] = own
        self._lr_at_start = _constant_lr(optimizer)
        self._registered: dict[str, Any] = {}
        named = self._named_tensors()
        self._keys = {k: None if k in named else t for k, t in model.state_dict().items()}
        """Keys of the model's state_dict; with a tensor if it is found there alone."""
        self._key_of = self._parameter_keys()
        self._check_optimizer()
        self._slots_ahead = SlotsAhead(optimizer)
        self._divided = Divided(self.model_tensors(), shards or {})

    # ------------------------------------------------------------ saving

    def entries(self) -> list[Entry]:
        """Every tensor, in an order that is the same on all ranks.

        Registered ones are read now: use the result before training goes on.
        """
        entries = [*self.model_entries(), *self._optimizer_entries()]
        for name, thing in self._registered.items():
            entries += taken_from(f"registered/{name}", thing.state_dict())[1]
        return entries + self._divided.registered

    def meta(self) -> dict[str, Any]:
        """The rest, as JSON values."""
        schedulers = {
            name: to_plain(scheduler.state_dict(), f"the state of {name}", refuse)
            for name, scheduler in self._schedulers.items()
        }
        registered = {
            name: taken_from(f"registered/{name}", thing.state_dict())[0]
            for name, thing in self._registered.items()
        }
        other = {
            key: to_plain(value, f"optimizer/other/{key}", refuse)
            for key, value in self._other_entries().items()
            if not is_tensor(value)
        }
        lr = None
        if self._lr_at_start is not None:
            lr = [self._lr_at_start, float(self.optimizer.get_lr())]
        state: dict[str, Any] = {
            "schedulers": schedulers,
            "registered": registered,
            "other": other,
            "lr": lr,
        }
        if self._divided:
            state["shards"] = names_of_shards(self.entries())
        return state | {"names": {key: name for name, key in self._key_of.items()}}

    def model_tensors(self) -> dict[str, Any]:
        """The model's tensors under the keys of its ``state_dict``.

        They are looked up by name: ``state_dict`` of a model prepared by ``amp.decorate`` gives
        converted copies, that of a ``DataParallel`` leaves out its own prefix.
        """
        named = self._named_tensors()
        return {key: named.get(key, tensor) for key, tensor in self._keys.items()}

    def _named_tensors(self) -> dict[str, Any]:
        import paddle

        model = self.model
        layer = model._layers if isinstance(model, paddle.DataParallel) else model
        return dict([*layer.named_parameters(), *layer.named_buffers()])

    def _parameter_keys(self) -> dict[str, str]:
        """Structured key by automatic name; of tied weights, the first key."""
        keys: dict[str, str] = {}
        for key, tensor in self.model_tensors().items():
            keys.setdefault(tensor.name, key)
        return keys

    def model_entries(self) -> Iterator[Entry]:
        buffers = {id(buffer) for _, buffer in self.model.named_buffers()}
        seen: set[int] = set()
        for key, tensor in self.model_tensors().items():
            if id(tensor) in seen:  # tied weights are saved once
                continue
            seen.add(id(tensor))
            local = id(tensor) in buffers or (
                tensor.stop_gradient and key.rpartition(".")[2] in _STATISTICS
            )
            scope: Scope = "local" if local else "replicated"
            changes: Changes = "any time" if local else "in step"
            if tensor.stop_gradient and not local:
                changes = "seldom"
            entry = Entry(f"model/{key}", tensor, scope, changes)
            yield self._divided.entry(entry, key)

    def _optimizer_entries(self) -> Iterator[Entry]:
        # Sorted: who has trained from the start has them in another order than who took them over.
        for name, tensor in sorted(self._slots().items()):
            entry = Entry(name, tensor, "replicated", "in step")
            yield self._divided.entry(entry, name.split("/", 1)[1].rpartition("/")[0])
        for key, value in sorted(self._other_entries().items()):
            if is_tensor(value):
                yield Entry(f"optimizer/other/{key}", value, "replicated", "any time")

    def _slots(self) -> dict[str, Any]:
        """Accumulators and master weights, by structured name."""
        masters = getattr(self.optimizer, "_master_weights", None) or {}
        owner_of = {tensor.name: name for name, tensor in masters.items()}
        slots: dict[str, Any] = {}
        for slot, by_parameter in (getattr(self.optimizer, "_accumulators", None) or {}).items():
            for name, tensor in by_parameter.items():
                slots[f"optimizer/{self._key(owner_of.get(name, name))}/{slot}"] = tensor
        for name, tensor in masters.items():
            slots[f"optimizer/{self._key(name)}/{_MASTER}"] = tensor
        return slots

    def _other_entries(self) -> dict[str, Any]:
        """What else the optimizer's state_dict has, automatic names replaced."""
        if self._is_paddles_own():
            return {}
        known = {tensor.name for tensor in self._slots().values()}
        known |= {"LR_Scheduler", "master_weights"}
        state = self.optimizer.state_dict()
        return {self._portable(k): v for k, v in state.items() if k not in known}

    def _is_paddles_own(self) -> bool:
        """Whether the optimizer's state is what ``_slots`` and the scheduler give, and no more."""
        from paddle.optimizer import Optimizer

        return getattr(type(self.optimizer), "state_dict", None) is Optimizer.state_dict

    def _key(self, parameter_name: str) -> str:
        return self._key_of.get(parameter_name, parameter_name)

    def _portable(self, key: str) -> str:
        """``key`` with the automatic name of a parameter at its start replaced by ``<its key>``."""
        matches = [name for name in self._key_of if key.startswith(name)]
        if not matches:
            return key
        name = max(matches, key=len)
        return f"<{self._key_of[name]}>{key[len(name) :]}"

    def _native(self, key: str) -> str:
        """The inverse of ``_portable``, with the names of this process."""
        for name, structured in self._key_of.items():
            if key.startswith(f"<{structured}>"):
                return name + key[len(structured) + 2 :]
        return key

    # ------------------------------------------------------------ putting back

    def restore(self, image: Image, there: Container[str] = ()) -> None:
        """Overwrites model, optimizer and schedulers; tensors ``there`` have been already.

        Raises CheckpointMismatch if ``image`` is not of this model and optimizer.
        """
        entries, apart, other = self._fitting(image)
        for entry in entries:
            if entry.name not in there:
                write_tensor(entry.tensor, image.read(entry.name))
        read_shards(image, apart)
        meta = image.info.meta.get("state", {})
        self._restore_other(image, other, meta.get("other", {}))
        self._restore_schedulers(image, meta)

    def places(self, image: Image) -> dict[str, Any]:
        """Tensors whose memory can be overwritten with what ``image`` has of their names.

        Raises CheckpointMismatch if it is not of this model and optimizer.
        """
        entries, _, _ = self._fitting(image)
        return {e.name: e.tensor for e in entries if in_place(e.tensor)}

    def prepare(self) -> None:
        """Makes beforehand what takes long in ``restore``; it or ``start_afresh`` has to follow."""
        if self._is_paddles_own():
            own = {p.name for p in trained_by(self.optimizer)}
            self._slots_ahead.make([t for t in self.model_tensors().values() if t.name in own])

    def start_afresh(self) -> None:
        """There is nothing to restore."""
        self._slots_ahead.settle([])

    def _fitting(self, image: Image) -> tuple[list[Entry], list[Entry], list[str]]:
        """What is there for ``image``: whole tensors, shards, and names in ``optimizer/other``."""
        other = [n for n in image.names() if n.startswith("optimizer/other/")]
        self._slots_ahead.settle(self._parameters_with_slots(image))
        entries = [
            entry
            for entry in [*self.model_entries(), *self._optimizer_entries()]
            if not entry.name.startswith("optimizer/other/")
        ]
        apart, entries = split(image, entries)
        mine = {entry.name for entry in apart}.union(other)
        given = [n for n in image.names() if not n.startswith("registered/") and n not in mine]
        compare(image, [entry.spec() for entry in entries], given)
        return entries, apart, other

    def register(self, name: str, thing: Any, image: Image | None) -> None:
        """Adds ``thing``; puts its state back if ``image`` holds one.

        Raises ConfigError if it cannot be saved, CheckpointMismatch if ``image`` lacks it.
        """
        _check_registered(name, thing, self._registered)
        taken_from(f"registered/{name}", thing.state_dict())
        self._registered[name] = thing
        if image is not None:
            self._restore_registered(name, image)

    def register_shard(self, name: str, tensor: Any, shard: ShardOf, image: Image | None) -> None:
        """Adds ``tensor``, a part of one that is divided; reads it if ``image`` is given.

        Raises ConfigError, CheckpointMismatch.
        """
        entry = self._divided.register(name, tensor, shard)
        if image is not None:
            read_shards(image, [entry])

    @property
    def divided(self) -> bool:
        """Whether this rank has parts of tensors that nobody else has."""
        return bool(self._divided)

    def parameters_apart(self) -> list[Any]:
        """Parameters that are shards: their gradients are the script's own affair."""
        tensors = self.model_tensors()
        return [tensors[key] for key in self._divided.shards]

    def shared_tensors(self) -> list[Any]:
        """The model's tensors without shards."""
        apart = self._divided.shards
        return [tensor for key, tensor in self.model_tensors().items() if key not in apart]

    def restore_registered(self, image: Image) -> None:
        """Puts back the state of every registered object; raises CheckpointMismatch."""
        for name in self._registered:
            self._restore_registered(name, image)

    def _restore_registered(self, name: str, image: Image) -> None:
        saved = image.info.meta.get("state", {}).get("registered", {})
        if name not in saved:
            raise CheckpointMismatch(
                f"The checkpoint of step {image.info.step} has no registered object {name!r}; "
                f"register what was registered when it was saved, or start with another "
                f"--checkpoint."
            )
        state = from_plain(saved[name], lambda reference: given_back(image, reference))
        _set_state(self._registered[name], state)

    # ------------------------------------------------------------ undoing

    def changeable(self, manual_lr: bool) -> dict[str, Copy]:
        """What a script may change between two steps: registered objects, schedulers it steps."""
        things = dict(self._registered)
        things |= {f" {name}": s for name, s in self._schedulers.items()} if manual_lr else {}
        return {name: Copy.of(name, thing.state_dict()) for name, thing in things.items()}

    def undo(self, copies: Mapping[str, Copy]) -> None:
        """Puts back what ``changeable`` gave."""
        for name, copy in copies.items():
            thing = self._schedulers[name[1:]] if name[:1] == " " else self._registered[name]
            _set_state(thing, copy.value())

    def check_all_registered(self, image: Image) -> None:
        """Raises CheckpointMismatch if ``image`` has registered objects that are not there."""
        saved = image.info.meta.get("state", {}).get("registered", {})
        self._divided.check_all_registered(image)
        if forgotten := sorted(set(saved) - set(self._registered)):
            raise CheckpointMismatch(
                f"The checkpoint of step {image.info.step} has the registered object "
                f"{forgotten[0]!r}, which this script has not; call s.register before the first "
                f"batch, or start with another --checkpoint."
            )

    def _parameters_with_slots(self, image: Image) -> list[Any]:
        keys = {
            name.split("/", 1)[1].rpartition("/")[0]
            for name in [*image.names(), *image.info.meta.get("state", {}).get("shards", [])]
            if name.startswith("optimizer/") and not name.startswith("optimizer/other/")
        }
        return [p for key, p in self.model_tensors().items() if key in keys]

    def _restore_other(self, image: Image, names: list[str], plain: Mapping[str, Any]) -> None:
        if not names and not plain:
            return
        state = dict(self.optimizer.state_dict())
        for name in names:
            key = self._native(name.removeprefix("optimizer/other/"))
            state[key] = tensor_of(image, name)
        for key, value in plain.items():
            state[self._native(key)] = from_plain(value, no_tensor)
        self.optimizer.set_state_dict(state)

    def _restore_schedulers(self, image: Image, meta: Mapping[str, Any]) -> None:
        saved = meta.get("schedulers", {})
        if set(saved) != set(self._schedulers):
            has = "has" if saved else "has no"
            raise CheckpointMismatch(
                f"The checkpoint of step {image.info.step} {has} learning rate scheduler, unlike "
                f"this script; use what it was saved with, or start with another --checkpoint."
            )
        for name, scheduler in self._schedulers.items():
            scheduler.set_state_dict(from_plain(saved[name], no_tensor))
        lr = meta.get("lr")
        # A rate that the script was started with anew counts; one it had set on the way is kept.
        if lr and self._lr_at_start == lr[0] and lr[1] != lr[0]:
            self.optimizer.set_lr(lr[1])

    def _check_optimizer(self) -> None:
        check_gives_out_all(self.optimizer)
        foreign = [p.name for p in trained_by(self.optimizer) if p.name not in self._key_of]
        if foreign:
            raise ConfigError(
                f"The optimizer trains {len(foreign)} parameters that are not the model's "
                f"({foreign[0]}, …); put all trained layers into one paddle.nn.Layer and give that "
                f"as model."
            )


def _constant_lr(optimizer: Any) -> float | None:
    rate = getattr(optimizer, "_learning_rate", None)
    return float(rate) if isinstance(rate, int | float) else None


def _check_registered(name: str, thing: Any, registered: Mapping[str, Any]) -> None:
    if not name or "/" in name:
        raise ConfigError(f"{name!r} cannot be registered: use a name without '/'.")
    if name in registered:
        raise ConfigError(f"{name!r} is registered already: use another name.")
    setter = hasattr(thing, "set_state_dict") or hasattr(thing, "load_state_dict")
    if not setter or not hasattr(thing, "state_dict"):
        raise ConfigError(
            f"{name!r} cannot be registered: {type(thing).__name__} lacks state_dict or "
            f"set_state_dict; give it both."
        )


def _set_state(thing: Any, state: Any) -> None:
    setter = getattr(thing, "set_state_dict", None) or thing.load_state_dict
    setter(state)
