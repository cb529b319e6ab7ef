"""Signatures of manifests: who wrote a checkpoint, and that nobody has altered it since.

A manifest names every block by its sha256, so an ed25519 signature of the manifest's name and bytes
covers the whole checkpoint. It stands in an object of its own beside the manifest and is stored
before head moves: what is committed by who has a key is signed.

``checkpoint.verify`` says what is refused on loading: ``required`` whatever is not signed by a
trusted key; ``if-present`` a signature that is wrong or by another key (what has none is taken, so
this finds mistakes, not an attacker who removes the signature); ``off`` nothing. The owner of the
signing key is trusted, too. What a signature does not say is that there is no newer checkpoint:
that is for etcd to know.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from paddle_ft.checkpoint import layout
from paddle_ft.checkpoint.manifest import FORMAT, Manifest, canonical, encode_manifest
from paddle_ft.checkpoint.store import Store
from paddle_ft.config import CheckpointConfig
from paddle_ft.errors import CheckpointDamaged, ConfigError, StoreMissing
from paddle_ft.failpoints import failpoint
from paddle_ft.types import CommitRef

_PURPOSE = b"paddle_ft checkpoint manifest 1\n"
_PUBLIC = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)
PRIVATE_FILE = "checkpoint-sign.pem"
PUBLIC_FILE = "checkpoint-trust.pem"
_FILE_BYTES_MAX = 2**20

Signed = Literal["no", "unchecked", "yes"]
"""``unchecked``: there is a signature, but no key to compare it with, or nobody wants to know."""


@dataclass(frozen=True, slots=True)
class Trust:
    """Whose signatures count, and with which key this process signs."""

    verify: Literal["required", "if-present", "off"] = "if-present"
    signer: Ed25519PrivateKey | None = None
    keys: Mapping[str, Ed25519PublicKey] | None = None
    """The trusted ones, by ``key_id``."""

    @classmethod
    def of(cls, config: CheckpointConfig) -> Trust:
        """What ``config`` asks for; raises ConfigError for a key that cannot be used."""
        signer = _private_key(config.sign_key) if config.sign_key else None
        keys = [key for path in config.trusted_keys for key in _public_keys(path)]
        if signer is not None:
            keys.append(signer.public_key())
        if config.verify == "required" and not keys:
            raise ConfigError(
                "checkpoint.verify is required, but nobody is trusted; name the files with the "
                "public keys in checkpoint.trusted_keys."
            )
        return cls(config.verify, signer, {key_id(key): key for key in keys})

    def sign(self, store: Store, ref: CommitRef, manifest: Manifest) -> None:
        """Stores the signature of ``manifest``, which ``ref`` names; nothing without a key."""
        if self.signer is None:
            return
        content = encode_manifest(manifest)
        assert hashlib.sha256(content).hexdigest() == ref.digest
        self.sign_content(store, ref.manifest, content, layout.signature_name(ref.manifest))

    def sign_content(self, store: Store, name: str, content: bytes, signature: str) -> None:
        """Stores as ``signature`` that of ``content``, which has, or will have, ``name``."""
        if self.signer is None:
            return
        wire = {
            "format": FORMAT,
            "kind": "signature",
            "key": key_id(self.signer.public_key()),
            "ed25519": base64.b64encode(self.signer.sign(_message(name, content))).decode(),
        }
        failpoint("signature.before")
        store.put(signature, canonical(wire))
        failpoint("signature.stored")

    def check(
        self, store: Store, name: str, content: bytes, signature_name: str | None = None
    ) -> Signed:
        """Looks whether ``content``, of the manifest ``name``, is what a trusted key has signed.

        Its signature has ``signature_name``; default: that of a checkpoint's manifest.
        Raises CheckpointDamaged if it is not and ``verify`` minds, StoreError.
        """
        if self.verify == "off" or not self.keys:
            return "unchecked"
        where = f"{store.url}/{name}"
        try:
            wire = store.get(signature_name or layout.signature_name(name))
        except StoreMissing:
            if self.verify == "if-present":
                return "no"
            raise CheckpointDamaged(
                f"{where} is not signed, and checkpoint.verify is required; use one that is "
                f"signed, or look into who wrote it."
            ) from None
        signer, signature = _parse(wire, where)
        if signer not in self.keys:
            raise CheckpointDamaged(
                f"{where} is signed with the key {signer}, which is not trusted; use another "
                f"checkpoint, or add that key to checkpoint.trusted_keys if you know whose it is."
            )
        try:
            self.keys[signer].verify(signature, _message(name, content))
        except InvalidSignature:
            raise CheckpointDamaged(
                f"{where} is not what was signed: it, or its signature, has been altered or "
                f"belongs to another checkpoint; use an older checkpoint."
            ) from None
        return "yes"


def key_id(key: Ed25519PublicKey) -> str:
    """Sixteen hex digits that name a public key."""
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()[:16]


def signed_manifests(store: Store) -> frozenset[str]:
    """The manifests that have a signature, be it right or wrong."""
    parsed = (layout.parse(info.name) for info in store.find(layout.SIGNATURES))
    return frozenset(p.manifest for p in parsed if p is not None)


def make_keys(directory: str | Path) -> tuple[Path, Path, str]:
    """Writes a new key pair into ``directory``: the private file, the public file, the key's id.

    Raises ConfigError if that cannot be done; a key that is there is never overwritten.
    """
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    place = Path(directory)
    paths = place / PRIVATE_FILE, place / PUBLIC_FILE
    try:
        place.mkdir(parents=True, exist_ok=True)
        for path, content, mode in zip(paths, (private, public), (0o600, 0o644), strict=True):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
    except FileExistsError as error:
        raise ConfigError(f"{error.filename} is there already; give another directory.") from None
    except OSError as error:
        raise ConfigError(f"No key can be written to {place} ({error.strerror}).") from None
    return *paths, key_id(key.public_key())


def _message(name: str, content: bytes) -> bytes:
    return _PURPOSE + name.encode() + b"\n" + content


def _parse(content: bytes, where: str) -> tuple[str, bytes]:
    """The key's id and the signature; raises CheckpointDamaged."""
    try:
        wire = json.loads(content)
        if wire["format"] != FORMAT or wire["kind"] != "signature":
            raise ValueError("not a signature of this format")
        return str(wire["key"]), base64.b64decode(wire["ed25519"], validate=True)
    except (KeyError, TypeError, ValueError, RecursionError, binascii.Error):
        raise CheckpointDamaged(
            f"The signature of {where} is damaged; use an older checkpoint."
        ) from None


def _private_key(given: str) -> Ed25519PrivateKey:
    """``given`` is the path of a PEM file, or its content."""
    inline = given.lstrip().startswith("-----BEGIN")
    name = "The key in checkpoint.sign_key" if inline else f"The signing key {given}"
    content = given.encode() if inline else _read(given, "checkpoint.sign_key")
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except TypeError:
        raise ConfigError(
            f"{name} is protected by a password; give one without, readable by this user alone."
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(
            f"{name} is not a private key in PEM form; make one with paddle-ft ckpt keygen."
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{name} is not an ed25519 key; make one with paddle-ft ckpt keygen.")
    return key


def _public_keys(path: str) -> Iterator[Ed25519PublicKey]:
    found: Iterable[bytes] = _PUBLIC.findall(_read(path, "checkpoint.trusted_keys"))
    if not found:
        raise ConfigError(
            f"{path} (checkpoint.trusted_keys) holds no public key in PEM form; give the file "
            f"that paddle-ft ckpt keygen calls {PUBLIC_FILE}."
        )
    for content in found:
        try:
            key = serialization.load_pem_public_key(content)
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise ConfigError(
                f"{path} (checkpoint.trusted_keys) holds a key that is not ed25519; remove it."
            )
        yield key


def _read(path: str, setting: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read(_FILE_BYTES_MAX)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise ConfigError(f"{setting}: cannot read {path} ({reason}); correct the path.") from None
