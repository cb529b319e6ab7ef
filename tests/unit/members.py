"""Members of a job, for tests that do not care where they are."""

from __future__ import annotations

from paddle_ft.types import Member


def member(node: str, incarnation: str = "1", slots: int = 1) -> Member:
    """Of node ``a`` on ``host-a``, with as many ports from 7000 on as it takes."""
    return Member(node, incarnation, f"host-{node}", slots, tuple(range(7000, 7001 + slots)))
