"""Which node is not to be asked any more. Pure.

Invariant: the job keeps at least its minimum of nodes. A leader bars its own node like any other,
and goes on leading: what hangs are workers, and the launcher that leads is well.
"""

from __future__ import annotations

from paddle_ft.config import HealthConfig
from paddle_ft.coordination.schema import JobState


def due(
    state: JobState, wall_s: float, config: HealthConfig, nodes_min: int
) -> tuple[str, str] | None:
    """Node and reason, if a node has had too many hung workers; None if none has.

    Args:
        wall_s: seconds since 1970.
    """
    if not config.quarantine_after:
        return None
    staying = [m for m, r in state.live.items() if not r.value.leaving]
    if len(staying) <= nodes_min:
        return None
    for member in sorted(staying):
        record = state.health.get(member)
        if record is None:
            continue
        recent = [t for t in record.value.blamed if wall_s - t < config.quarantine_window_s]
        if len(recent) >= config.quarantine_after:
            node = state.live[member].value.member.node
            minutes = config.quarantine_window_s / 60
            return node, f"{len(recent)} of its workers hung within {minutes:g} min"
    return None
