"""The nouns of the system: frozen values and their JSON wire form.

Everything here is plain data. ``encode`` and ``decode`` are the only way to and from bytes;
``decode`` refuses what does not have the shape of the type with ``ValueError``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Generic, Literal, TypeVar

from pydantic import TypeAdapter

T = TypeVar("T")


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def encode(value: object) -> bytes:
    """JSON bytes of one of the dataclasses below."""
    kind: Any = type(value)
    return _adapter(kind).dump_json(value)


def decode(kind: type[T], data: bytes) -> T:
    """The value that ``encode`` made; raises ValueError if ``data`` is not such a value."""
    hashable: Any = kind
    result: T = _adapter(hashable).validate_json(data)
    return result


# ---------------------------------------------------------------- members and generations


@dataclass(frozen=True, slots=True)
class Member:
    """One life of one node. A process that comes back under the same name is another member."""

    node: str
    incarnation: str
    host: str
    """The address under which the other nodes reach this one."""
    slots: int
    """Worker processes on this node (nproc_per_node)."""
    ports: tuple[int, ...]
    """Free ports on ``host``: ``ports[0]`` for a rendezvous store, then one for each slot, then
    more for the stores of further generations."""

    @property
    def id(self) -> str:
        return f"{self.node}.{self.incarnation}"

    def rendezvous_port(self, generation: int) -> int:
        """Port for the store of ``generation``: a group that is left still occupies its own."""
        usable = (self.ports[0], *self.ports[self.slots + 1 :])
        return usable[generation % len(usable)]


Recovery = Literal["", "in_place", "restart"]
"""What can be done with a script's workers when the group changes: they go on with what they have
in memory, or they are started again; "" while that is not known."""

NodeState = Literal["idle", "running", "paused", "failed", "finished"]


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """What a node says of its workers, about the generation ``generation`` and no other."""

    state: NodeState = "idle"
    generation: int = 0
    reason: str = ""
    fatal: int = 0
    """Exit code of a failure that a restart cannot mend (wrong model, bad flag); 0 if none."""
    collateral: bool = False
    """With ``failed``: the workers here only lost a peer; the cause is elsewhere."""
    pending_step: int = -1
    """The newest step whose snapshot this node holds but has not finished writing; -1 if none."""
    saved_step: int = -1
    """With ``paused`` and ``finished``: step of the checkpoint the workers handed over before they
    left; -1 if none."""
    damaged: tuple[str, ...] = ()
    """Manifests that this node could not restore because bytes are lost in every tier."""
    exit_code: int = 0
    """With ``failed``: how the worker ended that failed first; -n by signal n, 0 if none ended."""
    failed_at: int = 0
    """With ``failed``: the last step that worker had applied; 0 before its first."""
    recovery: Recovery = ""
    """What the script's own workers here have said they can do."""
    alive: int = 0
    """Workers of ``generation`` that run and have joined it or try to."""
    ready: bool = False
    """This node is no member, and its workers wait at the door with everything prepared."""


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """Value of ``nodes/<id>``, written by that node alone and leased."""

    member: Member
    status: NodeStatus = NodeStatus()
    leaving: bool = False
    """The node was asked to stop: move its work elsewhere and let it go."""
    link: str = ""
    """host:port at which other agents see whether this one lives."""
    lease: int = 0
    """The lease of this record, for whoever finds that its owner is dead."""


@dataclass(frozen=True, slots=True)
class CommitRef:
    """One committed checkpoint. ``sequence`` grows by one with every commit, whatever the step."""

    sequence: int
    step: int
    generation: int
    manifest: str
    """Name of the manifest in the store."""
    digest: str
    """sha256 of the manifest's bytes, hex."""
    metrics: tuple[tuple[str, float], ...] = ()
    """What retention may look at, sorted by name; finite numbers only."""


@dataclass(frozen=True, slots=True)
class Head:
    """Value of ``head``: the newest commit, and the ones before it that are still kept."""

    newest: CommitRef
    lineage: tuple[CommitRef, ...] = ()
    """Ancestors of ``newest`` that retention keeps, newest first, without ``newest``."""
    store: str = ""
    """Identity of the store the manifests are in."""


@dataclass(frozen=True, slots=True)
class Stumble:
    """A failure, and how many generations in a row have ended in the same one."""

    step: int
    exit_code: int
    nodes: tuple[str, ...]
    """Where, one name for each time."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A fixed list of members with ranks, and the point they start from."""

    number: int
    members: tuple[Member, ...]
    """In rank order: the ranks of a member are consecutive, ``slots`` of them."""
    endpoint: str
    """host:port of the rendezvous store; the host is that of the first member."""
    restore: CommitRef | None = None
    reason: str = ""
    failures: tuple[float, ...] = ()
    """Times of worker failures (seconds since 1970, clock of the leader) within the window."""
    restarts: int = 0
    """How many generations of this job came before because of a failure."""
    stumble: Stumble | None = None
    """The failure because of which the generation before ended, if it was a worker's own."""
    since: tuple[int, ...] = ()
    """For each member, the oldest generation whose workers there go on in this one with the state
    they have; a member that has been one since then has seen every change. Empty, or the number of
    this generation: workers start anew, from ``restore`` or with the state of a peer."""
    planned: bool = False
    """Nothing is wrong with the generation before: its workers leave it together, after a step."""

    @property
    def in_place(self) -> bool:
        """Whether workers of an earlier generation bring their state along."""
        return any(number < self.number for number in self.since)

    def workers_since(self, member_id: str) -> int:
        """The oldest generation whose workers go on at ``member_id``; its own number if none do."""
        numbers = dict(zip(self.member_ids(), self.since, strict=False))
        return numbers.get(member_id, self.number)

    @property
    def world_size(self) -> int:
        return sum(m.slots for m in self.members)

    def member_ids(self) -> tuple[str, ...]:
        return tuple(m.id for m in self.members)

    def first_rank(self, member_id: str) -> int:
        """Rank of the first worker of ``member_id``; raises KeyError if it is not a member."""
        rank = 0
        for member in self.members:
            if member.id == member_id:
                return rank
            rank += member.slots
        raise KeyError(member_id)


@dataclass(frozen=True, slots=True)
class Pause:
    """Value of ``pause``: all workers of ``generation`` shall save their state and leave."""

    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Part:
    """Value of ``parts/<generation>/<step>/<member>``: that member's share is in the store."""

    generation: int
    step: int
    member: str
    name: str
    """Object in the store that lists the member's tensors and blocks."""
    digest: str
    parent: str = ""
    """Manifest whose blocks the part refers to instead of writing them again; "" for none."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Value of ``outcome``: the job has ended."""

    exit_code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Versioned(Generic[T]):
    """A value as etcd holds it, with what a transaction can compare."""

    value: T
    create_revision: int
    mod_revision: int


# ---------------------------------------------------------------- tensors in host memory


Scope = Literal["replicated", "local"]
"""``replicated``: equal on all ranks. ``local``: each rank has its own (BatchNorm statistics)."""

Changes = Literal["any time", "in step", "seldom"]
"""When a tensor changes. ``in step``: in the optimizer's step only. ``seldom``: if the script does
it, as it may with a parameter that is not trained."""


@dataclass(frozen=True, slots=True)
class ShardOf:
    """Which part of a tensor that is divided among ranks one rank has."""

    start: tuple[int, ...]
    """Index of its first element, on each axis."""
    whole: tuple[int, ...]
    """Shape of the tensor."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor, or a contiguous piece of one, inside an image.

    The piece covers bytes ``[start, start + nbytes)`` of the tensor in C order and stands at
    ``offset`` of the image.
    """

    name: str
    dtype: str
    """numpy name, or ``bfloat16``."""
    shape: tuple[int, ...]
    """Shape of the whole tensor, or of the shard."""
    scope: Scope
    offset: int
    nbytes: int
    start: int = 0
    shard: ShardOf | None = None
    """With ``local``: this is a shard, to be put together with those of the other ranks."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What lies in one image: the state of one rank at one step."""

    step: int
    rank: int
    world_size: int
    tensors: tuple[TensorSpec, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    """JSON values: position, scheduler, random states, registered objects. Rank 0's counts."""


# ---------------------------------------------------------------- what has happened


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a launcher's record of events."""

    run: str
    """Which life of which launcher tells it."""
    kind: str
    wall_s: float
    """Seconds since 1970, by the clock of that machine."""
    at_s: float
    """CLOCK_MONOTONIC of that machine, of when it happened."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """JSON values; ``observe.events`` says which for each kind."""
