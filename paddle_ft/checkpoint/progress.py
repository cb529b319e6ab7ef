"""A progress bar of bytes on a terminal, a plain line where there is none; on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from paddle_ft.checkpoint.store import Store, tiers_of

Tell = Callable[[int], None]


@contextmanager
def bar(what: str, total: int | None, *, unit: str = "bytes") -> Iterator[Tell]:
    """Shows ``what`` until the block ends; the value is to be called with what was done since.

    ``total`` None: how much there will be is not known.
    """
    if not sys.stderr.isatty():
        sys.stderr.write(f"{what}\n")
        yield lambda done: None
        return
    amount = DownloadColumn() if unit == "bytes" else TextColumn("{task.completed} " + unit)
    columns = [TextColumn("{task.description}"), BarColumn(), amount]
    if unit == "bytes":
        columns.append(TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=total)
        yield lambda done: shown.update(task, advance=done)


class _Counted:
    """A store whose reads and deletions are told of."""

    def __init__(self, store: Store, tell: Tell) -> None:
        self._store, self._tell = store, tell
        self.tiers: tuple[Any, ...] = ()
        if len(tiers := tiers_of(store)) > 1:
            self.tiers = tuple(_Counted(tier, tell) for tier in tiers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read_into(self, name: str, offset: int, targets: Sequence[memoryview]) -> None:
        self._store.read_into(name, offset, targets)
        self._tell(sum(target.nbytes for target in targets))

    def delete(self, names: Iterable[str]) -> None:
        names = list(names)
        self._store.delete(names)
        self._tell(len(names))


def counted(store: Store, tell: Tell) -> Store:
    """``store``, telling of the bytes that are read and the objects that are deleted."""
    return cast(Store, _Counted(store, tell))
