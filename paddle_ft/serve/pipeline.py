"""Several models and the Python between them, as one model: what a user derives.

A published folder with a ``pipeline.py`` is served by the one class in it that derives from
``Pipeline``; its models lie in the same folder:

    class Reader(Pipeline):
        inputs = (Feature("image", "UINT8", (-1, -1, 3)),)
        outputs = (Feature("text", "BYTES", (-1,)),)

        def setup(self):
            self.detect = self.model("det")
            self.read = self.model("rec")

        def run(self, inputs, state):
            boxes = self.detect.run({"x": …})
            pages = int(state.get("pages") or b"0") + 1
            state.put("pages", b"%d" % pages)
            …
            return {"text": np.array([b"…"], object)}

It runs in a worker process, one call at a time. Its code is run as it is: publish it signed, and
let replicas ask for signatures (``checkpoint.verify = "required"``).
"""

from __future__ import annotations

import importlib.util
import inspect
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


class State:
    """What the session of one request keeps; for the thread that calls ``run``, until it returns.

    The session is named by the request (``X-Session-Id``). What is put is seen by ``get`` at once,
    and sent to the group when ``run`` has returned; what it raises with leaves all as it was. The
    client has its answer when the group has acknowledged every put. A request that is asked again,
    as after an answer that was lost, runs again: what must not count twice needs a number that the
    client gives.
    """

    KEY_BYTES_MAX = 128
    KEYS_MAX = 64
    """Asked for, and changed, by one request."""
    CHANGED_BYTES_MAX = 2**20
    """Of all values that one request puts."""

    def __init__(self, fetch: Callable[[str], bytes | None] | None) -> None:
        """``fetch`` None: the request names no session."""
        self._fetch = fetch
        self._seen: dict[str, bytes | None] = {}
        self._changes: dict[str, bytes] = {}
        self._open = True

    def get(self, key: str) -> bytes | None:
        """None if there is nothing. Raises ModelError, Unavailable."""
        fetch = self._checked(key)
        if key in self._changes:
            return self._changes[key]
        if key not in self._seen:
            if len(self._seen) >= self.KEYS_MAX:
                raise ModelError(f"A request may ask for {self.KEYS_MAX} keys of its session.")
            self._seen[key] = fetch(key)
        return self._seen[key]

    def put(self, key: str, value: bytes) -> None:
        """Keeps ``value``. Raises ModelError if it is too much."""
        self._checked(key)
        if not isinstance(value, bytes):
            raise TypeError(f"{key} is to be kept as a {type(value).__name__}, not as bytes")
        if key not in self._changes and len(self._changes) >= self.KEYS_MAX:
            raise ModelError(f"A request may change {self.KEYS_MAX} keys of its session.")
        others = sum(len(v) for k, v in self._changes.items() if k != key)
        if others + len(value) > self.CHANGED_BYTES_MAX:
            raise ModelError(
                f"A request may put {self.CHANGED_BYTES_MAX} bytes into its session; {key} would "
                f"exceed that."
            )
        self._changes[key] = value

    def close(self) -> dict[str, bytes]:
        """The changes by key; nothing is taken afterwards."""
        self._open = False
        return self._changes

    def _checked(self, key: str) -> Callable[[str], bytes | None]:
        if not self._open:
            raise RuntimeError("the state of a request is used after its end")
        if self._fetch is None:
            raise ModelError(
                "This model keeps something for each session, and the request names none: send "
                "X-Session-Id."
            )
        if not isinstance(key, str) or not 0 < len(key.encode()) <= self.KEY_BYTES_MAX:
            raise ModelError(f"A key is a text of 1 to {self.KEY_BYTES_MAX} bytes: {key!a:.80}")
        if not key.isprintable() or key in (".", ".."):
            raise ModelError(f"A key is made of printable characters, and not . or ..: {key!a:.80}")
        return self._fetch


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

    def run(self, inputs: Tensors, state: State) -> Tensors:
        """The outputs by name. ``raise ModelError("…")`` for inputs that are refused.

        A pipeline that keeps nothing may leave ``state`` out. Requests of a session are never
        joined, and run one after the other on a replica.
        """
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
            self._keeps = len(inspect.signature(self._pipeline.run).parameters) > 1
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
            self._keeps,
        )

    def run(self, inputs: Tensors, state: State | None = None) -> Tensors:
        """As ``Loaded``; without ``state`` its session is empty and nothing is kept of it."""
        check_inputs(self.info, inputs)
        state = state or State(lambda _: None)
        outputs = self._pipeline.run(*((inputs, state) if self._keeps else (inputs,)))
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
