"""Export to Paddle's files and safetensors, and import from them, without running what they say."""

from __future__ import annotations

import codecs
import collections
import contextlib
import io
import json
import os
import pickle  # noqa: TID251  the attacks are made with it
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from paddle_ft.checkpoint import standalone
from paddle_ft.checkpoint.cli import ckpt_app
from paddle_ft.checkpoint.pdparams import read_paddle
from paddle_ft.checkpoint.raw import Raw, read_safetensors, write_safetensors
from paddle_ft.errors import CheckpointDamaged, ConfigError

STATE = {
    "model": {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "n": np.array(7)},
    "opt": {"w_moment": np.ones(3), "LR_Scheduler": {"last_epoch": 4}},
    "epoch": 3,
    "list": [np.zeros((0, 2)), "x", (1, np.array([True]))],
}


def run(*arguments: object) -> str:
    """The output; raises what the command raised."""
    result = CliRunner().invoke(ckpt_app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def equal(a: Any, b: Any) -> bool:
    """Also in dtype and shape; a tensor is what NumPy makes of it."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, np.ndarray):
        b = np.asarray(b)
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    return bool(a == b)


@pytest.fixture
def url(tmp_path: Path) -> str:
    place = str(tmp_path / "store")
    standalone.save(place, STATE, 5).wait()
    return place


# ---------------------------------------------------------------- round trips


@pytest.mark.paddle
@pytest.mark.parametrize("form", ["paddle", "safetensors"])
def test_what_is_exported_and_imported_is_the_same(url: str, tmp_path: Path, form: str) -> None:
    out = tmp_path / "out"
    told = run("export", url, "--to", out, "--format", form)
    assert {Path(line).name for line in told.splitlines() if "/" in line} >= {"checkpoint.json"}
    new = str(tmp_path / "new")
    run("import", new, out)
    assert standalone.steps(new) == [5]
    assert equal(STATE, standalone.load(new))
    run("import", new, out, "--step", 9)  # a further one in the same store
    assert standalone.steps(new) == [5, 9]
    with pytest.raises(ConfigError, match="not empty"):
        run("export", url, "--to", out, "--format", form)


def test_safetensors_are_what_its_library_reads_and_writes(url: str, tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    run("export", url, "--to", tmp_path / "out", "--format", "safetensors")
    found = numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert equal(STATE["model"], found)
    numpy.save_file(
        {"b": np.arange(3), "a": np.ones((2, 2), np.float16)}, tmp_path / "x.safetensors"
    )
    run("import", tmp_path / "new", tmp_path / "x.safetensors")
    loaded = standalone.load(str(tmp_path / "new"))
    assert equal({"model": {"b": np.arange(3), "a": np.ones((2, 2), np.float16)}}, loaded)


@pytest.mark.paddle
def test_paddle_loads_what_is_exported(url: str, tmp_path: Path) -> None:
    import paddle

    run("export", url, "--to", tmp_path / "out")
    assert equal(STATE["model"], paddle.load(str(tmp_path / "out/model.pdparams")))
    assert equal(STATE["opt"], paddle.load(str(tmp_path / "out/opt.pdopt")))
    assert paddle.load(str(tmp_path / "out/state.pdparams"))["epoch"] == 3


@pytest.mark.paddle
def test_an_export_says_nothing_of_a_compiler_cache(url: str, tmp_path: Path) -> None:
    """Paddle warns where it finds none."""
    done = subprocess.run(
        [sys.executable, "-m", "paddle_ft.cli", "ckpt", "export", url, "--to", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.paddle
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_what_paddle_saves_is_imported(tmp_path: Path, protocol: int) -> None:
    import paddle

    layer = paddle.nn.Linear(4, 3)
    layer.register_buffer("brief", paddle.ones([2, 2], dtype="bfloat16"))
    layer.register_buffer("column", paddle.ones([2, 3]).t())
    optimizer = paddle.optimizer.Adam(
        paddle.optimizer.lr.StepDecay(0.1, 2), parameters=layer.parameters()
    )
    layer(paddle.ones([1, 4])).sum().backward()
    optimizer.step()
    paddle.save(layer.state_dict(), str(tmp_path / "a.pdparams"), protocol=protocol)
    paddle.save(optimizer.state_dict(), str(tmp_path / "a.pdopt"), protocol=protocol)
    run("import", tmp_path / "new", tmp_path / "a.pdparams", tmp_path / "a.pdopt", "--step", 2)
    loaded = standalone.load(str(tmp_path / "new"))
    assert set(loaded["model"]) == set(layer.state_dict())
    for name, tensor in layer.state_dict().items():
        assert loaded["model"][name].dtype == tensor.dtype
        assert equal(np.asarray(tensor), loaded["model"][name])
    assert loaded["optimizer"]["LR_Scheduler"] == optimizer.state_dict()["LR_Scheduler"]
    other = paddle.nn.Linear(4, 3)
    other.set_state_dict({k: loaded["model"][k] for k in ("weight", "bias")})
    assert equal(layer.weight.numpy(), other.weight)


@pytest.mark.paddle
def test_the_optimizer_of_a_session_goes_on_from_an_export(tmp_path: Path) -> None:
    """As in a new process: there the same layers get the same automatic names."""
    script = """
import sys, numpy as np, paddle, paddle_ft as ft
url, out = sys.argv[1:]
paddle.disable_signal_handler()
def make():
    paddle.seed(1)
    model = paddle.nn.Sequential(paddle.nn.Linear(3, 4), paddle.nn.BatchNorm1D(4))
    schedule = paddle.optimizer.lr.StepDecay(0.1, 2)
    return model, schedule, paddle.optimizer.AdamW(schedule, parameters=model.parameters())
def train(model, schedule, optimizer, steps):
    for i in range(steps):
        x = paddle.full([2, 3], i + 1.0) * paddle.to_tensor([[1.0], [2.0]])
        model(x).square().sum().backward()
        optimizer.step(); optimizer.clear_grad(set_to_zero=False); schedule.step()
model, schedule, optimizer = make()
if out == "-":
    from paddle_ft.state import TrainingState
    from paddle_ft.checkpoint.snapshot import Source
    from paddle_ft.checkpoint import plan, standalone
    from paddle_ft.types import ImageInfo
    import ctypes, mmap
    train(model, schedule, optimizer, 3)
    state = TrainingState(model, optimizer, schedule)
    entries = state.entries()
    specs = plan.share([e.spec() for e in entries], 0, 1, 4096, "rank0")
    memory = mmap.mmap(-1, plan.image_bytes(specs))
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    by_name = {e.name: e for e in entries}
    for s in specs:
        Source.of(by_name[s.name].tensor, s.start, s.nbytes, s.offset).copy(address, lambda: False)
    info = ImageInfo(3, 0, 1, specs, {"position": {}, "state": state.meta()})
    standalone.save_image(url, info, memoryview(memory)).wait()
else:
    model.set_state_dict(paddle.load(out + "/model.pdparams"))
    optimizer.set_state_dict(paddle.load(out + "/model.pdopt"))
train(model, schedule, optimizer, 2)
import hashlib
weights = b"".join(np.asarray(t).tobytes() for t in model.state_dict().values())
print(hashlib.sha256(weights).hexdigest())
"""
    file = tmp_path / "script.py"
    file.write_text(script)
    first = _python(file, tmp_path / "store", "-")
    run("export", tmp_path / "store", "--to", tmp_path / "out")
    assert _python(file, tmp_path / "store", tmp_path / "out") == first
    # And back into a store, from which a session can restore: names and meta are the same.
    run("import", tmp_path / "again", tmp_path / "out")
    one, two = (
        json.loads(run("show", place, "--json"))
        for place in (tmp_path / "store", tmp_path / "again")
    )
    assert one["meta"] == two["meta"]
    keep = ("name", "dtype", "shape", "bytes")
    assert [[t[k] for k in keep] for t in one["tensors"]] == [
        [t[k] for k in keep] for t in two["tensors"]
    ]


def _python(*arguments: object) -> str:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


# ---------------------------------------------------------------- pickles that are not tensors


class Calls:
    """A pickle that calls ``function(*arguments)`` when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def attacks(mark: str) -> dict[str, bytes]:
    command = f"touch {mark}"
    return {
        "system": pickle.dumps({"w": Calls(os.system, command)}),
        "eval": pickle.dumps({"w": Calls(eval, f"__import__('os').system({command!r})")}),
        "name alone": b"cposix\nsystem\n.",
        "codecs": pickle.dumps(Calls(codecs.encode, command, "rot13")),
        "paddle": b"cpaddle\nload\n(S'x'\ntR.",
        "numpy": b"cnumpy\nload\n(S'x'\ntR.",
        "numpy below": b"cnumpy.core.multiarray\nfromfile\n(S'x'\ntR.",
        "dotted": b"\x80\x04\x8c\x0enumpy.dtype.os\x8c\x06system\x93.",
        "attribute": b"\x80\x04\x8c\x05numpy\x8c\x0bdtype.__new__\x93.",
        "persistent": b"Px\n.",
        "extension": b"\x82\x01.",
        "function changed": (b"\x80\x04\x8c\x05numpy\x8c\x05dtype\x93}\x8c\x05_call\x8c\x01xsb."),
        "class of objects": pickle.dumps(np.array([Calls(os.system, command)], dtype=object)),
        "objects in the type": pickle.dumps(np.zeros(1, dtype=[("a", "f4")])),
        "set": pickle.dumps({"w": {1, 2}}),
        "complex object": pickle.dumps({"w": io.BytesIO(b"x")}),
    }


@pytest.mark.parametrize("name", list(attacks("x")))
def test_a_pickle_that_wants_more_than_arrays(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "ran"
    file = tmp_path / "evil.pdparams"
    file.write_bytes(attacks(str(mark))[name])
    with pytest.raises(CheckpointDamaged) as caught:
        run("import", tmp_path / "new", file)
    assert not mark.exists()
    assert not (tmp_path / "new").exists()
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_the_attack_would_have_worked(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    pickle.loads(attacks(str(mark))["system"])
    assert mark.exists()


def test_arrays_in_all_their_forms(tmp_path: Path) -> None:
    value = collections.OrderedDict(
        f=np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        c=np.arange(3, dtype=np.complex64),
        empty=np.zeros((0, 3), np.float64),
        scalar=np.float64(0.5),
        flag=np.array(True),
        plain=[1, 2.5, "x", None, (1, 2)],
    )
    for protocol in (2, 3, 4, 5):
        file = tmp_path / "a.pdparams"
        file.write_bytes(pickle.dumps(value, protocol))
        found = read_paddle(file)
        assert found["scalar"] == 0.5
        assert found["plain"] == value["plain"]
        for key in ("f", "c", "empty", "flag"):
            raw = found[key]
            assert (raw.dtype, raw.shape) == (str(value[key].dtype), value[key].shape)
            assert bytes(raw.data) == value[key].tobytes()


@given(st.binary(max_size=200), st.integers(0, 300), st.integers(0, 255))
def test_whatever_the_bytes_there_is_the_typed_error_alone(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int, byte: int
) -> None:
    place = tmp_path_factory.mktemp("fuzz")
    honest = pickle.dumps({"w": np.arange(4.0), "b": np.ones(2, np.float32)}, 4)
    altered = bytearray(honest)
    altered[at % len(altered)] = byte
    for content in (junk, honest[:at], bytes(altered)):
        for suffix in ("pdparams", "safetensors"):
            file = place / f"x.{suffix}"
            file.write_bytes(content)
            read = read_paddle if suffix == "pdparams" else read_safetensors
            with contextlib.suppress(CheckpointDamaged):
                read(file)


# ---------------------------------------------------------------- safetensors that are none


def raw(array: np.ndarray[Any, Any]) -> Raw:
    return Raw(str(array.dtype), array.shape, memoryview(array.tobytes()))


@pytest.mark.parametrize(
    "header",
    [
        b"", b"[]", b"{", b'{"a":1}', b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"X","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
    ],
)  # fmt: skip
def test_a_header_that_lies(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "x.safetensors"
    for content in (struct.pack("<Q", len(header)) + header + b"1234", struct.pack("<Q", 2**60)):
        file.write_bytes(content)
        with pytest.raises(CheckpointDamaged, match="safetensors"):
            read_safetensors(file)


def test_every_dtype_that_safetensors_know(tmp_path: Path) -> None:
    tensors = {"a": raw(np.arange(5, dtype=np.int8)), "b": raw(np.ones((2, 2)))}
    tensors["c"] = Raw("bfloat16", (3,), memoryview(b"abcdef"))
    file = tmp_path / "x.safetensors"
    write_safetensors(file, tensors, {"format": "np"})
    found = read_safetensors(file)
    assert {n: (r.dtype, r.shape, bytes(r.data)) for n, r in found.items()} == {
        n: (r.dtype, r.shape, bytes(r.data)) for n, r in tensors.items()
    }
    with pytest.raises(ConfigError, match="--format paddle"):
        write_safetensors(tmp_path / "y", {"z": raw(np.ones(2, np.complex128))}, {})


def test_files_that_cannot_be_imported(tmp_path: Path) -> None:
    for given_file, said in (("x.bin", "neither"), ("none.pdparams", "cannot be read")):
        with pytest.raises(ConfigError, match=said):
            run("import", tmp_path / "new", tmp_path / given_file)
    out = tmp_path / "out"
    out.mkdir()
    for index in (
        "",
        "[]",
        "{}",
        '{"format":1,"kind":"export","meta":{},"step":1,"tensors":{"a":["../x"]}}',
    ):
        (out / "checkpoint.json").write_text(index)
        with pytest.raises(CheckpointDamaged, match=r"checkpoint\.json"):
            run("import", tmp_path / "new", out)
