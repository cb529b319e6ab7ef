"""The names of the objects in a store.

Pure. Every object is immutable and its name is used once (a nonce sees to that), so that nothing
is ever overwritten and a write that arrives late can harm nobody:

    store.json                                             identity of the store
    data/<owner>/<sequence>-<generation>-<nonce>/<member>.<n>      packed blocks
    parts/<owner>/<sequence>-<generation>-<nonce>/<member>.json    what one member wrote
    manifests/<sequence>-<step>-<owner>-<nonce>.json       everything needed to load
    commits/<the same>.json                                the marker, written after head has moved
    signatures/<the same>.json                             who vouches for the manifest (``sign``)
    pins/<the manifest's>~<who>-<nonce>.json               keeps a checkpoint beyond retention
    owners/<owner>.json, owners/<owner>.over.json          where a history began, that it is over

``owner`` names one history of heads: one job in one etcd, or one process that saves on its own.
``sequence`` is the commit number the writer was working towards: the head's plus one. Both stand
in the name because they are what the collector decides by (see ``retention``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

STORE = "store.json"
DATA = "data/"
PARTS = "parts/"
MANIFESTS = "manifests/"
COMMITS = "commits/"
SIGNATURES = "signatures/"
PINS = "pins/"
OWNERS = "owners/"

Kind = Literal["data", "part", "manifest", "commit", "signature", "pin", "owner", "over"]

_OWNER = r"[A-Za-z0-9_]{1,64}"
_WRITE = re.compile(rf"(data|parts)/({_OWNER})/(\d{{10}})-(\d+)-([0-9a-f]+)/[^/]+\Z")
_COMMIT = re.compile(
    rf"(manifests|commits|signatures)/(\d{{10}})-(\d{{12}})-({_OWNER})-([0-9a-f]+)\.json\Z"
)
_KINDS: dict[str, Kind] = {
    "data": "data",
    "parts": "part",
    "manifests": "manifest",
    "commits": "commit",
    "signatures": "signature",
}
_PIN = re.compile(rf"pins/(\d{{10}}-\d{{12}}-{_OWNER}-[0-9a-f]+)~({_OWNER})-[0-9a-f]+\.json\Z")
_OWNED = re.compile(rf"owners/({_OWNER})(\.over)?\.json\Z")


@dataclass(frozen=True, slots=True)
class Name:
    """What the name of an object says of it."""

    kind: Kind
    owner: str
    sequence: int
    step: int = -1
    """Manifests, markers, signatures and pins only."""
    generation: int = -1
    """Data and parts only."""
    manifest: str = ""
    """Manifests, markers, signatures and pins: the manifest."""


def write_prefix(owner: str, sequence: int, generation: int, nonce: str) -> str:
    """``<owner>/<sequence>-<generation>-<nonce>/``, below ``data/`` and ``parts/``."""
    return f"{owner}/{sequence:010d}-{generation}-{nonce}/"


def manifest_name(sequence: int, step: int, owner: str, nonce: str) -> str:
    return f"{MANIFESTS}{sequence:010d}-{step:012d}-{owner}-{nonce}.json"


def commit_name(manifest: str) -> str:
    """The marker of ``manifest``."""
    return COMMITS + manifest[len(MANIFESTS) :]


def signature_name(manifest: str) -> str:
    """The signature of ``manifest``."""
    return SIGNATURES + manifest[len(MANIFESTS) :]


def pin_name(manifest: str, who: str, nonce: str) -> str:
    return f"{PINS}{manifest[len(MANIFESTS) : -len('.json')]}~{who}-{nonce}.json"


def owner_name(owner: str) -> str:
    return f"{OWNERS}{owner}.json"


def over_name(owner: str) -> str:
    return f"{OWNERS}{owner}.over.json"


def parse(name: str) -> Name | None:
    """What ``name`` says; None if it is not one of ours, which nobody then touches."""
    if match := _WRITE.match(name):
        return Name(_KINDS[match[1]], match[2], int(match[3]), generation=int(match[4]))
    if match := _COMMIT.match(name):
        manifest = MANIFESTS + name.partition("/")[2]
        return Name(_KINDS[match[1]], match[4], int(match[2]), int(match[3]), manifest=manifest)
    if match := _PIN.match(name):
        manifest = f"{MANIFESTS}{match[1]}.json"
        parsed = parse(manifest)
        assert parsed is not None
        return Name("pin", match[2], parsed.sequence, parsed.step, manifest=manifest)
    if match := _OWNED.match(name):
        return Name("over" if match[2] else "owner", match[1], 0)
    return None


def safe_member(member: str) -> str:
    """``member`` as a file name: what is not a letter, digit, dot or dash becomes ``_``."""
    return re.sub(r"[^A-Za-z0-9.-]", "_", member).lstrip(".") or "_"
