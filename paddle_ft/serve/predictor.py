"""One model in this process: Paddle Inference with settings that were measured, or a pipeline.

On CPU oneDNN with the graph's optimisations (4 to 8 times as fast as without on convolutions, equal
to within 1e-4); with ``exact`` without both, and then bit for bit what the model gave in training.
A predictor is for one thread: shared by several it answers wrongly.
"""

from __future__ import annotations

import logging
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paddle_ft.errors import ConfigError, PaddleFTError
from paddle_ft.serve.pipeline import FILE, Loaded, PipelineModel, check_inputs, said
from paddle_ft.serve.program import (
    NUMPY,
    Description,
    Files,
    description_of,
    find_files,
    slots_of,
)
from paddle_ft.serve.types import Feature, ModelError, ModelInfo, Tensors, Unavailable

assert zlib  # loaded before paddle, or 2.6.2 crashes at the first decompression
_log = logging.getLogger("paddle_ft")
PLATFORM = "paddle"
_GUESSES = (32, 8, 1)
"""For dimensions that are free, tried one after the other at the warm-up."""
_SHAPES_KEPT = 16
"""For so many shapes oneDNN keeps what it has prepared; without a bound it grows for ever."""


@dataclass(frozen=True, slots=True)
class Settings:
    threads: int = 1
    """Of one worker, for the CPU's kernels."""
    exact: bool = False
    """The very bits of the dynamic graph, at a fraction of the speed."""
    device: str = "cpu"
    """``cpu``, ``gpu:0``, or a custom device such as ``npu:0``."""
    memory_pool_mb: int = 256
    """Reserved on a GPU at the start."""
    rows_max: int = 4
    """Rows of the largest batch, for the warm-up."""


def describe(folder: Path, name: str, version: str) -> ModelInfo:
    """What the Paddle model in ``folder`` takes and gives; raises ConfigError."""
    return info_of(find_files(folder), description_of(folder), name, version)


def info_of(files: Files, told: Description, name: str, version: str) -> ModelInfo:
    """As ``describe``, of files that lie apart from their description."""
    inputs, outputs = (tuple(s.feature for s in slots) for slots in slots_of(files))
    if told.outputs and len(set(told.outputs)) != len(outputs):
        raise ConfigError(
            f"{files.program} has {len(outputs)} outputs, and {len(set(told.outputs))} names are "
            f"given for them; give one for each."
        )
    if told.outputs:
        names = zip(told.outputs, outputs, strict=True)
        outputs = tuple(Feature(given, f.datatype, f.shape) for given, f in names)
    batched = told.batched
    if batched is None:
        batched = all(f.shape[:1] == (-1,) for f in (*inputs, *outputs))
    return ModelInfo(name, version, PLATFORM, inputs, outputs, batched)


def open_model(folder: Path, name: str, version: str, settings: Settings) -> Loaded:
    """The pipeline or the Paddle model in ``folder``, loaded. Raises ConfigError."""
    if (folder / FILE).is_file():

        def part(path: Path) -> Loaded:
            return Predictor(path, path.name, version, settings)

        return PipelineModel(folder, name, version, part)
    return Predictor(folder, name, version, settings)


class Predictor:
    """One Paddle inference model; ``folder`` as ``program.find_files`` takes it."""

    def __init__(self, folder: Path, name: str, version: str, settings: Settings) -> None:
        files = find_files(folder)
        told = description_of(files.program.parent)
        self.info = info_of(files, told, name, version)
        try:
            self._predictor = _create(files, settings)
            self._handles = {
                n: self._predictor.get_input_handle(n) for n in self._predictor.get_input_names()
            }
            given = self._predictor.get_output_names()
        except Exception as error:
            raise ConfigError(
                f"Paddle Inference cannot load {files.program}: {said(error)}"
            ) from error
        named = {f.name for f in self.info.inputs}
        if self._handles.keys() != named or len(given) != len(self.info.outputs):
            raise ConfigError(f"{files.program} does not fit its parameters; export it again.")
        self._outputs = dict(zip((f.name for f in self.info.outputs), given, strict=True))

    def run(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """The outputs, as new arrays. Raises ModelError, Unavailable if memory is short."""
        check_inputs(self.info, inputs)
        for name, array in inputs.items():
            if not array.size:  # some kernels crash on it
                raise ModelError(f"{name} of shape {list(array.shape)} is empty.")
        try:
            for name, array in inputs.items():
                self._handles[name].copy_from_cpu(np.ascontiguousarray(array))
            self._predictor.run()
            return {
                name: self._predictor.get_output_handle(given).copy_to_cpu()
                for name, given in self._outputs.items()
            }
        except MemoryError:
            raise Unavailable("There is not enough memory for this batch.") from None
        except Exception as error:
            raise ModelError(f"{self.info.name} refuses these inputs: {said(error)}") from error


def _create(files: Files, settings: Settings) -> Any:
    import paddle
    from paddle import inference

    if settings.device.startswith("gpu") and not paddle.is_compiled_with_cuda():
        raise ConfigError(  # or it would serve on the CPU without a word
            f"This Paddle is not built for {settings.device}: install paddlepaddle-gpu, or give "
            "--device cpu."
        )
    paddle.disable_signal_handler()  # prints a C++ stack at SIGTERM
    config = inference.Config(str(files.program), str(files.parameters))
    config.disable_glog_info()
    _place(config, settings)
    config.switch_ir_optim(not settings.exact)
    if not settings.exact:
        # Of Paddle 3 the memory optimisation works with the new executor alone.
        if files.program.suffix == ".json":
            config.enable_new_executor()
        config.enable_memory_optim()
    return inference.create_predictor(config)


def _place(config: Any, settings: Settings) -> None:
    """Where it runs, and how: the seam for other devices. Raises ConfigError."""
    kind, _, number = settings.device.partition(":")
    if not number.isdigit() and (number or kind != "cpu"):
        raise ConfigError(f"There is no device {settings.device!r}; give cpu, gpu:0 or npu:0.")
    if kind == "gpu":
        config.enable_use_gpu(settings.memory_pool_mb, int(number))
    elif kind != "cpu":
        config.enable_custom_device(kind, int(number))
    else:
        config.disable_gpu()
        config.set_cpu_math_library_num_threads(settings.threads)
        if not settings.exact:
            config.set_mkldnn_cache_capacity(_SHAPES_KEPT)
            config.enable_mkldnn()
        elif hasattr(config, "disable_mkldnn"):
            config.disable_mkldnn()


def seed_anew() -> None:
    """For a process that was forked off another, or all of them would draw the same numbers."""
    import paddle

    seed = int.from_bytes(os.urandom(4), "little")
    np.random.seed(seed)
    paddle.seed(seed)


# ---------------------------------------------------------------- warm-up


def warm_up(model: Loaded, told: Description, rows_max: int) -> float:
    """Runs made-up requests, so that no real one is the first; gives the seconds of the last.

    One row and ``rows_max`` rows, twice each. Raises ModelError if shapes were told and the model
    refuses them; what is only guessed may be refused.
    """
    counts = sorted({1, rows_max}) if model.info.batched else [1]
    took_s = 0.0
    for rows in counts:
        for inputs in _made_up(model.info, told, rows):
            try:
                for _ in range(2):
                    began_s = time.perf_counter()
                    model.run(inputs)
                    took_s = time.perf_counter() - began_s
                break
            except PaddleFTError as error:
                if told.warm_up:
                    raise
                _log.debug("warm-up of %s: %s", model.info.name, error)
            except Exception as error:
                if told.warm_up:
                    raise ModelError(f"{model.info.name} fails: {said(error)}") from error
    return took_s


def _made_up(info: ModelInfo, told: Description, rows: int) -> Iterator[dict[str, NDArray[Any]]]:
    """Zeros of the shapes that were told, or of several that might do."""
    for guess in (0,) if told.warm_up else _GUESSES:
        inputs = {}
        for f in info.inputs:
            shape = list(told.warm_up.get(f.name, f.shape))
            if info.batched and shape:
                shape[0] = rows
            shape = [guess if size < 0 else size for size in shape]
            if f.datatype == "BYTES":
                inputs[f.name] = np.full(shape, b"", object)
            else:
                inputs[f.name] = np.zeros(shape, NUMPY[f.datatype])
        yield inputs
