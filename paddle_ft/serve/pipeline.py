"""Several models and the Python between them, as one model: what a user derives.

A published folder with a ``pipeline.py`` is served by the one class in it that derives from
``Pipeline``; its models lie in the same folder:

    class Reader(Pipeline):
        inputs = (Feature("image", "UINT8", (-1, -1, 3)),)
        outputs = (Feature("text", "BYTES", (-1,)),)

        def setup(self):
            self.detect = self.model("det")
            self.read = self.model("rec")

        def run(self, inputs, state=None):
            boxes = self.detect.run({"x": …})
            …
            return {"text": np.array([b"…"], object)}

It runs in a worker process, one call at a time. Its code is run as it is: publish it signed, and
let replicas ask for signatures (``checkpoint.verify = "required"``).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from paddle_ft.errors import ConfigError, PaddleFTError
from paddle_ft.serve.program import NUMPY
from paddle_ft.serve.types import Feature, ModelError, ModelInfo, Tensors

FILE = "pipeline.py"


class Loaded(Protocol):
    """A model in this process; for one thread."""

    @property
    def info(self) -> ModelInfo: ...

    def run(self, inputs: Tensors) -> Tensors:
        """The outputs. Raises ModelError if the model refuses these inputs."""
        ...


class Pipeline:
    """Derive from it, say what goes in and out, and define ``run``."""

    inputs: tuple[Feature, ...] = ()
    outputs: tuple[Feature, ...] = ()
    batched = False
    """Rows of several requests may be joined along the first dimension of every input."""

    def __init__(self, folder: Path, open_model: Callable[[Path], Loaded]) -> None:
        self.folder = folder
        """Where the published files lie; read-only."""
        self._open_model = open_model

    def setup(self) -> None:
        """Called once, before the first ``run``: loads models and tables."""

    def model(self, path: str) -> Loaded:
        """The Paddle inference model at ``path`` below the folder."""
        return self._open_model(self.folder / path)

    def run(self, inputs: Tensors, state: Any = None) -> Tensors:
        """The outputs by name. ``raise ModelError("…")`` for inputs that are refused."""
        raise AssertionError(f"{type(self).__name__} does not define run")


class PipelineModel:
    """A user's pipeline as ``Loaded``. Raises ConfigError if it cannot be used."""

    def __init__(
        self, folder: Path, name: str, version: str, open_model: Callable[[Path], Loaded]
    ) -> None:
        kind = _class_in(folder)
        try:
            self._pipeline = kind(folder, open_model)
            self._pipeline.setup()
        except PaddleFTError:
            raise
        except Exception as error:
            raise ConfigError(
                f"The pipeline {kind.__name__} in {folder / FILE} cannot be set up: {said(error)}"
            ) from error
        self.info = ModelInfo(
            name,
            version,
            "paddle_ft_pipeline",
            tuple(kind.inputs),
            tuple(kind.outputs),
            kind.batched,
        )

    def run(self, inputs: Tensors) -> Tensors:
        check_inputs(self.info, inputs)
        outputs = self._pipeline.run(inputs)
        names = {feature.name for feature in self.info.outputs}
        if not isinstance(outputs, Mapping) or set(outputs) != names:
            got = ", ".join(sorted(map(str, outputs))) if isinstance(outputs, Mapping) else "no map"
            raise ValueError(f"run gave {got}, and the outputs are {', '.join(sorted(names))}")
        for f in self.info.outputs:
            dtype = np.asarray(outputs[f.name]).dtype
            if not _fits(f, dtype):
                raise ValueError(f"run gave {f.name} of {dtype}, and it is to be {f.datatype}")
        return outputs


def check_inputs(info: ModelInfo, inputs: Tensors) -> None:
    """Raises ModelError unless they have the names and dtypes that the model takes."""
    names = {f.name for f in info.inputs}
    if inputs.keys() != names:
        given = ", ".join(sorted(inputs)) or "none"
        raise ModelError(f"{info.name} takes {', '.join(sorted(names))}; given are {given}.")
    for f in info.inputs:
        if not _fits(f, inputs[f.name].dtype):
            raise ModelError(f"{f.name} must be {f.datatype}; it is of {inputs[f.name].dtype}.")


def _fits(feature: Feature, dtype: np.dtype[Any]) -> bool:
    if feature.datatype == "BYTES":
        return dtype.kind in "OSU"
    return dtype == NUMPY.get(feature.datatype)


def _class_in(folder: Path) -> type[Pipeline]:
    """The one class of ``folder``'s pipeline.py that derives from Pipeline."""
    path = folder / FILE
    spec = importlib.util.spec_from_file_location("paddle_ft_published_pipeline", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(folder))  # modules beside it
    sys.dont_write_bytecode = True  # a published folder stays as it is
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{path} cannot be imported: {said(error)}") from error
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Pipeline)
        and value.__module__ == spec.name
        and not value.__name__.startswith("_")
    ]
    if len(found) != 1:
        names = ", ".join(kind.__name__ for kind in found) or "none"
        raise ConfigError(f"{path} must define one class derived from Pipeline; it has {names}.")
    return found[0]


def said(error: BaseException) -> str:
    """An exception of somebody else's code in one line of at most 500 characters."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not set(line) <= set("-= ")]
    return f"{type(error).__name__}: {' '.join(lines)}"[:500]
