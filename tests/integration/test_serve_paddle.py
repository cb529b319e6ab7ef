"""From a session to a served model, with real Paddle of both kinds of file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paddle_ft.checkpoint.sign import Trust
from paddle_ft.checkpoint.store import open_store
from paddle_ft.errors import ConfigError
from paddle_ft.serve.export import export_layer
from paddle_ft.serve.folder import load
from paddle_ft.serve.models import list_versions, read_version
from paddle_ft.serve.predictor import Predictor, Settings, warm_up
from paddle_ft.serve.program import DESCRIPTION, Description
from paddle_ft.serve.publish import publish
from paddle_ft.serve.types import Feature, ModelError
from tests.integration.session_world import ROOT, python_26

pytestmark = pytest.mark.paddle
SCRIPT = Path(__file__).parent / "serve_scripts" / "digits.py"


def test_a_layer_answers_as_it_did_and_refuses_what_it_cannot_take(tmp_path: Path) -> None:
    import paddle

    layer = paddle.nn.Sequential(paddle.nn.Linear(8, 4), paddle.nn.Dropout(0.5))
    spec = [paddle.static.InputSpec([None, 8], "float32", "x")]
    export_layer(layer, tmp_path, spec)
    assert [part.training for part in layer.sublayers(include_self=True)] == [True] * 3
    layer.eval()
    x = np.random.default_rng(0).random((3, 8), dtype="float32")
    wanted = layer(paddle.to_tensor(x)).numpy()
    for exact, off in ((True, 0.0), (False, 1e-5)):
        model = Predictor(tmp_path, "m", "1", Settings(exact=exact))
        assert model.info.inputs == (Feature("x", "FP32", (-1, 8)),)
        warm_up(model, Description(), rows_max=4)
        (given,) = model.run({"x": x}).values()
        assert np.abs(given - wanted).max() <= off
        for wrong in (x[:, :3], x.astype("f8"), x[:0]):
            with pytest.raises(ModelError):
                model.run({"x": wrong})
        assert (model.run({"x": x})[model.info.outputs[0].name] == given).all()
    (tmp_path / DESCRIPTION).write_text(Description(outputs=("a", "b")).model_dump_json())
    with pytest.raises(ConfigError, match="has 1 outputs, and 2 names"):
        Predictor(tmp_path, "m", "1", Settings())
    (tmp_path / DESCRIPTION).unlink()
    if not paddle.is_compiled_with_cuda():
        with pytest.raises(ConfigError, match="not built for gpu:0"):
            Predictor(tmp_path, "m", "1", Settings(device="gpu:0"))
    for name, shape, why in (("z", (1, 8), "takes x"), ("x", (1, 7), "any")):
        with pytest.raises(ConfigError, match=why):
            publish(tmp_path, "m", str(tmp_path / "store"), warm_up={name: shape})
    with pytest.raises(ConfigError, match="cannot be exported"):
        export_layer(layer, tmp_path, [paddle.static.InputSpec([None, 9], "float32", "x")])


@pytest.mark.slow
@pytest.mark.parametrize("version", ["this Paddle", "Paddle 2.6.2"])
def test_what_a_session_publishes_is_served_to_the_bit(version: str, tmp_path: Path) -> None:
    python = sys.executable if version == "this Paddle" else python_26()
    done = subprocess.run(
        [python, str(SCRIPT), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    told = {line["event"]: line for line in lines}

    # Publishing changed nothing in training: neither weights nor mode.
    assert told["trained"] == {"event": "trained", "same": True, "training": True}
    assert told["loaded"]["source"] == {"1": {"step": 2}, "2": {"step": 6}}
    assert told["published"]["version"] == 2
    assert told["before"]["differs"]

    assert told["info"]["batched"]
    assert "'image', datatype='FP32', shape=(-1, 64)" in told["info"]["info"]
    assert "'digit', datatype='INT64', shape=(-1,)" in told["info"]["info"]
    exact, tuned = (line for line in lines if line["event"] == "served")
    assert exact["off"] == 0.0
    assert tuned["off"] < 1e-4
    assert "give input_spec" in told["refused"]["text"]


@pytest.mark.slow
def test_the_ranks_of_a_job_publish_each_version_once(tmp_path: Path) -> None:
    place = tmp_path / "store"
    options = ["--nproc_per_node", "2", "--checkpoint", str(place), "--log_dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "paddle_ft.launch", *options, str(SCRIPT.with_name("job.py"))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    store = open_store(str(place))
    assert list_versions(store) == {"digits": [1, 2, 3]}
    manifests = [read_version(store, "digits", n, Trust())[0] for n in (1, 2, 3)]
    assert [manifest.source["step"] for manifest in manifests] == [2, 7, 12]
    assert len({manifest.files[1].blocks for manifest in manifests}) == 3


@pytest.mark.slow
def test_a_job_publishes_by_rules_what_it_would_publish_by_hand(tmp_path: Path) -> None:
    place = tmp_path / "store"
    options = ["--nproc_per_node", "2", "--checkpoint", str(place), "--log_dir", str(tmp_path)]
    script = [str(SCRIPT.with_name("ruled.py")), str(tmp_path)]

    def run() -> str:
        done = subprocess.run(
            [sys.executable, "-m", "paddle_ft.launch", *options, *script],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    told = run()
    assert "exported anew" not in told
    assert f"published often 3 to {place}" in told
    store = open_store(str(place))
    found = list_versions(store)
    assert found == {"best": [1, 2], "often": [1, 2, 3]}
    steps = {
        name: [read_version(store, name, n, Trust())[0].source["step"] for n in versions]
        for name, versions in found.items()
    }
    assert steps == {"best": [3, 7], "often": [5, 10, 12]}
    for name, of_name in steps.items():
        for version, step in enumerate(of_name, 1):
            loaded = load(store, name, version, tmp_path / "cache")
            by_hand = tmp_path / f"by-hand-{step}" / "inference.pdiparams"
            assert (loaded.folder / "inference.pdiparams").read_bytes() == by_hand.read_bytes()

    run()  # it is over: nothing is trained, and nothing published once more
    assert list_versions(store) == found
