"""From call to disk, and throughput to and from a directory and an S3 server."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from bench.drive import Line, driven_job
from bench.report import Row
from paddle_ft.checkpoint import plan
from paddle_ft.checkpoint.room import CheckpointRoom
from paddle_ft.checkpoint.store import Store, open_store
from paddle_ft.config import CheckpointConfig, Config
from paddle_ft.coordination.actions import Commit
from paddle_ft.coordination.schema import Fences
from paddle_ft.types import CommitRef, Head, ImageInfo, TensorSpec

TENSORS = 50
DURABLE = "From call to durable on disk"
THROUGHPUT = "Throughput"
WARM_UP = 2
"""Checkpoints after which the writer knows that everything changes each time."""


def tensors(nbytes: int, count: int = TENSORS) -> list[TensorSpec]:
    """``count`` float32 tensors of ``nbytes`` in all."""
    each = nbytes // count // 4
    return [
        TensorSpec(f"model/t{i}.weight", "float32", (each,), "replicated", 0, 4 * each)
        for i in range(count)
    ]


@contextmanager
def shared_memory(nbytes: int) -> Iterator[tuple[Path, memoryview]]:
    """A file of random bytes on shared memory, and a view of it."""
    path = Path(f"/dev/shm/paddle_ft-{os.getpid()}-bench.bin")
    with path.open("wb+") as file:
        file.write(np.random.default_rng(0).bytes(nbytes))
        file.flush()
        mapped = mmap.mmap(file.fileno(), nbytes)
    try:
        yield path, memoryview(mapped)
    finally:
        path.unlink()


def touch(view: memoryview) -> None:
    """Changes every block."""
    np.frombuffer(view[: view.nbytes // 4 * 4], dtype=np.uint32)[::512] += 1


class Writer:
    """Writes checkpoints one upon the other, as the agents of ``nodes`` nodes do.

    What an agent does beside this is to move ``head`` in etcd.
    """

    def __init__(self, store: Store, config: CheckpointConfig, nodes: int = 1) -> None:
        self.store = store
        self._head: Head | None = None
        self._rooms = [CheckpointRoom(store, Config(checkpoint=config)) for _ in range(nodes)]
        bound: dict[str, str] = {}
        for room in self._rooms:
            room.bind(lambda value: bound.setdefault("to", value))

    def write(self, images: Sequence[tuple[ImageInfo, memoryview]]) -> CommitRef:
        """Parts, manifest, marker; one image a node if there are several."""
        newest = self._head.newest if self._head else None
        sequence = newest.sequence + 1 if newest else 1
        groups = [images] if len(self._rooms) == 1 else [[image] for image in images]
        parts = tuple(
            room.write_part(
                group, sequence=sequence, generation=1, member=f"node{i}", parent=newest
            )
            for i, (room, group) in enumerate(zip(self._rooms, groups, strict=True))
        )
        action = Commit(
            generation=1,
            step=images[0][0].step,
            parts=parts,
            head=self._head,
            sequence=sequence,
            base=newest,
            lineage=(),
            obsolete=parts,
            fences=Fences(0, 0, 0),
        )
        ref = self._rooms[0].store_manifest(action)
        self._head = Head(ref)
        self._rooms[0].acknowledge(self._head)
        return ref

    def restore(self, ref: CommitRef, path: Path) -> None:
        self._rooms[0].restore(ref, ranks=[0], world_size=1, path=path)


def settle(nbytes: int) -> None:
    """Brings the machine to the same state before each measurement.

    What is left to be written is written. Then memory is taken and given back: on a virtual machine
    the host takes free pages away after a while, and the first use of such a page costs several
    times what a copy does, so that whoever comes first would pay for the page cache of all.
    """
    os.sync()
    with mmap.mmap(-1, nbytes) as memory:
        np.frombuffer(memory, np.uint8)[::4096] = 1


def timed(action: Callable[[], Any], nbytes: int) -> float:
    """Seconds that ``action`` takes, which is about ``nbytes``."""
    settle(nbytes + nbytes // 4)
    start_s = time.perf_counter()
    action()
    return time.perf_counter() - start_s


def dd(source: Path, target: Path) -> float:
    target.unlink(missing_ok=True)
    command = ["dd", f"if={source}", f"of={target}", "bs=4M", "conv=fsync"]
    run = lambda: subprocess.run(command, check=True, capture_output=True)  # noqa: E731
    return timed(run, source.stat().st_size)


# ---------------------------------------------------------------- from call to disk


def measure_durable(
    folder: Path, mbytes: float, rounds: int, torch: Line | None, say: Callable[[str], None]
) -> list[Row]:
    ours: list[float] = []
    limit: list[float] = []
    peers: dict[str, list[float]] = {"torch.save + fsync": [], "DCP async_save": []}
    nbytes = int(mbytes * 1e6)
    with (
        shared_memory(nbytes) as (source, _),
        driven_job(folder / "driven", mbytes) as job,
    ):
        job.ask()  # the first one in each buffer
        job.ask()
        for number in range(rounds):
            say(f"from call to disk, {number + 1} of {rounds}")
            settle(nbytes + nbytes // 4)
            ours.append(job.ask()["durable_s"])
            limit.append(dd(source, folder / "dd.bin"))
            if torch is not None:
                settle(2 * nbytes)
                answer = torch.ask(do="torch_save_fsync")
                peers["torch.save + fsync"].append(answer["durable_s"])
                settle(2 * nbytes)
                answer = torch.ask(do="dcp", stager="plain")
                peers["DCP async_save"].append(answer["durable_s"])
    shutil.rmtree(folder / "driven")
    (folder / "dd.bin").unlink()
    note = "in a real job under the launcher; up to the acknowledgement of the commit"
    return [
        Row(DURABLE, "snapshot begun → commit acknowledged", "s", ours, limit, "dd conv=fsync",
            peers, 1.3, note=note)
    ]  # fmt: skip


# ---------------------------------------------------------------- throughput


def measure_throughput(
    folder: Path, mbytes: float, rounds: int, say: Callable[[str], None]
) -> list[Row]:
    nbytes = int(mbytes * 1e6)
    specs = plan.share(tensors(nbytes), 0, 1, CheckpointConfig().block_bytes)
    nbytes = plan.image_bytes(specs)
    with shared_memory(nbytes) as (source, view):
        image = (ImageInfo(1, 0, 1, specs, {}), view)
        rows = [
            _directory(folder, source, image, rounds, say),
            *_reading(folder, source, image, rounds, say),
            _s3(source, image, rounds, say),
        ]
        del image
    return rows


def _rate(nbytes: int, seconds: list[float]) -> list[float]:
    return [nbytes / 1e6 / s for s in seconds]


def _directory(
    folder: Path, source: Path, image: Any, rounds: int, say: Callable[[str], None]
) -> Row:
    nbytes = image[1].nbytes
    writer = Writer(open_store(str(folder / "store")), CheckpointConfig())
    ours, limit = [], []
    for number in range(-WARM_UP, rounds):
        say(f"directory, {number + 1} of {rounds}")
        touch(image[1])
        ours.append(timed(lambda: writer.write([image]), nbytes))
        limit.append(dd(source, folder / "dd.bin"))
    shutil.rmtree(folder / "store")
    (folder / "dd.bin").unlink()
    first = nbytes / 1e6 / ours[0]
    note = f"the first one, which also looks for what may change in part, {first:.0f} MB/s"
    return Row(THROUGHPUT, "write to a directory", "MB/s", _rate(nbytes, ours[WARM_UP:]),
               _rate(nbytes, limit[WARM_UP:]), "dd conv=fsync", goal=0.8, sense=">=",
               note=note)  # fmt: skip


def _reading(
    folder: Path, source: Path, image: Any, rounds: int, say: Callable[[str], None]
) -> list[Row]:
    writer = Writer(open_store(str(folder / "store")), CheckpointConfig())
    ref = writer.write([image])
    plain = folder / "plain.bin"
    shutil.copyfile(source, plain)
    os.sync()
    target = Path(f"/dev/shm/paddle_ft-{os.getpid()}-bench-restore")

    nbytes = image[1].nbytes
    rows = []
    for warm in (True, False):
        forget(folder)
        if warm:  # objects are written past the page cache
            writer.restore(ref, target)
            target.unlink()
            read_file(plain)
        ours, limit = [], []
        for number in range(rounds):
            say(f"restore {'warm' if warm else 'cold'}, {number + 1} of {rounds}")
            if not warm:
                forget(folder)
            ours.append(timed(lambda: writer.restore(ref, target), nbytes))
            target.unlink()
            limit.append(timed(lambda: read_file(plain), nbytes))
        name = f"restore from a directory, page cache {'warm' if warm else 'cold'} for both"
        note = "restore verifies the sha256 of every byte, reading a file verifies nothing"
        rows.append(Row(THROUGHPUT, name, "MB/s", _rate(nbytes, ours), _rate(nbytes, limit),
                        "read the file", goal=0.8, sense=">=", note=note))  # fmt: skip
    shutil.rmtree(folder / "store")
    plain.unlink()
    return rows


def read_file(path: Path) -> None:
    """Into new memory, by one thread, 4 MiB at a time: what ``cat`` or a plain loader does."""
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(os.fstat(file.fileno()).st_size))
        at = 0
        while count := file.readinto(buffer[at : at + (4 << 20)]):
            at += count
    assert at == buffer.nbytes


def forget(folder: Path) -> None:
    """Drops what the page cache holds of the files below ``folder``."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _s3(source: Path, image: Any, rounds: int, say: Callable[[str], None]) -> Row:
    from tests.integration.s3_server import S3Server, weed_binary

    nbytes = image[1].nbytes
    ours: list[float] = []
    limit: list[float] = []
    if weed_binary() is not None:
        with S3Server() as server:
            os.environ.update(server.environment)
            url, config = server.bucket("bench"), server.config()
            client = _boto3_client(server.endpoint)
            for number in range(rounds):
                say(f"S3, {number + 1} of {rounds}")
                touch(image[1])
                writer = Writer(open_store(f"{url}/{number}", config), config)
                ours.append(timed(lambda w=writer: w.write([image]), nbytes))
                writer.store.delete([info.name for info in writer.store.find("")])
                limit.append(
                    timed(lambda: client.upload_file(str(source), "bench", "one-file"), nbytes)
                )
                client.delete_object(Bucket="bench", Key="one-file")
    return Row(THROUGHPUT, "write to an S3 server", "MB/s", _rate(nbytes, ours),
               _rate(nbytes, limit), "boto3 upload_file", goal=0.9, sense=">=")  # fmt: skip


def _boto3_client(endpoint: str) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client(
        "s3", endpoint_url=endpoint, config=Config(s3={"addressing_style": "path"})
    )


@contextmanager
def clean(folder: Path) -> Iterator[Path]:
    """``folder``, empty, and removed afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        with suppress(OSError):
            shutil.rmtree(folder)
