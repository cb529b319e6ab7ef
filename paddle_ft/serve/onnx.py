"""``paddle-ft onnx``: a published model as an ONNX file, by paddle2onnx (the extra ``onnx``)."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from paddle_ft.errors import ConfigError, MachineError
from paddle_ft.serve.publish_cli import ConfigFile, Url
from paddle_ft.serve.types import ModelError

_TIMEOUT_S = 600.0
# In a process of its own: what paddle2onnx cannot convert ends in a log line or in C++'s abort, and
# some graphs that it writes no runtime takes. Its optimisers are not asked for: the default one
# installs packages over the network.
_CONVERT = """
import sys
import onnx
import paddle2onnx
made = paddle2onnx.export(*sys.argv[1:3], opset_version=int(sys.argv[4]), optimize_tool="none")
onnx.checker.check_model(made, full_check=True)
open(sys.argv[3], "wb").write(made)
"""
_SUFFIXES = (".json", ".pdmodel")


def onnx(
    model: Annotated[str, typer.Argument(help="as published: NAME, or NAME=VERSION")],
    store: Url,
    to: Annotated[Path, typer.Option("--to", help="the ONNX file that is written")],
    opset: Annotated[int, typer.Option(help="of ONNX; raised where an operator needs it")] = 17,
    config_file: ConfigFile = None,
) -> None:
    """Write a published model as an ONNX file (needs pip install 'paddle-ft[onnx]')."""
    from paddle_ft.checkpoint.cli import open_url
    from paddle_ft.serve.folder import load
    from paddle_ft.serve.loader import wanted

    which = wanted(model)
    place, trust = open_url(store, config_file)
    with tempfile.TemporaryDirectory(prefix="paddle_ft-onnx-") as scratch:
        loaded = load(place, which.name, which.version, Path(scratch), trust=trust)
        try:
            nbytes = convert(loaded.folder, to, opset)
        finally:
            loaded.held.close()
    typer.echo(f"{which.name} {loaded.ref.version} is in {to}: {nbytes / 1e6:.1f} MB")


def convert(folder: Path, file: Path, opset: int) -> int:
    """Writes the inference files in ``folder`` to ``file``, whole or not at all; gives its bytes.

    Raises ConfigError without paddle2onnx, ModelError if it cannot convert the model,
    MachineError if the file cannot be written.
    """
    if importlib.util.find_spec("paddle2onnx") is None:
        raise ConfigError("paddle2onnx is not installed; pip install 'paddle-ft[onnx]'.")
    programs = [path for path in folder.iterdir() if path.suffix in _SUFFIXES]
    if (folder / "pipeline.py").exists() or len(programs) != 1:
        raise ConfigError(
            "A pipeline is Python and cannot be an ONNX file; publish its models by themselves, "
            "and write those."
        )
    parameters = programs[0].with_suffix(".pdiparams")
    # Beside the end, so that it takes its place in one go.
    made = file.with_name(f"{file.name}.{os.getpid()}.part")
    given = (str(programs[0]), str(parameters) if parameters.exists() else "", str(made))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        made.touch()
        done = subprocess.run(
            [sys.executable, "-c", _CONVERT, *given, str(opset)],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        nbytes = made.stat().st_size
        if done.returncode or not nbytes:
            raise ModelError(f"paddle2onnx cannot convert this model: {_reason(done)}")
        os.replace(made, file)
    except subprocess.TimeoutExpired:
        raise ModelError(f"paddle2onnx was not done after {_TIMEOUT_S:.0f} s.") from None
    except OSError as error:
        raise MachineError(f"{file} cannot be written ({error.strerror}).") from None
    finally:
        with suppress(OSError):
            made.unlink()
    return nbytes


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """What was said of the failure, in one line."""
    lines = [
        re.sub(r"\x1b\[[0-9;]*m", "", line).strip()
        for line in (done.stdout + "\n" + done.stderr).splitlines()
    ]
    fault = re.compile(r"error|fail|not support|unsupported", re.IGNORECASE)
    told = [line for line in lines if fault.search(line)]
    return (told or [line for line in lines if line] or [f"it ended with {done.returncode}"])[0]
