"""Checkpoints without a launcher, for a script or a notebook: ``save``, ``load``, ``steps``.

    handle = ft.checkpoint.save(url, {"model": model.state_dict(), "epoch": 3}, step=7)
    handle.wait()                                  # committed: it will load
    state = ft.checkpoint.load(url)                # the newest that is intact
    heads = ft.checkpoint.load(url, names="model/head.*")
    ft.checkpoint.steps(url)                       # [7]

There is no etcd here, so the newest marker in the store is the head. Each process is an owner of
its own (``retention``): two that save to one URL are told so and lose nothing, but which one's
checkpoint is the newest is then decided by who commits last.

Memory: ``SAVES_MAX`` copies of the state; a further ``save`` waits until one is written.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import mmap
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paddle_ft import config as settings
from paddle_ft.checkpoint import commit, layout, plan, retention, write
from paddle_ft.checkpoint.collect import collect, release
from paddle_ft.checkpoint.deltas import Prints
from paddle_ft.checkpoint.manifest import ITEM_BYTES, Manifest
from paddle_ft.checkpoint.restore import fetch
from paddle_ft.checkpoint.sign import Trust
from paddle_ft.checkpoint.snapshot import Source, array_of, dtype_name, nbytes_of, write_tensor
from paddle_ft.checkpoint.store import Store, open_store
from paddle_ft.checkpoint.store_directory import DirectoryStore
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import CheckpointDamaged, CheckpointMismatch, ConfigError, StoreError
from paddle_ft.plain import from_plain, to_plain
from paddle_ft.types import CommitRef, Head, ImageInfo, TensorSpec

_log = logging.getLogger(__name__)
SAVES_MAX = 2


class SaveHandle:
    """A checkpoint on its way; the state may be changed since ``save`` has returned."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._ref: CommitRef | None = None

    def done(self) -> bool:
        return self._done.is_set()

    def wait(self, timeout_s: float | None = None) -> CommitRef:
        """Returns once it is committed; raises what went wrong, TimeoutError if it takes longer."""
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"the checkpoint was not committed within {timeout_s} s")
        if self._error is not None:
            raise self._error
        assert self._ref is not None
        return self._ref

    def _finish(self, ref: CommitRef | None, error: BaseException | None) -> None:
        self._ref, self._error = ref, error
        self._done.set()


def save(
    url: str,
    state: Mapping[str, Any],
    step: int,
    *,
    keep: retention.Keep | None = None,
    metrics: Mapping[str, float] | None = None,
    config: CheckpointConfig | None = None,
) -> SaveHandle:
    """Copies ``state`` and writes it in the background; only what changed is written.

    ``state``: dicts, lists and tuples of tensors, arrays, numbers, strings and None. ``keep``:
    which older ones stay (``KeepLast(3)``); all, if it is not given. ``metrics`` are what
    ``KeepBest`` looks at. Raises ConfigError for a URL or a state that cannot be saved; what the
    store has against it comes out of ``wait``.
    """
    writer = _writer(url, config or _config())
    writer.slots.acquire()
    try:
        image = _image_of(state, step, dict(metrics or {}))
    except BaseException:
        writer.slots.release()
        raise
    handle = SaveHandle()
    writer.start(handle, image, keep)
    return handle


def save_image(
    url: str,
    info: ImageInfo,
    memory: memoryview,
    *,
    keep: retention.Keep | None = None,
    config: CheckpointConfig | None = None,
) -> SaveHandle:
    """As ``save``, of an image that is in ``memory`` and stays as it is until it is written."""
    writer = _writer(url, config or _config())
    writer.slots.acquire()
    handle = SaveHandle()
    writer.start(handle, (info, memory), keep)
    return handle


def load(
    url: str,
    step: int | None = None,
    names: str | Sequence[str] | None = None,
    *,
    config: CheckpointConfig | None = None,
) -> dict[str, Any]:
    """The state that was saved: of ``step``, or the newest that is intact.

    Arrays come back as arrays; Paddle tensors too, unless paddle is loaded in this process
    (bfloat16 as uint16). With ``names``, patterns such as ``model/backbone.*``, a flat dict of
    the tensors that match; nothing else is read. So too for what a training session saved.
    Raises CheckpointMismatch if there is no such checkpoint, CheckpointDamaged, StoreError.
    """
    store = open_store(url, config or _config())
    refs = [r for r in commit.list_commits(store) if step is None or r.step == step]
    if not refs:
        what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise CheckpointMismatch(f"{store.url} holds {what}; correct the URL or the step.")
    patterns = [names] if isinstance(names, str) else names
    trust = Trust.of(config or _config())
    error: CheckpointDamaged | None = None
    for ref in refs:
        try:
            return _load(store, ref, patterns, trust)
        except CheckpointDamaged as damage:
            _log.warning("%s", damage)
            error = error or damage
    assert error is not None
    raise error


def steps(url: str, *, config: CheckpointConfig | None = None) -> list[int]:
    """The steps of all committed checkpoints, in ascending order."""
    store = open_store(url, config or _config())
    return sorted({ref.step for ref in commit.list_commits(store)})


def _config() -> CheckpointConfig:
    return settings.load({}, os.environ).config.checkpoint


# ---------------------------------------------------------------- saving


@dataclass(slots=True)
class _Writer:
    """All saves of this process to one URL, one at a time."""

    store: Store
    config: CheckpointConfig
    trust: Trust
    slots: threading.BoundedSemaphore
    last: SaveHandle | None = None
    """Of the newest save; the next one is written after it."""
    owner: str = ""
    head: Head | None = None
    manifests: dict[str, Manifest] = field(default_factory=dict)
    prints: Prints = field(default_factory=Prints)

    def start(
        self, handle: SaveHandle, image: tuple[ImageInfo, memoryview], keep: retention.Keep | None
    ) -> None:
        """Writes on a thread that the interpreter waits for: a script's last save gets written."""
        with _writers_lock:
            before, self.last = self.last, handle
        threading.Thread(
            target=self._run, args=(handle, before, image, keep), name="checkpoint-save"
        ).start()

    def _run(
        self,
        handle: SaveHandle,
        before: SaveHandle | None,
        image: tuple[ImageInfo, memoryview],
        keep: retention.Keep | None,
    ) -> None:
        if before is not None:
            before._done.wait()
        ref: CommitRef | None = None
        failure: BaseException | None = None
        try:
            ref = self._save(image, keep)
        except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
            _log.error("The checkpoint of step %d was not saved: %s", image[0].step, error)
            failure = error
        finally:
            self.slots.release()
            handle._finish(ref, failure)

    def _save(self, image: tuple[ImageInfo, memoryview], keep: retention.Keep | None) -> CommitRef:
        after = self._begin()
        head, parent = self.head, None
        if head is not None:
            with suppress(CheckpointDamaged):  # nothing of it can be referred to, then
                parent = (head.newest, self._manifest(head.newest))
        part = write.write_part(
            self.store,
            [image],
            write.Share(self.owner, (head.newest.sequence if head else 0) + 1, 0, "alone", parent),
            self.config,
            prints=self.prints,
        )
        listing = write.read_part(self.store, part)
        parents = {parent[0].manifest: parent[1]} if parent else {}
        manifest = plan.merge(
            [listing], head=head, parents=parents, created_s=time.time(), after=after
        )
        ref = write.store_manifest(self.store, manifest)
        self.trust.sign(self.store, ref, manifest)
        self.manifests[ref.manifest] = manifest
        self.head = retention.next_head(
            head, ref, keep or retention.KeepAll(), commit.identify(self.store), self._metrics(keep)
        )
        commit.mark_committed(self.store, self.head)
        for name in self.manifests.keys() - plan.kept(self.head):
            del self.manifests[name]
        if keep is not None:
            collect(self.store, self.head, self.owner)
        return ref

    def _begin(self) -> int:
        """Finds the head, once; the newest sequence in the store, whoever wrote it."""
        if not self.owner:
            owner = commit.new_owner()
            commit.identify(self.store)
            self.head = commit.adopt(self.store, owner)
            self.owner = owner
        newest = commit.newest_head(self.store)
        if newest is None or self.head is None or newest.newest == self.head.newest:
            return newest.newest.sequence if newest else 0
        parsed = layout.parse(newest.newest.manifest)
        if parsed is not None and parsed.owner != self.owner:
            _log.warning(
                "Somebody else is saving to %s too: step %d is not of this process. Nothing is "
                "lost, but give each its own directory or prefix.",
                self.store.url,
                newest.newest.step,
            )
        return newest.newest.sequence

    def _manifest(self, ref: CommitRef) -> Manifest:
        if ref.manifest not in self.manifests:
            self.manifests[ref.manifest] = commit.read_manifest(self.store, ref, self.trust)
        return self.manifests[ref.manifest]

    def _metrics(self, keep: retention.Keep | None) -> dict[int, dict[str, float]]:
        """The metrics of all that may be kept, by sequence."""
        found: dict[int, dict[str, float]] = {}
        if keep is not None and self.head is not None:
            for ref in (self.head.newest, *self.head.lineage):
                with suppress(CheckpointDamaged):
                    self._manifest(ref)
        for manifest in self.manifests.values():
            metrics = manifest.meta.get("metrics")
            if isinstance(metrics, dict):
                found[manifest.sequence] = metrics
        return found


_writers: dict[tuple[int, str, CheckpointConfig], _Writer] = {}
"""By process, too: a forked child is another writer."""
_writers_lock = threading.Lock()


def _writer(url: str, config: CheckpointConfig) -> _Writer:
    store = open_store(url, config)
    with _writers_lock:
        key = (os.getpid(), store.url, config)
        if key not in _writers:
            slots = threading.BoundedSemaphore(SAVES_MAX)
            _writers[key] = _Writer(store, config, Trust.of(config), slots)
        return _writers[key]


@atexit.register
def _say_that_it_is_over() -> None:
    """So that those who come after need not wait a day to collect what this process leaves."""
    for (pid, url, config), writer in _writers.items():
        if isinstance(writer.store, DirectoryStore) and not writer.store.root.exists():
            continue  # it was removed, and is not to be made again for that
        if pid == os.getpid() and writer.owner:
            with suppress(StoreError):
                release(open_store(url, config.model_copy(update={"attempts": 1})), writer.owner)


def _image_of(
    state: Mapping[str, Any], step: int, metrics: dict[str, float]
) -> tuple[ImageInfo, memoryview]:
    """A copy of ``state`` in host memory."""
    tensors: dict[str, Any] = {}

    def take(where: str, value: object) -> dict[str, Any] | None:
        is_array = isinstance(value, np.ndarray)
        if not (is_array or hasattr(value, "data_ptr")) or dtype_name(value) not in ITEM_BYTES:
            return None
        name = where.removeprefix("state/")
        if name in tensors:
            raise ConfigError(f"{where}: two tensors have the same path; use keys without '/'.")
        tensors[name] = value
        return {"name": name, "array": is_array}

    tree = to_plain(dict(state), "state", take)
    specs, offset = [], 0
    for name, tensor in tensors.items():
        offset = plan.aligned(offset)
        shape = tuple(int(n) for n in tensor.shape)
        size = nbytes_of(tensor)
        specs.append(TensorSpec(name, dtype_name(tensor), shape, "replicated", offset, size))
        offset += size
    memory = mmap.mmap(-1, max(1, offset))
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for spec in specs:
        source = Source.of(tensors[spec.name], 0, spec.nbytes, spec.offset)
        source.copy(address, lambda: False)
    meta = {"tree": tree, "metrics": metrics}
    return ImageInfo(step, 0, 1, tuple(specs), meta), memoryview(memory)[:offset]


# ---------------------------------------------------------------- loading


def _load(
    store: Store, ref: CommitRef, patterns: Sequence[str] | None, trust: Trust
) -> dict[str, Any]:
    manifest = commit.read_manifest(store, ref, trust)
    wanted = plan.plan_read(manifest, [0], patterns)
    # Views of it are handed out; it goes when the last of them does.
    image = memoryview(mmap.mmap(-1, max(1, wanted.nbytes)))
    fetch(store, ref.manifest, wanted.targets, image)
    found = {spec.name: spec for spec in wanted.tensors[0]}

    def array(name: str) -> np.ndarray[Any, Any]:
        spec = found[name]
        return array_of(spec.dtype, spec.shape, image[spec.offset : spec.offset + spec.nbytes])

    def give(reference: dict[str, Any]) -> object:
        name = reference["name"]
        paddle = sys.modules.get("paddle")
        if reference["array"] or paddle is None:
            return array(name)
        spec = found[name]
        tensor = paddle.empty(list(spec.shape), dtype=spec.dtype)
        write_tensor(tensor, image[spec.offset : spec.offset + spec.nbytes])
        return tensor

    if patterns is not None or "tree" not in manifest.meta:
        return {name: array(name) for name in found}
    try:
        state = from_plain(manifest.meta["tree"], give)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointDamaged(
            f"{store.url}/{ref.manifest} describes a state that is not in it ({error}); use an "
            f"older checkpoint."
        ) from None
    assert isinstance(state, dict)
    return state
