"""What the ranks agree on at each step, and where in the data the job stands.

Pure. Invariant: a Verdict is a function of the sums of all ballots, so all ranks come to the same
one; whatever a single rank knows (its clock, its buffers, a request to stop) counts for all or for
none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from paddle_ft import sampling
from paddle_ft.errors import CheckpointMismatch, ConfigError
from paddle_ft.policies import Facts, Rule


@dataclass(slots=True)
class Schedule:
    """Asks ``rule`` whether a checkpoint is due, with what has been seen so far."""

    rule: Rule
    mtbf_s: float = 0.0
    saved_step: int = 0
    saved_at_s: float = 0.0
    cost_s: float = 0.0

    def due(self, step: int, now_s: float, asked: frozenset[int] = frozenset()) -> bool:
        """Whether ``step`` is to be saved; stays true until something is."""
        return self.rule(
            Facts(
                step=step,
                now_s=now_s,
                saved_step=self.saved_step,
                saved_at_s=self.saved_at_s,
                asked=asked,
                cost_s=self.cost_s,
                mtbf_s=self.mtbf_s,
            )
        )

    def saved(self, step: int, now_s: float) -> None:
        self.saved_step, self.saved_at_s = step, now_s

    def lost(self, safe_step: int) -> None:
        """What was saved after ``safe_step`` may not have become a checkpoint."""
        self.saved_step = min(self.saved_step, max(safe_step, 0))

    def held(self, seconds: float | None) -> None:
        """Training waited so long for one snapshot; the mean over some ten of them counts."""
        if seconds is None:
            return
        self.cost_s += (seconds - self.cost_s) * (0.1 if self.cost_s else 1.0)


# ---------------------------------------------------------------- the vote


@dataclass(frozen=True, slots=True)
class Ballot:
    """What one rank says before the step numbered ``step`` is applied."""

    step: int
    due: bool = False
    """A checkpoint is due after this step."""
    busy: bool = False
    """No buffer is free for it."""
    pause: bool = False
    """All shall save and leave after this step."""
    regroup: bool = False
    """All shall leave the group for another one after this step."""
    present: tuple[int, ...] = ()
    """1 for each trained parameter that has a gradient here."""

    def to_numbers(self) -> list[int]:
        """What is summed over the ranks."""
        flags = (self.due, self.busy, self.pause, self.regroup)
        return [1, self.step, *map(int, flags), *self.present]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all ranks do after the step."""

    save: bool = False
    pause: bool = False
    regroup: bool = False
    present: tuple[int, ...] = ()
    """For each trained parameter, on how many ranks it has a gradient."""

    @classmethod
    def of(cls, sums: Sequence[int], world_size: int, step: int) -> Verdict:
        """The verdict of the summed ballots; raises ConfigError if the ranks are out of step."""
        votes, steps, due, busy, pause, regroup, *present = sums
        if votes != world_size or steps != step * world_size:
            raise ConfigError(
                f"The ranks are at different steps (this one at {step}); call s.step equally often "
                f"on all ranks."
            )
        return cls(
            save=due > 0 and busy == 0,
            pause=pause > 0,
            regroup=regroup > 0,
            present=tuple(present),
        )


# ---------------------------------------------------------------- the position


@dataclass(slots=True)
class Position:
    """Where the job stands: equal on all ranks, and all that is needed to go on with the data."""

    step: int = 0
    """Steps applied."""
    batch: int = 0
    """Batches handed out: seeds are derived from this number."""
    samples: int = 0
    """Samples handed out, over all ranks."""
    stream: int = 0
    """Which call of ``Session.batches``, from 0."""
    epoch: int = 0
    offset: int = 0
    """Samples of ``epoch`` handed out."""
    plan: sampling.Stream | None = None
    """What the stream was told to be; None before its first batch."""
    shards: int = 0
    """Logical shards of a batch; 0: a batch is divided by the number of ranks."""

    def turn_to(self, stream: int) -> None:
        """The stream numbered ``stream`` begins."""
        self.stream, self.epoch, self.offset, self.plan = stream, 0, 0, None

    def advance(self, batch: sampling.Batch) -> None:
        """``batch`` is handed out."""
        self.batch += 1
        self.samples += batch.size
        self.epoch, self.offset = batch.epoch, batch.stop

    def steps_total(self) -> int:
        """Steps at the end of the present stream; 0 if there is none.

        Of a script that accumulates gradients it is known only after its first step how many
        batches make one.
        """
        if self.plan is None:
            return 0
        batches = sampling.steps_left(self.plan, self.epoch, self.offset)
        of_one_step = max(1, round(self.batch / self.step)) if self.step else 1
        return self.step + -(-batches // of_one_step)

    def check(self, plan: sampling.Stream) -> None:
        """Raises CheckpointMismatch unless the order of ``plan`` is that of what was begun.

        The batch size and the number of epochs may change.
        """
        for name, what in (("length", "samples"), ("seed", "as seed"), ("shuffle", "as shuffle")):
            before, now = getattr(self.plan, name, None), getattr(plan, name)
            if self.plan is not None and before != now:
                raise CheckpointMismatch(
                    f"This job is at step {self.step} of a dataset with {before} {what}, and now "
                    f"it is {now}; give s.batches the same dataset, seed and shuffle as before, or "
                    f"start with another --checkpoint."
                )

    def divide(self, shards: int) -> None:
        """Batches are of ``shards`` logical shards; raises CheckpointMismatch if they were not."""
        if self.step and self.shards != shards:
            before, now = (f"reproducible={n}" if n else "it off" for n in (self.shards, shards))
            raise CheckpointMismatch(
                f"This job is at step {self.step} with {before}, and now the script has {now}, "
                f"which gives other sums; give ft.session what it had before, or start with "
                f"another --checkpoint."
            )
        self.shards = shards

    def to_meta(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], step: int) -> Position:
        """What ``to_meta`` gave; raises CheckpointMismatch for anything else."""
        try:
            fields = dict(meta)
            plan = fields.pop("plan")
            position = cls(**fields, plan=sampling.Stream(**plan) if plan else None)
        except (KeyError, TypeError, ValueError):
            position = None
        if position is None or position.step != step:
            raise CheckpointMismatch(
                f"The checkpoint of step {step} does not say where in the data it stands: it was "
                f"not written by a session; start with another --checkpoint."
            )
        return position
