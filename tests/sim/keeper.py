"""The snapshots of one simulated node: parts written beside training, restore points loaded.

Follows ``paddle_ft.agent.snapshots``; the listings are the product's own, of a model with three
small tensors: ``weights`` change at every step, ``frozen`` never, ``running`` is each rank's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from paddle_ft.checkpoint import layout, plan
from paddle_ft.checkpoint.manifest import Block, Extent, Manifest, PartListing, Piece, encode_part
from paddle_ft.checkpoint.write import digest_of
from paddle_ft.errors import CheckpointDamaged, StoreUnavailable
from paddle_ft.types import CommitRef, Generation, Part, TensorSpec
from tests.sim.task import Steps, Task
from tests.sim.training import SimWorker, State

if TYPE_CHECKING:
    from tests.sim.agent import SimAgent

BUFFERS = 2
RETRY_S = 1.0
TENSORS = (
    TensorSpec("weights", "uint8", (4,), "replicated", 0, 4),
    TensorSpec("frozen", "uint8", (2,), "replicated", 0, 2),
    TensorSpec("running", "uint8", (1,), "local", 0, 1),
)


@dataclass(frozen=True, slots=True)
class RestoreFailed:
    generation: int
    manifest: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Job:
    generation: int
    revision: int
    step: int
    states: tuple[tuple[int, State], ...]


@cache
def _share(rank: int, world_size: int) -> tuple[TensorSpec, ...]:
    return plan.share(TENSORS, rank, world_size, block_bytes=1)


@lru_cache(maxsize=4096)
def block_digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


class Keeper:
    def __init__(self, agent: SimAgent) -> None:
        self._agent = agent
        self._world = agent.world
        self._generation = 0
        self._revision = 0
        self._member = ""
        self._ranks: tuple[int, ...] = ()
        self._world_size = 0
        self._arrived: dict[int, dict[int, State]] = {}
        self._pending: list[int] = []
        self._queue: list[_Job] = []
        self._writing = False
        self._base: CommitRef | None = None
        self._restored: State | None = None
        self._load: CommitRef | None = None
        self._waiting: list[SimWorker] = []

    # ------------------------------------------------------------ one generation

    def begin(self, generation: Generation, revision: int, ranks: Sequence[int]) -> None:
        self._generation, self._revision = generation.number, revision
        self._member = self._agent.me
        self._ranks, self._world_size = tuple(ranks), generation.world_size
        self._arrived.clear()
        self._waiting.clear()
        self._base = generation.restore
        self._restored = State() if generation.restore is None else None
        self._load = generation.restore
        if not generation.in_place:
            self._start_loading()

    def _start_loading(self) -> None:
        """In place only when somebody asks for it: others have newer states."""
        ref, self._load, number = self._load, None, self._generation
        if ref is not None:
            Task(self._agent.process, lambda task: self._restore(task, number, ref))

    def committed(self, commit: CommitRef) -> None:
        self._base = commit

    @property
    def pending_step(self) -> int:
        return max(self._pending, default=-1)

    def buffers_free(self, generation: int) -> bool:
        return len(self._pending) + len(self._arrived) < BUFFERS

    # ------------------------------------------------------------ writing

    def arrived(self, worker: SimWorker, state: State) -> None:
        """A rank has copied its share; the step is written once all ranks here have."""
        if worker.generation != self._generation or worker.world_size != self._world_size:
            return
        images = self._arrived.setdefault(state.step, {})
        images[worker.rank] = state
        if len(images) < len(self._ranks):
            return
        del self._arrived[state.step]
        self._pending.append(state.step)
        self._queue.append(
            _Job(self._generation, self._revision, state.step, tuple(sorted(images.items())))
        )
        if not self._writing:
            self._writing = True
            Task(self._agent.process, self._write_all)

    def _write_all(self, task: Task) -> Steps:
        while self._queue:
            job = self._queue.pop(0)
            while job.generation == self._generation:
                try:
                    part = yield from self._write(task, job)
                except StoreUnavailable:
                    yield task.sleep(RETRY_S)
                    continue
                self._agent.part_written(part, job.revision)
                break
            self._pending.remove(job.step)
            self._agent.changed()
        self._writing = False

    def _write(self, task: Task, job: _Job) -> Steps:
        """As ``checkpoint.write.write_part``."""
        front, node = self._world.store, self._agent.node
        base, member = self._base, self._member
        parent: Manifest | None = None
        if base is not None:
            try:
                parent = yield front.call(task, node, self._world.manifest, base)
            except CheckpointDamaged:
                pass  # nothing of it can be referred to: everything is written
        sequence = (base.sequence if base else 0) + 1
        prefix = layout.write_prefix(
            self._world.owner, sequence, job.generation, self._world.nonce()
        )
        data = f"{layout.DATA}{prefix}{member}.0"
        known = _blocks_of(parent) if parent else {}
        pieces, size = self._pieces(job, data, known)
        if size:
            yield front.call(task, node, self._world.put, data, bytes(size))
        sizes = dict(parent.objects) if parent else {}
        sizes[data] = size
        used = {e.object for p in pieces for b in p.blocks for e in b.extents}
        listing = PartListing(
            owner=self._world.owner,
            sequence=sequence,
            generation=job.generation,
            step=job.step,
            member=member,
            world_size=self._world_size,
            block_bytes=1,
            ranks=tuple(rank for rank, _ in job.states),
            parent=base.manifest if base and parent else "",
            objects={name: sizes[name] for name in sorted(used)},
            pieces=pieces,
            meta=next(
                ({"step": s.step, "position": s.position} for r, s in job.states if r == 0), None
            ),
        )
        content = encode_part(listing)
        name = f"{layout.PARTS}{prefix}{member}.json"
        yield front.call(task, node, self._world.put, name, content)
        return Part(job.generation, job.step, member, name, digest_of(content), listing.parent)

    def _pieces(
        self, job: _Job, data: str, known: dict[str, Block]
    ) -> tuple[tuple[Piece, ...], int]:
        pieces, size = [], 0
        for rank, state in job.states:
            for spec in _share(rank, self._world_size):
                blocks = []
                for at in range(spec.start, spec.start + spec.nbytes):
                    digest = self._digest(spec.name, at, rank, state)
                    if digest not in known:
                        known[digest] = Block(digest, 1, (Extent(data, size, 1),))
                        size += 1
                    blocks.append(known[digest])
                owner = rank if spec.scope == "local" else -1
                pieces.append(
                    Piece(
                        spec.name,
                        spec.dtype,
                        spec.shape,
                        spec.scope,
                        owner,
                        spec.start,
                        tuple(blocks),
                    )
                )
        return tuple(pieces), size

    def _digest(self, tensor: str, at: int, rank: int, state: State) -> str:
        if tensor == "frozen":
            return block_digest(f"frozen/{at}")
        digest = block_digest(f"{tensor}/{at if tensor == 'weights' else rank}/{state}")
        self._world.states[digest] = state
        return digest

    # ------------------------------------------------------------ restoring

    def wait_restored(self, worker: SimWorker, generation: int) -> None:
        if generation != self._generation:
            return  # it is over: nobody answers
        self._start_loading()
        if self._restored is not None:
            worker.told(worker.hear_restored, generation, self._restored)
        else:
            self._waiting.append(worker)

    def _restore(self, task: Task, generation: int, ref: CommitRef) -> Steps:
        """As ``checkpoint.restore``: every block of the manifest must be there."""
        front, node = self._world.store, self._agent.node
        while generation == self._generation:
            try:
                manifest = yield front.call(task, node, self._world.manifest, ref)
                yield front.call(task, node, self._world.check_objects, ref, manifest)
            except StoreUnavailable:
                yield task.sleep(RETRY_S)
                continue
            except CheckpointDamaged as error:
                self._agent.cannot_restore(RestoreFailed(generation, ref.manifest, str(error)))
                return
            if generation == self._generation:
                self._restored = self._world.state_in(ref, manifest)
                for worker in self._waiting:
                    worker.told(worker.hear_restored, generation, self._restored)
                self._waiting.clear()
            return


def _blocks_of(manifest: Manifest) -> dict[str, Block]:
    return {block.digest: block for piece in manifest.tensors for block in piece.blocks}
