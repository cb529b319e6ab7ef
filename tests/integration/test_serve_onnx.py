"""Published models as ONNX files (C9): they compute what Paddle computes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from paddle_ft.cli import app
from paddle_ft.errors import ConfigError
from paddle_ft.serve.onnx import convert
from paddle_ft.serve.publish import publish
from paddle_ft.serve.types import ModelError

pytestmark = pytest.mark.skipif(
    find_spec("paddle2onnx") is None, reason="paddle2onnx (the extra onnx) needs Paddle 3"
)


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["onnx", *map(str, words)])


@pytest.mark.paddle
def test_an_onnx_file_computes_what_the_published_model_does(tmp_path: Path) -> None:
    """C9: any batch size, with another runtime."""
    import onnxruntime
    import paddle

    nn = paddle.nn
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10), nn.Softmax())
    store, file = tmp_path / "store", tmp_path / "out" / "net.onnx"
    net.eval()
    spec = [paddle.static.InputSpec([None, 64], "float32", "image")]
    paddle.jit.save(net, str(tmp_path / "net" / "inference"), input_spec=spec)
    publish(tmp_path / "net", "net", str(store))

    done = run("net", "--store", store, "--to", file)

    assert done.exit_code == 0, (done.output, done.exception)
    assert done.output.startswith(f"net 1 is in {file}: ")
    assert list(file.parent.iterdir()) == [file]
    session = onnxruntime.InferenceSession(str(file))
    for rows in (1, 5):
        image = np.random.default_rng(rows).random((rows, 64), "float32")
        (got,) = session.run(None, {session.get_inputs()[0].name: image})
        np.testing.assert_allclose(got, net(paddle.to_tensor(image)).numpy(), atol=1e-6)


def test_what_cannot_be_an_onnx_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    """C9: a pipeline, and files that are no program; what was there stays."""
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "pipeline.py").touch()
    with pytest.raises(ConfigError, match="pipeline is Python"):
        convert(tmp_path / "pipeline", tmp_path / "a.onnx", 17)

    broken, file = tmp_path / "broken", tmp_path / "b.onnx"
    broken.mkdir()
    (broken / "inference.json").write_text("{}")
    (broken / "inference.pdiparams").write_bytes(b"")
    file.write_bytes(b"before")
    with pytest.raises(ModelError, match="paddle2onnx cannot convert this model: "):
        convert(broken, file, 17)
    assert file.read_bytes() == b"before"
    assert not list(tmp_path.glob("*.part"))
