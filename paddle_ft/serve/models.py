"""Published versions of models in a store, and how one comes to this machine.

    models/manifest/<name>/<version>.json                  what a version consists of
    models/signature/<name>/<version>-<digest>.json        who vouches for that manifest
    models/blob/<2 digits>/<sha256>                        blocks, shared by all versions and models

Invariant: a version exists when its manifest is stored, with all its blocks stored before; it is
never changed. Whoever loads it verifies every byte against the manifest, and the manifest against
the signature.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from paddle_ft.checkpoint.manifest import canonical
from paddle_ft.checkpoint.sign import Trust
from paddle_ft.checkpoint.store import Store
from paddle_ft.errors import CheckpointDamaged, CheckpointMismatch, ConfigError, StoreMissing
from paddle_ft.serve.types import ModelInfo

_ROOT = "models/"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
_MANIFEST = re.compile(rf"{_ROOT}manifest/([^/]+)/(\d{{8}})\.json\Z")
_BLOCK_BYTES_MAX = 64 * 2**20


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Block(_Part):
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    nbytes: int = Field(ge=1, le=_BLOCK_BYTES_MAX)


class File(_Part):
    path: str
    """Below the folder of the model, with ``/``."""
    blocks: tuple[Block, ...]

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    @model_validator(mode="after")
    def _inside(self) -> Self:
        path = PurePosixPath(self.path)
        if path.is_absolute() or not path.parts or {"..", "."} & set(self.path.split("/")):
            raise ValueError("the path of a file leads out of its folder")
        if "\0" in self.path or len(self.path) > 500:
            raise ValueError("the path of a file is none")
        return self


class Version(_Part):
    """The manifest of one version."""

    format: Literal[1] = 1
    kind: Literal["model"] = "model"
    name: str
    version: int = Field(ge=1, lt=10**8)
    created_s: float
    """Seconds since 1970."""
    paddle: str
    """Version of Paddle that published it; "" if none was there."""
    info: ModelInfo | None
    """None for a pipeline, of which only its own code knows."""
    files: tuple[File, ...]
    source: dict[str, str | int] = {}
    """Where it comes from: job, step."""

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def encode(self) -> bytes:
        content: bytes = canonical(self.model_dump(mode="json"))
        return content


@dataclass(frozen=True, slots=True)
class VersionRef:
    """What is to be registered of a version: enough to load it, and nothing else."""

    name: str
    version: int
    digest: str
    """sha256 of the manifest, hex."""


def check_name(name: str) -> str:
    """``name``; raises ConfigError if no model can have it."""
    if not _NAME.match(name):
        raise ConfigError(
            f"{name!r} cannot be the name of a model; use 1 to 100 letters, digits, dots, hyphens "
            f"and _, the first a letter or a digit."
        )
    return name


def manifest_name(name: str, version: int) -> str:
    return f"{_ROOT}manifest/{name}/{version:08d}.json"


def signature_name(name: str, version: int, content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()
    return f"{_ROOT}signature/{name}/{version:08d}-{digest[:16]}.json"


def blob_name(digest: str) -> str:
    return f"{_ROOT}blob/{digest[:2]}/{digest}"


def list_versions(store: Store, name: str = "") -> dict[str, list[int]]:
    """The versions of each model (of ``name`` alone), oldest first."""
    prefix = f"{_ROOT}manifest/{check_name(name)}/" if name else f"{_ROOT}manifest/"
    found: dict[str, list[int]] = {}
    for info in store.find(prefix):
        if match := _MANIFEST.match(info.name):
            found.setdefault(match[1], []).append(int(match[2]))
    return {name: sorted(versions) for name, versions in sorted(found.items())}


def read_version(
    store: Store, name: str, version: int | None, trust: Trust, digest: str | None = None
) -> tuple[Version, VersionRef]:
    """The manifest of a version, verified; ``version`` None: the newest.

    With ``digest`` it must be that very manifest. Raises StoreMissing (it says what there is),
    CheckpointDamaged, CheckpointMismatch for what is of another format, StoreError.
    """
    check_name(name)
    if version is None:
        versions = list_versions(store, name).get(name)
        if not versions:
            raise StoreMissing(_missing(store, name, None))
        version = versions[-1]
    place = manifest_name(name, version)
    try:
        content = store.get(place)
    except StoreMissing:
        raise StoreMissing(_missing(store, name, version)) from None
    found = hashlib.sha256(content).hexdigest()
    if digest is not None and found != digest:
        raise CheckpointDamaged(
            f"{store.url}/{place} is not the {name} {version} that its group serves: replicas of a "
            f"group need one --store."
        )
    trust.check(store, place, content, signature_name(name, version, content))
    manifest = _decode(content, f"{store.url}/{place}")
    if (manifest.name, manifest.version) != (name, version):
        raise CheckpointMismatch(
            f"{store.url}/{place} is the manifest of {manifest.name} {manifest.version}; it was "
            f"copied to a wrong name."
        )
    return manifest, VersionRef(name, version, found)


def _decode(content: bytes, where: str) -> Version:
    try:
        wire = json.loads(content)
    except (ValueError, RecursionError):
        wire = None
    if not isinstance(wire, dict):
        raise CheckpointDamaged(f"{where} is damaged; load another version or publish it again.")
    if (wire.get("format"), wire.get("kind")) != (1, "model"):
        raise CheckpointMismatch(
            f"{where} is of format {wire.get('format')!r}, which this version of paddle_ft does "
            f"not read; update paddle_ft."
        )
    try:
        return Version.model_validate(wire)
    except ValidationError as error:
        raise CheckpointDamaged(
            f"{where} is damaged ({error.errors()[0]['msg']}); load another version or publish it "
            f"again."
        ) from None


def _missing(store: Store, name: str, version: int | None) -> str:
    known = list_versions(store)
    if name not in known:
        names = ", ".join(known) or "none"
        return f"{store.url} holds no model {name}; its models are: {names}."
    there = ", ".join(map(str, known[name][-20:]))
    return f"{store.url} holds no version {version} of {name}; there are {there}."
