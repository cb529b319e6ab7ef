"""The stores that the contract is checked on: the simulator's model, fsspec's memory, a directory,
and a real S3 server; each test gets an empty one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from paddle_ft.checkpoint.store import Store, open_store
from tests.integration.s3_server import S3Server
from tests.sim.model_store import ModelStore

_numbers = itertools.count()
KINDS = ["model", "memory", "directory", pytest.param("s3", marks=pytest.mark.s3)]


@dataclass(frozen=True)
class Bucket:
    """A bucket of a running server; ``url`` is ``s3://name``."""

    server: S3Server
    url: str

    def open(self, prefix: str, **settings: object) -> Store:
        return open_store(f"{self.url}/{prefix}", self.server.config(**settings))

    def fresh(self, **settings: object) -> Store:
        """A store that nobody else uses."""
        return self.open(f"{next(_numbers)}/a", **settings)


def served_bucket() -> Iterator[Bucket]:
    """A server with one bucket, its credentials in the environment; for fixtures."""
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield Bucket(server, server.bucket("checkpoints"))


@pytest.fixture(scope="session", params=KINDS)
def store_place(request: pytest.FixtureRequest) -> Iterator[str | Bucket]:
    """The kind of store; for S3 a bucket of one server for the whole run."""
    if request.param == "s3":
        yield from served_bucket()
    else:
        yield request.param


@pytest.fixture
def store(store_place: str | Bucket, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if isinstance(store_place, Bucket):
        return store_place.fresh()
    if store_place == "model":
        return ModelStore()
    if store_place == "memory":
        return open_store(f"memory://contract-{next(_numbers)}/a")
    return open_store(str(tmp_path / "deep" / "store"))
