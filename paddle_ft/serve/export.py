"""From a layer in training to the files that Paddle Inference reads."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paddle_ft.errors import ConfigError
from paddle_ft.serve.pipeline import said

PREFIX = "inference"


def export_layer(layer: Any, folder: Path, input_spec: Sequence[Any] | None) -> str:
    """Writes ``layer`` as it is now to ``folder``, for inference; gives the version of Paddle.

    The layer itself stays what it was: not converted, and each part in training or evaluation as
    before. Raises ConfigError if it cannot be exported.
    """
    import paddle

    layer = getattr(layer, "_layers", layer)  # paddle.DataParallel
    if not isinstance(layer, paddle.nn.Layer):
        raise ConfigError(
            f"A {type(layer).__name__} cannot be published; give a paddle.nn.Layer, or the path of "
            f"inference files."
        )
    modes = [(part, part.training) for part in layer.sublayers(include_self=True)]
    layer.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec = None if input_spec is None else list(input_spec)
            paddle.jit.save(layer, str(folder / PREFIX), input_spec=spec)
    except Exception as error:
        what = "" if input_spec else " (give input_spec, the shape and dtype of each input)"
        raise ConfigError(
            f"{type(layer).__name__} cannot be exported by paddle.jit.to_static{what}: "
            f"{said(error)}"
        ) from error
    finally:
        for part, training in modes:
            part.training = training
    return str(paddle.__version__)
