"""Brings a published version to a folder of this machine, every byte of it verified.

    <cache>/<model>/<version>-<digest>/            the files
    <cache>/<model>/<version>-<digest>.json        their manifest, for those who come after

Blocks are fetched in parallel, from folders of other versions where these have them. A folder is
complete or not there. Of a model the few that were used last are kept, and those that some process
holds (``Held``), however old. Memory: ``_THREADS`` blocks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from paddle_ft.checkpoint.content import digest_of
from paddle_ft.checkpoint.crew import Crew
from paddle_ft.checkpoint.sign import Trust
from paddle_ft.checkpoint.store import Store
from paddle_ft.errors import CheckpointDamaged, MachineError, StoreMissing
from paddle_ft.serve.models import Block, File, Version, VersionRef, blob_name, read_version

_THREADS = 8
_KEPT = 3
_YOUNG_S = 3600.0
_TRIES = 3


class Held:
    """While it lives, no process removes ``folder``: a lock that goes with its holder."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError if there is no such folder."""
        self._folder = folder
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # Where a file system has no locks, all goes on without them: then nothing is removed.
        with suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def is_there(self) -> bool:
        """Whether the folder is still the one that is held."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._folder))
        return False

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()


@dataclass(frozen=True, slots=True)
class LoadedVersion:
    folder: Path
    ref: VersionRef
    manifest: Version
    nbytes_fetched: int
    """From the store; the rest was on this machine."""
    held: Held
    """To be closed when the folder is not used any more."""


def load(
    store: Store,
    name: str,
    version: int | None,
    cache: Path,
    *,
    trust: Trust | None = None,
    digest: str | None = None,
    on_progress: Callable[[float], None] = lambda _: None,
) -> LoadedVersion:
    """The folder of a version (None: the newest), ready to be opened.

    ``on_progress`` is called on threads, with the share that is there.

    Raises StoreMissing if there is no such version, CheckpointDamaged if bytes are lost or are not
    those that were published and signed, CheckpointMismatch, MachineError if the cache cannot be
    written, StoreError.
    """
    manifest, ref = read_version(store, name, version, trust or Trust(), digest)
    place = cache / name
    folder = place / f"{ref.version}-{ref.digest[:16]}"
    loader = _Loader(store, place, manifest, on_progress)
    try:
        place.mkdir(parents=True, exist_ok=True)
        held = loader.bring(folder)
        _trim(place, folder)
    except OSError as error:
        raise MachineError(
            f"{name} {ref.version} cannot be written to {place} ({error.strerror}); make room, or "
            f"name a folder that can be written with --cache."
        ) from None
    return LoadedVersion(folder, ref, manifest, loader.nbytes_fetched, held)


class _Loader:
    def __init__(
        self, store: Store, place: Path, manifest: Version, on_progress: Callable[[float], None]
    ) -> None:
        self.nbytes_fetched = 0
        self._nbytes_written = 0
        self._on_progress = on_progress
        self._store, self._place, self._manifest = store, place, manifest

    def bring(self, folder: Path) -> Held:
        """``folder``, intact and held. Other processes may bring and remove it meanwhile."""
        for _ in range(_TRIES):
            with suppress(FileNotFoundError, NotADirectoryError):
                held = Held(folder)
                if self.is_intact(folder) and held.is_there():
                    os.utime(folder)
                    return held
                held.close()
            self._build(folder)
        raise MachineError(
            f"{folder} is not what was written to it; see whether its disk is sound."
        )

    def is_intact(self, folder: Path) -> bool:
        """Whether ``folder`` has the very bytes of the version, and no file besides."""
        if not folder.is_dir():
            return False
        there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
        if there != {file.path for file in self._manifest.files}:
            return False
        with Crew(_THREADS, "verify") as crew:
            return all(crew.map(lambda f: self._is_same(folder / f.path, f), self._manifest.files))

    def _is_same(self, path: Path, file: File) -> bool:
        if path.is_symlink() or path.stat().st_size != file.nbytes:
            return False
        with path.open("rb") as stream:
            return all(digest_of(stream.read(b.nbytes)) == b.digest for b in file.blocks)

    def _build(self, folder: Path) -> None:
        """Puts ``folder`` there anew, unless another process has just done so."""
        scratch = self._scratch()
        near = dict(self._near())
        try:
            with Crew(_THREADS, "fetch") as crew:
                for file in self._manifest.files:
                    self._write(scratch / file.path, file, near, crew)
            (self._place / f"{folder.name}.json").write_bytes(self._manifest.encode())
            with suppress(FileNotFoundError):  # another process does the same
                if folder.exists() and not self.is_intact(folder):
                    folder.rename(self._scratch())
            try:
                scratch.rename(folder)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _scratch(self) -> Path:
        return self._place / f".tmp-{secrets.token_hex(8)}"

    def _write(self, path: Path, file: File, near: dict[str, tuple[Path, int]], crew: Crew) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:

            def copy(item: tuple[Block, int]) -> None:
                block, at = item
                data = self._copy(block, near.get(block.digest)) or self._fetch(block)
                while data:
                    count = os.pwrite(descriptor, data, at)
                    data, at = data[count:], at + count
                self._nbytes_written += block.nbytes
                self._on_progress(min(1.0, self._nbytes_written / self._manifest.nbytes))

            places, at = [], 0
            for block in file.blocks:
                places.append((block, at))
                at += block.nbytes
            for _ in crew.map(copy, places):
                pass
        finally:
            os.close(descriptor)

    def _copy(self, block: Block, found: tuple[Path, int] | None) -> bytes:
        """The block from another version's folder; b"" if it is not there."""
        if found is None:
            return b""
        with suppress(OSError), found[0].open("rb") as stream:
            stream.seek(found[1])
            data = stream.read(block.nbytes)
            if digest_of(data) == block.digest:
                return data
        return b""

    def _fetch(self, block: Block) -> bytes:
        name = blob_name(block.digest)
        which = f"{self._manifest.name} {self._manifest.version}"
        for _ in range(2):  # the first time it may have been altered on its way
            try:
                data = self._store.get(name)
            except StoreMissing:
                raise CheckpointDamaged(
                    f"{which} lacks a block ({self._store.url}/{name}); load another version, or "
                    f"publish it again."
                ) from None
            if digest_of(data) == block.digest:
                self.nbytes_fetched += block.nbytes
                return data
        raise CheckpointDamaged(
            f"A block of {which} has been altered ({self._store.url}/{name}); load another "
            f"version, or remove that object and publish it again."
        )

    def _near(self) -> Iterator[tuple[str, tuple[Path, int]]]:
        """Where blocks of other versions are on this machine; nothing that need be true."""
        for path in self._place.glob("*.json"):
            try:
                other = Version.model_validate_json(path.read_bytes())
            except (OSError, ValueError):
                continue
            for file in other.files:
                at = 0
                for block in file.blocks:
                    yield block.digest, (path.with_suffix("") / file.path, at)
                    at += block.nbytes


def _trim(place: Path, current: Path) -> None:
    """Keeps the folders used last, those in use, and what others are just writing."""
    dated = []
    for path in place.iterdir():
        try:
            modified_s = path.stat().st_mtime
        except FileNotFoundError:  # another process does the same
            continue
        if path.name.startswith(".tmp-"):
            if time.time() - modified_s > _YOUNG_S:
                shutil.rmtree(path, ignore_errors=True)
        elif path.is_dir() and path != current:
            dated.append((modified_s, path))
    for _, path in sorted(dated, reverse=True)[_KEPT - 1 :]:
        _remove(path)


def _remove(folder: Path) -> None:
    """Removes it, unless somebody holds it."""
    gone = folder.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # another process does the same
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.rename(gone)  # whoever has opened it by now sees that it has gone
    except OSError:
        return
    finally:
        os.close(descriptor)
    folder.with_name(f"{folder.name}.json").unlink(missing_ok=True)
    shutil.rmtree(gone, ignore_errors=True)
