"""What a training script uses: the same loop as before, and nothing that is lost when it is killed.

    with ft.session(model=model, optimizer=opt, lr_scheduler=sched) as s:
        for x, y in s.batches(dataset, batch_size=64, epochs=10, shuffle=True, seed=0):
            loss = loss_fn(model(x), y)
            loss.backward()
            s.step(loss)

Invariants: a snapshot is taken between two rounds of the loop, when the next batch is asked for (in
a loop without ``batches``, at the end of ``step``). There, everything that belongs to the step
before has happened, also what the script does after ``s.step``, and nothing of the next one. All
ranks take it at the same step: they agree by a vote, a sum of small integers over the ranks, before
each optimizer step.

When a peer is lost, nothing is applied, and the group is formed anew when the next batch is asked
for (``regroup``); what is handed out then is the batch of the step that was not applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
from typing_extensions import Self

from paddle_ft.checkpoint.snapshot import Image
from paddle_ft.collective import is_peer_loss, peer_loss
from paddle_ft.context import Context
from paddle_ft.errors import (
    EXIT_COLLECTIVE,
    EXIT_PAUSED,
    CollectiveFailed,
    ConfigError,
    PaddleFTError,
)
from paddle_ft.exits import Leave, install_hook, say
from paddle_ft.feed import Feed
from paddle_ft.keeper import Keeper, NullKeeper, Superseded
from paddle_ft.nested import Copy
from paddle_ft.policies import Rule, parse
from paddle_ft.progress import Ballot, Position, Verdict
from paddle_ft.regroup import Membership
from paddle_ft.reproducible import shards_asked, update_of
from paddle_ft.saver import Saver
from paddle_ft.serve.handoff import Publishing
from paddle_ft.standing import Standing
from paddle_ft.state import TrainingState
from paddle_ft.streams import Streams
from paddle_ft.types import ShardOf
from paddle_ft.update import LrStep, check_lr_step


def session(
    *,
    model: Any,
    optimizer: Any,
    lr_scheduler: Any = None,
    lr_step: LrStep = "step",
    checkpoint: str | None = None,
    save: Rule | str | None = None,
    reproducible: bool | int = False,
    shards: Mapping[str, ShardOf] | None = None,
) -> Session:
    """A session for one training loop, to be used as a context manager.

    Entering joins the process group, restores the state if there is something to restore, and
    otherwise makes all ranks start from rank 0's parameters. Leaving normally saves a last
    checkpoint; an exception of the script saves nothing.

    Args:
        model: a ``paddle.nn.Layer``. The session averages the gradients over the global batch; a
            ``paddle.DataParallel`` does so itself, over ranks (so its slices should be equal).
        optimizer: a Paddle optimizer over parameters of ``model``.
        lr_scheduler: stepped by the session after each step (``lr_step="step"``) or after the last
            one of an epoch (``"epoch"``); with ``"manual"``, or if it is not given, the script
            steps it. Its state is saved in any case.
        checkpoint: directory or URL, for a script that runs without the launcher; None: nothing is
            saved then. Under the launcher its own ``--checkpoint`` counts.
        save: when to save, as a rule (``policies``) or as text (``"1000 steps, 10min"``); default:
            ``"auto"``. ``--checkpoint_every`` wins over it.
        reproducible: the result does not depend on the number of ranks either: a batch is worked on
            in this many logical shards (True: 12), each a round of the loop (``reproducible``).
        shards: tensors of the model of which this rank has a part, by key of its ``state_dict``.
            They and their optimizer slots are saved with their place in the whole, and restored
            under another division; their gradients are not summed over the ranks. Such a session
            does not recover in place.

    Raises (on entering) ConfigError, CheckpointMismatch, CollectiveFailed, StoreError.
    """
    check_lr_step(lr_step, lr_scheduler)
    context = Context(checkpoint, parse(save) if isinstance(save, str) else save)
    install_hook()
    state = TrainingState(model, optimizer, lr_scheduler, shards)
    return Session(state, lr_step, context, shards_asked(reproducible))


class Session(Publishing, Standing):
    """One training loop under protection; made by ``session``."""

    def __init__(
        self, state: TrainingState, lr_step: LrStep, context: Context, shards: int
    ) -> None:
        self._context = context
        self._collective = context.collective
        self._state = state
        self._lr_step = lr_step
        self._shards = shards
        self._keeper: Keeper = NullKeeper()
        self._saver: Saver | None = None
        self._image: Image | None = None
        self._position = Position()
        self._entered = self._started = False
        self._verdict = Verdict()
        self._cut_short = False
        """The step under way was not applied: the group is broken."""
        self._handoffs = []
        self._copies: dict[str, Copy] = {}
        """Of what a script may change in a round, as it was when the round began."""

    # ------------------------------------------------------------ begin

    def __enter__(self) -> Self:
        assert not self._entered, "a session is used once; make another one"
        self._entered = True
        try:
            self._begin()
        except PaddleFTError as error:
            self._abort(error)
        return self

    def _begin(self) -> None:
        import paddle

        context = self._context
        if context.env is not None:  # or SIGTERM from the agent would print a stack
            paddle.disable_signal_handler()
        if self._state.divided:
            context.check_divided()
        parallel = isinstance(self._state.model, paddle.DataParallel)
        self._members = Membership(context, self._state, parallel)
        self._keeper = self._members.keeper
        self._members.first()
        self._image, self._position = self._members.image, self._members.position
        how = (self._lr_step, self._collective, parallel, self._shards)
        self._update = update_of(self._state, *how)
        self._streams = Streams(self._collective, not parallel, self._position, self._shards)
        self._saver = Saver(context, self._keeper, self._state, self.global_step)
        self._teller = self._context.teller(self._position)

    def register(self, name: str, thing: Any) -> None:
        """Saves and restores ``thing`` too, from its ``state_dict`` and by its ``set_state_dict``.

        ``state_dict`` may hold tensors, arrays, numbers, strings, None, lists, tuples and dicts; it
        must be equal on all ranks. Call it before the first batch.

        Raises ConfigError for what cannot be saved, CheckpointMismatch if the checkpoint that was
        restored has no ``name``.
        """
        assert self._entered, "call s.register inside of the with block"
        if self._started:
            raise ConfigError(f"{name!r} is registered after the first batch: do it before.")
        self._state.register(name, thing, self._image)

    def register_shard(
        self, name: str, tensor: Any, *, start: Sequence[int], whole: Sequence[int]
    ) -> None:
        """Saves and restores ``tensor`` too, this rank's part of one that is divided among all.

        It begins at index ``start`` of a tensor of shape ``whole``, of which the ranks' parts are
        all, without overlapping (or are the same). Restored is the part that this rank now has.
        Call it before the first batch; such a session does not recover in place.

        Raises ConfigError, CheckpointMismatch if the checkpoint lacks ``name``.
        """
        assert self._entered, "call s.register_shard inside of the with block"
        if self._started:
            raise ConfigError(f"{name!r} is registered after the first batch: do it before.")
        shard = ShardOf(tuple(start), tuple(whole))
        self._context.check_divided()
        self._state.register_shard(name, tensor, shard, self._image)
        self._members.cannot_change()

    # ------------------------------------------------------------ the loop

    def batches(
        self,
        dataset: Any,
        batch_size: int,
        epochs: int = 1,
        *,
        shuffle: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> Iterator[Any]:
        """This rank's slices of the global batches, from where the job stands.

        Every sample of every epoch is used once, whatever the number of ranks and however often
        they are restarted; the last batch of an epoch may be smaller. If it has fewer samples than
        there are ranks, some ranks get one that does not count. Before each batch Paddle, NumPy and
        Python are seeded from (seed, number of the batch, rank).

        Several loops in one script are told apart by their order; after a restart those that were
        over give nothing. Two of them at the same time are an error.

        Args:
            dataset: map-style: ``__len__`` and ``__getitem__``.
            batch_size: samples of one step over all ranks.
            epochs: how often to go through ``dataset``.
            shuffle: another order in each epoch, by ``seed``; else the dataset's own.
            num_workers: processes that fetch ahead; 0: in line. The batches are the same.
            collate_fn: list of samples -> batch; default as in ``paddle.io.DataLoader``.

        Raises ConfigError, and CheckpointMismatch if the job was started with another dataset
        length, seed or shuffle.
        """
        assert self._entered, "call s.batches inside of the with block"
        number, feed = self._streams.open(
            dataset,
            batch_size,
            epochs,
            shuffle,
            seed,
            num_workers=num_workers,
            collate_fn=collate_fn,
        )
        return self._run(number, feed)

    def _run(self, number: int, feed: Feed) -> Iterator[Any]:
        self._start_stepping()
        for data in self._streams.run(number, feed, self._between_rounds):
            if self._streams.open_batches == 1 and self._members.recovery == "in_place":
                self._members.check_own_state()
                self._copies = self._state.changeable(self._lr_step == "manual")
            self._update.handed_out(self._streams.item)
            yield data

    def _start_stepping(self) -> None:
        """Once all is registered: the image is needed no longer."""
        if self._started:
            return
        self._started = self._members.started = True
        self._members.image = None
        if self._image is not None:
            self._state.check_all_registered(self._image)
            self._image = None

    def step(self, loss: Any = None, *, scaler: Any = None) -> bool:
        """Ends a step: sums the gradients over the ranks, agrees, applies them, and clears them.

        Gives whether it was applied. It is not if a peer was lost meanwhile: the loop is handed
        the same batch once more then, and the job goes on as if that had been the first time, with
        registered objects (and a scheduler that the script steps) as they were before it. Nor is
        it, with ``reproducible``, before this rank's last shard of the batch.

        ``loss`` is shown, and rank 0's is kept with the checkpoint. Call this equally often on all
        ranks. Of several batches since the last step the gradients add up, as without a session.
        With a ``paddle.amp.GradScaler`` as ``scaler`` (to be registered, too) it applies the step.

        Raises CollectiveFailed if a peer is lost and the group cannot be formed again in place.
        """
        assert self._entered, "call s.step inside of the with block"
        self._start_stepping()
        if not self._streams.in_loop or not self._streams.open_batches:
            self._members.cannot_change()  # its batch could not be handed out again
        if not self._update.take():
            return False
        ends_epoch = self._streams.close_round()
        try:
            if self._members.ordered_at_once or self._cut_short:
                raise Superseded(f"Rank {self.rank} is to join another group.")
            self._verdict = self._vote(self._update.gather(self._streams.weight))
        except CollectiveFailed as error:
            if self._members.recovery != "in_place":
                raise
            self._cut_short = True
            self._update.drop()
            self._members.broken(error)
            return False
        if self._saver is not None:
            self._saver.before_step(loss)
        self._update.apply(self._verdict.present, scaler, ends_epoch)
        self._position.step += 1
        self._streams.applied()
        self._teller.tell(self._position, loss)
        if not self._streams.in_loop:
            self._between_rounds()
        return True

    def _vote(self, present: list[int]) -> Verdict:
        step, saver = self.global_step + 1, self._saver
        ballot = Ballot(
            step=step,
            due=saver is not None and (self._wants_saving or saver.is_due(step)),
            busy=saver is not None and saver.is_busy(),
            pause=bool(self._keeper.pause_reason),
            regroup=self._members.ordered,
            present=tuple(present),
        )
        numbers, own = ballot.to_numbers(), self._members.own_words()
        sums = self._update.sum(np.concatenate([numbers, own]))
        verdict = Verdict.of(sums[: len(numbers)].tolist(), self.world_size, step)
        self._members.agree(sums[len(numbers) :])
        return verdict

    def _between_rounds(self) -> bool:
        """Does what the last vote asked for; gives whether the loop goes on from elsewhere."""
        verdict, self._verdict = self._verdict, Verdict()
        if self._cut_short or verdict.regroup or self._members.ordered_at_once:
            self._regroup()
            return True
        if self._saver is not None and (verdict.save or verdict.pause):
            self._saver.save(self._position, verdict.pause)
        if verdict.pause:
            self._leave_paused()
        self._publish_due(verdict.save)
        return False

    def _regroup(self) -> None:
        """Goes on in another group, from the furthest step that any of its ranks has applied."""
        if self._saver is not None:
            self._saver.abandon()
        self._update.drop()
        if self._cut_short or self._streams.open_batches:
            self._streams.rewind()
            self._state.undo(self._copies)
        self._members.next(self._position)
        self._cut_short = False
        self._streams.resize(self.rank, self.world_size)
        self._streams.move_to(self._members.position)
        if self._saver is not None:
            self._saver.regrouped()
        self._teller = self._context.teller(self._position)

    def _leave_paused(self) -> NoReturn:
        keeper = self._keeper
        reason = keeper.pause_reason or "another rank was asked to"
        if self._context.env is None:  # nobody else waits for the checkpoint
            keeper.wait_committed(self.global_step)
            self._collective.sum([0])  # who leaves first may take the others with it
        keeper.close("paused", reason, EXIT_PAUSED, self.global_step)
        raise Leave(keeper.pause_exit_code or EXIT_PAUSED)

    # ------------------------------------------------------------ end

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        finished = error is None or (isinstance(error, SystemExit) and not error.code)
        if finished:
            try:
                self._finish()
            except PaddleFTError as failure:
                self._abort(failure)
            return
        if self._saver is not None:
            self._saver.abandon()
        self._abandon_publishing()
        self._streams.kill()
        if isinstance(error, Leave):
            return
        if error is not None and is_peer_loss(error):
            self._abort(peer_loss(error, self.rank))
        if isinstance(error, PaddleFTError):
            self._abort(error)
        self._keeper.close(None)

    def _finish(self) -> None:
        self._save_last()
        self._finish_publishing()
        self._keeper.close("done", step=self.global_step)

    def _save_last(self) -> None:
        """The last checkpoint, unless that step is safe already."""
        while True:
            try:
                if self._cut_short:
                    raise Superseded("The last step was not applied.")
                if self._saver is not None:
                    self._saver.save_last(self._position)
                break
            except Superseded:
                self._regroup()

    def _abort(self, error: PaddleFTError) -> NoReturn:
        """Tells the agent why this process ends, and ends it or lets ``error`` do so."""
        lost = isinstance(error, CollectiveFailed)
        reason = str(error)
        self._keeper.close("collective" if lost else "fatal", reason, error.exit_code)
        self._keeper = NullKeeper()
        if lost and self._context.env is not None:
            say(reason)
            raise Leave(EXIT_COLLECTIVE) from None
        raise error
