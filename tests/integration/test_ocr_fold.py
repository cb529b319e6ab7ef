"""`examples/ocr/fold.py`: fewer operators, the same answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddle_ft.serve.predictor import Predictor, Settings
from paddle_ft.serve.program import find_files

FOLD = Path(__file__).parents[2] / "examples" / "ocr" / "fold.py"
# A program of Paddle 2, whichever Paddle is here.
MODEL = """
import sys, paddle
from paddle import nn, static
paddle.enable_static()

def affine(x):
    one = lambda value: static.create_parameter(
        [1], "float32", default_initializer=nn.initializer.Constant(value))
    return one(1.7) * x + one(-0.4)

net = static.Program()
with static.program_guard(net, static.Program()):
    x = static.data("x", [None, 3, 16, 16], "float32")
    bias = nn.initializer.Constant(0.3)
    conv = lambda x, n, size, groups=1: static.nn.conv2d(
        x, n, size, padding=size // 2, groups=groups, bias_attr=paddle.ParamAttr(initializer=bias))
    x1 = affine(nn.functional.hardswish(affine(conv(x, 8, 3))))    # before one without padding
    x2 = affine(nn.functional.hardswish(affine(conv(x1, 8, 1))))   # before one with padding
    x3 = conv(x2, 8, 3, 8)
    x4 = affine(x3) + x3                                           # of use elsewhere, too
    x5 = affine(nn.functional.hardswish(x4))
    out = conv(x5, 4, 1) + x5.mean()
    executor = static.Executor(paddle.CPUPlace())
    executor.run(static.default_startup_program())
    static.save_inference_model(sys.argv[1] + "/inference", [x], [out], executor, program=net)
"""


@pytest.fixture
def fold(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLD.parent)
    import fold

    return fold


@pytest.fixture
def model(tmp_path: Path) -> Path:
    subprocess.run(
        [sys.executable, "-c", MODEL, str(tmp_path)],
        env=os.environ | {"FLAGS_enable_pir_api": "0", "GLOG_minloglevel": "2"},
        timeout=100,
        check=True,
    )
    return tmp_path


@pytest.mark.paddle
@pytest.mark.slow
@pytest.mark.timeout(150)
def test_what_is_folded_answers_as_before(fold: Any, model: Path) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype("float32")
    settings = Settings(exact=True)
    assert find_files(model).program.suffix == ".pdmodel"
    (before,) = Predictor(model, "net", "1", settings).run({"x": x}).values()
    # Two of two operators each before their convolutions and one behind; one of two where there is
    # padding; none where a result is of use elsewhere, too.
    assert fold.fold(model) == 2 + 2 + 2 + 1
    (after,) = Predictor(model, "net", "1", settings).run({"x": x}).values()
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    assert np.abs(before).max() > 1
    assert fold.fold(model) == 0

    path = model / "inference.pdiparams"
    whole = path.read_bytes()
    for data in (whole[:-4], whole[:30], whole + b"\0"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="the parameters"):
            fold.fold(model)
