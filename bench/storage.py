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
from paddle_ft.coordination.decide import Commit
from paddle_ft.coordination.schema import Fences
from paddle_ft.types import CommitRef, Head, ImageInfo, TensorSpec

TENSORS = 50
DURABLE = "From call to durable on disk"
THROUGHPUT = "Throughput"


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


def timed(action: Callable[[], Any]) -> float:
    """Seconds; what was left to be written before is written first."""
    os.sync()
    start_s = time.perf_counter()
    action()
    return time.perf_counter() - start_s


def dd(source: Path, target: Path) -> float:
    target.unlink(missing_ok=True)
    command = ["dd", f"if={source}", f"of={target}", "bs=4M", "conv=fsync"]
    return timed(lambda: subprocess.run(command, check=True, capture_output=True))


# ---------------------------------------------------------------- from call to disk


def measure_durable(
    folder: Path, mbytes: float, rounds: int, torch: Line | None, say: Callable[[str], None]
) -> list[Row]:
    ours: list[float] = []
    limit: list[float] = []
    peers: dict[str, list[float]] = {"torch.save + fsync": [], "DCP async_save": []}
    with (
        shared_memory(int(mbytes * 1e6)) as (source, _),
        driven_job(folder / "driven", mbytes) as job,
    ):
        job.ask()  # the first one in each buffer
        job.ask()
        for number in range(rounds):
            say(f"from call to disk, {number + 1} of {rounds}")
            os.sync()
            ours.append(job.ask()["durable_s"])
            limit.append(dd(source, folder / "dd.bin"))
            if torch is not None:
                os.sync()
                answer = torch.ask(do="torch_save_fsync")
                peers["torch.save + fsync"].append(answer["durable_s"])
                os.sync()
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
            _s3(source, image, max(2, rounds // 2), say),
        ]
        del image
    return rows


def _rate(nbytes: int, seconds: list[float]) -> list[float]:
    return [nbytes / 1e6 / s for s in seconds]


def _directory(
    folder: Path, source: Path, image: Any, rounds: int, say: Callable[[str], None]
) -> Row:
    ours, limit = [], []
    for number in range(rounds):
        say(f"directory, {number + 1} of {rounds}")
        touch(image[1])
        writer = Writer(open_store(str(folder / "store")), CheckpointConfig())
        ours.append(timed(lambda w=writer: w.write([image])))
        shutil.rmtree(folder / "store")
        limit.append(dd(source, folder / "dd.bin"))
    (folder / "dd.bin").unlink()
    nbytes = image[1].nbytes
    return Row(THROUGHPUT, "write to a directory", "MB/s", _rate(nbytes, ours),
               _rate(nbytes, limit), "dd conv=fsync", goal=0.8, sense=">=")  # fmt: skip


def _reading(
    folder: Path, source: Path, image: Any, rounds: int, say: Callable[[str], None]
) -> list[Row]:
    writer = Writer(open_store(str(folder / "store")), CheckpointConfig())
    ref = writer.write([image])
    plain = folder / "plain.bin"
    shutil.copyfile(source, plain)
    os.sync()
    target = Path(f"/dev/shm/paddle_ft-{os.getpid()}-bench-restore")

    rows = []
    for warm in (True, False):
        ours, limit = [], []
        for number in range(rounds):
            say(f"restore {'warm' if warm else 'cold'}, {number + 1} of {rounds}")
            if not warm:
                forget(folder)
            ours.append(timed(lambda: writer.restore(ref, target)))
            target.unlink()
            limit.append(timed(lambda: read_file(plain)))
        name = f"restore from a directory, page cache {'warm' if warm else 'cold'} for both"
        nbytes = image[1].nbytes
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
                ours.append(timed(lambda w=writer: w.write([image])))
                writer.store.delete([info.name for info in writer.store.find("")])
                limit.append(timed(lambda: client.upload_file(str(source), "bench", "one-file")))
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
