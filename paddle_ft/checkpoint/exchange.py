"""Checkpoints as files of other formats, and back.

A directory that was exported holds, for a checkpoint of a training session:

    model.pdparams or model.safetensors         under the names of ``model.state_dict()``
    model.pdopt                                 for ``opt.set_state_dict``, with automatic names
    optimizer.safetensors                       under ``<name of the parameter>/<slot>``
    <name>.pdparams or registered.safetensors   what the script had registered
    checkpoint.json                             everything that is not a tensor, and what is where

and for one of ``ft.checkpoint.save`` a file for each dict at the top, ``state`` for the rest. Of
tensors that are local to a rank (BatchNorm statistics) rank 0's are taken.

With ``checkpoint.json`` an import gives back a checkpoint from which a session goes on; other files
become what ``ft.checkpoint.load`` reads: ``{"model": {...}, "optimizer": {...}}``.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from paddle_ft.checkpoint import layout, plan
from paddle_ft.checkpoint.manifest import FORMAT, Manifest
from paddle_ft.checkpoint.pdparams import read_paddle, write_paddle
from paddle_ft.checkpoint.raw import Raw, read_safetensors, write_safetensors
from paddle_ft.checkpoint.restore import fetch
from paddle_ft.checkpoint.store import Store
from paddle_ft.errors import CheckpointDamaged, ConfigError, StoreFull
from paddle_ft.plain import from_plain, to_plain
from paddle_ft.types import CommitRef, ImageInfo, TensorSpec

Form = Literal["paddle", "safetensors"]
INDEX = "checkpoint.json"
_OPTIMIZERS = ("opt", "optim", "optimizer")
_MASTER = "master_weight"


# ---------------------------------------------------------------- out


def export(store: Store, ref: CommitRef, manifest: Manifest, place: Path, form: Form) -> list[Path]:
    """Writes the checkpoint into the new or empty directory ``place``; the files, index last.

    Raises ConfigError, CheckpointDamaged, StoreError.
    """
    tensors = _read(store, ref, manifest)
    try:
        if place.exists() and any(place.iterdir()):
            raise ConfigError(f"{place} is not empty; give --to a new directory.")
        place.mkdir(parents=True, exist_ok=True)
        if form == "paddle":
            files = _paddle_files(manifest, tensors)
            for name, content in files.items():
                write_paddle(place / name, content)
        else:
            files = _flat_files(tensors)
            for name, content in files.items():
                write_safetensors(place / name, content, {"format": "np", "step": str(ref.step)})
        where = {
            raw.name: [name, *path]
            for name, content in files.items()
            for path, raw in _leaves(content)
        }
        index = {"format": FORMAT, "kind": "export", "step": ref.step, "world_size": 1}
        index |= {"tensors": where, "meta": manifest.meta}
        (place / INDEX).write_text(json.dumps(index, indent=1))
    except OSError as error:
        raise StoreFull(
            f"{place} cannot be written ({error.strerror}); make room or give another directory."
        ) from None
    return [*(place / name for name in files), place / INDEX]


def _read(store: Store, ref: CommitRef, manifest: Manifest) -> dict[str, Raw]:
    wanted = plan.plan_read(manifest, [0])
    image = memoryview(mmap.mmap(-1, max(1, wanted.nbytes)))
    fetch(store, ref.manifest, wanted.targets, image)
    return {
        s.name: Raw(s.dtype, s.shape, image[s.offset : s.offset + s.nbytes], name=s.name)
        for s in wanted.tensors[0]
    }


def _paddle_files(manifest: Manifest, tensors: Mapping[str, Raw]) -> dict[str, Any]:
    meta = manifest.meta
    if "tree" in meta:
        state = from_plain(meta["tree"], lambda reference: _leaf(tensors, reference))
        assert isinstance(state, dict)
        return _by_top_key(state)
    state = meta.get("state", {})
    groups = _grouped(tensors)
    files: dict[str, Any] = {"model.pdparams": groups.pop("model", {})}
    if names := state.get("names"):
        files["model.pdopt"] = _paddle_optimizer(groups.get("optimizer", {}), names, state)
    for name, value in state.get("registered", {}).items():
        content = from_plain(value, lambda reference: _leaf(tensors, reference))
        files[f"{layout.safe_member(name)}.pdparams"] = {name: content}
    return files


def _leaf(tensors: Mapping[str, Raw], reference: Mapping[str, Any]) -> Raw:
    try:
        raw = tensors[reference["name"]]
    except KeyError:
        raise CheckpointDamaged(
            f"The checkpoint speaks of the tensor {reference.get('name')}, which it does not have; "
            f"use an older one."
        ) from None
    return Raw(raw.dtype, raw.shape, raw.data, bool(reference.get("array")), raw.name)


def _by_top_key(state: Mapping[Any, Any]) -> dict[str, Any]:
    files: dict[str, Any] = {}
    rest = {}
    for key, value in state.items():
        if not isinstance(value, dict) or not isinstance(key, str):
            rest[key] = value
            continue
        suffix = "pdopt" if key in _OPTIMIZERS else "pdparams"
        files[f"{layout.safe_member(key)}.{suffix}"] = value
    if rest:
        files["state.pdparams"] = {**files.pop("state.pdparams", {}), **rest}
    return files


def _paddle_optimizer(
    tensors: Mapping[str, Raw], names: Mapping[str, str], state: Mapping[str, Any]
) -> dict[str, Any]:
    """As ``opt.state_dict()`` has it in a process that makes the same layers in the same order."""
    result: dict[str, Any] = {}
    masters: dict[str, Raw] = {}
    for key, raw in tensors.items():
        parameter, _, slot = key.rpartition("/")
        name = names.get(parameter)
        if name is None:
            continue
        if slot == _MASTER:
            masters[name] = raw
            continue
        stem = f"{name}_fp32_master_0" if f"{parameter}/{_MASTER}" in tensors else name
        result[f"{stem}_{slot}_0"] = raw
    if masters:
        result["master_weights"] = masters
    if (schedule := state.get("schedulers", {})) and (
        value := schedule.get("optimizer", schedule.get("lr_scheduler"))
    ):
        result["LR_Scheduler"] = from_plain(value, lambda reference: None)
    return result


def _grouped(tensors: Mapping[str, Raw]) -> dict[str, dict[str, Raw]]:
    """By the first part of the name, ``state`` for those that have only one."""
    groups: dict[str, dict[str, Raw]] = {}
    for name, raw in tensors.items():
        group, slash, key = name.partition("/")
        groups.setdefault(group if slash else "state", {})[key if slash else name] = raw
    return groups


def _flat_files(tensors: Mapping[str, Raw]) -> dict[str, dict[str, Raw]]:
    files: dict[str, dict[str, Raw]] = {}
    for group, content in _grouped(tensors).items():
        files.setdefault(f"{layout.safe_member(group)}.safetensors", {}).update(content)
    return files


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Raw]]:
    if isinstance(value, Raw):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _leaves(item, (*path, number))


# ---------------------------------------------------------------- in


def read_files(paths: Sequence[Path]) -> tuple[dict[str, Raw], dict[str, Any], int]:
    """The tensors by name, the meta and the step (0 if it is not known) of a checkpoint that is to
    be made from one exported directory or from single files.

    Raises ConfigError, CheckpointDamaged.
    """
    if len(paths) == 1 and (paths[0] / INDEX).is_file():
        return _read_exported(paths[0])
    state: dict[str, Any] = {}
    for path in paths:
        content = _read_file(path)
        group = state.setdefault("optimizer" if path.suffix == ".pdopt" else "model", {})
        if twice := sorted(map(str, group.keys() & content.keys())):
            raise ConfigError(f"{path} has {twice[0]}, which another file has, too; give one.")
        group.update(content)
    tensors: dict[str, Raw] = {}

    def take(where: str, value: object) -> dict[str, Any] | None:
        if not isinstance(value, Raw):
            return None
        name = where.removeprefix("state/")
        if name in tensors:
            raise ConfigError(f"{name} occurs twice in what is to be imported; rename one of them.")
        tensors[name] = value
        return {"name": name, "array": value.array}

    return tensors, {"tree": to_plain(state, "state", take), "metrics": {}}, 0


def _read_exported(place: Path) -> tuple[dict[str, Raw], dict[str, Any], int]:
    try:
        index = json.loads((place / INDEX).read_text())
        if index["format"] != FORMAT or index["kind"] != "export":
            raise ValueError("another format")
        meta, step = index["meta"], int(index["step"])
        where = {str(name): (str(file), path) for name, (file, *path) in index["tensors"].items()}
        if any(Path(file).name != file for file, _ in where.values()):
            raise ValueError("a file that is elsewhere")
        contents = {file: _read_file(place / file) for file in {f for f, _ in where.values()}}
        tensors = {name: _at(contents[file], path) for name, (file, path) in where.items()}
    except OSError as error:
        raise ConfigError(f"{place} cannot be read ({error.strerror}).") from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointDamaged(
            f"{place / INDEX} does not fit the files beside it ({error}); export again."
        ) from None
    return tensors, meta, step


def _at(content: Any, path: Sequence[Any]) -> Raw:
    for key in path:
        content = content[key]
    if not isinstance(content, Raw):
        raise TypeError(f"{'/'.join(map(str, path))} is no tensor")
    return content


def _read_file(path: Path) -> dict[Any, Any]:
    readers: dict[str, Callable[[Path], dict[Any, Any]]] = {
        ".pdparams": read_paddle,
        ".pdopt": read_paddle,
        ".safetensors": lambda path: dict(read_safetensors(path)),
    }
    if path.suffix not in readers:
        raise ConfigError(
            f"{path} is neither an exported directory nor a .pdparams, .pdopt or .safetensors file."
        )
    try:
        return readers[path.suffix](path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); correct the path.") from None


def image_of(
    tensors: Mapping[str, Raw], meta: Mapping[str, Any], step: int, tell: Callable[[int], None]
) -> tuple[ImageInfo, memoryview]:
    """One image of all ``tensors``; ``tell`` hears of the bytes that were copied."""
    specs, offset = [], 0
    for name, raw in sorted(tensors.items()):
        offset = plan.aligned(offset)
        specs.append(TensorSpec(name, raw.dtype, raw.shape, "replicated", offset, raw.data.nbytes))
        offset += raw.data.nbytes
    image = memoryview(mmap.mmap(-1, max(1, offset)))
    for spec in specs:
        image[spec.offset : spec.offset + spec.nbytes] = tensors[spec.name].data
        tell(spec.nbytes)
    return ImageInfo(step, 0, 1, tuple(specs), dict(meta)), image[:offset]
