"""A Paddle model from publishing to unmodified clients, changed and hurt under their requests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.replica_world import ADMIN, ReplicaProcess, replica
from tests.test_tidy import ROOT

pytestmark = [pytest.mark.paddle, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a store of two versions, and what they give."""
    place = tmp_path_factory.mktemp("digits")
    script = ROOT / "tests/integration/serve_scripts/two_digits.py"
    told = subprocess.run(
        [sys.executable, str(script), str(place / "store")],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=200,
        check=True,
    ).stdout
    return place, json.loads(told.splitlines()[-1])


def over_http(made: ReplicaProcess, x: Any) -> Any:
    """Scores by plain HTTP."""
    data = {"name": "image", "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}
    status, _, answer = made.ask("POST", "/v2/models/digits/infer", {"inputs": [data]})
    assert status == 200, answer
    (found,) = answer["outputs"]
    return np.array(found["data"], "f4").reshape(found["shape"])


def over_triton(made: ReplicaProcess, x: Any, kind: str) -> Any:
    module = pytest.importorskip(f"tritonclient.{kind}")
    client = module.InferenceServerClient(getattr(made, kind))
    try:
        given = module.InferInput("image", list(x.shape), "FP32")
        given.set_data_from_numpy(x)
        return client.infer("digits", [given]).as_numpy("scores")
    finally:
        client.close()


def is_near(got: Any, wanted: Any) -> bool:
    return bool(np.abs(np.asarray(got) - np.asarray(wanted, "f4")).max() < 1e-4)


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_tritonclient_is_served_and_loads_a_version(
    world: tuple[Path, Any], wait_for: Callable[..., None], kind: str
) -> None:
    place, told = world
    x = np.array(told["x"], "f4")
    module = pytest.importorskip(f"tritonclient.{kind}")
    with replica(place, "--spares", "0", models=["digits=1"]) as made:
        client = module.InferenceServerClient(getattr(made, kind))
        assert client.is_server_live()
        wait_for(client.is_server_ready, 120)
        assert is_near(over_triton(made, x, kind), told["scores"][0])
        admin = {name.lower(): value for name, value in ADMIN.items()}
        client.load_model("digits", headers=admin)
        assert is_near(over_triton(made, x, kind), told["scores"][1])
        policy = {"version_policy": {"specific": {"versions": [1]}}}
        client.load_model("digits", headers=admin, config=json.dumps(policy))
        assert is_near(over_triton(made, x, kind), told["scores"][0])
        client.unload_model("digits", headers=admin)
        wait_for(lambda: not client.is_server_ready())
        client.close()


def test_nothing_fails_while_a_version_comes_and_workers_go(
    world: tuple[Path, Any], wait_for: Callable[..., None]
) -> None:
    place, told = world
    x = np.array(told["x"], "f4")
    seen: list[int] = []
    failures: list[str] = []
    stop = threading.Event()

    def ask(made: ReplicaProcess) -> None:
        while not stop.is_set():
            try:
                got = over_http(made, x)
            except Exception as error:  # noqa: BLE001 - each is a failure
                failures.append(repr(error))
                return
            versions = [n for n, scores in enumerate(told["scores"], 1) if is_near(got, scores)]
            seen.append(versions[0] if versions else 0)

    with replica(place, models=["digits=1"]) as made:
        wait_for(made.is_ready, 120)
        threads = [threading.Thread(target=ask, args=(made,)) for _ in range(2)]
        try:
            for thread in threads:
                thread.start()
            wait_for(lambda: len(seen) > 5)
            assert made.load("digits") == (200, None)
            wait_for(lambda: 2 in seen)
            for _ in range(2):
                for worker in workers_of(made):
                    count = len(seen)
                    os.kill(worker, signal.SIGKILL)
                    wait_for(lambda count=count: len(seen) > count + 5, 60)
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
        assert not failures
        assert set(seen) == {1, 2}
        assert seen[-1] == 2


def workers_of(made: ReplicaProcess) -> list[int]:
    children = Path(f"/proc/{made.pid}/task").glob("*/children")
    return [int(pid) for path in children for pid in path.read_text().split()]
