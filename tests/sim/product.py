"""What the product takes from outside, made repeatable: threads and random names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from paddle_ft.checkpoint import collect, commit


class _OneByOne:
    """``checkpoint.crew.Crew`` without threads."""

    def __init__(self, threads: int, name: str) -> None:
        pass

    def __enter__(self) -> _OneByOne:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        return [function(item) for item in items]


@contextmanager
def repeatable(nonce: Callable[[], str]) -> Iterator[None]:
    """Within the block the store is asked by one thread, and names come from ``nonce``."""
    with (
        mock.patch.object(collect, "Crew", _OneByOne),
        mock.patch.object(commit, "Crew", _OneByOne),
        mock.patch("secrets.token_hex", side_effect=lambda nbytes: nonce()),
    ):
        yield
