"""Makes a version of a model out of a layer, of inference files or of a pipeline.

What the store has, with its size, is not stored again (``cut``): what it has lost is. The manifest
is put last, under the first number that is free: of two who publish at the same time each gets its
own.
"""

from __future__ import annotations

import ast
import importlib.metadata
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paddle_ft.checkpoint.content import digest_of
from paddle_ft.checkpoint.crew import Crew
from paddle_ft.checkpoint.sign import Trust
from paddle_ft.checkpoint.store import Store, open_store
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import (
    ConfigError,
    MachineError,
    PaddleFTError,
    StoreMissing,
    StoreUnavailable,
)
from paddle_ft.failpoints import failpoint
from paddle_ft.serve import pipeline
from paddle_ft.serve.cut import cut
from paddle_ft.serve.models import (
    Block,
    File,
    Version,
    VersionRef,
    blob_name,
    check_name,
    list_versions,
    manifest_name,
    read_version,
    signature_name,
)
from paddle_ft.serve.program import DESCRIPTION, Description, find_files
from paddle_ft.serve.types import ModelInfo

_THREADS = 8
_TRIES = 100
_FILES_MAX = 10_000
_SKIPPED = ("__pycache__",)
_PROGRAM = ("inference.json", "inference.pdmodel")
"""As ``export`` calls it."""


@dataclass(frozen=True, slots=True)
class Published:
    """A version that is in the store, and what it took; ``ref`` is what is to be registered."""

    ref: VersionRef
    store_url: str
    nbytes: int
    nbytes_new: int
    """Of the blocks that no version before had."""
    info: ModelInfo | None
    """None for a pipeline."""
    signed: bool


def publish(
    model: Any,
    name: str,
    store_url: str,
    *,
    input_spec: Sequence[Any] | None = None,
    outputs: Sequence[str] = (),
    batched: bool | None = None,
    warm_up: Mapping[str, Sequence[int]] | None = None,
    source: Mapping[str, str | int] | None = None,
    config: CheckpointConfig | None = None,
) -> Published:
    """Publishes ``model`` as the next version of ``name``.

    Args:
        model: a ``paddle.nn.Layer``; or the path of inference files (a folder with one model, a
            prefix), or of a folder with a ``pipeline.py`` and what it needs.
        store_url: a directory, ``file://``, ``s3://bucket/prefix``.
        input_spec: of a layer, as for ``paddle.jit.to_static``.
        outputs: names for the outputs, in their order; default: Paddle's own.
        batched: whether rows of several requests may be joined; default: if the first dimension of
            all inputs and outputs is free.
        warm_up: shape of each input for the requests before the first real one.
        source: where it comes from (job, step), for people.

    Raises ConfigError for what cannot be published, StoreError.
    """
    check_name(name)
    config = config or CheckpointConfig()
    store, trust = open_store(store_url, config), Trust.of(config)
    told = Description(
        outputs=tuple(outputs),
        batched=batched,
        warm_up={n: tuple(shape) for n, shape in (warm_up or {}).items()},
    )
    with tempfile.TemporaryDirectory(prefix="paddle_ft-publish-") as scratch:
        paddle = _paddle_version()
        if isinstance(model, str | os.PathLike):
            files = _listed(Path(model))
        else:
            from paddle_ft.serve.export import export_layer

            paddle = export_layer(model, Path(scratch), input_spec)
            files = _listed(Path(scratch))
        if told != Description():
            if pipeline.FILE in files:
                raise ConfigError(
                    f"{model} is a pipeline, which says itself what it takes and gives: outputs, "
                    "batched and warm_up are for a single model."
                )
            if DESCRIPTION in files:
                raise ConfigError(f"{model} has its own {DESCRIPTION}; change that instead.")
            files[DESCRIPTION] = Path(scratch) / DESCRIPTION
            files[DESCRIPTION].write_text(told.model_dump_json(exclude_defaults=True))
        return _store(store, trust, name, files, paddle, dict(source or {}))


def _listed(path: Path) -> dict[str, Path]:
    """The files to be stored, by their name in the published folder. Raises ConfigError."""
    if not (path / pipeline.FILE).is_file():
        found = find_files(path)
        files = {file.name: file for file in (found.program, found.parameters)}
        described = found.program.parent / DESCRIPTION
        return files | ({DESCRIPTION: described} if described.is_file() else {})
    _check_pipeline(path / pipeline.FILE)
    files = {}
    for root, folders, names in os.walk(path):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED and not f.startswith("."))
        for file in sorted(names):
            if not file.startswith("."):
                full = Path(root) / file
                files[full.relative_to(path).as_posix()] = full
    if len(files) > _FILES_MAX:
        raise ConfigError(f"{path} has {len(files)} files; a model may have {_FILES_MAX}.")
    return files


def _check_pipeline(path: Path) -> None:
    """What can be seen without running it."""
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{path} is not Python: {error}.") from None
    if not any(isinstance(node, ast.ClassDef) and node.bases for node in tree.body):
        raise ConfigError(f"{path} defines no class derived from paddle_ft.serve.Pipeline.")


def _info_of(files: Mapping[str, Path], name: str) -> ModelInfo | None:
    """Of a Paddle model, read from the files that are to be stored."""
    if pipeline.FILE in files:
        return None
    from paddle_ft.serve.predictor import info_of
    from paddle_ft.serve.program import Files, description_in

    program = next(p for p in files.values() if p.suffix in (".json", ".pdmodel"))
    told = description_in(files[DESCRIPTION]) if DESCRIPTION in files else Description()
    info = info_of(Files(program, program.with_suffix(".pdiparams")), told, name, "")
    _check_warm_up(info, told)
    return info


def _check_warm_up(info: ModelInfo, told: Description) -> None:
    declared = {feature.name: feature.shape for feature in info.inputs}
    for name, shape in told.warm_up.items():
        if name not in declared:
            raise ConfigError(
                f"warm_up names the input {name}, and {info.name} takes {', '.join(declared)}."
            )
        fits = len(shape) == len(declared[name])
        if not fits or any(d not in (-1, s) for d, s in zip(declared[name], shape, strict=True)):
            raise ConfigError(
                f"warm_up gives {name} the shape {list(shape)}, and {info.name} takes "
                f"{list(declared[name])} (-1: any)."
            )


def _store(
    store: Store,
    trust: Trust,
    name: str,
    files: Mapping[str, Path],
    paddle: str,
    source: dict[str, str | int],
) -> Published:
    info = _info_of(files, name)
    versions = list_versions(store, name).get(name, [])
    blocks = _Blocks(store)
    with Crew(_THREADS, "publish") as crew:
        listed = [_put_file(blocks, crew, path, file) for path, file in files.items()]
    nbytes_new = sum(blocks.new.values())
    failpoint("publish.blobs")
    if versions and (before := _of_same_step(store, trust, name, versions[-1], source, listed)):
        return replace(before, nbytes_new=nbytes_new)
    number = versions[-1] + 1 if versions else 1
    for version in range(number, number + _TRIES):
        manifest = Version(
            name=name,
            version=version,
            created_s=time.time(),
            paddle=paddle,
            info=info,
            files=tuple(listed),
            source=source,
        )
        content, place = manifest.encode(), manifest_name(name, version)
        signature = signature_name(name, version, content)
        trust.sign_content(store, place, content, signature)
        failpoint("publish.signed")
        if store.put(place, content, if_absent=True) or _is_ours(store, place, content):
            ref = VersionRef(name, version, digest_of(content))
            signed = trust.signer is not None
            return Published(ref, store.url, manifest.nbytes, nbytes_new, info, signed)
        if trust.signer is not None:
            store.delete([signature])
    raise StoreUnavailable(f"{store.url}: {_TRIES} versions of {name} were published by others.")


def _of_same_step(
    store: Store,
    trust: Trust,
    name: str,
    version: int,
    source: Mapping[str, str | int],
    files: Sequence[File],
) -> Published | None:
    """That version, if it is of the same step of the same job, with the same weights.

    A job that is started again after its end has nothing new to publish. The program is not
    looked at: where it was traced from stands in it, too.
    """
    if not {"job", "step"} <= source.keys():
        return None
    signed = trust.signer is not None
    strict = replace(trust, verify="required") if signed else trust
    try:
        manifest, ref = read_version(store, name, version, strict)
    except PaddleFTError:
        return None
    if any(manifest.source.get(key) != source[key] for key in ("job", "step")):
        return None

    def kept(given: Sequence[File]) -> list[File]:
        return sorted((f for f in given if not f.path.startswith(_PROGRAM)), key=lambda f: f.path)

    if kept(manifest.files) != kept(files):
        return None
    return Published(ref, store.url, manifest.nbytes, 0, manifest.info, signed)


def _is_ours(store: Store, place: str, content: bytes) -> bool:
    """Whether what is there is what was to be put: a first attempt that seemed to fail has."""
    try:
        return store.get(place) == content
    except StoreMissing:
        return False


class _Blocks:
    """Puts blocks that the store does not show; listed once for each two first digits."""

    def __init__(self, store: Store) -> None:
        self.new: dict[str, int] = {}
        """Bytes by digest of what was put."""
        self._store = store
        self._there: dict[str, dict[str, int]] = {}
        self._locks = {f"{first:02x}": threading.Lock() for first in range(256)}

    def put(self, block: memoryview) -> Block:
        digest = digest_of(block)
        name = blob_name(digest)
        with self._locks[digest[:2]]:
            there = self._there.get(digest[:2])
            if there is None:
                found = self._store.find(name.removesuffix(digest))
                there = self._there[digest[:2]] = {info.name: info.nbytes for info in found}
            size = there.get(name)
            there[name] = len(block)
        if size is None:
            if self._store.put(name, block, if_absent=True):
                self.new[digest] = len(block)
        elif size != len(block):
            self._store.put(name, block)
            self.new[digest] = len(block)
        return Block(digest=digest, nbytes=len(block))


def _put_file(blocks: _Blocks, crew: Crew, path: str, file: Path) -> File:
    """Stores the blocks of one file."""
    with _mapped(file) as data:
        starts, at = [], 0
        for size in cut(data, parameters=file.suffix == ".pdiparams"):
            starts.append(data[at : at + size])
            at += size
        try:
            listed = tuple(crew.map(blocks.put, starts))
        finally:
            for view in starts:
                with suppress(BufferError):
                    view.release()
    return File(path=path, blocks=listed)


@contextmanager
def _mapped(file: Path) -> Iterator[memoryview]:
    """The bytes of ``file``. Raises MachineError if it cannot be read."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            memory = mmap.mmap(stream.fileno(), size, prot=mmap.PROT_READ) if size else None
    except OSError as error:
        raise MachineError(f"{file} cannot be read ({error.strerror}).") from None
    view = memoryview(memory if memory is not None else b"")
    try:
        yield view
    finally:
        with suppress(BufferError):  # after an error: some thread still reads it
            view.release()
            if memory is not None:
                memory.close()


def _paddle_version() -> str:
    """Of what is installed, without loading it; "" if it is not."""
    for distribution in ("paddlepaddle", "paddlepaddle-gpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""
