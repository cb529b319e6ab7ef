"""What happened in a run, as the checkers see it: facts in the order of the virtual clock.

Facts are taken where they cannot be wrong: writes from etcd itself as it applies them, objects
from the store, states from the workers that computed them; never from what an agent believes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from paddle_ft.types import CommitRef, Generation, Head
from tests.sim.training import State


@dataclass(frozen=True, slots=True)
class Write:
    """A put of ``leader``, ``generation``, ``head``, ``pause`` or ``outcome``, as etcd made it."""

    at_s: float
    revision: int
    key: str
    value: Any
    sender: str
    """Member that sent the transaction; "" if nobody did."""
    term: int
    """create_revision of the leader key in the view it was decided on."""
    leader: str
    """Who held the leader key at that moment; "" if nobody."""
    leader_term: int
    seen: int = 0
    """Revision of the view it was decided on."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An object is in the store; ``needs`` are those it is worthless without."""

    at_s: float
    name: str
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Removed:
    at_s: float
    name: str


@dataclass(frozen=True, slots=True)
class Damaged:
    """A fault destroyed ``name``: whatever needs it is excused."""

    at_s: float
    name: str


@dataclass(frozen=True, slots=True)
class Saved:
    """What a manifest holds: the states of all ranks' weights, and the common position."""

    at_s: float
    manifest: str
    step: int
    position: int
    states: tuple[State, ...]


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A worker was told that ``commit`` is safe."""

    at_s: float
    commit: CommitRef


@dataclass(frozen=True, slots=True)
class EtcdLost:
    """etcd came back without its data."""

    at_s: float


@dataclass(frozen=True, slots=True)
class Exited:
    """An agent ended by itself."""

    at_s: float
    node: str
    exit_code: int
    asked: int
    """Exit code of the signal it had got; 0 if none."""
    registered_s: float


@dataclass(frozen=True, slots=True)
class Nodes:
    """Who is there to stay has changed: registered, gone, or asked to leave."""

    at_s: float
    staying: frozenset[str]
    revision: int = 0

    @property
    def nodes(self) -> frozenset[str]:
        """Their names, without incarnations."""
        return frozenset(key.partition("/")[2].rpartition(".")[0] for key in self.staying)


@dataclass(frozen=True, slots=True)
class Barred:
    """``node`` was put in quarantine, by the leader or, with no ``sender``, by a person; or taken
    out of it (``lifted``)."""

    at_s: float
    revision: int
    node: str
    sender: str
    seen: int = 0
    """Revision of the view it was decided on."""
    lifted: bool = False


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault that can make workers fail."""

    at_s: float


@dataclass(frozen=True, slots=True)
class Formed:
    """The ranks of a group stand together and begin to step."""

    at_s: float
    generation: int
    run: int
    workers: tuple[int, ...]
    """Numbers of the processes, in rank order."""
    members: tuple[str, ...]
    """Where these processes are."""
    brought: tuple[State, ...]
    """What those had that came with a state; () where all load it from a checkpoint."""
    states: tuple[State, ...]
    """What each goes on with."""


@dataclass(frozen=True, slots=True)
class Applied:
    """A step was applied, by all ranks of a group or, when it broke just then, by some of them."""

    at_s: float
    generation: int
    state: State
    """As it is after it."""
    workers: tuple[int, ...]
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Gone:
    """A worker process has ended: by itself, ``killed``, ``stopped`` by its agent, or ``worn``."""

    at_s: float
    worker: int
    how: str


Fact = (
    Formed
    | Applied
    | Gone
    | Nodes
    | Barred
    | Struck
    | Write
    | Stored
    | Removed
    | Damaged
    | Saved
    | Acknowledged
    | EtcdLost
    | Exited
)


@dataclass(slots=True)
class History:
    batch: int
    """Samples of one step."""
    steps: int
    """Of the whole training; 0 if the script saves nothing."""
    members_timeout_s: float = 600.0
    nodes_min: int = 1
    facts: list[Fact] = field(default_factory=list)

    def add(self, fact: Fact) -> None:
        self.facts.append(fact)

    def generations(self) -> list[Generation]:
        return [f.value for f in self.facts if isinstance(f, Write) and f.key == "generation"]

    def heads(self) -> list[Head]:
        return [f.value for f in self.facts if isinstance(f, Write) and f.key == "head"]
